"""Runs methods with seeds, one run after the other, and reports them side by side.

python -m fmlora_jax.compare --config=configs/digits.py [--methods=all] [--seeds=1993,1994,1995]
  [--config.FIELD=VALUE ...] [--workdir=DIR] [--dry_run]

--methods takes names between commas: --methods=fm_lora,lora,linear_probe; "all" is every method in
every variant that its file declares. A method's own settings follow it, each after a colon:

  --methods=lora:mode=sequential,lora:mode=incremental:rank=8,fm_lora:prompt.num_tokens=0

A field with a dot is one of the whole config, such as optim.learning_rate. The config file is read
anew for each method, as FILE:method=NAME; --config.FIELD=VALUE is for all of them.

Each run has its folder, DIR/METHOD/SEED, which `main` and `report` take too. The same command again
goes on: finished runs are read, the one under way resumes at its checkpoint. A run that can't be
done or diverges is one line, the others go on, and the exit code is 1. At the end stand the table,
its Markdown in DIR/compare.md and the accuracies over tasks in DIR/compare.png.
"""

import collections
import dataclasses
import pathlib
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags

from fmlora_jax.cli import overrides, program
from fmlora_jax.cli.overrides import Choice
from fmlora_jax.cli.text import duration
from fmlora_jax.config import Config, ConfigError
from fmlora_jax.workdir import lock
from fmlora_jax.workdir.files import write_atomically
from fmlora_jax.workdir.result_file import RESULT

