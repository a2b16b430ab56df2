"""scikit-learn's digits in 5 tasks of 2 classes: real images, nothing to download."""

from fmlora_jax.cli import config_files
from fmlora_jax.models import vit

# the best of three on validation images (--config.tasks.evaluate_on=val) with the head lda, by the
# mean of Acc and AAA over seeds 1993 and 1994; lora's was chosen for mode=incremental, adapter's
# for kind=houlsby; linear_probe trains the head only
LEARNING_RATES = {
  "adapter": 1e-4,
  "c_lora": 3e-4,
  "coda_prompt": 3e-3,
  "dualprompt": 1e-2,
  "finetune": 3e-5,
  "fm_lora": 1e-3,
  "hide_prompt": 1e-2,
  "inflora": 3e-3,
  "l2p": 1e-5,
  "lora": 1e-3,
  "sd_lora": 1e-3,
}

# the defaults of these methods are for wider networks and more tokens: at most 96 components can be
# orthonormal, and 25 prompt tokens are too many for 17 tokens of the image (validation)
SETTINGS = {"coda_prompt": {"pool_size": 50}, "l2p": {"length": 1}}

# the alignment is the best for the linear probe (validation); hide_prompt includes one
PLAIN = {"start": "class_mean"}
HEADS = {
  "plain": PLAIN,
  "aligned": PLAIN | {"alignment": {"epochs": 100, "learning_rate": 2e-2}},
  "lda": PLAIN | {"kind": "lda"},
  "hide_prompt": PLAIN,
}


def get_config(variant: str | None = None):
  """Returns the config; variants: method=NAME, tasks=N, head=plain|aligned|lda."""
  chosen = config_files.parse_variant(variant, "method", "tasks", "head")
  method, head = chosen.get("method", "fm_lora"), config_files.head_settings(chosen, HEADS)
  first = 0.1 if head == PLAIN else 1.0  # of task 1: features may move, if statistics are stored
  fm_lora = {
    "bases": {"targets": vit.PROJECTIONS, "lr_scale": first},
    "core": {"first_lr_scale": first},
    # ten prompt tokens are many for 17 tokens of the image, and the one prompt of all tasks must
    # hardly move after task 1
    "prompt": {"num_tokens": 1, "first_lr_scale": first, "lr_scale": 0.05},
  }
  settings = SETTINGS | {"fm_lora": fm_lora}
  return config_files.defaults(
    batch_size=32,
    compute_dtype="float32",
    method={"name": method} | settings.get(method, {}),
    tasks={"benchmark": "digits", "num_tasks": int(chosen.get("tasks", 5))},
    input={"augmentation": "mild"},
    weights={"tag": "micro_letters"},
    optim={"learning_rate": LEARNING_RATES.get(method, 1e-3), "head_learning_rate": 1e-2},
    head=head,
  )
