"""Learning rates over one task, as factors of the peak.

The epoch-wise ones are those that official codes of other methods run; each says where it differs
from what its name promises.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fmlora_jax.config import Config

Schedule = Callable[[Float[Array, ""], Int[Array, ""]], Float[Array, ""]]


def make_schedule(config: Config, learning_rate: float) -> Schedule:
  """Returns the function (progress in [0, 1), epoch from 0) -> factor of `learning_rate`."""
  optim, epochs = config.optim, config.epochs

  def cosine(progress, epoch):
    """Annealing to 0 by steps; FM-LoRA Sec. 4.1."""
    del epoch
    return 0.5 * (1 + jnp.cos(jnp.pi * progress))

  def constant(progress, epoch):
    del progress, epoch
    return jnp.float32(1)

  def steps(progress, epoch):
    """Times `decay` at each milestone."""
    del progress
    passed = jnp.sum(epoch >= jnp.asarray(optim.milestones))
    return jnp.float32(optim.decay) ** passed

  def coda_cosine(progress, epoch):
    """Annealing by epochs with the first one twice: CODA-Prompt's loop (also InfLoRA's) as it runs.

    Nominally cos(99·pi·e / (200·(K - 1))) in epoch e of K.
    """
    del progress
    return jnp.cos(99 * jnp.pi * _one_late(epoch) / (200 * max(epochs - 1, 1)))

  def timm_cosine(progress, epoch):
    """Annealing by epochs with the first one twice, to `final_learning_rate`: HiDe-Prompt's."""
    del progress
    least = optim.final_learning_rate / learning_rate
    return least + 0.5 * (1 - least) * (1 + jnp.cos(jnp.pi * _one_late(epoch) / epochs))

  known = (cosine, constant, steps, coda_cosine, timm_cosine)
  return {schedule.__name__: schedule for schedule in known}[optim.schedule]


def _one_late(epoch):
  return jnp.maximum(epoch - 1, 0)
