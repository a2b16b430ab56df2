"""What a run would cost: memory, FLOPs, parameters, time. Nothing is trained, nothing written.

The programs of the run itself are compiled and a few of their steps timed, on one image of noise in
place of all: the data are listed, none is decoded. From the second task on every method runs one
program, so two tasks stand for all; what a method does between tasks is done with a few images.
Only the user's caches are left fuller: the run then finds its programs compiled.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fmlora_jax.cli.text import duration
from fmlora_jax.config import Config
from fmlora_jax.distributed import memory
from fmlora_jax.experiment import costs
from fmlora_jax.experiment.costs import Cost
from fmlora_jax.experiment.setup import RunSetup, SetupCache
from fmlora_jax.input import resident
from fmlora_jax.tasks import TaskSequence
from fmlora_jax.train.labels import num_trained
from fmlora_jax.types import Variables

FEW = 8  # images of a task, for what a method does between tasks
TRIES = 3  # programs compiled for the largest batch, beside the run's own
COLUMNS = (
  *("", "trained", "GFLOP/image", "x forward", "weights", "state", "images", "temp", "in all"),
  *("ms", "images/s", "compile s"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramCost:
  """Tasks that run one program.

  Attributes:
    first, last: of them, from 0.
    trained: parameters that each of them trains.
    step: of training.
  """

  first: int
  last: int
  trained: int
  step: Cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """What a run would cost.

  Attributes:
    config: what is asked for.
    stages: of training.
    test: of a batch of test images.
    forward_gflops: of the plain ViT, for an image.
    stored: parameters, as of `Method.stored`, of all tasks.
    limit: bytes of a device.
    largest_batch: that fits; None where none was found.
    largest_task: training images in it.
    seconds: of one seed, by kind, without compilation; None where a program was not run.
    caveats: what is not known before the run.
  """

  config: Config
  stages: list[ProgramCost]
  test: Cost
  forward_gflops: float
  stored: dict[str, Any]
  limit: int
  largest_batch: int | None
  largest_task: int
  seconds: dict[str, float] | None
  caveats: list[str]


def estimate(config: Config) -> Estimate:
  """Returns what a run of `config` would cost.

  Raises:
    ConfigError: as the run.
  """
  settled, cache = settle(config), SetupCache()
  setup = _without_images(cache, settled)
  begun, facts = _begin_tasks(cache, settled)
  limit = memory.device_memory() or memory.host_memory()
  num_tasks = len(setup.sequence.tasks)
  stages = [
    ProgramCost(
      first=first,
      last=end - 1,
      trained=_num_trained(setup, begun[first], first),
      step=costs.measure_train_step(setup, begun[first], first, limit),
    )
    for first, end in itertools.pairwise((*begun, num_tasks))
  ]
  last, step = stages[-1].first, stages[-1].step
  test = costs.measure_test_step(setup, begun[last], limit)

  def needed(batch_size):
    other = _without_images(cache, dataclasses.replace(settled, batch_size=batch_size))
    return costs.measure_train_step(other, begun[last], last, limit=0).total

  most = resident.capacity(setup.sequence, "train")
  known, multiple = (settled.batch_size, step.total), setup.mesh.size
  return Estimate(
    config=config,
    stages=stages,
    test=test,
    forward_gflops=costs.forward_gflops(settled, setup.sizes),
    stored=setup.method.stored([facts[min(i, len(facts) - 1)] for i in range(num_tasks)]),
    limit=limit,
    largest_batch=largest_batch(needed, known, limit=limit, most=most, multiple=multiple),
    largest_task=most,
    seconds=_seconds(setup, stages, test),
    caveats=config.method.largest()[1],
  )


def settle(config: Config) -> Config:
  """Returns the config with one seed, and what is chosen task by task at its largest."""
  seed = (config.seeds or (config.seed,))[0]
  method, _ = config.method.largest()
  threads = dataclasses.replace(config.input, workers=0)
  return dataclasses.replace(config, seed=seed, seeds=(), method=method, input=threads)


def _without_images(cache: SetupCache, config: Config) -> RunSetup:
  """Returns the run's setup, with one image of noise in place of all."""
  setup = cache.setup(config)
  sequence = setup.sequence
  noise = np.random.default_rng(0).integers(0, 256, (*sequence.source.canvas, 3), np.uint8)
  source = dataclasses.replace(sequence.source, decode=functools.partial(_repeat, noise))
  return setup.with_sequence(dataclasses.replace(sequence, source=source))


