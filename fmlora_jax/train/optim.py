"""AdamW with cosine annealing, one group per label; what a rule labels frozen stays as it is.

Source: FM-LoRA (arXiv:2504.08823) Sec. 4.1; the groups are ours.
"""

import jax
import jax.numpy as jnp
import optax

from fmlora_jax.config import Config
from fmlora_jax.types import Params

GROUPS = ("adapter", "bases", "prompt", "head", "frozen")


def make(config: Config, labels: Params) -> optax.GradientTransformationExtraArgs:
  """Returns the optimiser of one task over leaves labelled with GROUPS.

  Its update takes `progress` in [0, 1), the part of the task that is done: a traced number, so
  tasks of different lengths share one compiled step.
  """
  optim = config.optim
  adapter, head = optim.learning_rate, optim.head_learning_rate
  groups = {
    "adapter": _adamw(adapter, optim.weight_decay),
    "bases": _adamw(adapter * config.bases.lr_scale, optim.weight_decay),
    "prompt": _adamw(adapter * config.prompt.lr_scale, optim.weight_decay),
    "head": _adamw(head, optim.head_weight_decay),
    "frozen": optax.set_to_zero(),
  }
  grouped = optax.multi_transform(groups, labels)
  if optim.clip_norm is None:
    return grouped
  return optax.chain(optax.clip_by_global_norm(optim.clip_norm), grouped)


def _adamw(learning_rate: float, weight_decay: float) -> optax.GradientTransformationExtraArgs:
  return optax.chain(
    optax.scale_by_adam(),
    optax.add_decayed_weights(weight_decay),
    optax.scale(-learning_rate),
    _cosine_annealing(),
  )


def _cosine_annealing() -> optax.GradientTransformationExtraArgs:
  """Scales updates by (1 + cos(π·progress)) / 2."""

  def update(updates, state, params=None, *, progress, **extra):
    del params, extra
    factor = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return jax.tree.map(lambda leaf: leaf * factor, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
