"""scikit-learn's digits in 5 tasks of 2 classes: real images, nothing to download."""

from fmlora_jax.cli import config_files
from fmlora_jax.models import vit

# the best of two or three on validation images (--config.tasks.evaluate_on=val) of seeds 1993 and
# 1994; lora's is that of mode=sequential, adapter's of kind=houlsby, and both are the better of
# two for the other kind; linear_probe has none
LEARNING_RATES = {
  "adapter": 1e-4,
  "c_lora": 1e-4,
  "coda_prompt": 3e-3,
  "dualprompt": 3e-3,
  "finetune": 3e-5,
  "fm_lora": 1e-3,
  "hide_prompt": 1e-2,
  "inflora": 1e-3,
  "l2p": 1e-5,
  "lora": 3e-4,
  "sd_lora": 1e-3,
}

# of methods whose defaults are for wider networks and more tokens: at most 96 components can be
# orthonormal, and beside 17 tokens 25 of prompts are too many (validation)
SETTINGS = {"coda_prompt": {"pool_size": 50}, "l2p": {"length": 1}}

# the alignment is the one that suits the linear probe best (validation); hide_prompt has its own
PLAIN = {"start": "class_mean"}
HEADS = {
  "plain": PLAIN,
  "aligned": PLAIN | {"alignment": {"epochs": 100, "learning_rate": 2e-2}},
  "hide_prompt": PLAIN,
}


def get_config(variant: str | None = None):
  """Returns the config; variants: method=NAME, tasks=N, head=plain|aligned."""
  chosen = config_files.parse_variant(variant, "method", "tasks", "head")
  method, head = chosen.get("method", "fm_lora"), config_files.head_settings(chosen, HEADS)
  fm_lora = {
    # features may move more in task 1 where the head follows them
    "bases": {"targets": vit.PROJECTIONS, "lr_scale": 1.0 if "alignment" in head else 0.1},
    # beside 17 tokens ten of prompts are many, and one prompt for all tasks must hardly move once
    # it has learned
    "prompt": {"num_tokens": 1, "lr_scale": 0.05},
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
