"""What a run would cost: memory, FLOPs, parameters, time. Nothing is trained, nothing written.

The programs of the run itself are compiled and a few of their steps timed, on one image of noise in
place of all: the data are listed, none is decoded. From the second task on every method runs one
program, so two tasks stand for all; what a method does between tasks is done with a few images.
Only the user's caches are left fuller: the run then finds its programs compiled.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fmlora_jax import parts
from fmlora_jax.config import Config
from fmlora_jax.evaluate import count_correct
from fmlora_jax.methods.rules import label_leaves, partition
from fmlora_jax.models import vit
from fmlora_jax.parts import Workshop
from fmlora_jax.tasks import TaskSequence, resident
from fmlora_jax.train import mesh as mesh_lib
from fmlora_jax.train.loop import Trainer
from fmlora_jax.types import Sizes, Variables
from fmlora_jax.writer import duration

HOOK_IMAGES = 8  # of a task, for what a method does between tasks
TIMED_SECONDS = 1.0  # of training steps, or a step where that takes longer
TRIES = 3  # programs compiled for the largest batch beside the run's own
COLUMNS = (
  *("", "trained", "GFLOP/image", "x forward", "weights", "state", "images", "temp", "in all"),
  *("ms", "images/s", "compile s"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
  """What a compiled program takes.

  Attributes:
    gflops: of an image, as the program is written.
    bytes: on one device, by what takes them.
    compiling: seconds.
    seconds: of a batch; None where it was not run: it does not fit.
  """

  gflops: float
  bytes: dict[str, int]
  compiling: float
  seconds: float | None = None

  @property
  def total(self) -> int:
    return sum(self.bytes.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """Tasks that run one program: `first` to `last`, counted from 1; parameters that they train."""

  first: int
  last: int
  trained: int
  step: Cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """What a run would cost.

  Attributes:
    config: as it was taken; see `settle`.
    spec: of the tasks.
    stages: of training.
    testing: on a batch of test images.
    forward_gflops: of the plain ViT, of an image.
    stored: what `Method.stored` says of all tasks.
    limit: bytes of a device.
    largest_batch: that fits; None where none does.
    seconds: by kind; None where a program was not run. Without compilation.
    caveats: what it leaves out.
  """

  config: Config
  stages: list[Stage]
  testing: Cost
  forward_gflops: float
  stored: dict[str, Any]
  limit: int
  largest_batch: int | None
  seconds: dict[str, float] | None
  caveats: list[str]


def estimate(config: Config) -> Estimate:
  """Returns what a run of `config` would cost, with each seed that it names.

  Raises:
    ConfigError: as the run.
  """
  asked, config, workshop = config, settle(config), Workshop()
  trainer = _without_images(workshop, config)
  begun, facts = _begin_tasks(workshop, config)
  limit, num_tasks = parts.device_memory(), len(trainer.sequence.tasks)
  stages = []
  for index, variables in begun.items():
    last = min((other for other in begun if other > index), default=num_tasks)
    stages.append(
      Stage(
        first=index + 1,
        last=last,
        trained=_num_trained(trainer, variables, index),
        step=measure_step(trainer, variables, index, limit),
      )
    )
  testing = measure_testing(trainer, variables, limit)

  def needed(batch_size):
    other = _without_images(workshop, dataclasses.replace(config, batch_size=batch_size))
    return measure_step(other, variables, index, limit=0).total

  largest = largest_batch(
    needed,
    known=(config.batch_size, stages[-1].step.total),
    limit=limit,
    most=resident.capacity(trainer.sequence, "train"),
    multiple=trainer.mesh.size,
  )
  return Estimate(
    config=config,
    stages=stages,
    testing=testing,
    forward_gflops=_forward_gflops(config, workshop.parts(config).sizes),
    stored=trainer.method.stored([facts[min(i, len(facts) - 1)] for i in range(num_tasks)]),
    limit=limit,
    largest_batch=largest,
    seconds=_seconds(trainer, stages, testing),
    caveats=_caveats(asked, facts),
  )


def settle(config: Config) -> Config:
  """Returns the config with one seed, and ranks that are selected at the largest they may be."""
  drs, seeds = config.drs, config.seeds or (config.seed,)
  if drs.strategy != "fixed":
    drs = dataclasses.replace(drs, strategy="fixed", rank=drs.candidate_ranks[-1])
  threads = dataclasses.replace(config.input, workers=0)
  return dataclasses.replace(config, seed=seeds[0], seeds=(), drs=drs, input=threads)


def _caveats(config: Config, facts: list[dict]) -> list[str]:
  lines = []
  if config.drs.strategy != "fixed" and "complexity" in facts[0]:
    rank = config.drs.candidate_ranks[-1]
    lines.append(f"ranks are selected: {rank}, the largest, is taken, and no time to select them")
  return lines


def _without_images(workshop: Workshop, config: Config) -> Trainer:
  """Returns the run's trainer, with one image of noise in place of all."""
  trainer = workshop.parts(config).trainer
  sequence = trainer.sequence
  noise = np.random.default_rng(0).integers(0, 256, (*sequence.source.canvas, 3), np.uint8)
  source = dataclasses.replace(sequence.source, decode=functools.partial(_repeat, noise))
  return trainer.reseeded(config.seed, dataclasses.replace(sequence, source=source))


