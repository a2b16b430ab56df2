"""Description of a run for --dry_run: nothing is loaded, trained or written."""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from fmlora_jax.cli import outputs
from fmlora_jax.config import Config
from fmlora_jax.distributed import memory
from fmlora_jax.experiment import preflight, provenance
from fmlora_jax.workdir.identity import (
  ENVIRONMENT,
  IDENTITY,
  changes,
  check_folder,
  read_identity,
)
from fmlora_jax.workdir.result_file import RESULT


def state(workdir: pathlib.Path) -> str:
  """Returns the progress of earlier sessions in a workdir: "finished", "begun", or ""."""
  if os.path.isfile(workdir / RESULT):
    return "finished"
  return "begun" if os.path.isfile(workdir / IDENTITY) else ""


def is_only_read(folder: pathlib.Path, runs: Iterable[pathlib.Path]) -> bool:
  """Returns whether all runs in a folder have finished and nothing can be written there."""
  return all(state(run) == "finished" for run in runs) and not outputs.is_writable(folder)


def describe(config: Config, workdir: pathlib.Path) -> Iterator[str]:
  """Yields lines on a run, or one for each of several seeds, that `config` asks for.

  Raises:
    ConfigError: if a setting or a folder is invalid, as far as no data are needed to see it.
  """
  preflight.check(config, memory.host_memory())
  tasks, weights = config.tasks, config.weights
  count = f"{tasks.num_tasks} task{'s' if tasks.num_tasks > 1 else ''}"
  yield f"benchmark  {tasks.benchmark}, {tasks.scenario}, {count}, measured on {tasks.evaluate_on}"
  yield f"method     {config.method.name}, {config.epochs} epochs, batches of {config.batch_size}"
  source = f" from {weights.path}" if weights.path else ""
  yield f"weights    {weights.tag or weights.architecture}{source}"
  missing = preflight.missing_files(config)
  yield from (f"missing    {problem}" for problem in missing)
  for seed in config.seeds or (config.seed,):
    folder = workdir / str(seed) if config.seeds else workdir
    one = dataclasses.replace(config, seed=seed, seeds=())
    yield f"seed       {seed}, workdir {folder}: {_action(one, folder, missing)}"


def _action(config: Config, workdir: pathlib.Path, missing: Sequence[str]) -> str:
  check_folder(workdir)
  if missing:
    return "would be refused, for what is missing"
  if not state(workdir):
    return "would start"
  now = {"config": dataclasses.asdict(config), ENVIRONMENT: provenance.environment()}
  before = read_identity(workdir, now)
  if changed := changes({name: before[name] for name in now}, now):
    return f"would be refused, the folder belongs to another run ({'; '.join(changed)})"
  return "would print its result" if state(workdir) == "finished" else "would resume"
