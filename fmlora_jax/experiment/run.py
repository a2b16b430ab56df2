"""A run: tasks learned in order, and every task so far measured after each one."""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from fmlora_jax.cli.text import task_list
from fmlora_jax.config import OWN_FIELDS, Config, ConfigError
from fmlora_jax.distributed import hosts
from fmlora_jax.experiment import provenance
from fmlora_jax.experiment.clock import Clock
from fmlora_jax.experiment.result import build_result
from fmlora_jax.experiment.session import Session
from fmlora_jax.experiment.setup import RunSetup, SetupCache
from fmlora_jax.experiment.task_loop import TaskLoop
from fmlora_jax.report import notes
from fmlora_jax.tasks import task_file
from fmlora_jax.train import mesh as mesh_lib
from fmlora_jax.train.evaluator import TestSets
from fmlora_jax.workdir import checkpoint, files, lock, result_file
from fmlora_jax.workdir import identity as identity_lib
from fmlora_jax.workdir import log as writer


def run(
  config: Config,
  workdir: pathlib.Path | str,
  console: Console | None = None,
  cache: SetupCache | None = None,
  began: float | None = None,
) -> dict[str, Any]:
  """Runs, resumes or re-reads the experiment in `workdir`; returns the contents of result.json.

  Args:
    console: for the output; None takes the standard output.
    cache: of several runs, which then share what they can; None is for a single run.
    began: when the program began, by time.monotonic(); None is now.

  Raises:
    ConfigError: if a setting, a file or the workdir is invalid, in one line; also if another
      process runs in the workdir.
    NonFiniteError: if training diverges.
    Stopped: if the program was asked to stop; what was trained is saved.
    FrozenError: if training changes a frozen array.
  """
  workdir = _checked(config, workdir)
  is_finished = hosts.run_on_first(functools.partial(identity_lib.check_folder, workdir))
  locked = contextlib.nullcontext() if is_finished else lock.hold_lock(workdir)
  with (
    Clock(time.monotonic() if began is None else began) as clock,
    hosts.entered_on_first(locked) as require_held,
  ):
    setup = (cache or SetupCache()).setup(config, clock.kind)
    task_text = task_file.dump_task_file(setup.sequence)
    identity = {
      "config": dataclasses.asdict(config),
      "weights_sha256": setup.info.sha256,
      "manifest_sha256": setup.sequence.manifest_sha256,
      "task_file_sha256": hashlib.sha256(task_text.encode()).hexdigest(),
      "environment": provenance.environment(),
    }
    hosts.assert_same_on_all(identity | {"versions": provenance.versions()}, besides=OWN_FIELDS)
    hosts.run_on_first(functools.partial(identity_lib.claim_workdir, workdir, identity))
    is_finished = hosts.run_on_first((workdir / result_file.RESULT).is_file)  # also meanwhile
    if not is_finished:
      write = functools.partial(files.write_atomically, workdir / task_file.FILE, task_text)
      hosts.run_on_first(write)
    if not (workdir / (result_file.RESULT if is_finished else task_file.FILE)).exists():
      raise ConfigError(
        f"workdir {workdir} is not shared with process 0: put it on storage that all hosts share"
      )
    with writer.open_run(
      workdir, console=console, writes=hosts.is_first(), require_held=require_held
    ) as log:
      _describe(setup, workdir, log)
      if is_finished:
        result = result_file.read_result(workdir)
        identity_lib.require_result(workdir / result_file.RESULT, result, _facts(setup))
        log.note("finished before; its result:")
      else:
        result = _learn(setup, workdir, identity, log, clock, require_held)
      for line in notes.costs(result):
        log.note(line)
  return result


def _checked(config: Any, workdir: Any) -> pathlib.Path:
  """Returns the workdir, after a look at what a Python program has passed."""
  if not isinstance(config, Config):
    raise ConfigError(
      f"config is {config!r:.60}: must be a Config, such as fmlora_jax.load_config('digits')"
    )
  if config.seeds:
    raise ConfigError(f"config.seeds is {config.seeds}: must be (), as this is one run; set seed")
  if not isinstance(workdir, (str, pathlib.Path)) or not str(workdir):
    raise ConfigError(f"workdir is {workdir!r:.60}: must be the path of a folder")
  return pathlib.Path(workdir)


def _facts(setup: RunSetup) -> dict[str, Any]:
  """Returns what the run's result has and is known before training."""
  config, sequence = setup.config, setup.sequence
  return {
    "config": dataclasses.asdict(config),
    "weights_sha256": setup.info.sha256,
    "manifest_sha256": sequence.manifest_sha256,
    "scenario": sequence.scenario,
    "split_id": sequence.split_id,
    "class_order": sequence.class_order,
    "n_test": [len(getattr(task, config.tasks.evaluate_on)) for task in sequence.tasks],
  }


def _describe(setup: RunSetup, workdir: pathlib.Path, log: writer.RunLog) -> None:
  """Shows what is run."""
  config, sequence, info = setup.config, setup.sequence, setup.info
  log.note(f"devices    {provenance.devices(setup.mesh)}")
  log.note(f"backbone   {info.tag}, sha256 {info.sha256}, {setup.sizes.depth} blocks")
  log.note(f"benchmark  {sequence.split_id}, manifest {sequence.manifest_sha256[:16]}")
  log.note(f"scenario   {sequence.scenario}, {len(sequence.tasks)} tasks, seed {config.seed}")
  log.note(f"tasks      {task_list([task.name for task in sequence.tasks])}")
  log.note(f"input      {provenance.images(setup.loader)}")
  log.note(f"method     {config.method.name}, workdir {workdir}")
  log.note(f"passes     {provenance.passes(setup.method.passes)}")
  for caveat in setup.caveats:
    log.note(f"caveat     {caveat}")


def _learn(
  setup: RunSetup,
  workdir: pathlib.Path,
  identity: dict[str, Any],
  log: writer.RunLog,
  clock: Clock,
  require_held: Callable[[], None] | None,
) -> dict[str, Any]:
  """Learns the tasks that are left; writes plots and result.json, and returns its contents."""
  store = checkpoint.CheckpointStore(
    workdir,
    mesh_lib.replicated(setup.mesh),
    identity=identity,
    on_damage=setup.config.checkpoint.on_damage,
    note=log.note,
    require_held=require_held,
  )
  session = Session(store)
  tests = TestSets(
    setup.loader,
    setup.config.tasks.evaluate_on,
    setup.method,
    setup.weights,
    batch_size=mesh_lib.padded_size(setup.config.eval_batch_size, setup.mesh),
    center=setup.center,
    mesh=setup.mesh,
  )
  TaskLoop(setup, session, tests, log, clock).run()
  result = build_result(setup, session.progress, session.variables, tests.sizes)
  if require_held:  # in the first process
    require_held()
    try:
      from fmlora_jax.report import plots  # matplotlib takes a second to import

      plots.write_plots(result, workdir)
    except Exception as error:  # plots repeat result.json: an error must not lose it
      log.note(f"warning    no plots: {type(error).__name__}: {error}")
    result["wall_seconds"] = clock.seconds()
    result_file.write_result(workdir, result)  # last: it marks the run as finished
  return result
