"""One experiment with several seeds in one process: a whole run each, and a summary of all.

The runs follow each other and share weights, decoded images and compiled programs. Steps vmapped
over five seeds took 1.1 to 1.4 times as long on a CPU and gave other last bits: each seed folds its
own past into the projections, so no product with the backbone can be shared.
"""

import contextlib
import dataclasses
import json
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from fmlora_jax.cli import outputs
from fmlora_jax.config import Config, ConfigError
from fmlora_jax.distributed import hosts
from fmlora_jax.experiment.plan import is_only_read, state
from fmlora_jax.experiment.run import run
from fmlora_jax.experiment.setup import SetupCache
from fmlora_jax.report.runs import RunResult
from fmlora_jax.workdir import files, identity, lock

SUMMARY = "seeds.json"
SCORES = (
  *("acc", "aaa", "acc_task_mean", "aaa_task_mean"),
  *("forgetting", "forgetting_clipped", "bwt", "fwt", "learning_accuracy"),
)


def run_each(
  config: Config,
  workdir: pathlib.Path,
  console: Console | None = None,
  began: float | None = None,
) -> list[dict[str, Any]]:
  """Runs, resumes or re-reads the experiment with each of `config.seeds`; returns their results.

  Each has the folder WORKDIR/SEED, which a run of that single seed can resume. The summary of all
  is WORKDIR/seeds.json.

  Args:
    console: for the output; None takes the standard output.
    began: when the program began, by time.monotonic(); the time counts for the first seed.

  Raises:
    ConfigError: if the workdir is that of a single run, or as `run`.
    NonFiniteError: if training diverges.
  """
  if (workdir / identity.IDENTITY).exists():
    raise ConfigError(
      f"config.seeds is {config.seeds}: --workdir must be a folder for several runs, and {workdir} "
      "is that of one; choose another"
    )
  with hosts.entered_on_first(_locked(config, workdir)) as require_held:
    results = _run_each(config, workdir, console, began, require_held or (lambda: None))
    if require_held:
      require_held()
      text = json.dumps(files.jsonable(summary(results), SUMMARY), indent=1)
      files.write_atomically(workdir / SUMMARY, f"{text}\n")
  return results


@contextlib.contextmanager
def _locked(config: Config, workdir: pathlib.Path) -> Iterator[Callable[[], None] | None]:
  """Holds the lock of a folder, as `hold_lock`, unless it is only read."""
  if is_only_read(workdir, [workdir / str(seed) for seed in config.seeds]):
    yield None
    return
  outputs.require_folder("workdir", workdir)
  with lock.hold_lock(workdir) as require_held:
    yield require_held


def _run_each(config, workdir, console, began, require_held):
  console = (console or Console()) if hosts.is_first() else Console(quiet=True)
  cache, results = SetupCache(keeps_images=True), []
  for i, seed in enumerate(config.seeds):
    folder, single = workdir / str(seed), dataclasses.replace(config, seed=seed, seeds=())
    finished = state(folder) == "finished"
    require_held()
    note = f"\nseed {seed}, {i + 1} of {len(config.seeds)}{' (finished)' * finished}"
    console.print(Text(note), soft_wrap=True)
    shown = Console(quiet=True) if finished else console
    results.append(run(single, folder, shown, cache, None if results else began))
  return results


def summary(results: Sequence[RunResult]) -> dict[str, Any]:
  """Returns the contents of seeds.json: mean, std (ddof 1) and every seed's value of each score.

  Mean and std are None where a seed has no such score; the std also for a single seed.
  """
  scores = {}
  for name in SCORES:
    values = [result[name] for result in results]
    known = None not in values
    scores[name] = {
      "mean": statistics.mean(values) if known else None,
      "std": statistics.stdev(values) if known and len(values) > 1 else None,
      "by_seed": {str(result["seed"]): result[name] for result in results},
    }
  return {
    "method": results[0]["method"],
    "benchmark": results[0]["benchmark"],
    "seeds": [result["seed"] for result in results],
    **scores,
    "wall_seconds": sum(result["wall_seconds"]["total"] for result in results),
  }
