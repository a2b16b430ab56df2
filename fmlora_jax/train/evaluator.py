"""Counts of right answers over padded batches of test images."""

import concurrent.futures
import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from fmlora_jax.distributed import stop
from fmlora_jax.input import order
from fmlora_jax.input.loader import Prefetcher, TaskLoader
from fmlora_jax.methods.common.base import AdaptedViT
from fmlora_jax.train import mesh as mesh_lib
from fmlora_jax.types import Examples, Params, SequenceSpec, Variables


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

  In cil and dil the classes of all tasks so far, as in the codes of CODA-Prompt, InfLoRA, SD-LoRA
  and PILOT; those of L2P, DualPrompt and HiDe-Prompt let unseen classes be predicted too. In til,
  where the task is given, those of the set's task.
  """
  classes, seen = np.arange(spec.num_classes), spec.class_ranges[learned][1]
  if spec.scenario == "til":
    return np.stack([(classes >= lo) & (classes < hi) for lo, hi in spec.class_ranges])
  return np.stack([classes < seen] * spec.num_tasks)


def iterate_batches(
  read: Callable, sizes: Sequence[int] | Int[np.ndarray, " T"], batch_size: int, replicate: Callable
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


class TestSets:
  """The images that fill the accuracy matrix, one set for each task.

  Args:
    loader: of images.
    split: "test" or "val".
    method: to measure.
    weights: the pre-trained backbone.
    batch_size: over all devices.
    center: as of `Evaluator`.
    mesh: devices.

  Attributes:
    sizes: images of each set.
  """

  __test__ = False  # for pytest

  def __init__(
    self,
    loader: TaskLoader,
    split: str,
    method: AdaptedViT,
    weights: Params,
    *,
    batch_size: int,
    center: Callable,
    mesh: jax.sharding.Mesh,
  ):
    records = [getattr(task, split) for task in loader.sequence.tasks]
    self.sizes = np.asarray([len(indices) for indices in records])
    self._images = loader.test_images(np.concatenate(records))
    self._spec, self._weights, self._batch_size = loader.sequence.spec, weights, batch_size
    self._evaluator, self._fold = Evaluator(method, center), jax.jit(method.fold)
    self._replicate = functools.partial(mesh_lib.place, shardings=mesh_lib.replicated(mesh))

  def num_after(self, index: int) -> int:
    """Returns how many sets are measured after task `index`: in dil also the next task's."""
    spec = self._spec
    return index + 1 + (spec.scenario == "dil" and index + 1 < spec.num_tasks)

  def prefetch(self, index: int, prefetcher: Prefetcher) -> concurrent.futures.Future | None:
    """Decodes the sets of task `index` in the background; None where images are streamed."""
    return self._images.prefetch(int(sum(self.sizes[: self.num_after(index)])), prefetcher)

  def count_correct(self, variables: Variables, index: int, num_sets: int) -> list[int]:
    """Returns right answers on the first sets, of a model that has learned tasks 0 to `index`."""
    sizes = self.sizes[:num_sets]
    model = self._fold(self._weights, variables)
    masks = self._replicate(allowed_classes(self._spec, index))
    batches = iterate_batches(self._images.read, sizes, self._batch_size, self._replicate)
    return self._evaluator.correct(model, batches, masks)[:num_sets].tolist()
