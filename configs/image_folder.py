"""Your images: a folder with one folder per class, inside split or domain folders or not.

python -m fmlora_jax.main --config=configs/image_folder.py:tasks=5 \\
    --config.tasks.data_dir=FOLDER --config.weights.path=FILE
"""

from fmlora_jax.cli import config_files

# features of few images drift far when a task moves them, so what is stored follows them
HEADS = {  # hide_prompt includes an alignment
  "plain": {"start": "class_mean"},
  "aligned": {"start": "class_mean", "alignment": {"epochs": 30}},
  "lda": {"kind": "lda", "start": "class_mean", "drift": "sdc"},
  "hide_prompt": {"start": "class_mean"},
}

# ten prompt tokens beside the 16 of a small image cost accuracy from their random start on
SETTINGS = {"fm_lora": {"prompt": {"num_tokens": 1, "lr_scale": 0.05}}}


def get_config(variant: str | None = None):
  """Returns the config; variants: method=NAME, tasks=N, scenario=cil|dil|til, head=KIND."""
  chosen = config_files.parse_variant(variant, "method", "scenario", "tasks", "head")
  scenario = chosen.get("scenario", "cil")
  default = "plain" if scenario == "til" else "lda"  # given tasks need not be told apart
  method = chosen.get("method", "fm_lora")
  return config_files.defaults(
    method={"name": method} | SETTINGS.get(method, {}),
    tasks={
      "benchmark": "image_folder",
      "scenario": scenario,
      "num_tasks": int(chosen.get("tasks", 5)),
    },
    input={"source_size": 256},
    head=config_files.head_settings(chosen, HEADS, default),
  )
