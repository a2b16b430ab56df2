"""Classifier alignment: a classifier of all classes learns from features drawn as they once were.

Training with local cross-entropy never compares classes of different tasks; this does, without an
image of theirs. Source: HiDe-Prompt (arXiv:2310.07234), task-adaptive prediction.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fmlora_jax import config as config_lib
from fmlora_jax.methods import class_statistics
from fmlora_jax.types import NonFiniteError, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
  """Stochastic gradient descent on drawn features, its rate annealed epoch by epoch to 0.

  Attributes:
    epochs: each of one minibatch per class of the tasks before; 0 leaves the classifier alone.
    batch_size: features in a minibatch.
    learning_rate, momentum: of SGD.
  """

  epochs: int = 30
  batch_size: int = 120
  learning_rate: float = 5e-3
  momentum: float = 0.9

  def __post_init__(self):
    require = config_lib.require
    require(self.epochs >= 0, "epochs", self.epochs, ">= 0")
    require(self.batch_size >= 1, "batch_size", self.batch_size, ">= 1")
    require(self.learning_rate > 0, "learning_rate", self.learning_rate, "> 0")
    require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")


class Aligner:
  """Aligns one classifier after each task; its program compiles once for all of them.

  Args:
    settings: of the descent.
    field: where they stand in the config.
    logits: (params, features [B, D]) -> [B, O] over all outputs; all of `params` is trained.
    output: of each row of the statistics; every output has a row.
  """

  def __init__(
    self,
    settings: AlignmentConfig,
    field: str,
    logits: Callable[..., Float[Array, "B O"]],
    output: Int[np.ndarray, " R"],
  ):
    self.settings, self._field, self._logits, self._output = settings, field, logits, output
    self._descend = jax.jit(self._descent)

  def align(
    self, params: Params, statistics: Params, rows: Bool[np.ndarray, " R"], num_old: int, key
  ) -> tuple[Params, float | None]:
    """Returns the trained params and the loss of the last minibatch in nats, None of 0 epochs.

    Args:
      rows: whose classes are known by now; other outputs are masked.
      num_old: how many of them are from earlier tasks: minibatches in an epoch.

    Raises:
      NonFiniteError: if the loss gets NaN or infinite.
    """
    if not self.settings.epochs:
      return params, None
    params, loss = self._descend(params, statistics, rows, jnp.int32(num_old), key)
    if not np.isfinite(loss):
      raise NonFiniteError(
        f"loss is {loss} in the alignment of a classifier: must be finite; lower "
        f"config.{self._field}.learning_rate"
      )
    return params, float(loss)

  def _descent(self, params, statistics, rows, num_old, key: PRNGKeyArray):
    settings = self.settings
    momentum = optax.trace(decay=settings.momentum)
    chances = class_statistics.chances(statistics, rows)
    output = jnp.asarray(self._output)
    known = jnp.zeros(self._output.max() + 1, bool).at[output].max(rows)

    def loss_of(params, key):
      features, row = class_statistics.draw(statistics, chances, key, settings.batch_size)
      logits = self._logits(params, features)
      masked = jnp.where(known, logits, -1e9)  # finite: -inf would make NaN gradients
      return optax.softmax_cross_entropy_with_integer_labels(masked, output[row]).mean()

    def body(i, carry):
      params, state, _ = carry
      loss, grads = jax.value_and_grad(loss_of)(params, jax.random.fold_in(key, i))
      updates, state = momentum.update(grads, state)
      annealed = 0.5 * (1 + jnp.cos(jnp.pi * (i // num_old) / settings.epochs))
      rate = settings.learning_rate * annealed
      params = jax.tree.map(lambda leaf, update: leaf - rate * update, params, updates)
      return params, state, loss

    carry = params, momentum.init(params), jnp.float32(0)
    params, _, loss = jax.lax.fori_loop(0, settings.epochs * num_old, body, carry)
    return params, loss
