"""DomainNet in 6 tasks, one domain each, of 345 shared classes: domain-incremental.

The paper has no such benchmark.

python -m fmlora_jax.prepare domainnet --data_dir=DIR
python -m fmlora_jax.main --config=configs/domainnet_dil.py --config.tasks.data_dir=DIR

The domains have the order of S-Prompts (arXiv:2207.12819); --config.tasks.order=shuffled draws an
order from the seed. The official recipes are for configs/domainnet.py.
"""

from fmlora_jax.cli import config_files


def get_config(variant: str | None = None):
  """Returns the config; variants: method=NAME, tasks=N, split=official|full|paper."""
  return config_files.paper(
    variant,
    benchmark="domainnet",
    scenario="dil",
    order="natural",
    num_tasks=6,
    split="official",
  )
