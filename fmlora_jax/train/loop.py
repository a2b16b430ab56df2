"""One task from its images to trained variables; resumable at any chunk of steps."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from fmlora_jax.config import Config
from fmlora_jax.tasks import Task, TaskSequence, augment, order, resident, stream
from fmlora_jax.train import mesh as mesh_lib
from fmlora_jax.train.step import Fixed, Stepper, TrainState, make_chunk
from fmlora_jax.train.streams import stream_key
from fmlora_jax.types import (
  Method,
  NonFiniteError,
  Params,
  TaskArrays,
  TaskView,
  Variables,
)


class Trainer:
  """Trains a method task by task on one mesh.

  Args:
    config: the run's.
    method: what is trained.
    sequence: the tasks.
    weights: the pre-trained backbone, float32.
    normalisation: of pixels.
    image_size: side that the ViT sees.
    mesh: devices; see `mesh.py` for what lies where.
    streams: whether images are decoded when their turn comes, instead of once per task.
  """

  def __init__(
    self,
    config: Config,
    method: Method,
    sequence: TaskSequence,
    weights: Params,
    *,
    normalisation: str,
    image_size: int,
    mesh: jax.sharding.Mesh,
    streams: bool = False,
  ):
    mesh_lib.check_batch(config.batch_size, "batch_size", mesh)
    mesh_lib.check_batch(config.eval_batch_size, "eval_batch_size", mesh)
    self.config, self.method, self.sequence = config, method, sequence
    self.weights = mesh_lib.put(weights, mesh_lib.spread(mesh, weights))
    whole = mesh_lib.replicated(mesh)
    self.root = jax.jit(lambda: jax.random.key(config.seed), out_shardings=whole)()
    self._mesh, self.streams = mesh, streams
    self.share = resident.Share(jax.process_index(), jax.process_count())
    pixels = {
      "size": image_size,
      "augmentation": config.input.augmentation,
      "normalisation": normalisation,
      "dtype": jnp.dtype(config.compute_dtype),
      "take": mesh_lib.make_take(mesh),
    }
    self.augment = functools.partial(augment.train_batch, **pixels)
    self.center = functools.partial(augment.test_batch, **pixels)
    # in whole batches: seeds, whose tasks differ a little in size, then share compiled programs
    size = config.batch_size
    self._capacity = {
      part: -(-resident.capacity(sequence, part) // size) * size for part in ("train", "val")
    }
    self._steps = config.input.steps_per_dispatch
    if streams:
      self._steps = stream.steps_per_block(sequence, size, at_most=self._steps)
    self._chunks: dict = {}

  def put(self, tree):
    """Places arrays, equal in all processes, on every device."""
    return mesh_lib.put(tree, mesh_lib.replicated(self._mesh))

  def share_out(self, tree):
    """Places what a method's hook returned on every device."""
    return mesh_lib.share_out(tree, self._mesh)

  def assemble(self, tree):
    """Places this process's share of arrays whose leading axis is split over the devices."""
    return mesh_lib.assemble(tree, self._mesh)

  def view(self, index: int) -> TaskView:
    """Returns task `index`; its images are on the devices unless they are streamed."""
    task, config = self.sequence.tasks[index], self.config
    # the data order has its own stream: another method of the same seed sees the same batches
    order_of = {"batch_size": config.batch_size, "task": index}
    train = self._reader(task, "train")
    val = self._reader(task, "val") if len(task.val) else None

    def train_batches(epoch):
      return train(order.epoch_indices(len(task.train), seed=config.seed, epoch=epoch, **order_of))

    def val_batches(epoch):
      return val(order.epoch_indices(len(task.val), seed=config.seed + 1, epoch=epoch, **order_of))

    def train_chunks(start):
      end = config.epochs * self.steps_per_epoch(index)
      cuts = order.bounds(start, end, self._steps, config.checkpoint.every_steps)
      sizes = {"num": len(task.train), "size": self._steps, "bounds": cuts}
      return train(order.Chunks(seed=config.seed, **sizes, **order_of))

    return TaskView(
      index=index,
      num_classes=task.hi - task.lo,
      arrays=self.put(TaskArrays(*map(jnp.int32, (index, task.lo, task.hi)))),
      weights=self.weights,
      train_batches=train_batches,
      val_batches=val_batches if val else None,
      train_chunks=train_chunks,
      augment=self.augment,
      center=self.center,
      fetch=mesh_lib.fetch,
      key=lambda name: stream_key(self.root, name, task=index),
    )

  def _reader(self, task: Task, part: str) -> Callable:
    """Returns the function blocks of rows -> (examples, rows) of each, over a split of a task."""
    indices = getattr(task, part)
    if self.streams:
      workers = self.config.input.workers
      return stream.Stream(
        sequence=self.sequence,
        indices=indices,
        put=self.assemble,
        share=self.share,
        workers=workers,
      ).read
    own = self.share.rows(self._capacity[part])
    examples = resident.load(self.sequence, indices[own], own.stop - own.start)
    examples = self.assemble(examples)
    return functools.partial(resident.read, examples)

  def steps_per_epoch(self, index: int) -> int:
    """Returns the steps of one epoch of task `index`; the last batch may be padded."""
    return -(-len(self.sequence.tasks[index].train) // self.config.batch_size)

  def init(self, variables: Variables, index: int) -> TrainState:
    """Returns the state at the start of task `index`."""
    return self._stepper(index).init(variables)

  def _stepper(self, index: int) -> Stepper:
    return self._programs(index)[0]

  def _programs(self, index: int):
    """Returns the stepper and its jitted chunk; tasks with the same rules share them."""
    rules = self.method.rules(index)
    if rules not in self._chunks:
      stepper = Stepper(self.method, self.config, rules)
      chunk = make_chunk(stepper, self.augment, self._mesh)
      self._chunks[rules] = stepper, chunk
    return self._chunks[rules]

  def num_programs(self) -> int:
    """Returns how many times a training step was compiled."""
    return sum(chunk._cache_size() for _, chunk in self._chunks.values())

  def train(
    self, state: TrainState, variables: Variables, view: TaskView
  ) -> Iterator[tuple[TrainState, dict[str, np.ndarray], float]]:
    """Yields (state, stats, seconds) after each chunk of steps until the task is done.

    `stats` are numbers of the chunk's steps; `seconds` include the wait for its images. A chunk
    ends at every multiple of `checkpoint.every_steps`, so that the state may be saved there. The
    yielded state is donated to the next chunk.

    Raises:
      NonFiniteError: if a loss or a gradient norm is not finite, with task and step.
      ConfigError: if images are streamed and one can't be decoded any more.
    """
    _, chunk = self._programs(view.index)
    total = self.config.epochs * self.steps_per_epoch(view.index)
    frozen = self.method.freeze(self.weights, variables)
    fixed = Fixed(
      frozen=mesh_lib.put(frozen, mesh_lib.spread(self._mesh, frozen)),
      mem=self.put(variables.mem),
      task=view.arrays,
      total_steps=self.put(jnp.int32(total)),
      root=self.root,
    )
    # a copy of its own: the chunk donates it, and a method may have put one array in two places
    state = jax.tree.map(jnp.copy, self.put(state))
    done = int(state.step)
    with contextlib.closing(view.train_chunks(done)) as chunks:
      began = time.monotonic()
      for examples, rows in chunks:
        num = int(np.sum(rows[:, 0] >= 0))
        rows, count = self.put((rows, np.int32(num)))
        state, stats = chunk(state, fixed, examples, rows, count)
        stats = {name: np.asarray(values)[:num] for name, values in stats.items()}
        self._check(stats, view.index, done)
        done += num
        yield state, stats, time.monotonic() - began
        began = time.monotonic()

  def _check(self, stats, task: int, done: int) -> None:
    bad = ~(np.isfinite(stats["loss"]) & np.isfinite(stats["grad_norm"]))
    if bad.any():
      i = int(np.argmax(bad))
      raise NonFiniteError(
        f"loss is {stats['loss'][i]} and gradient norm {stats['grad_norm'][i]} at task {task + 1} "
        f"of {len(self.sequence.tasks)}, step {done + i + 1}: must be finite; lower "
        "config.optim.learning_rate or set config.optim.clip_norm"
      )
