"""Progress and numbers of a run: console, metrics.jsonl, TensorBoard events.

A terminal gets a bar with the task, the epoch, images/s and the time left; a log file gets a few
plain lines. `metrics.jsonl` is the record, `events/` a view of it for TensorBoard.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from fmlora_jax.cli.output import Unfailing
from fmlora_jax.cli.text import duration, shortened
from fmlora_jax.train import metrics
from fmlora_jax.workdir import metrics_file
from fmlora_jax.workdir.events import Events
from fmlora_jax.workdir.files import explain_failure, jsonable, write_atomically
from fmlora_jax.workdir.matrix_table import matrix_table
from fmlora_jax.workdir.metrics_file import METRICS

NOT_FINITE = "non_finite.json"
EVENTS = "events"
NAME_WIDTH = 48  # characters of a task's name in its title
LINE_EVERY_S = (10.0, 60.0)  # without a terminal: the shortest and the longest pause
LINE_EVERY_SHARE = 0.02  # of the task's steps, between these two


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskPlan:
  """Facts about a task that the log shows; `index` counts from 0."""

  index: int
  num_tasks: int
  name: str
  num_classes: int
  num_train: int
  epochs: int
  steps_per_epoch: int
  batch_size: int

  @property
  def steps(self) -> int:
    return self.epochs * self.steps_per_epoch


@contextlib.contextmanager
def open_run(
  workdir: str | os.PathLike,
  *,
  console: Console | None = None,
  writes: bool = True,
  require_held: Callable[[], None] | None = None,
) -> Iterator["RunLog"]:
  """Yields the log of the run in `workdir`; closes bar and events on any exit.

  Args:
    workdir: a local or mounted folder; made if need be.
    console: for progress; None takes the standard output.
    writes: False shows nothing and writes no file: only one process of a run does.
    require_held: called before each write; see `hold_lock`.
  """
  quiet = not writes or sys.stdout is None  # closed
  if quiet or console is None:
    console = Console(quiet=True) if quiet else Console(file=cast(IO[str], Unfailing(sys.stdout)))
  log = RunLog(Path(workdir), console, writes, require_held)
  try:
    yield log
  finally:
    log.close()


class RunLog:
  """See `open_run`. Steps count over the whole run; `step` is the number of steps done before."""

  def __init__(
    self,
    workdir: Path,
    console: Console,
    writes: bool = True,
    require_held: Callable[[], None] | None = None,
  ):
    self.console, self._writes = console, writes
    self._require_held = require_held or (lambda: None)
    self._workdir = workdir
    self._events: Events | None = None
    self._bar: Progress | None = None
    self._plan: TaskPlan
    self._began, self._last_time, self._last_done = 0.0, 0.0, 0
    if writes:
      workdir.mkdir(parents=True, exist_ok=True)

  def sync(self) -> dict[str, Any]:
    """Returns what identifies all lines so far, once they are on the disk."""
    return metrics_file.sync(self._workdir)

  def truncate(self, task: int, step: int, saved: Mapping[str, Any] | None = None) -> None:
    """Drops all lines at or after (task, step), so that a resumed run logs nothing twice.

    To be called once, before the first `scalars`; with (0, 0) in a fresh run. A line tells what was
    lost; see `metrics_file.truncate`.
    """
    if not self._writes:
      return
    self._require_held()
    if loss := metrics_file.truncate(self._workdir, task, step, saved):
      self.note(loss)
    if self._events:
      self._events.close()
    self._events = Events(self._workdir / EVENTS, step)

  def scalars(self, task: int, step: int, values: Mapping[str, Any]) -> None:
    """Appends one line per value to metrics.jsonl, null for NaN, and an event for TensorBoard."""
    if not self._writes:
      return
    self._require_held()
    self._events = self._events or Events(self._workdir / EVENTS)
    when = {"task": int(task), "step": int(step)}
    lines = [when | {"name": k, "value": jsonable(float(v), k)} for k, v in values.items()]
    path, text = self._workdir / METRICS, "".join(json.dumps(line) + "\n" for line in lines)
    with explain_failure(path, len(text)), open(path, "a", encoding="utf-8") as file:
      file.write(text)
    self._events.add({name: float(value) for name, value in values.items()}, int(step))

  def not_finite(self, report: Mapping[str, Any]) -> None:
    """Writes the findings of a `NonFiniteError` to non_finite.json."""
    if report and self._writes:
      self._require_held()
      write_atomically(path := self._workdir / NOT_FINITE, json.dumps(report, indent=1) + "\n")
      self.note(f"the step's numbers and images are in {path}")

  def note(self, text: str) -> None:
    """Shows one line as it is; the terminal wraps it."""
    self.console.print(Text(text), soft_wrap=True)  # Text: "[0-9]" is no markup, ":cat:" no emoji

  def task_started(self, plan: TaskPlan) -> None:
    """Announces a task, and starts its bar on a terminal."""
    self._plan = plan
    self._began = self._last_time = time.monotonic()
    self._last_done = 0
    self.note(
      f"\n{_title(plan)}: {plan.num_classes} classes, {plan.num_train:,} training images, "
      f"{plan.epochs} epochs of {plan.steps_per_epoch} steps"
    )
    if self.console.is_terminal:
      columns = TextColumn("{task.description}", markup=False), BarColumn(24)
      detail = TextColumn("{task.fields[detail]}", style="dim", markup=False)
      self._bar = Progress(*columns, detail, console=self.console, transient=True)
      self._bar.add_task(_title(plan), total=plan.steps, detail="")
      self._bar.start()

  def phase(self, text: str) -> None:
    """Shows an activity other than training steps, such as "decoding" or "testing"."""
    if self._bar:
      self._bar.update(self._bar.task_ids[0], detail=text)
    else:
      self.note(f"  {text}")

  def progress(self, done: int, *, loss: float, images_per_second: float) -> None:
    """Shows the progress of the task; cheap enough for every dispatch.

    Args:
      done: training steps of this task so far.
      loss: of the last step or steps.
      images_per_second: over the last steps.
    """
    plan = self._plan
    epoch = max(done - 1, 0) // plan.steps_per_epoch + 1
    left = (plan.steps - done) * plan.batch_size / max(images_per_second, 1e-9)
    detail = f"epoch {epoch}/{plan.epochs}  loss {loss:.4f}  {images_per_second:,.0f} images/s"
    detail += f"  {duration(left)} left" if done < plan.steps else ""
    if self._bar:
      self._bar.update(self._bar.task_ids[0], completed=done, detail=detail)
    elif self._line_is_due(done):
      self.note(f"  step {done}/{plan.steps}  {detail}")

  def task_ended(
    self,
    accuracy: metrics.Accuracy,
    n_test: metrics.Counts,
    facts: Mapping[str, Any] | None = None,
    names: Sequence[str] = (),
  ) -> None:
    """Shows the accuracy matrix so far, its summary and the method's facts about the task.

    Args:
      names: of all tasks, for the rows of the matrix.
    """
    self._stop_bar()
    learned = metrics.num_learned(accuracy)
    accuracy, n_test = accuracy[:learned, :learned], n_test[:learned]
    self.note(f"{_title(self._plan)}: done in {duration(time.monotonic() - self._began)}")
    if facts:
      self.note("  " + ", ".join(f"{name} {_short(value)}" for name, value in facts.items()))
    self.console.print(matrix_table(accuracy, n_test, self.console, names[:learned]))
    acc, aaa = metrics.acc(accuracy, n_test), metrics.aaa(accuracy, n_test)
    line = f"  accuracy {acc:.2f}, mean so far {aaa:.2f}"
    if learned > 1:
      line += f", forgetting {metrics.forgetting(accuracy):.2f}"
    self.note(line)

  def close(self) -> None:
    """Stops the bar and closes the events; may be called twice."""
    self._stop_bar()
    if self._events:
      self._events.close()
      self._events = None

  def _stop_bar(self) -> None:
    if self._bar:
      self._bar.stop()
      self._bar = None

  def _line_is_due(self, done: int) -> bool:
    now = time.monotonic()
    waited, share = now - self._last_time, (done - self._last_done) / self._plan.steps
    least, most = LINE_EVERY_S
    due = waited >= most or (waited >= least and share >= LINE_EVERY_SHARE)
    if due or done >= self._plan.steps:
      self._last_time, self._last_done = now, done
      return True
    return False


def _title(plan: TaskPlan) -> str:
  return f"task {plan.index + 1}/{plan.num_tasks} ({shortened(plan.name, NAME_WIDTH)})"


def _short(value: Any) -> str:
  value = jsonable(value, "facts")
  return f"{value:.4g}" if isinstance(value, float) else str(value)
