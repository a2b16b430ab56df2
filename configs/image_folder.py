"""Your own images: a folder of class folders, with or without train/val/test above or domains.

python -m fmlora_jax.main --config=configs/image_folder.py:tasks=5 \\
    --config.tasks.data_dir=FOLDER --config.weights.path=FILE
"""

from fmlora_jax import config_files


def get_config(variant: str | None = None):
  """Returns the config; variants: method=NAME, tasks=N, scenario=cil|dil|til."""
  chosen = config_files.parse_variant(variant, "method", "scenario", "tasks")
  method, scenario = chosen.get("method", "fm_lora"), chosen.get("scenario", "cil")
  # where the task is given, nothing must tell tasks apart; hide_prompt has an alignment of its own
  aligned = scenario != "til" and method != "hide_prompt"
  return config_files.defaults(
    method={"name": method},
    tasks={
      "benchmark": "image_folder",
      "scenario": scenario,
      "num_tasks": int(chosen.get("tasks", 5)),
    },
    input={"source_size": 256},
    head={"start": "class_mean", "alignment": {"epochs": 30 if aligned else 0}},
  )
