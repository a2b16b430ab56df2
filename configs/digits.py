"""scikit-learn's digits in 5 tasks of 2 classes: real images, nothing to download."""

from fmlora_jax import config


def get_config(variant: str | None = None):
  """Returns the config; variants: method=NAME, tasks=N."""
  chosen = config.parse_variant(variant)
  return config.defaults(
    batch_size=32,
    compute_dtype="float32",
    method={"name": chosen.get("method", "fm_lora")},
    tasks={"benchmark": "digits", "num_tasks": int(chosen.get("tasks", 5))},
    input={"augmentation": "mild"},
    weights={"tag": "micro_letters"},
  )