def _repeat(image: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  sizes = np.full((len(rows), 2), image.shape[:2], np.int32)
  return np.broadcast_to(image, (len(rows), *image.shape)), sizes


def _begin_tasks(workshop: Workshop, config: Config) -> tuple[dict[int, Variables], list[dict]]:
  """Returns the variables with which tasks begin, by the first task of a program, and facts of it.

  Tasks, counted from 0, that run the program of the one before are left out.
  """
  batch = -(-HOOK_IMAGES // jax.device_count()) * jax.device_count()
  trainer = _without_images(workshop, dataclasses.replace(config, batch_size=batch))
  method, sequence = trainer.method, _few_images(trainer.sequence)
  trainer = trainer.reseeded(config.seed, sequence)
  variables, begun, facts, programs = method.init(trainer.root, trainer.weights), {}, [], []
  for index in range(min(2, len(sequence.tasks))):
    view = trainer.view(index)
    variables, before = method.begin_task(variables, view)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables)
    if (method.rules(index), shapes) not in programs:
      begun[index] = variables
    programs.append((method.rules(index), shapes))
    variables, after = method.end_task(variables, view)
    facts.append(before | after)
  return begun, facts


def _few_images(sequence: TaskSequence) -> TaskSequence:
  tasks = tuple(
    dataclasses.replace(task, train=task.train[:HOOK_IMAGES], val=task.val[:HOOK_IMAGES])
    for task in sequence.tasks
  )
  return dataclasses.replace(sequence, tasks=tasks)


def _num_trained(trainer: Trainer, variables: Variables, index: int) -> int:
  params = {"shared": variables.shared, "cur": variables.cur}
  trained, _ = partition(params, label_leaves(params, trainer.method.rules(index)))
  return sum(leaf.size for leaf in jax.tree.leaves(trained))


def measure_step(trainer: Trainer, variables: Variables, index: int, limit: int) -> Cost:
  """Returns what a training step of task `index` takes; it is run if it fits `limit` bytes."""
  view = trainer.view(index)
  state = jax.tree.map(jnp.copy, trainer.put(trainer.init(variables, index)))
  fixed = trainer.fixed(variables, view)
  examples, rows = _first(view.train_chunks(0))
  most = int(np.sum(rows[:, 0] >= 0))
  rows = jax.device_put(rows, mesh_lib.split(trainer.mesh, axis=1))
  began = time.monotonic()
  program = trainer.chunk(index).lower(state, fixed, examples, rows, trainer.put(jnp.int32(1)))
  program = program.compile()
  compiling = time.monotonic() - began
  batch = jax.eval_shape(trainer.augment, examples, rows[0], trainer.root)
  step = jax.jit(trainer.stepper(index).step).lower(state, fixed, batch)
  waiting = _first(view.val_batches(0))[0] if view.val_batches else None
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

  def run(num):
    nonlocal state
    began = time.monotonic()
    state, _ = program(state, fixed, examples, rows, trainer.put(jnp.int32(num)))
    jax.block_until_ready(state)
    return (time.monotonic() - began) / num

  once = min(run(1), run(1))
  num = max(1, min(most, int(TIMED_SECONDS / once)))
  return dataclasses.replace(cost, seconds=run(num))


def measure_testing(trainer: Trainer, variables: Variables, limit: int) -> Cost:
  """Returns what a batch of test images takes; it is run if it fits `limit` bytes."""
  size, spec = trainer.config.eval_batch_size, trainer.sequence.spec
  method = trainer.method
  model = jax.jit(method.fold)(trainer.weights, variables)
  records = trainer.sequence.tasks[0].test[:size]
  examples = trainer.split(resident.load(trainer.sequence, records, size))
  owner = trainer.split(np.zeros(size, np.int32))
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
      "images": _num_bytes(examples) // trainer.mesh.size,
      "temp": program.memory_analysis().temp_size_in_bytes,
    },
    compiling=compiling,
  )
  if cost.total > limit:
    return cost

  def run():
    began = time.monotonic()
    jax.block_until_ready(program(model, examples, owner, masks))
    return time.monotonic() - began

  return dataclasses.replace(cost, seconds=min(run(), run()))


