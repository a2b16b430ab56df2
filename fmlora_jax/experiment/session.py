"""One session of a run: what it has reached, restored from the newest checkpoint and saved."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from fmlora_jax.distributed import hosts
from fmlora_jax.experiment import guards
from fmlora_jax.train import metrics
from fmlora_jax.train.step import TrainState
from fmlora_jax.types import Variables
from fmlora_jax.workdir import checkpoint, files

GROUPS = ("shared", "cur", "mem")  # of `Variables`; "frozen" is a function of them


@dataclasses.dataclass
class Progress:
  """The state of a run besides arrays; JSON in every checkpoint.

  Attributes:
    task: the current one, from 0.
    training: whether the checkpoint lies within the task, not at its end.
    facts: of the method about each task so far.
    correct: rows of counts of right answers, [after task][test set].
    ahead: dil only: right answers on each task's test set just before it is learned.
    baseline: dil only: the same with the untrained head.
    seconds: wall time of all sessions up to this checkpoint, as of `clock.Clock`; the time after a
      session's last checkpoint is lost with its work.
    trained: trained parameters of the last task.
    devices: in words; one entry for each session that ran on others than the one before.
    code: the same of the commit and the versions of libraries.
    val_read: whether the method read validation images.
    logged: size and hash of metrics.jsonl, as of `RunLog.sync`.
  """

  task: int = 0
  training: bool = False
  facts: list[dict] = dataclasses.field(default_factory=list)
  correct: list[list[int]] = dataclasses.field(default_factory=list)
  ahead: list[int | None] = dataclasses.field(default_factory=list)
  baseline: list[int | None] = dataclasses.field(default_factory=list)
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  trained: int = 0
  devices: list[str] = dataclasses.field(default_factory=list)
  code: list[str] = dataclasses.field(default_factory=list)
  val_read: bool = False
  logged: dict[str, Any] = dataclasses.field(default_factory=dict)

  def counts(self, num_tasks: int) -> Int[np.ndarray, "T T"]:
    """Returns right answers, [after task][test set]; 0 where nothing was measured."""
    counts = np.zeros((num_tasks, num_tasks), int)
    for i, row in enumerate(self.correct):
      counts[i, : len(row)] = row
    return counts

  def matrix(self, n_test: Int[np.ndarray, " T"]) -> Float[np.ndarray, "T T"]:
    """Returns the accuracy matrix so far.

    Args:
      n_test: images of each test set.
    """
    return metrics.accuracy_matrix(self.counts(len(n_test)), n_test, len(self.correct))


class Session:
  """Restores a run from its newest checkpoint, and saves it.

  Attributes:
    progress: of the run.
    variables: of the method; empty before the run has begun.
  """

  def __init__(self, store: checkpoint.CheckpointStore):
    self._store = store
    self.progress = Progress()
    self.variables = Variables(frozen={}, shared={}, cur={}, mem={})

  def restore(self, init_state: Callable[[Variables, int], TrainState]) -> TrainState | None:
    """Restores progress and variables from the newest checkpoint, if there is one.

    Args:
      init_state: (variables, task) -> the state of training at the start of the task.

    Returns:
      The state of training where the checkpoint lies within a task.

    Raises:
      ConfigError: if the checkpoint differs between processes.
    """
    snapshot = self._store.latest()
    _assert_same(snapshot)
    if snapshot is None:
      return None
    self.progress, arrays = Progress(**snapshot.record["progress"]), snapshot.arrays
    groups = {name: checkpoint.unflatten(arrays, name) for name in GROUPS}
    self.variables = Variables(frozen={}, **groups)
    if not self.progress.training:
      self.progress.task += 1
      return None
    template = jax.eval_shape(lambda v: init_state(v, self.progress.task), self.variables)
    return template.replace(
      params={"shared": groups["shared"], "cur": groups["cur"]},
      opt_state=checkpoint.fill(template.opt_state, arrays, "opt_state"),
      step=arrays["step"],
    )

  def save(self, step: int, seconds: Mapping[str, float], state: TrainState | None = None) -> None:
    """Saves progress and variables.

    Args:
      step: training steps of the whole run so far.
      seconds: as of `Progress.seconds`.
      state: of training, within a task; at a task's end None, and the checkpoint is permanent.

    Raises:
      NonFiniteError: if an array is not finite.
    """
    trees = {name: getattr(self.variables, name) for name in GROUPS}
    if state is not None:
      trees |= {"opt_state": state.opt_state, "step": state.step}
    arrays = checkpoint.flatten(trees)
    guards.require_finite(arrays, f"at the end of step {step} of the run")
    self.progress.training, self.progress.seconds = state is not None, dict(seconds)
    record = {"progress": dataclasses.asdict(self.progress)}
    snapshot = checkpoint.Snapshot(arrays=arrays, record=record)
    self._store.save(step, snapshot, keep=state is None)

  def require_free_space(self, num_tasks: int) -> None:
    """Refuses to begin where a checkpoint for each task that is left, and one more, do not fit."""
    groups = [getattr(self.variables, name) for name in GROUPS]
    left = num_tasks - self.progress.task
    need, purpose = (left + 1) * checkpoint.num_bytes(groups), f"checkpoints of {left} tasks"
    hosts.run_on_first(
      functools.partial(files.require_free_space, self._store.folder, need, purpose)
    )


def _assert_same(snapshot: checkpoint.Snapshot | None) -> None:
  """Refuses checkpoints that differ between processes."""
  fix = "--workdir must be a folder that all share"
  hosts.assert_same_on_all({"checkpoint.step": snapshot and snapshot.record["step"]}, fix=fix)
  if snapshot:
    facts = {name: snapshot.record[name] for name in ("progress", "digests")}
    hosts.assert_same_on_all({"checkpoint": facts}, fix=fix)
