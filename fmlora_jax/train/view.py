"""Views of tasks: all that a method may see of each."""

import contextlib
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from fmlora_jax.config import Config
from fmlora_jax.distributed import stop
from fmlora_jax.input import order
from fmlora_jax.input.loader import TaskLoader
from fmlora_jax.train import mesh as mesh_lib
from fmlora_jax.train.rng import named_key
from fmlora_jax.types import Batches, Facts, Params, TaskArrays, TaskView


class TaskViews:
  """Makes the view of each task.

  Args:
    config: of the run.
    loader: of the images.
    weights: the pre-trained backbone, float32, on the devices of the mesh.
    augment, center: as of `TaskView`.
    mesh: devices.
    root: PRNG key of the run.

  Attributes:
    val_read: whether the method has read validation images.
  """

  def __init__(
    self,
    config: Config,
    loader: TaskLoader,
    weights: Params,
    *,
    augment: Callable,
    center: Callable,
    mesh: jax.sharding.Mesh,
    root: jax.Array,
  ):
    self._config, self._loader, self._weights, self._root = config, loader, weights, root
    self._augment, self._center, self._mesh = augment, center, mesh
    self._width = mesh_lib.padded_size(config.batch_size, mesh)
    self.val_read = False

  def view(self, index: int, earlier: Sequence[Facts] = ()) -> TaskView:
    """Returns the view of task `index`; its images are on the devices unless they are streamed.

    Args:
      earlier: the facts of the tasks before.
    """
    task, readers = self._loader.sequence.tasks[index], self._loader.readers(index)
    train, val = readers["train"], readers.get("val")
    arrays = TaskArrays(*map(jnp.int32, (index, task.lo, task.hi)))
    return TaskView(
      index=index,
      num_classes=task.hi - task.lo,
      steps_per_epoch=-(-len(task.train) // self._config.batch_size),
      earlier=tuple(earlier),
      arrays=mesh_lib.place(arrays, mesh_lib.replicated(self._mesh)),
      weights=self._weights,
      train_batches=functools.partial(self._train_batches, train, index),
      val_batches=functools.partial(self._val_batches, val, index) if val else None,
      train_chunks=functools.partial(self._train_chunks, train, index),
      augment=self._augment,
      center=self._center,
      gather=mesh_lib.gather_to_host,
      replicate=lambda tree: mesh_lib.replicate_from_host0(tree, self._mesh),
      key=lambda name: named_key(self._root, name, task=index),
      seed=self._config.seed,
    )

  # The order of the data has a seed of its own: all methods of a seed see the same batches.

  def _train_batches(self, read: Callable, index: int, epoch: int) -> Batches:
    num = len(self._loader.sequence.tasks[index].train)
    return _until_stopped(read(self._epoch(num, index, epoch, self._config.seed)))

  def _val_batches(self, read: Callable, index: int, epoch: int) -> Batches:
    self.val_read = True
    num = len(self._loader.sequence.tasks[index].val)
    return _until_stopped(read(self._epoch(num, index, epoch, self._config.seed + 1)))

  def _epoch(self, num: int, index: int, epoch: int, seed: int) -> Int[np.ndarray, "steps W"]:
    rows = order.epoch_indices(num, self._config.batch_size, seed, task=index, epoch=epoch)
    return order.padded(rows, self._width)

  def _train_chunks(self, read: Callable, index: int, start: int) -> Batches:
    config, num = self._config, len(self._loader.sequence.tasks[index].train)
    size = self._loader.chunk_steps
    end = config.epochs * -(-num // config.batch_size)
    chunks = order.Chunks(
      num=num,
      batch_size=config.batch_size,
      width=self._width,
      seed=config.seed,
      task=index,
      bounds=order.bounds(start, end, size, config.checkpoint.every_steps),
      size=size,
    )
    return _until_stopped(read(chunks))


def _until_stopped(batches: Batches) -> Batches:
  """Yields the items of a generator and closes it; raises Stopped if the program is to stop."""
  with contextlib.closing(batches):
    for batch in batches:
      stop.check()
      yield batch
