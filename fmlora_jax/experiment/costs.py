"""What the programs of a run take, as they are compiled for it: memory, FLOPs, time."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmlora_jax.config import Config
from fmlora_jax.input import resident
from fmlora_jax.models import vit
from fmlora_jax.train.evaluator import count_correct
from fmlora_jax.train.loop import Trainer
from fmlora_jax.types import Sizes, Variables

TIMED_SECONDS = 1.0  # of training steps, or one step where that takes longer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
  """What a compiled program takes.

  Attributes:
    gflops: of an image, as the program is written: what libraries do counts too.
    bytes: on one device, by what takes them. At most: what two of them share is in both.
    compiling: seconds.
    seconds: of a batch; None where it does not fit and so was not run.
  """

  gflops: float
  bytes: dict[str, int]
  compiling: float
  seconds: float | None = None

  @property
  def total(self) -> int:
    return sum(self.bytes.values())


def measure_train_step(trainer: Trainer, variables: Variables, index: int, limit: int) -> Cost:
  """Returns what a training step of task `index` takes.

  Args:
    variables: with which the task begins.
    limit: bytes of a device; what takes more is not run.
  """
  view = trainer.view(index)
  state = jax.tree.map(jnp.copy, trainer.put(trainer.init(variables, index)))
  fixed = trainer.fixed(variables, view)
  examples, rows = _first(view.train_chunks(0))
  waiting = _first(view.val_batches(0))[0] if view.val_batches else None
  most = int(np.sum(rows[:, 0] >= 0))
  rows = trainer.put(rows)
  began = time.monotonic()
  lowered = trainer.chunk(index).lower(state, fixed, examples, rows, trainer.put(jnp.int32(1)))
  program = lowered.compile()
  compiling = time.monotonic() - began
  batch = jax.eval_shape(trainer.augment, examples, rows[0], trainer.root)
  step = jax.jit(trainer.stepper(index).step).lower(state, fixed, batch)
  cost = Cost(
    gflops=_gflops(step, len(batch.labels)),
    bytes={
      "weights": _num_bytes((trainer.weights, fixed.frozen)),
      "state": _num_bytes((state, variables)),
      "images": _num_bytes((examples, waiting)),
      "temp": program.memory_analysis().temp_size_in_bytes,
    },
    compiling=compiling,
  )
  if cost.total > limit:
    return cost

  def run(num: int) -> float:
    nonlocal state
    began = time.monotonic()
    state, _ = program(state, fixed, examples, rows, trainer.put(jnp.int32(num)))
    jax.block_until_ready(state)
    return (time.monotonic() - began) / num

  once = min(run(1), run(1))
  num = max(1, min(most, int(TIMED_SECONDS / once)))
  return dataclasses.replace(cost, seconds=run(num))


def measure_test_step(trainer: Trainer, variables: Variables, limit: int) -> Cost:
  """Measures the classification of a batch of test images; arguments as `measure_train_step`."""
  size, spec, method = trainer.config.eval_batch_size, trainer.sequence.spec, trainer.method
  model = jax.jit(method.fold)(trainer.weights, variables)
  own = trainer.share.rows(size)
  records = trainer.sequence.tasks[0].train[:size][own]  # any: no image is looked at
  examples = trainer.assemble(
    resident.load_examples(trainer.sequence, records, own.stop - own.start)
  )
  owner = trainer.put(np.zeros(size, np.int32))
  masks = trainer.put(np.ones((spec.num_tasks, spec.num_classes), bool))
  functions = {"predict": method.predict, "center": trainer.center}
  began = time.monotonic()
  program = count_correct.lower(model, examples, owner, masks, **functions).compile()
  compiling = time.monotonic() - began
  batch = jax.eval_shape(trainer.center, examples, owner)
  cost = Cost(
    gflops=_gflops(jax.jit(method.predict).lower(model, batch.images), size),
    bytes={
      "weights": _num_bytes((trainer.weights, model)),
      "state": _num_bytes(variables),
      "images": _num_bytes(examples),
      "temp": program.memory_analysis().temp_size_in_bytes,
    },
    compiling=compiling,
  )
  if cost.total > limit:
    return cost
  seconds = _seconds(lambda: program(model, examples, owner, masks))
  return dataclasses.replace(cost, seconds=seconds)


def forward_gflops(config: Config, sizes: Sizes) -> float:
  """Returns the cost of the plain ViT for an image."""
  backbone = vit.make_vit(sizes, jnp.dtype(config.compute_dtype))
  weights = jax.eval_shape(backbone.init, jax.random.key(0))
  image = jax.ShapeDtypeStruct((1, sizes.image_size, sizes.image_size, 3), config.compute_dtype)
  return _gflops(jax.jit(backbone.apply).lower(weights, image), 1)


def _gflops(lowered: jax.stages.Lowered, batch_size: int) -> float:
  return lowered.cost_analysis()["flops"] / batch_size / 1e9


def _seconds(run: Callable[[], Any]) -> float:
  """Returns the time of the second run: the first one may wait for what came before."""
  for _ in range(2):
    began = time.monotonic()
    jax.block_until_ready(run())
  return time.monotonic() - began


def _num_bytes(tree: Any) -> int:
  """Returns the bytes that arrays take on each device."""
  shapes = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree))
  return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def _first(blocks: Iterator) -> Any:
  with contextlib.closing(blocks):
    return next(blocks)