def largest_batch(
  needed: Callable[[int], int], known: tuple[int, int], *, limit: int, most: int, multiple: int
) -> int | None:
  """Returns a batch size that fits, close below the largest; None where none does.

  What a batch needs is close to a straight line: the guess on it is compiled, and where it does not
  fit a new line is drawn through it.

  Args:
    needed: batch size -> bytes on a device. Compiles: it is asked at most TRIES times.
    known: a batch size and its bytes.
    limit: bytes of a device.
    most: images in the largest task; a larger batch would be padding.
    multiple: what batch sizes must be a multiple of.
  """
  fits = known[0] if known[1] <= limit else None
  (size, total), guess = known, 2 * known[0]
  for _ in range(TRIES):
    guess = min(guess, -(-most // multiple) * multiple)
    if guess < multiple or guess == size or (fits or 0) >= guess:
      break
    found = needed(guess)
    if found <= limit:
      fits = max(fits or 0, guess)
    slope = max((found - total) / (guess - size), 1e-9)
    size, total = guess, found
    guess = int(size + (limit - total) / slope) // multiple * multiple
  return fits


def _seconds(trainer: Trainer, stages: list[Stage], testing: Cost) -> dict[str, float] | None:
  """Returns the time of all steps, of all tests, and of passes between tasks."""
  if testing.seconds is None or any(stage.step.seconds is None for stage in stages):
    return None
  config, sequence, passes = trainer.config, trainer.sequence, trainer.method.passes
  steps = sum(
    config.epochs * trainer.steps_per_epoch(index) * stage.step.seconds
    for stage in stages
    for index in range(stage.first - 1, stage.last)
  )
  tests = np.cumsum([len(getattr(task, config.tasks.evaluate_on)) for task in sequence.tasks])
  between = passes.between / passes.test * sum(len(task.train) for task in sequence.tasks)
  size, each = config.eval_batch_size, testing.seconds
  return {
    "train": steps,
    "eval": float(np.sum(-(-tests // size)) * each),
    "between": between / size * each,
  }


def _forward_gflops(config: Config, sizes: Sizes) -> float:
  """Returns the cost of the plain ViT for an image."""
  backbone = vit.make(sizes, jnp.dtype(config.compute_dtype))
  weights = jax.eval_shape(backbone.init, jax.random.key(0))
  image = jax.ShapeDtypeStruct((1, sizes.image_size, sizes.image_size, 3), config.compute_dtype)
  return _gflops(jax.jit(backbone.apply).lower(weights, image), 1)


def _gflops(lowered: jax.stages.Lowered, batch_size: int) -> float:
  return lowered.cost_analysis()["flops"] / batch_size / 1e9


def _num_bytes(tree: Any) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _first(blocks: Iterator) -> Any:
  with contextlib.closing(blocks):
    return next(blocks)


def show(found: Estimate, console: Console) -> None:
  """Prints what `estimate` returned, to a terminal or as plain text."""
  config = found.config
  shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
  for i, name in enumerate(COLUMNS):
    shown.add_column(name, justify="right" if i else "left", no_wrap=True)
  for stage in found.stages:
    tasks = f"{stage.first}" if stage.first == stage.last else f"{stage.first} to {stage.last}"
    cells = _cells(stage.step, found.forward_gflops, config.batch_size)
    shown.add_row(f"task {tasks}", f"{stage.trained:,}", *cells)
  cells = _cells(found.testing, found.forward_gflops, config.eval_batch_size)
  shown.add_row("test", "", *cells)
  Console(file=console.file, width=max(console.width, 120)).print(shown)
  for line in lines(found):
    console.print(Text(line), soft_wrap=True)


def _cells(cost: Cost, forward_gflops: float, batch_size: int) -> list[str]:
  speed = ["does not fit", ""]
  if cost.seconds is not None:
    speed = [f"{cost.seconds * 1e3:.4g}", f"{batch_size / cost.seconds:,.1f}"]
  return [
    f"{cost.gflops:.4g}",
    f"{cost.gflops / forward_gflops:.2f}",
    *(f"{count / 2**20:,.1f}" for count in (*cost.bytes.values(), cost.total)),
    *speed,
    f"{cost.compiling:.1f}",
  ]


def lines(found: Estimate) -> list[str]:
  """Returns what the table does not say."""
  config, stored = found.config, found.stored
  per_task = " ".join(f"{count:,}" for count in stored["per_task"])
  largest = "none fits"
  if found.largest_batch:
    largest = f"{found.largest_batch} fits; config.batch_size is {config.batch_size}"
  return [
    f"memory     MiB on one device, at most; it has {found.limit / 2**20:,.0f}",
    f"batch      {largest}",
    f"stored     {stored['shared']:,} parameters once; added by each task: {per_task}",
    f"time       {_described_time(found)}",
    *(f"caveat     {caveat}" for caveat in found.caveats),
  ]


def _described_time(found: Estimate) -> str:
  if found.seconds is None:
    return "unknown: a program that does not fit was not run"
  kinds = ", ".join(f"{kind} {duration(seconds)}" for kind, seconds in found.seconds.items())
  total = duration(sum(found.seconds.values()))
  return f"about {total} and compiling ({kinds}): steps timed here, on images of noise"
