"""The same ten digits in 4 domains: plain, inverted, turned by 90 degrees, noisy and blurred."""

from fmlora_jax import config


def get_config(variant: str | None = None):
  """Returns the config; variants: method=NAME."""
  chosen = config.parse_variant(variant, "method")
  return config.defaults(
    batch_size=32,
    compute_dtype="float32",
    method={"name": chosen.get("method", "fm_lora")},
    tasks={"benchmark": "digits_dil", "scenario": "dil", "num_tasks": 4},
    input={"augmentation": "mild"},
    weights={"tag": "micro_letters"},
  )
