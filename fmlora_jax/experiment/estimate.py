"""Estimate of a run: memory, FLOPs, parameters, time. Nothing is trained.

It compiles the programs of the run and times a few of their steps, on one image of noise in place
of all: the data are listed, none is decoded. From the second task on every method runs one program,
so two tasks stand for all; the hooks between tasks see a few images. Only the compilation cache is
written, so that the run starts warm.
"""

import dataclasses
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
from fmlora_jax.experiment import costs, noise
from fmlora_jax.experiment.costs import Cost
from fmlora_jax.experiment.setup import RunSetup, SetupCache
from fmlora_jax.input import resident
from fmlora_jax.train.labels import num_trained
from fmlora_jax.types import Variables

FEW = 8  # images of a task, for the hooks between tasks
TRIES = 3  # programs compiled for the largest batch, beside the run's own
COLUMNS = (
  *("", "trained", "GFLOP/image", "x forward", "weights", "state", "images", "temp", "in all"),
  *("ms", "images/s", "compile s"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """Successive tasks that run one program.

  Attributes:
    first, last: indices of these tasks, from 0.
    trained: parameters that each of them trains.
    step: cost of a training step.
  """

  first: int
  last: int
  trained: int
  step: Cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """Cost of a run.

  Attributes:
    config: of the run.
    stages: all tasks.
    test: cost of classifying a batch of test images.
    forward_flops: of the plain ViT, for an image.
    stored: numbers of stored parameters after all tasks, as of `AdaptedViT.stored`.
    limit: bytes of a device.
    largest_batch: largest batch size that fits; None where none was found.
    largest_task: training images of the largest task.
    seconds: of one seed, by kind, without compilation; None where a program was not run.
    caveats: facts that only the run can tell, and what a reader of its results must know.
  """

  config: Config
  stages: list[Stage]
  test: Cost
  forward_flops: float
  stored: dict[str, Any]
  limit: int
  largest_batch: int | None
  largest_task: int
  seconds: dict[str, float] | None
  caveats: list[str]


def estimate(config: Config) -> Estimate:
  """Returns the cost of a run of `config`.

  Raises:
    ConfigError: as the run does.
  """
  settled, cache = settle(config), SetupCache()
  setup = noise.without_images(cache.setup(settled))
  begun, facts = _begin_tasks(cache, settled)
  limit = memory.device_memory() or memory.host_memory()
  num_tasks = len(setup.sequence.tasks)
  stages = []
  for (first, variables), end in zip(begun.items(), (*list(begun)[1:], num_tasks), strict=True):
    params = {"shared": variables.shared, "cur": variables.cur}
    trained = num_trained(params, setup.method.rules(first))
    step = costs.measure_train_step(setup, variables, first, limit)
    stages.append(Stage(first=first, last=end - 1, trained=trained, step=step))
  last = stages[-1].first
  test = costs.measure_test_step(setup, begun[last], limit)

  def needed(batch_size):
    other = noise.without_images(cache.setup(dataclasses.replace(settled, batch_size=batch_size)))
    return costs.measure_train_step(other, begun[last], last, limit=0).total

  most = resident.capacity(setup.sequence, "train")
  known, multiple = (settled.batch_size, stages[-1].step.total), setup.mesh.size
  return Estimate(
    config=config,
    stages=stages,
    test=test,
    forward_flops=costs.forward_flops(setup),
    stored=setup.method.stored([facts[min(i, len(facts) - 1)] for i in range(num_tasks)]),
    limit=limit,
    largest_batch=largest_batch(needed, known, limit=limit, most=most, multiple=multiple),
    largest_task=most,
    seconds=_seconds(setup, stages, test),
    caveats=[*config.method.largest()[1], *setup.sequence.caveats],
  )


def settle(config: Config) -> Config:
  """Returns the config with one seed, and what is chosen task by task at its largest."""
  seed = (config.seeds or (config.seed,))[0]
  method, _ = config.method.largest()
  threads = dataclasses.replace(config.input, workers=0)
  return dataclasses.replace(config, seed=seed, seeds=(), method=method, input=threads)


def _begin_tasks(cache: SetupCache, config: Config) -> tuple[dict[int, Variables], list[dict]]:
  """Returns the variables with which a stage begins, by its first task, and the facts of two tasks.

  The second stage begins with task 1, if that one runs another program than task 0.
  """
  devices = jax.device_count()
  small = dataclasses.replace(config, batch_size=-(-FEW // devices) * devices)
  setup = noise.without_images(cache.setup(small), most=FEW)
  method = setup.method
  variables = method.init(setup.root, setup.weights)
  begun, programs, facts = {}, [], []
  for index in range(min(2, len(setup.sequence.tasks))):
    view = setup.views.view(index)
    variables, before = method.begin_task(variables, view)
    seen = variables.replace(mem=variables.mem_of_steps)
    program = method.rules(index), jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), seen)
    if program not in programs:
      begun[index] = variables
    programs.append(program)
    variables, after = method.end_task(variables, view)
    facts.append(before | after)
  return begun, facts


def largest_batch(
  needed: Callable[[int], int], known: tuple[int, int], *, limit: int, most: int, multiple: int
) -> int | None:
  """Returns the largest batch size that fits, or one close below it; None where none was found.

  Memory is nearly linear in the batch size: each guess is where a line through the last two sizes
  reaches the limit.

  Args:
    needed: batch size -> bytes on a device; called at most TRIES times.
    known: a batch size and its bytes.
    limit: bytes of a device.
    most: images in the largest task; a larger batch would be padding.
    multiple: divides every batch size.
  """
  most = -(-most // multiple) * multiple
  (size, total), guess = known, 2 * known[0]
  fitting = [size] if total <= limit else []
  for _ in range(TRIES):
    guess = min(guess, most)
    if guess < multiple or guess == size or guess in fitting:
      break
    guess_total = needed(guess)
    if guess_total <= limit:
      fitting.append(guess)
    slope = max((guess_total - total) / (guess - size), 1.0)
    size, total = guess, guess_total
    guess = int(size + (limit - total) / slope) // multiple * multiple
  return max(fitting, default=None)


def _seconds(setup: RunSetup, stages: list[Stage], test: Cost) -> dict[str, float] | None:
  """Returns the seconds of all steps, of all tests, and of passes between tasks."""
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


def show(cost: Estimate, console: Console) -> None:
  """Prints an estimate, to a terminal or as plain text."""
  table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
  for i, name in enumerate(COLUMNS):
    table.add_column(name, justify="right" if i else "left", no_wrap=True)
  for stage in cost.stages:
    more = f" to {stage.last + 1}" if stage.last > stage.first else ""
    cells = _cells(stage.step, cost.forward_flops, cost.config.batch_size)
    table.add_row(f"task {stage.first + 1}{more}", f"{stage.trained:,}", *cells)
  table.add_row("test", "", *_cells(cost.test, cost.forward_flops, cost.config.eval_batch_size))
  # one line a row, whatever the terminal's width
  Console(file=console.file, width=max(console.width, 140)).print(table)
  for line in lines(cost):
    console.print(Text(line), soft_wrap=True)


def _cells(step: Cost, forward_flops: float, batch_size: int) -> list[str]:
  speed = "does not fit", ""
  if step.seconds is not None:
    speed = f"{step.seconds * 1e3:.4g}", f"{batch_size / step.seconds:,.1f}"
  return [
    f"{step.flops_as_written / 1e9:.4g}",
    f"{step.flops_as_written / forward_flops:.2f}",
    *(f"{count / 2**20:,.1f}" for count in (*step.bytes.values(), step.total)),
    *speed,
    f"{step.compile_seconds:.1f}",
  ]


def lines(cost: Estimate) -> list[str]:
  """Returns the lines below the table."""
  batch, added = cost.largest_batch, cost.stored["per_task"]
  largest = f"{batch} is the largest found to fit" if batch else "none was found that fits"
  if batch and batch >= cost.largest_task:
    largest = f"{batch} fits, the whole of a task"
  return [
    f"memory     in MiB of one device, at most; it has {cost.limit / 2**20:,.0f}",
    f"batch      {largest}; config.batch_size is {cost.config.batch_size}",
    f"stored     {cost.stored['shared'] + sum(added):,} parameters beside backbone and head; "
    f"added by each task: {' '.join(f'{count:,}' for count in added)}",
    f"time       {_described_time(cost)}",
    *(f"caveat     {caveat}" for caveat in cost.caveats),
  ]


def _described_time(cost: Estimate) -> str:
  if cost.seconds is None:
    return "unknown: what does not fit was not run"
  kinds = ", ".join(f"{kind} {duration(seconds)}" for kind, seconds in cost.seconds.items())
  runs = max(1, len(cost.config.seeds))
  total = duration(runs * sum(cost.seconds.values()))
  seeds = f" for {runs} seeds; each" if runs > 1 else ""
  return f"about {total}{seeds} ({kinds}), and compilation; from steps timed here, on noise"
