"""CIFAR-100 in 10 tasks of 10 classes: Table 2 of FM-LoRA.

python -m fmlora_jax.prepare cifar100 --data_dir=DIR
python -m fmlora_jax.main --config=configs/cifar100.py --config.tasks.data_dir=DIR
"""

from fmlora_jax.cli import config_files


def get_config(variant: str | None = None):
  """Returns the config; variants: method=NAME, tasks=N, split=official|full|paper,
  recipe=unified|official.
  """
  return config_files.paper(
    variant, benchmark="cifar100", num_tasks=10, split="official", source_size=32
  )
