"""Costs of compiled programs: FLOPs, memory, time."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmlora_jax.experiment.setup import RunSetup
from fmlora_jax.input import resident
from fmlora_jax.models import vit
from fmlora_jax.train import mesh as mesh_lib
from fmlora_jax.train.evaluator import count_correct
from fmlora_jax.types import Variables

TIMED_SECONDS = 1.0  # of training steps, or one step where that takes longer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
  """Cost of a compiled program.

  Attributes:
    flops: of an image, as compiled; on a mesh, the share of one device.
    flops_as_written: of an image, before XLA's passes; what GPU libraries compute counts here only.
    bytes: of one device, by category; an upper bound, shared buffers count twice.
    compile_seconds: of tracing and compiling.
    seconds: of a batch; None where it was not run.
  """

  flops: float
  flops_as_written: float
  bytes: dict[str, int]
  compile_seconds: float
  seconds: float | None = None

  @property
  def total(self) -> int:
    """Bytes of all categories."""
    return sum(self.bytes.values())


class Program:
  """A compiled function with its arguments.

  Args:
    function: jitted. A state that it donates is its first argument, and the first of its results.
    arguments: arrays; shapes are enough for a program that is not run.
    batch_size: images of a run.
    held: arrays that lie on the devices meanwhile, by category.
    step: the part whose FLOPs count as written; None means all.
    static: static arguments by name.

  Attributes:
    arguments: of the next run.
    cost: without the seconds of a batch.
  """

  def __init__(
    self,
    function: Callable,
    *arguments: Any,
    batch_size: int,
    held: Mapping[str, Any] | None = None,
    step: jax.stages.Lowered | None = None,
    **static: Callable,
  ):
    began = time.monotonic()
    lowered = function.lower(*arguments, **static)
    self._compiled, self.arguments = lowered.compile(), arguments
    compile_seconds = time.monotonic() - began
    num_bytes = {name: _num_bytes(tree) for name, tree in (held or {}).items()}
    self.cost = Cost(
      flops=_flops(self._compiled, batch_size),
      flops_as_written=_flops(step or lowered, batch_size),
      bytes=num_bytes | {"temp": _temp_bytes(self._compiled)},
      compile_seconds=compile_seconds,
    )

  def __call__(self, num: int) -> float:
    """Returns the seconds of `num` runs; each takes the state that the one before returned."""
    began = time.monotonic()
    for _ in range(num):
      result = self._compiled(*self.arguments)
      if isinstance(result, tuple):
        self.arguments = result[0], *self.arguments[1:]
    jax.block_until_ready(result)
    return time.monotonic() - began


def measure_train_step(setup: RunSetup, variables: Variables, index: int, limit: int) -> Cost:
  """Returns the cost of a training step of task `index`.

  Args:
    setup: of a run.
    variables: with which the task begins.
    index: of the task, from 0.
    limit: bytes of a device; a program that takes more is not run.
  """
  view, whole = setup.views.view(index), mesh_lib.replicated(setup.mesh)
  trainer, rules = setup.trainer, setup.method.rules(index)
  state = jax.tree.map(jnp.copy, mesh_lib.place(trainer.init(variables, index), whole))
  context = trainer.step_context(variables, view)
  examples, rows = _first(view.train_chunks(0))
  waiting = _first(view.val_batches(0))[0] if view.val_batches else None
  most = int(np.sum(rows[:, 0] >= 0))
  rows, one = mesh_lib.place((rows, np.int32(1)), whole)
  batch = jax.eval_shape(setup.programs.augment, examples, rows[0], setup.root)
  program = Program(
    setup.programs.multi_step(rules),
    *(state, context, examples, rows, one),
    batch_size=len(batch.labels),
    held={
      "weights": (setup.weights, context.frozen),
      "state": (state, variables),
      "images": (examples, waiting),
    },
    step=jax.jit(setup.programs.train_step(rules).step).lower(state, context, batch),
  )
  if program.cost.total > limit:
    return program.cost

  def seconds(num: int) -> float:
    program.arguments = *program.arguments[:-1], mesh_lib.place(np.int32(num), whole)
    return program(1) / num

  once = min(seconds(1), seconds(1))
  num = max(1, min(most, int(TIMED_SECONDS / once)))
  return dataclasses.replace(program.cost, seconds=seconds(num))


def measure_test_step(setup: RunSetup, variables: Variables, limit: int) -> Cost:
  """Returns the cost of classifying a batch of test images; arguments as `measure_train_step`."""
  size = mesh_lib.padded_size(setup.config.eval_batch_size, setup.mesh)
  spec, method = setup.sequence.spec, setup.method
  model = jax.jit(method.fold)(setup.weights, variables)
  shard = setup.loader.shard.rows(size)
  records = setup.sequence.tasks[0].train[:size][shard]  # any: the images are noise
  examples = resident.load_examples(setup.sequence, records, shard.stop - shard.start)
  examples = mesh_lib.shard_batch(examples, setup.mesh)
  owner, masks = mesh_lib.place(
    (np.zeros(size, np.int32), np.ones((spec.num_tasks, spec.num_classes), bool)),
    mesh_lib.replicated(setup.mesh),
  )
  images = jax.eval_shape(setup.center, examples, owner).images
  program = Program(
    count_correct,
    *(model, examples, owner, masks),
    batch_size=size,
    held={"weights": (setup.weights, model), "state": variables, "images": examples},
    step=jax.jit(method.predict).lower(model, images),
    predict=method.predict,
    center=setup.center,
  )
  if program.cost.total > limit:
    return program.cost
  program(1)  # it may wait for what came before
  return dataclasses.replace(program.cost, seconds=program(1))


def forward_flops(setup: RunSetup) -> float:
  """Returns the FLOPs of the plain ViT for an image."""
  dtype, side = jnp.dtype(setup.config.compute_dtype), setup.sizes.image_size
  image, forward = jax.ShapeDtypeStruct((1, side, side, 3), dtype), vit.make_vit(setup.sizes, dtype)
  return _flops(jax.jit(forward.apply).lower(setup.weights, image), batch_size=1)


def _flops(program: jax.stages.Lowered | jax.stages.Compiled, batch_size: int) -> float:
  return (program.cost_analysis() or {})["flops"] / batch_size


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
