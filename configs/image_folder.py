"""Your own images: a folder of class folders, with or without train/val/test above or domains.

python -m fmlora_jax.main --config=configs/image_folder.py:tasks=5 \\
    --config.tasks.data_dir=FOLDER --config.weights.path=FILE
"""

from fmlora_jax import config_files


def get_config(variant: str | None = None):
  """Returns the config; variants: method=NAME, tasks=N, scenario=cil|dil|til."""
  chosen = config_files.parse_variant(variant, "method", "scenario", "tasks")
  return config_files.defaults(
    method={"name": chosen.get("method", "fm_lora")},
    tasks={
      "benchmark": "image_folder",
      "scenario": chosen.get("scenario", "cil"),
      "num_tasks": int(chosen.get("tasks", 5)),
    },
    input={"source_size": 256},
    head={"start": "class_mean"},
  )
