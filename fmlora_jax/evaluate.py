"""Counts of right answers over padded batches of test images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fmlora_jax.types import Examples, Method


class Evaluator:
  """Classifies test images with a folded model; one program for all tasks and batches.

  Args:
    method: gives `predict`.
    center: (examples, rows [B]) -> Batch, as at test time.
    batch_size: images per program, over all devices.
    put: host arrays with a leading batch axis -> the devices.
  """

  def __init__(self, method: Method, center: Callable, batch_size: int, put: Callable):
    self._batch_size, self._put = batch_size, put

    def count(model, examples, class_mask):
      batch = center(examples, jnp.arange(batch_size))
      logits = method.predict(model, batch.images)
      predicted = jnp.argmax(jnp.where(class_mask, logits, -jnp.inf), axis=-1)
      return jnp.sum((predicted == batch.labels) & batch.valid)

    self._count = jax.jit(count)

  def padded(self, num: int) -> int:
    """Returns the rows that `num` images need in whole batches."""
    return -(-num // self._batch_size) * self._batch_size

  def correct(self, model, examples: Examples, class_mask: np.ndarray) -> int:
    """Returns how many valid rows of `examples` (whole batches) are predicted right.

    Args:
      model: what `Method.fold` returned.
      examples: numpy arrays, padded to `padded(n)` rows.
      class_mask: bool [C]: the classes that may be predicted.
    """
    size = self._batch_size
    counts = []
    for lo in range(0, len(examples.labels), size):
      batch = jax.tree.map(lambda leaf: leaf[lo : lo + size], examples)  # noqa: B023
      counts.append(self._count(model, self._put(batch), class_mask))
    return sum(int(count) for count in counts)
