"""The same ten digits in 4 domains: plain, inverted, turned by 90 degrees, noisy and blurred."""

from fmlora_jax.cli import config_files
from fmlora_jax.models import vit

# the best of two or three on validation images (--config.tasks.evaluate_on=val), one or two seeds
LEARNING_RATES = {
  "adapter": 1e-3,
  "c_lora": 3e-4,
  "coda_prompt": 1e-2,
  "dualprompt": 1e-2,
  "finetune": 1e-4,
  "fm_lora": 1e-3,
  "hide_prompt": 1e-2,
  "inflora": 3e-3,
  "l2p": 1e-5,
  "lora": 3e-4,
  "sd_lora": 3e-4,
}

# for lora all projections are better than query and value alone, as for fm_lora; the others are
# those of digits.py
SETTINGS = {
  "coda_prompt": {"pool_size": 80},
  "l2p": {"length": 1},
  "lora": {"targets": vit.PROJECTIONS},
}

HEADS = {  # hide_prompt includes an alignment
  "plain": {},
  "aligned": {"alignment": {"epochs": 100, "learning_rate": 2e-2}},
  "lda": {"kind": "lda"},
  "hide_prompt": {},
}


def get_config(variant: str | None = None):
  """Returns the config; variants: method=NAME, head=plain|aligned|lda."""
  chosen = config_files.parse_variant(variant, "method", "head")
  method, head = chosen.get("method", "fm_lora"), config_files.head_settings(chosen, HEADS)
  rate, factor = LEARNING_RATES.get(method, 1e-3), 1.0
  if method == "fm_lora" and head:
    # where statistics are stored the first domain may move the features more, the others less
    rate, factor = 3e-4, 6.0
  fm_lora = {
    "bases": {"targets": vit.PROJECTIONS, "lr_scale": factor},
    "core": {"first_lr_scale": factor},
    "prompt": {"num_tokens": 2, "first_lr_scale": factor, "lr_scale": 0.05},
  }
  settings = SETTINGS | {"fm_lora": fm_lora}
  return config_files.defaults(
    epochs=10,  # with 30 every method forgets more
    batch_size=32,
    compute_dtype="float32",
    method={"name": method} | settings.get(method, {}),
    tasks={"benchmark": "digits_dil", "scenario": "dil", "num_tasks": 4},
    input={"augmentation": "mild"},
    weights={"tag": "micro_letters"},
    optim={"learning_rate": rate},
    head=head,
  )
