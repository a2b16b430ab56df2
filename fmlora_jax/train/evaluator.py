"""Counts of right answers over padded batches of test images."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from fmlora_jax.distributed import stop
from fmlora_jax.input import order
from fmlora_jax.methods.common.base import AdaptedViT
from fmlora_jax.types import Examples, SequenceSpec


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

  Runs that share `predict` and `center` share the program.

  Args:
    method: gives `predict`.
    center: (examples, rows [B]) -> Batch, as at test time.
  """

  def __init__(self, method: AdaptedViT, center: Callable):
    self._count = functools.partial(count_correct, predict=method.predict, center=center)

  def correct(
    self,
    model,
    batches: Iterable[tuple[Examples, Int[Array, " B"]]],
    masks: Bool[Array, "T C"],
  ) -> Int[np.ndarray, " T"]:
    """Returns how many images of each test set are predicted right; 0 of sets without images.

    Args:
      model: what `AdaptedViT.fold` returned.
      batches: (images, the set that each is from), on the devices and all of one shape.
      masks: row i: the classes that may be predicted for images of set i.
    """
    counts = [self._count(model, *batch, masks) for batch in batches]
    return np.sum([np.asarray(count) for count in counts], axis=0)


def allowed_classes(spec: SequenceSpec, learned: int) -> Bool[np.ndarray, "T C"]:
  """Returns which classes may be predicted for images of each test set after task `learned`.

  Those of all tasks so far; in til, where the task is given, those of the set's own. Source:
  protocol of L2P and its successors, which never predict a class that was not seen.
  """
  classes, seen = np.arange(spec.num_classes), spec.class_ranges[learned][1]
  if spec.scenario == "til":
    return np.stack([(classes >= lo) & (classes < hi) for lo, hi in spec.class_ranges])
  return np.stack([classes < seen] * spec.num_tasks)


def iterate_batches(
  read: Callable, sizes: Sequence[int], batch_size: int, put: Callable
) -> Iterator[tuple[Examples, Int[Array, " B"]]]:
  """Yields the batches of test sets that follow each other in what `read` reads.

  Args:
    read: blocks of rows -> (the images of a block alone, its rows) of each.
    sizes: of the sets; a batch may span several, and the last one is padded.
    batch_size: over all devices.
    put: host arrays with a leading batch axis -> the devices.
  """
  owners = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
  blocks = order.natural(len(owners), batch_size)
  for (examples, _), rows in zip(stop.checked(read(blocks)), blocks, strict=True):
    yield examples, put(owners[rows])  # padding has any owner: it is not valid