TABLE, PLOT = "compare.md", "compare.png"
CONFIG_FLAG = re.compile(r"--?config(\.|=|$)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
  """One run of the comparison.

  Attributes:
    config: None where it can't be.
    problem: why not.
  """

  label: str
  seed: int
  workdir: pathlib.Path
  config: Config | None
  problem: str = ""

  @property
  def state(self) -> str:
    """What an earlier session left: "finished", "begun", or nothing."""
    if (self.workdir / RESULT).exists():
      return "finished"
    return "begun" if (self.workdir / "config.json").exists() else ""


def plan(
  config_flags: Sequence[str], choices: Sequence[Choice], seeds: Sequence[int], folder: pathlib.Path
) -> list[Planned]:
  """Returns the runs, seed after seed.

  Args:
    config_flags: --config=FILE[:VARIANT] and any --config.FIELD=VALUE.

  Raises:
    UsageError: if they name a method or a seed, or no file.
  """
  file, variant, common = _split_flags(config_flags)
  planned = []
  for seed in seeds:
    for choice in choices:
      own = [*choice.flags(), f"--config.seed={seed}"]
      names = {_name(flag) for flag in own}
      arguments = [
        f"--config={file}:{','.join(filter(None, (variant, f'method={choice.name}')))}",
        *(flag for flag in common if _name(flag) not in names),
        *own,
      ]
      label = re.sub(r"[^\w=.+-]+", "-", str(choice)).strip("-")
      place = {"label": label, "seed": seed, "workdir": folder / label / str(seed)}
      try:
        planned.append(Planned(config=overrides.read_config(arguments), **place))
      except ConfigError as error:
        planned.append(Planned(config=None, problem=str(error), **place))
  return planned


def _split_flags(config_flags: Sequence[str]) -> tuple[str, str, list[str]]:
  """Returns the config file, its variant, and the settings."""
  files = [flag for flag in config_flags if _name(flag) == "config"]
  if not files:
    raise app.UsageError(
      "--config is missing: name a file in configs/, as in --config=configs/digits.py"
    )
  file, _, variant = files[-1].partition("=")[2].partition(":")
  common = [flag for flag in config_flags if flag not in files]
  names = {_name(flag) for flag in common}
  if re.search(r"(^|,)method=", variant) or names & {"config.method", "config.method.name"}:
    raise app.UsageError("--config names a method: they are given as --methods=NAME,NAME")
  for name in sorted(names & {"config.seed", "config.seeds"}):
    raise app.UsageError(f"--{name} is given: the seeds are given as --seeds=1993,1994")
  return file, variant, common


def _name(flag: str) -> str:
  """Returns "config.seed" of "--config.seed=1993"."""
  return flag.partition("=")[0].lstrip("-")


def listing(planned: Sequence[Planned], folder: pathlib.Path) -> list[str]:
  """Returns what there is to do: a line for all, and one for each method."""
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
  return lines


def run_all(
  planned: Sequence[Planned], run: Callable[[Planned], dict], note: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[str]]:
  """Does the runs one after the other.

  Args:
    run: does, resumes or reads one.
    note: shows a line.

  Returns:
    The results, and a line for each method and reason for which there are none.
  """
  results: dict[tuple[str, int], dict] = {}
  problems = collections.defaultdict(list)
  for i, one in enumerate(planned):
    left = duration_left(planned[i:], results)
    found = f" ({one.state})" if one.state else ""
    note(f"\nrun {i + 1} of {len(planned)}: {one.label}, seed {one.seed}{found}{left}")
    try:
      if one.config is None:
        raise ConfigError(one.problem)
      results[one.label, one.seed] = run(one)
    except Exception as error:
      line = program.reason(error, one.config and one.config.batch_size)
      if program.DEBUG.value or not line:
        raise
      note(f"left out: {line}")
      problems[one.label, line].append(str(one.seed))
  return list(results.values()), [
    f"left out: {label}, seed {', '.join(seeds)}: {line}"
    for (label, line), seeds in problems.items()
  ]


def duration_left(
  planned: Sequence[Planned], results: Mapping[tuple[str, int], Mapping[str, Any]]
) -> str:
  """Returns ", about 3:10 min left", or nothing where nothing is left or known.

  A run is expected to take as long as its method with other seeds took, or else as all so far.
  """
  took = {place: result["wall_seconds"]["total"] for place, result in results.items()}
  waiting = [run for run in planned if run.config and run.state != "finished"]
  if not took or not waiting:
    return ""
  total = 0.0
  for run in waiting:
    own = [seconds for (label, _), seconds in took.items() if label == run.label]
    total += statistics.mean(own or took.values())
  return f", about {duration(total)} left"


def main(argv: list[str]) -> None:
  config_flags = [argument for argument in argv[1:] if CONFIG_FLAG.match(argument)]
  if stray := [argument for argument in argv[1:] if argument not in config_flags]:
    raise app.UsageError(
      f"unexpected argument {stray[0]!r}: settings are given as --config.FIELD=VALUE"
    )
  values = flags.FLAGS
  program.check_workdir()
  if not all(seed.isdecimal() for seed in values.seeds) or not values.seeds:
    raise app.UsageError(f"--seeds is {values.seeds}: must be whole numbers, such as 1993,1994")
  seeds = list(dict.fromkeys(map(int, values.seeds)))
  file, variant, _ = _split_flags(config_flags)
  name = re.sub(r"[^\w=.-]+", "-", f"compare-{pathlib.Path(file).stem}-{variant}").strip("-")
  folder = program.workdir(name)
  planned = plan(config_flags, overrides.parse_methods(values.methods), seeds, folder)
  from rich.console import Console
  from rich.text import Text

  console = Console()

  def note(line):
    console.print(Text(line), soft_wrap=True)

  for line in listing(planned, folder):
    note(line)
  if values.dry_run:
    return
  from fmlora_jax.experiment.run import run
  from fmlora_jax.experiment.setup import SetupCache
  from fmlora_jax.report import plots, tables

  cache = SetupCache(keeps_images=True)

  def run_one(one):  # of a finished run no more is said than that it is
    return run(one.config, one.workdir, Console(quiet=one.state == "finished"), cache)

  program.keep_programs()
  with lock.hold_lock(folder):
    results, problems = run_all(planned, run_one, note)
    if results:
      tables.show(results, console, problems)
      write_atomically(folder / TABLE, tables.markdown(results, problems) + "\n")
      plots.plot_accuracy_over_tasks(tables.group(results), folder / PLOT)
      note(f"written: {folder / TABLE}, {folder / PLOT}")
  if problems:
    program.fail(f"{len(planned) - len(results)} of {len(planned)} runs are left out", code=1)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses all flags but those of the config, which are returned: each method reads them anew."""
  config_flags, others = [], [argv[0]]
  arguments = iter(argv[1:])
  for argument in arguments:
    if CONFIG_FLAG.match(argument):
      config_flags.append(argument if "=" in argument else f"{argument}={next(arguments, '')}")
    else:
      others.append(argument)
  program.check_files(config_flags)
  name, *stray = program.parse_flags(others)
  return [name, *config_flags, *stray]


if __name__ == "__main__":
  flags.adopt_module_key_flags(program)
  flags.DEFINE_string("methods", "all", "NAME or NAME:FIELD=VALUE..., between commas.")
  flags.DEFINE_list("seeds", ["1993", "1994", "1995"], "Between commas.")
  flags.DEFINE_bool("dry_run", False, "Say what would be run, and run nothing.")
  program.start(main, parse_flags)
