"""A comparison: each method with each seed, one run after the other, and their results.

Each run has the folder DIR/METHOD/SEED. Finished runs are read, others resumed.
"""

import collections
import contextlib
import dataclasses
import pathlib
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from fmlora_jax.cli import config_flag, errors, outputs
from fmlora_jax.cli.config_flag import Changes
from fmlora_jax.cli.methods_flag import Choice
from fmlora_jax.cli.text import duration
from fmlora_jax.config import Config, ConfigError, moved_field
from fmlora_jax.experiment import preflight
from fmlora_jax.experiment import run as experiment
from fmlora_jax.experiment.plan import is_only_read, state
from fmlora_jax.experiment.setup import SetupCache
from fmlora_jax.report import tables
from fmlora_jax.workdir import lock
from fmlora_jax.workdir.files import write_atomically

TABLE, PLOT = "compare.md", "compare.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedRun:
  """One run of the comparison.

  Attributes:
    label: the method with its settings, as a name of a folder.
    config: None if it is invalid.
    problem: why it is.
  """

  label: str
  seed: int
  workdir: pathlib.Path
  config: Config | None
  problem: str = ""

  @property
  def state(self) -> str:
    """Progress of earlier sessions: "finished", "begun", or ""."""
    return state(self.workdir)


def plan(
  file: str, changes: Changes, choices: Sequence[Choice], seeds: Sequence[int], folder: pathlib.Path
) -> list[PlannedRun]:
  """Returns the runs, seed after seed.

  Args:
    file: FILE[:VARIANT]; it is read for each method anew.
    changes: (FIELD, VALUE) for all methods; those of a method replace them.
  """
  planned = []
  for seed in seeds:
    for choice in choices:
      of_run = [*choice.changes, ("seed", str(seed))]
      fields = {field for field, _ in of_run}
      common = [change for change in changes if moved_field(change[0]) not in fields]
      label = re.sub(r"[^\w=.+-]+", "-", str(choice)).strip("-")
      text = f"{file}{',' if ':' in file else ':'}method={choice.name}"
      config, problem = None, ""
      try:
        config = config_flag.read_config(text, of_run, common)
      except ConfigError as error:
        problem = str(error)
      workdir = folder / label / str(seed)
      planned.append(
        PlannedRun(label=label, seed=seed, workdir=workdir, config=config, problem=problem)
      )
  return planned


def check_arguments(file: str | None, changes: Changes) -> None:
  """Refuses a method or a seed in what is given for all methods and seeds.

  Raises:
    ConfigError: with the flag that they belong to; also if the file is missing.
  """
  path = config_flag.config_path(file)
  fields = {field for field, _ in changes}
  if path.suffix == ".json":
    raise ConfigError(f"--config is {file!r}: must be a config file, which is read for each method")
  if re.search(r"[:,]method=", str(file)) or fields & {"method", "method.name"}:
    raise ConfigError("--config names a method: they are given as --methods=NAME,NAME")
  for field in sorted(fields & {"seed", "seeds"}):
    raise ConfigError(f"--config.{field} is given: the seeds are given as --seeds=1993,1994")


def workdir_name(file: str, changes: Changes) -> str:
  """Returns the name of the default folder: the config file and what is changed for all methods."""
  stem, variant = config_flag.config_path(file).stem, file.partition(":")[2]
  changed = config_flag.describe_changes(variant, [(moved_field(f), text) for f, text in changes])
  return "-".join(filter(None, ("compare", stem, changed)))


def listing(planned: Sequence[PlannedRun], folder: pathlib.Path) -> list[str]:
  """Returns what the comparison would do: a line for all, and one for each method."""
  states = collections.Counter(run.state for run in planned)
  labels = dict.fromkeys(run.label for run in planned)
  lines = [
    f"compare    {len(planned)} runs in {folder}: {states['finished']} finished, "
    f"{states['begun']} begun"
  ]
  width = max(map(len, labels))
  for label in labels:
    runs = [run for run in planned if run.label == label]
    problem = next((run.problem for run in runs if run.problem), None)
    seeds = ", ".join(f"{run.seed} {run.state}".strip() for run in runs)
    lines.append(f"  {label:{width}}  {f'left out: {problem}' if problem else seeds}")
  configs = [run.config for run in planned if run.config and run.state != "finished"]
  distinct = {(config.tasks, config.weights): config for config in configs}.values()
  missing = dict.fromkeys(line for config in distinct for line in preflight.missing_files(config))
  return lines + [f"missing    {line}" for line in missing]


