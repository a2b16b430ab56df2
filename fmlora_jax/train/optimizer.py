"""The optimizer of one task: one group per label, and no update for frozen leaves.

Source: AdamW with cosine annealing is FM-LoRA's (arXiv:2504.08823) Sec. 4.1; the groups are ours.
"""

from collections.abc import Hashable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from fmlora_jax.config import Config, OptimConfig
from fmlora_jax.train import schedules
from fmlora_jax.types import OptimizerGroup, Params


def make_optimizer(
  config: Config, groups: Mapping[str, OptimizerGroup], labels: Params
) -> optax.GradientTransformationExtraArgs:
  """Returns the optimizer of one task over leaves labelled with names of `groups` or "frozen".

  Its update takes `progress` in [0, 1), the share of the task that is done, and `epoch` and `task`
  from 0: traced numbers, so tasks of different lengths share one compiled step.
  """
  optim = config.optim

  def transform(group):
    rate, decay, later = optim.learning_rate, optim.weight_decay, optim.later_lr_scale
    if group.is_head:
      rate, decay = optim.head_learning_rate, optim.head_weight_decay
      later = optim.later_head_lr_scale
    return _group(config, rate * group.lr_scale, decay * group.decays, later)

  transforms: dict[Hashable, optax.GradientTransformation] = {"frozen": optax.set_to_zero()}
  transforms |= {name: transform(group) for name, group in groups.items()}
  grouped = optax.multi_transform(transforms, labels)
  if optim.clip_norm is None:
    return grouped
  return optax.chain(optax.clip_by_global_norm(optim.clip_norm), grouped)


def _group(
  config: Config, learning_rate: float, weight_decay: float, later: float
) -> optax.GradientTransformationExtraArgs:
  return optax.chain(
    *_direction(config.optim, weight_decay),
    optax.scale(-learning_rate),
    _scheduled(schedules.make_schedule(config, learning_rate), later),
  )


def _direction(optim: OptimConfig, weight_decay: float) -> tuple[optax.GradientTransformation, ...]:
  """Returns the transformations from gradients to a direction, for a rate of 1."""
  decayed = optax.add_decayed_weights(weight_decay)
  if optim.name == "adamw":
    return optax.scale_by_adam(), decayed
  if optim.name == "adam":
    return decayed, optax.scale_by_adam()
  return decayed, optax.trace(decay=optim.momentum)


def _scheduled(factor: schedules.Schedule, later: float) -> optax.GradientTransformationExtraArgs:
  """Scales updates by factor(progress, epoch), and by `later` from the second task on."""

  def update(updates, state, params=None, *, progress, epoch, task=0, **extra):
    del params, extra
    now = factor(progress, epoch)
    if later != 1:  # or the step's program would be another
      now *= jnp.where(jnp.asarray(task) > 0, later, 1)
    return jax.tree.map(lambda leaf: leaf * now, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), cast(Any, update))
