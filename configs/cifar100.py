"""CIFAR-100 in 10 tasks of 10 classes: Table 2 of FM-LoRA.

python -m fmlora_jax.prepare cifar100 --data_dir=DIR
python -m fmlora_jax.main --config=configs/cifar100.py --config.tasks.data_dir=DIR
"""

from fmlora_jax import config


def get_config(variant: str | None = None):
  """Returns the config; variants: method=NAME, tasks=N, split=official|full|paper."""
  chosen = config.parse_variant(variant, "method", "tasks", "split")
  return config.defaults(
    method={"name": chosen.get("method", "fm_lora")},
    tasks={
      "benchmark": "cifar100",
      "num_tasks": int(chosen.get("tasks", 10)),
      "split": chosen.get("split", "official"),
    },
    input={"source_size": 32, "augmentation": "pilot", "normalisation": "zero_one"},
  )