def require_outputs(planned: Sequence[PlannedRun], folder: pathlib.Path) -> None:
  """Refuses a table or plot that can't be written into a folder; one that is only read needs none.

  Raises:
    ConfigError: in one line.
  """
  if folder.is_dir() and not is_only_read(folder, [run.workdir for run in planned]):
    for name in (TABLE, PLOT):
      outputs.require_file(f"{name} of --workdir", folder / name)


def run_all(
  planned: Sequence[PlannedRun],
  run: Callable[[PlannedRun], dict],
  note: Callable[[str], None],
  *,
  debug: bool = False,
) -> tuple[list[dict[str, Any]], list[str]]:
  """Does the runs one after the other; an error that a user may fix leaves one run out.

  Args:
    run: does, resumes or reads one.
    note: shows a line.
    debug: let the first error through.

  Returns:
    The results, and a line for each method and reason for which there are none.
  """
  results: dict[tuple[str, int], dict] = {}
  problems = collections.defaultdict(list)
  for i, one in enumerate(planned):
    left = duration_left(planned[i:], results)
    before = f" ({one.state})" if one.state else ""
    note(f"\nrun {i + 1} of {len(planned)}: {one.label}, seed {one.seed}{before}{left}")
    try:
      if one.config is None:
        raise ConfigError(one.problem)
      results[one.label, one.seed] = run(one)
    except Exception as error:
      line = None if debug else errors.explain(error)
      if not line:
        raise
      note(f"left out: {line}")
      problems[one.label, line].append(str(one.seed))
  return list(results.values()), [
    f"left out: {label}, seed {', '.join(seeds)}: {line}"
    for (label, line), seeds in problems.items()
  ]


def duration_left(
  planned: Sequence[PlannedRun], results: Mapping[tuple[str, int], Mapping[str, Any]]
) -> str:
  """Returns ", about 3:10 min left", or nothing where nothing is left or known.

  A run is expected to take as long as its method with other seeds took, or else as all so far.
  """
  took = {key: result["wall_seconds"]["total"] for key, result in results.items()}
  waiting = [run for run in planned if run.config and run.state != "finished"]
  if not took or not waiting:
    return ""
  total = 0.0
  for run in waiting:
    same_method = [seconds for (label, _), seconds in took.items() if label == run.label]
    total += statistics.mean(same_method or took.values())
  return f", about {duration(total)} left"


def compare(planned: Sequence[PlannedRun], folder: pathlib.Path, *, debug: bool) -> int:
  """Does all runs and writes their table and plot; returns how many runs have no result.

  Args:
    debug: let the first error through.
  """
  console, cache = Console(), SetupCache(keeps_images=True)

  def note(line):
    console.print(Text(line), soft_wrap=True)

  def run_one(one):  # of a finished run no more is shown than that it is
    quiet = Console(quiet=True) if one.state == "finished" else console
    require_held()
    with errors.out_of_memory_explained(one.config.batch_size):
      return experiment.run(one.config, one.workdir, quiet, cache)

  is_read = is_only_read(folder, [run.workdir for run in planned])
  locked = contextlib.nullcontext(lambda: None) if is_read else lock.hold_lock(folder)
  with locked as require_held:
    results, problems = run_all(planned, run_one, note, debug=debug)
    if results:
      tables.show(results, console, problems)
    require_held()
    if results and not is_read:
      write_atomically(folder / TABLE, tables.markdown(results, problems) + "\n")
      note(f"written: {folder / TABLE}{_plotted(results, folder / PLOT)}")
  return len(planned) - len(results)


def _plotted(results: Sequence[Mapping[str, Any]], path: pathlib.Path) -> str:
  """Draws the accuracies over tasks; returns what to say of it, as an error must not lose more."""
  try:
    from fmlora_jax.report import plots  # matplotlib takes a second to import

    plots.plot_accuracy_over_tasks(tables.group(results), path)
  except Exception as error:
    return f"; warning: no plot: {type(error).__name__}: {error}"
  return f", {path}"
