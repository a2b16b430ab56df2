"""The micro backbone of configs/digits.py: a ViT pre-trained on letters, never a digit."""

import ml_collections


def get_config():
  """Returns the recipe; the fields are explained in fmlora_jax/pretrain.py."""
  return ml_collections.ConfigDict(
    {
      "architecture": "micro",
      "seed": 0,
      "pool": 160_000,
      "num_val": 4_000,
      "steps": 6_000,
      "batch_size": 256,
      "learning_rate": 2e-3,
      "weight_decay": 0.05,
    }
  )