def _repeat(image: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """A `Source.decode` that gives the same image for all records."""
  sizes = np.full((len(rows), 2), image.shape[:2], np.int32)
  return np.broadcast_to(image, (len(rows), *image.shape)), sizes


def _begin_tasks(cache: SetupCache, config: Config) -> tuple[dict[int, Variables], list[dict]]:
  """Returns the variables with which a task begins, by its index, and what its hooks said of it.

  They are of task 0, and of task 1 if that one runs another program; facts are of both.
  """
  devices = jax.device_count()
  little = dataclasses.replace(config, batch_size=-(-FEW // devices) * devices)
  setup = _without_images(cache, little)
  setup = setup.with_sequence(_few_images(setup.sequence))
  method = setup.method
  variables = method.init(setup.root, setup.weights)
  begun, programs, facts = {}, [], []
  for index in range(min(2, len(setup.sequence.tasks))):
    view = setup.views.view(index)
    variables, before = method.begin_task(variables, view)
    program = method.rules(index), jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables)
    if program not in programs:
      begun[index] = variables
    programs.append(program)
    variables, after = method.end_task(variables, view)
    facts.append(before | after)
  return begun, facts


def _few_images(sequence: TaskSequence) -> TaskSequence:
  tasks = tuple(
    dataclasses.replace(task, train=task.train[:FEW], val=task.val[:FEW]) for task in sequence.tasks
  )
  return dataclasses.replace(sequence, tasks=tasks)


def _num_trained(setup: RunSetup, variables: Variables, index: int) -> int:
  params = {"shared": variables.shared, "cur": variables.cur}
  return num_trained(params, setup.method.rules(index))


def largest_batch(
  needed: Callable[[int], int], known: tuple[int, int], *, limit: int, most: int, multiple: int
) -> int | None:
  """Returns a batch size that fits, the largest or close below it; None where none was found.

  Memory is close to a straight line over the batch size: the guess on the line is compiled, and a
  new line drawn through it.

  Args:
    needed: batch size -> bytes on a device; asked at most TRIES times.
    known: a batch size and its bytes.
    limit: bytes of a device.
    most: images in the largest task; a larger batch would be padding.
    multiple: what batch sizes are multiples of.
  """
  most = -(-most // multiple) * multiple
  (size, total), guess = known, 2 * known[0]
  fitting = [size] if total <= limit else []
  for _ in range(TRIES):
    guess = min(guess, most)
    if guess < multiple or guess == size or guess in fitting:
      break
    found = needed(guess)
    if found <= limit:
      fitting.append(guess)
    slope = max((found - total) / (guess - size), 1.0)
    size, total = guess, found
    guess = int(size + (limit - total) / slope) // multiple * multiple
  return max(fitting, default=None)


def _seconds(setup: RunSetup, stages: list[ProgramCost], test: Cost) -> dict[str, float] | None:
  """Returns the time of all steps, of all tests, and of passes between tasks."""
  if test.seconds is None or None in [stage.step.seconds for stage in stages]:
    return None
  config, sequence, passes = setup.config, setup.sequence, setup.method.passes
  train = sum(
    setup.trainer.num_steps(index) * (stage.step.seconds or 0.0)
    for stage in stages
    for index in range(stage.first, stage.last + 1)
  )
  images = sum(len(task.train) for task in sequence.tasks)
  tests = np.cumsum([len(getattr(task, config.tasks.evaluate_on)) for task in sequence.tasks])
  of_image = test.seconds / config.eval_batch_size / passes.test
  return {
    "train": train,
    "eval": float(np.sum(-(-tests // config.eval_batch_size)) * test.seconds),
    "between tasks": passes.between * images * of_image,
  }


def show(found: Estimate, console: Console) -> None:
  """Prints what `estimate` returned, to a terminal or as plain text."""
  table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
  for i, name in enumerate(COLUMNS):
    table.add_column(name, justify="right" if i else "left", no_wrap=True)
  for stage in found.stages:
    more = f" to {stage.last + 1}" if stage.last > stage.first else ""
    cells = _cells(stage.step, found.forward_gflops, found.config.batch_size)
    table.add_row(f"task {stage.first + 1}{more}", f"{stage.trained:,}", *cells)
  table.add_row("test", "", *_cells(found.test, found.forward_gflops, found.config.eval_batch_size))
  # one line a row, whatever the terminal's width
  Console(file=console.file, width=max(console.width, 140)).print(table)
  for line in lines(found):
    console.print(Text(line), soft_wrap=True)


def _cells(cost: Cost, forward_gflops: float, batch_size: int) -> list[str]:
  speed = "does not fit", ""
  if cost.seconds is not None:
    speed = f"{cost.seconds * 1e3:.4g}", f"{batch_size / cost.seconds:,.1f}"
  return [
    f"{cost.gflops:.4g}",
    f"{cost.gflops / forward_gflops:.2f}",
    *(f"{count / 2**20:,.1f}" for count in (*cost.bytes.values(), cost.total)),
    *speed,
    f"{cost.compiling:.1f}",
  ]


def lines(found: Estimate) -> list[str]:
  """Returns what the table does not say."""
  batch, added = found.largest_batch, found.stored["per_task"]
  largest = f"{batch} is the largest found to fit" if batch else "none was found that fits"
  if batch and batch >= found.largest_task:
    largest = f"{batch} fits, the whole of a task"
  return [
    f"memory     in MiB of one device, at most; it has {found.limit / 2**20:,.0f}",
    f"batch      {largest}; config.batch_size is {found.config.batch_size}",
    f"stored     {found.stored['shared'] + sum(added):,} parameters beside backbone and head; "
    f"added by each task: {' '.join(f'{count:,}' for count in added)}",
    f"time       {_described_time(found)}",
    *(f"caveat     {caveat}" for caveat in found.caveats),
  ]


def _described_time(found: Estimate) -> str:
  if found.seconds is None:
    return "unknown: what does not fit was not run"
  kinds = ", ".join(f"{kind} {duration(seconds)}" for kind, seconds in found.seconds.items())
  runs = max(1, len(found.config.seeds))
  total = duration(runs * sum(found.seconds.values()))
  seeds = f" for {runs} seeds; each" if runs > 1 else ""
  return f"about {total}{seeds} ({kinds}), and compilation; from steps timed here, on noise"
