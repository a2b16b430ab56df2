"""The optimiser of one task, one group per label; what a rule labels frozen stays as it is.

Source: AdamW with cosine annealing is FM-LoRA's (arXiv:2504.08823) Sec. 4.1; the groups are ours.
"""

import jax
import optax

from fmlora_jax.config import Config, OptimConfig
from fmlora_jax.train import schedules
from fmlora_jax.types import Params

GROUPS = ("adapter", "bases", "prompt", "scale", "head", "frozen")


def make_optimizer(config: Config, labels: Params) -> optax.GradientTransformationExtraArgs:
  """Returns the optimiser of one task over leaves labelled with GROUPS.

  Its update takes `progress` in [0, 1), the part of the task that is done, and `epoch` from 0:
  traced numbers, so tasks of different lengths share one compiled step. Weight decay, which pulls
  to 0, spares the group "scale": factors whose neutral value is another.
  """
  optim = config.optim
  adapter, decay = optim.learning_rate, optim.weight_decay
  rates = {
    "adapter": (adapter, decay),
    "bases": (adapter * config.bases.lr_scale, decay),
    "prompt": (adapter * config.prompt.lr_scale, decay),
    "scale": (adapter, 0.0),
    "head": (optim.head_learning_rate, optim.head_weight_decay),
  }
  groups = {name: _group(config, *rate) for name, rate in rates.items()}
  grouped = optax.multi_transform(groups | {"frozen": optax.set_to_zero()}, labels)
  if optim.clip_norm is None:
    return grouped
  return optax.chain(optax.clip_by_global_norm(optim.clip_norm), grouped)


def _group(
  config: Config, learning_rate: float, weight_decay: float
) -> optax.GradientTransformationExtraArgs:
  return optax.chain(
    *_direction(config.optim, weight_decay),
    optax.scale(-learning_rate),
    _scheduled(schedules.make_schedule(config, learning_rate)),
  )


def _direction(optim: OptimConfig, weight_decay: float) -> tuple[optax.GradientTransformation, ...]:
  """Returns what turns gradients into a direction, for a rate of 1."""
  decayed = optax.add_decayed_weights(weight_decay)
  if optim.name == "adamw":
    return optax.scale_by_adam(), decayed
  if optim.name == "adam":
    return decayed, optax.scale_by_adam()
  return decayed, optax.trace(decay=optim.momentum)


def _scheduled(factor: schedules.Schedule) -> optax.GradientTransformationExtraArgs:
  """Scales updates by factor(progress, epoch)."""

  def update(updates, state, params=None, *, progress, epoch, **extra):
    del params, extra
    now = factor(progress, epoch)
    return jax.tree.map(lambda leaf: leaf * now, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
