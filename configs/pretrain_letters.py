"""The micro backbone of configs/digits.py: a ViT for 32 px pre-trained on rendered letters, no digit."""

import dataclasses

import ml_collections

from fmlora_jax import pretrain


def get_config():
  return ml_collections.ConfigDict(dataclasses.asdict(pretrain.Recipe()))
