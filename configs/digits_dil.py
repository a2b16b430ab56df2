"""The same ten digits in 4 domains: plain, inverted, turned by 90 degrees, noisy and blurred."""

from fmlora_jax import config
from fmlora_jax.models import vit

# the best of two or three on validation images (--config.tasks.evaluate_on=val), one or two seeds
LEARNING_RATES = {"fm_lora": 1e-3, "lora": 3e-4, "finetune": 1e-4}


def get_config(variant: str | None = None):
  """Returns the config; variants: method=NAME."""
  chosen = config.parse_variant(variant, "method")
  method = chosen.get("method", "fm_lora")
  return config.defaults(
    epochs=10,  # with 30 every method forgets more
    batch_size=32,
    compute_dtype="float32",
    # better than query and value alone, for lora as for fm_lora
    method={"name": method} | ({"targets": vit.PROJECTIONS} if method == "lora" else {}),
    tasks={"benchmark": "digits_dil", "scenario": "dil", "num_tasks": 4},
    input={"augmentation": "mild"},
    weights={"tag": "micro_letters"},
    optim={"learning_rate": LEARNING_RATES.get(method, 1e-3)},
    bases={"targets": vit.PROJECTIONS},
    prompt={"lr_scale": 0.05},
  )
