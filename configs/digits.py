"""scikit-learn's digits in 5 tasks of 2 classes: real images, nothing to download."""

from fmlora_jax import config

# fm_lora: the best of about a dozen settings on validation images of seed 1993
# (--config.tasks.evaluate_on=val); finetune: one value tried; others: the default, not searched
LEARNING_RATES = {"fm_lora": 5e-3, "finetune": 3e-4}


def get_config(variant: str | None = None):
  """Returns the config; variants: method=NAME, tasks=N."""
  chosen = config.parse_variant(variant, "method", "tasks")
  method = chosen.get("method", "fm_lora")
  return config.defaults(
    batch_size=32,
    compute_dtype="float32",
    method={"name": method},
    tasks={"benchmark": "digits", "num_tasks": int(chosen.get("tasks", 5))},
    input={"augmentation": "mild"},
    weights={"tag": "micro_letters"},
    optim={"learning_rate": LEARNING_RATES.get(method, 1e-3)},
    prompt={"lr_scale": 0.02},  # one prompt for all tasks: it must hardly move once it has learned
  )
