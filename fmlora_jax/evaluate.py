"""Counts of right answers over padded batches of test images."""

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from fmlora_jax.types import Examples, Method


class Evaluator:
  """Classifies test images with a folded model: one forward pass each, one program for all tasks.

  Args:
    method: gives `predict`.
    center: (examples, rows [B]) -> Batch, as at test time.
    batch_size: images per program, over all devices.
    put: host arrays with a leading batch axis -> the devices.
  """

  def __init__(self, method: Method, center: Callable, batch_size: int, put: Callable):
    self._batch_size, self._put = batch_size, put

    def count(model, examples, owner, masks):
      batch = center(examples, jnp.arange(batch_size))
      logits = method.predict(model, batch.images)
      predicted = jnp.argmax(jnp.where(masks[owner], logits, -jnp.inf), axis=-1)
      right = (predicted == batch.labels) & batch.valid
      return jnp.zeros(len(masks), jnp.int32).at[owner].add(right)

    self._count = jax.jit(count)

  def correct(
    self, model, tests: Sequence[Examples], masks: Bool[np.ndarray, "T C"]
  ) -> Int[np.ndarray, " T"]:
    """Returns how many images of each test set are predicted right; 0 beyond the last set.

    Args:
      model: what `Method.fold` returned.
      tests: one set per task, numpy arrays without padding; batches may span several of them.
      masks: row i: the classes that may be predicted for images of set i.
    """
    counts = [self._count(model, *batch, masks) for batch in self._batches(tests)]
    return np.sum([np.asarray(count) for count in counts], axis=0)

  def _batches(self, tests: Sequence[Examples]) -> Iterator[tuple[Examples, Int[np.ndarray, " B"]]]:
    """Yields (images of full batches, the set each is from); the last batch is padded."""
    sizes = [len(test.labels) for test in tests]
    owners = np.repeat(np.arange(len(tests)), sizes)
    rows = np.concatenate([np.arange(size) for size in sizes])
    for lo in range(0, len(rows), self._batch_size):
      owner, row = (array[lo : lo + self._batch_size] for array in (owners, rows))
      parts = [
        jax.tree.map(lambda leaf: leaf[row[owner == i]], tests[i])  # noqa: B023
        for i in np.unique(owner)
      ]
      missing = self._batch_size - len(row)
      padded = jax.tree.map(
        lambda *leaves: _pad(np.concatenate(leaves), missing),  # noqa: B023
        *parts,
      )
      yield self._put((padded, _pad(owner.astype(np.int32), missing)))


def _pad(array: np.ndarray, rows: int) -> np.ndarray:
  """Appends rows of zeros: not valid."""
  return np.pad(array, [(0, rows), *[(0, 0)] * (array.ndim - 1)])
