"""CUB-200-2011 in 10 tasks of 20 classes: Table 2 of FM-LoRA.

python -m fmlora_jax.prepare cub200 --data_dir=DIR
python -m fmlora_jax.main --config=configs/cub200.py --config.tasks.data_dir=DIR

The published split (split=official) has 30 training images a class instead of 47, so its numbers
are not comparable with the table's.
"""

from fmlora_jax.cli import config_files


def get_config(variant: str | None = None):
  """Returns the config; variants: method=NAME, tasks=N, split=paper|full|official,
  recipe=unified|official.
  """
  return config_files.paper(variant, benchmark="cub200", num_tasks=10, split="paper")
