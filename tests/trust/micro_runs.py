"""Runs of seconds on made-up tasks and the tiny ViT of the tests, for what must be run often.

`in_child` runs one in a process of its own, which may kill itself at a named point.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import pathlib
import signal
from collections.abc import Iterator
from unittest import mock

import conftest
import jax
from orbax.checkpoint._src.path import atomicity

from fmlora_jax import config, methods, tasks
from fmlora_jax.cli import config_files
from fmlora_jax.experiment.run import run
from fmlora_jax.experiment.session import Session
from fmlora_jax.experiment.setup import SetupCache
from fmlora_jax.experiment.task_loop import TaskLearner, TaskLoop
from fmlora_jax.report import plots
from fmlora_jax.train.evaluator import Evaluator, TestSets
from fmlora_jax.workdir import checkpoint, files, identity, log, result_file, step_folders

EVERY = 3  # steps between checkpoints
CHANGES = {
  "weights": {"tag": "random"},
  "checkpoint": {"every_steps": EVERY},
  "input": {"steps_per_dispatch": 2},
}
METHODS = {
  "fm_lora": {"drs": {"strategy": "gumbel", "selector_steps": 5}}
  | {"head": {"alignment": {"epochs": 5}, "num_centroids": 3}},
  "inflora": {"method": {"rank": 3}},
  "hide_prompt": {
    "method": {"layers": (0, 1), "prompt_length": 2, "num_centroids": 4, "repulsion": 0.05}
    | {"identity": {"epochs": 3, "learning_rate": 0.01}}
  },
  "sd_lora": {"method": {"rank": 3}},
  "lora": {"method": {"rank": 3}},
}
# where a run kills itself: (owner, function, before or after its n-th call)
POINTS: dict[str, tuple[object, str, str, int]] = {
  "before the workdir is claimed": (identity, "claim_workdir", "before", 1),
  "after the workdir is claimed": (identity, "claim_workdir", "after", 1),
  "before the first save": (checkpoint.CheckpointStore, "save", "before", 1),
  "in a save, all written and not yet named": (
    atomicity.AtomicRenameTemporaryPath, "finalize", "before", 3
  ),
  "in a save, named and not yet synced": (files, "fsync_tree", "before", 2),
  "in a save, not yet read again": (checkpoint.CheckpointStore, "_load", "before", 2),
  "in a save, before others are dropped": (step_folders.StepFolders, "_drop", "before", 1),
  "in a save, one of the others half dropped": (step_folders.StepFolders, "_drop", "half", 2),
  "after a save within a task": (checkpoint.CheckpointStore, "save", "after", 1),
  "before metrics": (log.RunLog, "scalars", "before", 8),
  "in a line of metrics": (log.RunLog, "scalars", "half", 8),
  "after metrics": (log.RunLog, "scalars", "after", 8),
  "after begin_task": (TaskLearner, "train", "before", 2),
  "after training, before end_task": (TaskLearner, "end", "before", 2),
  "after end_task": (TaskLearner, "_adopt", "before", 4),
  "in an evaluation": (Evaluator, "correct", "before", 2),
  "after an evaluation": (TestSets, "count_correct", "after", 1),
  "before a task's row of metrics": (log.RunLog, "task_ended", "before", 2),
  "after a task's row of metrics": (TaskLoop, "_measure", "after", 2),
  "after the save of a task's end": (Session, "save", "after", 3),
  "at the switch of tasks": (TaskLoop, "_learn_task", "before", 2),
  "before the plots": (plots, "write_plots", "before", 1),
  "before result.json": (result_file, "write_result", "before", 1),
  "in result.json": (result_file, "write_atomically", "half", 1),
}  # fmt: skip


def settings(method: str = "fm_lora", **changes) -> config.Config:
  values = config_files.merged(conftest.SETTINGS, CHANGES)
  values = config_files.merged(values, METHODS[method])
  values = config_files.merged(values, {"method": {"name": method}})
  return methods.build_config(config_files.merged(values, changes))


@contextlib.contextmanager
def small_parts() -> Iterator[None]:
  """Runs within have made-up tasks and the tiny ViT, whatever their config names."""
  sequence = conftest.made_up_sequence()
  tasks_made = mock.patch.object(tasks, "make", lambda *args, **kwargs: sequence)
  with conftest.tiny_vit_loaded(), tasks_made:
    yield


def in_child(
  settings: config.Config, workdir: pathlib.Path, point: str | None = None
) -> multiprocessing.Process:
  """Starts the run in a process, forked from one that has imported all and computed nothing."""
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["micro_runs"])
  child = context.Process(target=_run, args=(settings, workdir, point))
  child.start()
  return child


def _run(settings: config.Config, workdir: pathlib.Path, point: str | None) -> None:
  quiet = os.open(os.devnull, os.O_WRONLY)
  os.dup2(quiet, 1)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  with small_parts(), _killing(point):
    run(settings, workdir)


@contextlib.contextmanager
def _killing(point: str | None) -> Iterator[None]:
  if point is None:
    yield
    return
  owner, name, when, calls = POINTS[point]
  original, seen = getattr(owner, name), [0]

  @functools.wraps(original)
  def function(*args, **kwargs):
    seen[0] += 1
    if seen[0] == calls and when == "before":
      _die()
    if seen[0] == calls and when == "half":
      _half_done(name, *args)
    result = original(*args, **kwargs)
    if seen[0] == calls:
      _die()
    return result

  with mock.patch.object(owner, name, function):
    yield


def _half_done(name: str, owner, *rest) -> None:
  """Leaves what a kill in the middle of a function leaves."""
  if name == "_drop":
    next(path for path in sorted(rest[0].rglob("*")) if path.is_file()).unlink()
  elif name == "scalars":
    with open(owner._workdir / log.METRICS, "a") as file:
      file.write('{"task": ')
  else:  # write_atomically(path, text)
    owner.with_name(f".{owner.name}.{os.getpid()}").write_text(rest[0][:9])
  _die()


def _die() -> None:
  os.kill(os.getpid(), signal.SIGKILL)


def outcome(workdir: pathlib.Path) -> dict:
  """Returns all that two runs must have in common, to the bit."""
  result = json.loads((workdir / "result.json").read_text())
  del result["wall_seconds"]
  del result["git_commit"], result["protocol"]["code"]  # someone may commit meanwhile
  digests = {
    path.name: json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]["digests"]
    for path in sorted((workdir / "checkpoints").iterdir())
  }
  return {"result": result, "metrics": (workdir / "metrics.jsonl").read_text(), "kept": digests}


def resumed(settings: config.Config, workdir: pathlib.Path, cache: SetupCache) -> dict:
  """Runs in this process to the end; returns its outcome."""
  run(settings, workdir, cache=cache)
  return outcome(workdir)
