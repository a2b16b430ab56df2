"""DomainNet in 5 tasks of 69 classes, all six domains together: Table 2 of FM-LoRA.

python -m fmlora_jax.prepare domainnet --data_dir=DIR
python -m fmlora_jax.main --config=configs/domainnet.py --config.tasks.data_dir=DIR

The paper calls this domain-incremental; configs/domainnet_dil.py is that. Some published lists of
images seem to lack quickdraw: --config.tasks.domains selects domains.
"""

from fmlora_jax.cli import config_files


def get_config(variant: str | None = None):
  """Returns the config; variants: method=NAME, tasks=N, split=official|full|paper,
  recipe=unified|official.
  """
  return config_files.paper(variant, benchmark="domainnet", num_tasks=5, split="official")
