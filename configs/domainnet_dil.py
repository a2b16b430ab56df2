"""DomainNet in 6 tasks, one domain each, of 345 shared classes: domain-incremental. Ours.

python -m fmlora_jax.prepare domainnet --data_dir=DIR
python -m fmlora_jax.main --config=configs/domainnet_dil.py --config.tasks.data_dir=DIR

The domains come in the order of S-Prompts (arXiv:2207.12819); --config.tasks.order=shuffled draws
another from the seed.
"""

from fmlora_jax import config


def get_config(variant: str | None = None):
  """Returns the config; variants: method=NAME, tasks=N, split=official|full|paper."""
  chosen = config.parse_variant(variant, "method", "tasks", "split")
  return config.defaults(
    method={"name": chosen.get("method", "fm_lora")},
    tasks={
      "benchmark": "domainnet",
      "scenario": "dil",
      "order": "natural",
      "num_tasks": int(chosen.get("tasks", 6)),
      "split": chosen.get("split", "official"),
    },
    input={"source_size": 256, "augmentation": "pilot", "normalisation": "zero_one"},
  )
