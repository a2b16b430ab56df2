"""One task from its images to trained variables; resumable at any chunk of steps."""

import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from fmlora_jax.config import Config, ConfigError
from fmlora_jax.distributed import stop
from fmlora_jax.input import augment, order, resident, streaming
from fmlora_jax.input.prefetch import Prefetcher
from fmlora_jax.methods.common.base import AdaptedViT
from fmlora_jax.tasks import TaskSequence
from fmlora_jax.train import mesh as mesh_lib
from fmlora_jax.train.rng import named_key
from fmlora_jax.train.step import StepContext, TrainState, TrainStep, make_multi_step
from fmlora_jax.types import (
  Examples,
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
    weights: the pre-trained backbone, float32, on the devices of the mesh.
    normalisation: of pixels.
    image_size: side that the ViT sees.
    mesh: devices; see `mesh.py` for what lies where.
    streams: whether images are decoded when their turn comes, instead of once per task.
  """

  def __init__(
    self,
    config: Config,
    method: AdaptedViT,
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
    self.method, self.mesh, self.streams, self.weights = method, mesh, streams, weights
    self.share = resident.ProcessShard(jax.process_index(), jax.process_count())
    pixels = {
      "size": image_size,
      "augmentation": config.input.augmentation,
      "normalisation": normalisation,
      "dtype": jnp.dtype(config.compute_dtype),
      "gather": mesh_lib.make_gather_rows(mesh),
    }
    self.augment = functools.partial(augment.train_batch, **pixels)
    self.center = functools.partial(augment.test_batch, **pixels)
    self._steps = config.input.steps_per_dispatch
    if streams:
      self._steps = streaming.steps_per_block(sequence, config.batch_size, at_most=self._steps)
    self._chunks: dict = {}
    self._capacity = {"train": 0, "val": 0}
    self._take(config, sequence)

  def _take(self, config: Config, sequence: TaskSequence) -> None:
    """Sets what a run of another seed has of its own.

    Raises:
      ConfigError: if a task has more steps than can be counted.
    """
    self.config, self.sequence = config, sequence
    self.val_read = False  # whether the method asked for validation images
    whole = mesh_lib.replicated(self.mesh)
    self.root = jax.jit(lambda: jax.random.key(config.seed), out_shardings=whole)()
    self._coming: dict[int, concurrent.futures.Future] = {}
    most = config.epochs * max(self.steps_per_epoch(i) for i in range(len(sequence.tasks)))
    if most >= 2**31:
      raise ConfigError(
        f"config.epochs is {config.epochs}: must be less, a task would have {most} steps, and they "
        "are counted to 2147483647"
      )
    # in whole batches, and never less than before: seeds, whose tasks differ a little in size, then
    # share compiled programs
    size = config.batch_size
    self._capacity = {
      part: max(least, -(-resident.capacity(sequence, part) // size) * size)
      for part, least in self._capacity.items()
    }

  def reseeded(self, seed: int, sequence: TaskSequence) -> "Trainer":
    """Returns the trainer of a run that differs in the seed; both share what is compiled.

    Args:
      sequence: of the same spec.
    """
    other = copy.copy(self)
    other._take(dataclasses.replace(self.config, seed=seed), sequence)
    return other

  def put(self, tree):
    """Places arrays, equal in all processes, on every device."""
    return mesh_lib.place(tree, mesh_lib.replicated(self.mesh))

  def share_out(self, tree):
    """Places what a method's hook returned on every device."""
    return mesh_lib.replicate_from_host0(tree, self.mesh)

  def assemble(self, tree):
    """Places this process's share of arrays whose leading axis is split over the devices."""
    return mesh_lib.shard_batch(tree, self.mesh)

  def view(self, index: int) -> TaskView:
    """Returns task `index`; its images are on the devices unless they are streamed."""
    task, config = self.sequence.tasks[index], self.config
    # the data order has its own stream: another method of the same seed sees the same batches
    order_of = {"batch_size": config.batch_size, "task": index}
    readers = self._readers(index)
    train, val = readers["train"], readers.get("val")

    def train_batches(epoch):
      rows = order.epoch_indices(len(task.train), seed=config.seed, epoch=epoch, **order_of)
      return stop.checked(train(rows))

    def val_batches(epoch):
      self.val_read = True
      rows = order.epoch_indices(len(task.val), seed=config.seed + 1, epoch=epoch, **order_of)
      return stop.checked(val(rows))

    def train_chunks(start):
      end = config.epochs * self.steps_per_epoch(index)
      cuts = order.bounds(start, end, self._steps, config.checkpoint.every_steps)
      sizes = {"num": len(task.train), "size": self._steps, "bounds": cuts}
      return stop.checked(train(order.Chunks(seed=config.seed, **sizes, **order_of)))

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
      gather=mesh_lib.gather_to_host,
      replicate=self.share_out,
      key=lambda name: named_key(self.root, name, task=index),
      seed=config.seed,
    )

  def load_ahead(self, index: int, ahead: Prefetcher) -> None:
    """Has the images of task `index` decoded in `ahead`, for a later `view` to take them."""
    if not self.streams:
      self._coming = {index: ahead.submit(self._load, index)}

  def _load(self, index: int, stop: threading.Event | None = None) -> dict[str, Examples]:
    """Returns this process's share of the images of each split of task `index`, on the host."""
    loaded = {}
    for part, indices in self._splits(index).items():
      own = self.share.rows(self._capacity[part])
      loaded[part] = resident.load_examples(self.sequence, indices[own], own.stop - own.start, stop)
    return loaded

  def _splits(self, index: int) -> dict[str, np.ndarray]:
    """Returns the records of "train", and of "val" if task `index` has some."""
    task = self.sequence.tasks[index]
    return {part: getattr(task, part) for part in self._capacity if len(getattr(task, part))}

  def _readers(self, index: int) -> dict[str, Callable]:
    """Returns the function blocks of rows -> (examples, rows) of each, for splits of a task."""
    if self.streams:
      place = {"put": self.assemble, "share": self.share, "workers": self.config.input.workers}
      return {
        part: streaming.StreamingReader(sequence=self.sequence, indices=indices, **place).read
        for part, indices in self._splits(index).items()
      }
    coming = self._coming.pop(index, None)
    loaded = self.assemble(coming.result() if coming else self._load(index))
    return {
      part: functools.partial(resident.read_resident, images) for part, images in loaded.items()
    }

  def steps_per_epoch(self, index: int) -> int:
    """Returns the steps of one epoch of task `index`; the last batch may be padded."""
    return -(-len(self.sequence.tasks[index].train) // self.config.batch_size)

  def init(self, variables: Variables, index: int) -> TrainState:
    """Returns the state at the start of task `index`."""
    return self.stepper(index).init(variables)

  def stepper(self, index: int) -> TrainStep:
    """Returns the step of task `index`."""
    return self._programs(index)[0]

  def chunk(self, index: int) -> Callable:
    """Returns the jitted program that does several steps of task `index`; see `make_multi_step`."""
    return self._programs(index)[1]

  def fixed(self, variables: Variables, view: TaskView) -> StepContext:
    """Returns what the steps of a task only read, on the devices."""
    total = self.config.epochs * self.steps_per_epoch(view.index)
    frozen = self.method.freeze(self.weights, variables)
    return StepContext(
      frozen=mesh_lib.place(frozen, mesh_lib.fsdp_sharding(self.mesh, frozen)),
      mem=self.put(variables.mem),
      task=view.arrays,
      total_steps=self.put(jnp.int32(total)),
      root=self.root,
    )

  def _programs(self, index: int):
    """Returns the stepper and its jitted chunk; tasks with the same rules share them."""
    rules = self.method.rules(index)
    if rules not in self._chunks:
      stepper = TrainStep(self.method, self.config, rules)
      chunk = make_multi_step(stepper, self.augment, self.mesh)
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
      NonFiniteError: if a loss, a gradient norm or a parameter is not finite, with task and step;
        no state that came of that step is ever yielded.
      ConfigError: if images are streamed and one can't be decoded any more.
      Stopped: between two chunks, if the program is to stop.
    """
    chunk, fixed = self.chunk(view.index), self.fixed(variables, view)
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
        if (good := int(state.step) - done) < num:
          stats = {name: values[: good + 1] for name, values in stats.items()}
          raise self._not_finite(stats, view.index, done + good)
        done += num
        yield state, stats, time.monotonic() - began
        began = time.monotonic()

  def _not_finite(self, stats: dict[str, np.ndarray], task: int, step: int) -> NonFiniteError:
    """Returns the error of the step after `step` others; the last of `stats` are its numbers."""
    last = {name: values[-1] for name, values in stats.items()}
    what = f"loss is {last['loss']} and gradient norm {last['grad_norm']}"
    if np.isfinite([*last.values()]).all():
      what = f"a trained parameter is not finite ({what})"
    images = self.sequence.tasks[task].train
    sizes = {"num": len(images), "batch_size": self.config.batch_size, "size": 1}
    place = {"seed": self.config.seed, "task": task, "bounds": (step, step + 1)}
    ((rows,),) = order.Chunks(**sizes, **place)
    found = {name: [f"{value:.6g}" for value in values] for name, values in stats.items()}
    return NonFiniteError(
      f"{what} at task {task + 1} of {len(self.sequence.tasks)}, step {step + 1}: must be finite; "
      "lower config.optim.learning_rate or set config.optim.clip_norm",
      {"task": task + 1, "step": step + 1, "last_steps": found}
      | {"images": [self.sequence.source.shown(row) for row in images[rows[rows >= 0]]]},
    )
