"""What the programs of a run take, as they are compiled for it: memory, FLOPs, time."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmlora_jax.config import Config
from fmlora_jax.experiment.setup import RunSetup
from fmlora_jax.input import resident
from fmlora_jax.models import vit
from fmlora_jax.train import mesh as mesh_lib
from fmlora_jax.train.evaluator import count_correct
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


def measure_train_step(setup: RunSetup, variables: Variables, index: int, limit: int) -> Cost:
  """Returns what a training step of task `index` takes.

  Args:
    variables: with which the task begins.
    limit: bytes of a device; what takes more is not run.
  """
  view, whole = setup.views.view(index), mesh_lib.replicated(setup.mesh)
  trainer, rules = setup.trainer, setup.method.rules(index)
  state = jax.tree.map(jnp.copy, mesh_lib.place(trainer.init(variables, index), whole))
  context = trainer.step_context(variables, view)
  examples, rows = _first(view.train_chunks(0))
  waiting = _first(view.val_batches(0))[0] if view.val_batches else None
  most = int(np.sum(rows[:, 0] >= 0))
  rows, one = mesh_lib.place((rows, np.int32(1)), whole)
  began = time.monotonic()
  lowered = setup.programs.multi_step(rules).lower(state, context, examples, rows, one)
  program = lowered.compile()
  compiling = time.monotonic() - began
  batch = jax.eval_shape(setup.programs.augment, examples, rows[0], setup.root)
  step = jax.jit(setup.programs.train_step(rules).step).lower(state, context, batch)
  cost = Cost(
    gflops=_gflops(step, len(batch.labels)),
    bytes={
      "weights": _num_bytes((setup.weights, context.frozen)),
      "state": _num_bytes((state, variables)),
      "images": _num_bytes((examples, waiting)),
      "temp": _temp_bytes(program),
    },
    compiling=compiling,
  )
  if cost.total > limit:
    return cost

  def run(num: int) -> float:
    nonlocal state
    began = time.monotonic()
    state, _ = program(state, context, examples, rows, mesh_lib.place(np.int32(num), whole))
    jax.block_until_ready(state)
    return (time.monotonic() - began) / num

  once = min(run(1), run(1))
  num = max(1, min(most, int(TIMED_SECONDS / once)))
  return dataclasses.replace(cost, seconds=run(num))


def measure_test_step(setup: RunSetup, variables: Variables, limit: int) -> Cost:
  """Measures the classification of a batch of test images; arguments as `measure_train_step`."""
  size, spec, method = setup.config.eval_batch_size, setup.sequence.spec, setup.method
  model = jax.jit(method.fold)(setup.weights, variables)
  own = setup.loader.shard.rows(size)
  records = setup.sequence.tasks[0].train[:size][own]  # any: no image is looked at
  examples = resident.load_examples(setup.sequence, records, own.stop - own.start)
  examples = mesh_lib.shard_batch(examples, setup.mesh)
  owner, masks = mesh_lib.place(
    (np.zeros(size, np.int32), np.ones((spec.num_tasks, spec.num_classes), bool)),
    mesh_lib.replicated(setup.mesh),
  )
  functions = {"predict": method.predict, "center": setup.center}
  began = time.monotonic()
  program = count_correct.lower(model, examples, owner, masks, **functions).compile()
  compiling = time.monotonic() - began
  batch = jax.eval_shape(setup.center, examples, owner)
  cost = Cost(
    gflops=_gflops(jax.jit(method.predict).lower(model, batch.images), size),
    bytes={
      "weights": _num_bytes((setup.weights, model)),
      "state": _num_bytes(variables),
      "images": _num_bytes(examples),
      "temp": _temp_bytes(program),
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
  return (lowered.cost_analysis() or {})["flops"] / batch_size / 1e9


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


def _temp_bytes(program: jax.stages.Compiled) -> int:
  analysis = program.memory_analysis()
  assert analysis is not None  # of programs that XLA compiled
  return analysis.temp_size_in_bytes


def _first(blocks: Generator) -> Any:
  with contextlib.closing(blocks):
    return next(blocks)
