"""Classifier alignment: SGD on features drawn from the statistics of all classes so far.

Training with local cross-entropy never compares classes of different tasks; alignment does, without
an image of earlier tasks. Source: SLCA (arXiv:2303.05118), classifier alignment; HiDe-Prompt
(arXiv:2310.07234), task-adaptive prediction, whose descent this is.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fmlora_jax.config import AlignmentConfig, ConfigError
from fmlora_jax.methods.common import class_statistics
from fmlora_jax.models import heads
from fmlora_jax.types import (
  Facts,
  Features,
  NonFiniteError,
  Params,
  Reported,
  SequenceSpec,
  TaskView,
)

LOSS = Reported(name="alignment_loss", kind=float)


class Aligner:
  """Aligns one classifier after each task; its program compiles once for all of them.

  Args:
    settings: of the descent.
    field: their path in the config, for messages.
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
    self,
    params: Params,
    statistics: Params,
    rows: Bool[np.ndarray, " R"],
    num_old: int,
    key: PRNGKeyArray,
  ) -> tuple[Params, float | None]:
    """Returns the trained params and the loss of the last minibatch in nats, None of 0 epochs.

    Args:
      rows: those of the classes seen so far; other outputs are masked.
      num_old: how many of them are from earlier tasks: minibatches in an epoch.

    Raises:
      NonFiniteError: if the loss becomes NaN or infinite.
      ConfigError: if there are more minibatches than an int32 can count.
    """
    if not self.settings.epochs:
      return params, None
    if (steps := self.settings.epochs * num_old) >= 2**31:
      raise ConfigError(
        f"config.{self._field}.epochs is {self.settings.epochs}: must be less, a classifier would "
        f"learn from {steps} minibatches, and they are counted to 2147483647"
      )
    params, loss = self._descend(params, statistics, rows, jnp.int32(num_old), key)
    if not np.isfinite(loss):
      raise NonFiniteError(
        f"loss is {loss} in the alignment of a classifier: must be finite; lower "
        f"config.{self._field}.learning_rate"
      )
    return params, float(loss)

  def _descent(self, params, statistics, rows, num_old, key):
    settings = self.settings
    momentum = optax.trace(decay=settings.momentum)
    chances = class_statistics.chances(statistics, rows)
    output = jnp.asarray(self._output)
    seen = jnp.zeros(self._output.max() + 1, bool).at[output].max(rows)

    def loss_fn(params, key):
      features, row = class_statistics.draw(statistics, chances, key, settings.batch_size)
      return masked_loss(self._logits(params, features), output[row], seen)

    def body(i, carry):
      params, state, _ = carry
      loss, grads = jax.value_and_grad(loss_fn)(params, jax.random.fold_in(key, i))
      updates, state = momentum.update(grads, state)
      rate = annealed_rate(settings.learning_rate, i // num_old, settings.epochs)
      params = jax.tree.map(lambda leaf, update: leaf - rate * update, params, updates)
      return params, state, loss

    carry = params, momentum.init(params), jnp.float32(0)
    params, _, loss = jax.lax.fori_loop(0, settings.epochs * num_old, body, carry)
    return params, loss


def masked_loss(
  logits: Float[Array, "B O"], targets: Int[Array, " B"], seen: Bool[Array, " O"]
) -> Float[Array, ""]:
  """Returns the mean cross-entropy over the outputs seen so far, in nats."""
  masked = jnp.where(seen, logits, heads.NEVER)
  return optax.softmax_cross_entropy_with_integer_labels(masked, targets).mean()


def annealed_rate(
  learning_rate: float, epoch: int | Int[Array, ""], epochs: int
) -> Float[Array, ""]:
  """Returns the rate of an epoch: cosine annealing to 0. Source: HiDe-Prompt's code."""
  annealed = 0.5 * (1 + jnp.cos(jnp.pi * epoch / epochs))
  return learning_rate * annealed


class HeadAlignment:
  """Statistics of each class's features, and the alignment of the head with all of them.

  Args:
    settings: of the descent.
    field: their path in the config, for messages.
    num_centroids: of each class of a task at most.
    spec: of the sequence.
    width: D.
    logits: of the head: (rows, features [B, D]) -> [B, C].
    features: (model, images) -> [B, D], as at test time.

  Attributes:
    collect: (model, view) -> these features of the training images, and their labels.
  """

  def __init__(
    self,
    settings: AlignmentConfig,
    field: str,
    *,
    num_centroids: int,
    spec: SequenceSpec,
    width: int,
    logits: Callable[..., Float[Array, "B C"]],
    features: Callable[..., Features],
  ):
    self._rows = class_statistics.Rows(spec)
    self._shape = len(self._rows), num_centroids, width
    self.collect = class_statistics.make_collector(features)
    self._aligner = Aligner(settings, field, logits, self._rows.label)

  @property
  def num_stored(self) -> int:
    """Numbers in the statistics of all tasks: means and variances."""
    return 2 * math.prod(self._shape)

  def empty(self) -> Params:
    """Returns statistics without a class."""
    return class_statistics.empty(*self._shape)

  def after(
    self,
    head: Params,
    statistics: Params,
    images: tuple[Float[np.ndarray, "n D"], Int[np.ndarray, " n"]],
    view: TaskView,
  ) -> tuple[Params, Params, Facts]:
    """Returns the aligned head, the statistics with the task of `view`, and facts of it.

    The head stays as it is after the first task: it was trained on all classes at once.

    Args:
      head: rows of all classes, those of the task as training left them.
      statistics: of the tasks before.
      images: what `collect` returns at the task's end.

    Raises:
      NonFiniteError: if the loss becomes NaN or infinite.
    """
    task, rows = view.index, self._rows
    statistics = view.replicate(class_statistics.add(statistics, rows, task, *images, view.seed))
    if task == 0:
      return head, statistics, {}
    head, loss = self._aligner.align(
      head, statistics, rows.task <= task, int(rows.first[task]), view.key("alignment")
    )
    return head, statistics, {"alignment_loss": loss}
