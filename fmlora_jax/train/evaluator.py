"""Counts of right answers over padded batches of test images."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from fmlora_jax.distributed import stop
from fmlora_jax.input import order
from fmlora_jax.types import Examples, Method, SequenceSpec


@functools.partial(jax.jit, static_argnames=("predict", "center"))
def count_correct(
  model, examples, owner, masks, *, predict: Callable, center: Callable
) -> Int[Array, " T"]:
  """Returns how many images of a batch are predicted right, for each test set."""
  batch = center(examples, jnp.arange(len(owner)))
  logits = predict(model, batch.images)
  predicted = jnp.argmax(jnp.where(masks[owner], logits, -jnp.inf), axis=-1)
  right = (predicted == batch.labels) & batch.valid
  return jnp.zeros(len(masks), jnp.int32).at[owner].add(right)


class Evaluator:
  """Classifies test images with a folded model: one forward pass each, one program for all tasks.

  Runs with the same `predict` and `center` share the program.

  Args:
    method: its `predict` is used.
    center: (examples, rows [B]) -> Batch, as at test time.
  """

  def __init__(self, method: Method, center: Callable):
    self._count = functools.partial(count_correct, predict=method.predict, center=center)

  def correct(
    self,
    model,
    batches: Iterable[tuple[Examples, Int[Array, " B"]]],
    masks: Bool[Array, "T C"],
  ) -> Int[np.ndarray, " T"]:
    """Returns how many images of each test set are predicted right; 0 of sets without images.

    Args:
      model: result of `Method.fold`.
      batches: (images, index of each one's set), on the devices and all of one shape.
      masks: row i: the classes that may be predicted for images of set i.
    """
    counts = []
    for batch in batches:
      if counts:  # one batch waits while another is computed: the device never holds more
        counts[-1] = np.asarray(counts[-1])
      counts.append(self._count(model, *batch, masks))
    return np.sum(np.asarray(counts), axis=0)


def allowed_classes(spec: SequenceSpec, learned: int) -> Bool[np.ndarray, "T C"]:
  """Returns which classes may be predicted for images of each test set after task `learned`.

  In cil and dil the classes of all tasks so far; in til, where the task is given, those of the
  set's task. Source: protocol of L2P and its successors, which never predict an unseen class.
  """
  classes, seen = np.arange(spec.num_classes), spec.class_ranges[learned][1]
  if spec.scenario == "til":
    return np.stack([(classes >= lo) & (classes < hi) for lo, hi in spec.class_ranges])
  return np.stack([classes < seen] * spec.num_tasks)


def iterate_batches(
  read: Callable, sizes: Sequence[int], batch_size: int, replicate: Callable
) -> Iterator[tuple[Examples, Int[Array, " B"]]]:
  """Yields the batches of test sets that lie one after the other in the images of `read`.

  Args:
    read: blocks of rows -> (the images of a block alone, its rows) of each.
    sizes: of the sets; a batch may span several, and the last one is padded.
    batch_size: over all devices.
    replicate: host arrays -> all devices.

  Raises:
    Stopped: between two batches, if the program is to stop.
  """
  owners = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
  blocks = order.natural(len(owners), batch_size)
  with contextlib.closing(read(blocks)) as batches:
    for (examples, _), rows in zip(batches, blocks, strict=True):
      stop.check()
      yield examples, replicate(owners[rows])  # padding has any owner: it is not valid
