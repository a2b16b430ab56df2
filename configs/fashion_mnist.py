"""Fashion-MNIST as a folder of images, 5 tasks of 2 classes, on 11 blocks of a DINOv2 ViT-S/14.

python launch/fashion_mnist.py FOLDER_OF_IDX_GZ FOLDER
python -m fmlora_jax.main --config=configs/fashion_mnist.py \\
    --config.tasks.data_dir=FOLDER --config.weights.path=FILE

FILE is any DINOv2 ViT-S/14; with --config.weights.tag=dinov2_small the published one is used.
"""

from fmlora_jax.cli import config_files

# the best of two to four on validation images (--config.tasks.evaluate_on=val), seed 1993; for
# finetune one was tried, and lora's was chosen for mode=incremental
LEARNING_RATES = {
  "adapter": 1e-5,
  "c_lora": 1e-5,
  "coda_prompt": 3e-3,
  "dualprompt": 1e-3,
  "finetune": 1e-6,
  "fm_lora": 3e-4,
  "hide_prompt": 1e-3,
  "inflora": 5e-5,
  "l2p": 1e-6,
  "lora": 5e-5,
  "sd_lora": 1e-3,
}

HEADS = {
  "plain": {"kind": "class_mean", "start": "class_mean"},
  "aligned": {"start": "class_mean", "alignment": {"epochs": 30}},
  "lda": {"kind": "lda", "start": "class_mean"},
  "hide_prompt": {"start": "class_mean"},  # needs a trained head
}

# not searched; on the digits a prompt costs accuracy
SETTINGS = {"fm_lora": {"prompt": {"num_tokens": 0}}}


def get_config(variant: str | None = None):
  """Returns the config; variants: method=NAME, head=plain|aligned|lda."""
  chosen = config_files.parse_variant(variant, "method", "head")
  method, head = chosen.get("method", "fm_lora"), config_files.head_settings(chosen, HEADS)
  return config_files.defaults(
    epochs=1,
    batch_size=64,
    compute_dtype="float32",
    method={"name": method} | SETTINGS.get(method, {}),
    tasks={"benchmark": "image_folder", "num_tasks": 5},
    input={
      "image_size": 56,
      "source_size": 56,
      "augmentation": "mild",
      "normalisation": "imagenet",
    },
    weights={"tag": "", "architecture": "dinov2_s14", "depth": 11},
    optim={"learning_rate": LEARNING_RATES.get(method, 1e-3), "head_learning_rate": 1e-4},
    head=head,
  )
