"""What a run shows and leaves behind: progress, metrics.jsonl, TensorBoard events, result.json.

On a terminal a bar with the task, the epoch, images/s and the time left; elsewhere plain lines,
few enough for a log file. `metrics.jsonl` is the truth, `events/` a view of it for TensorBoard.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from fmlora_jax.train import metrics
from fmlora_jax.workdir import disk
from fmlora_jax.workdir.events import Events

RESULT = "result.json"
METRICS = "metrics.jsonl"
NOT_FINITE = "non_finite.json"
EVENTS = "events"
FIELDS = (  # noqa: SIM905  of every result; a literal would take a line for each
  "method benchmark scenario split_id manifest_sha256 seed class_order task_names n_test accuracy "
  "acc aaa acc_task_mean aaa_task_mean forgetting forgetting_clipped bwt fwt learning_accuracy "
  "params rehearsal_bytes passes caveats weights normalisation augmentation "
  "epochs batch_size wall_seconds params_sha256 devices versions git_commit config finished"
).split()
LINE_EVERY_S = (10.0, 60.0)  # where there is no terminal: at least and at most
LINE_EVERY_SHARE = 0.02  # of the task's steps, between the two


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskPlan:
  """What the log must know of a task before it starts; `index` counts from 0."""

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
  workdir: str | os.PathLike, *, console: Console | None = None, writes: bool = True
) -> Iterator["RunLog"]:
  """Yields the log of the run in `workdir`, made if need be; closes bar and events on any exit.

  Args:
    workdir: a local or mounted folder.
    console: where to show; None takes the standard output.
    writes: False shows nothing and leaves no file: of all processes of a run one writes.
  """
  log = RunLog(Path(workdir), (console or Console()) if writes else Console(quiet=True), writes)
  try:
    yield log
  finally:
    log.close()


class RunLog:
  """See `open_run`. Steps count over the whole run; `step` is the number of steps done before."""

  def __init__(self, workdir: Path, console: Console, writes: bool = True):
    self.console, self._writes = console, writes
    self._workdir = workdir
    self._events = self._plan = self._bar = None
    self._began = self._last_time = 0.0
    self._last_done = 0
    if writes:
      workdir.mkdir(parents=True, exist_ok=True)

  def truncate(self, task: int, step: int) -> None:
    """Drops what was logged at or after (task, step); call it once, before the first `scalars`.

    A resumed run then logs nothing twice; a fresh run calls it with (0, 0). A last line that was
    cut off by a crash goes too, and what was said of the end of `task`, which comes again.
    """
    if not self._writes:
      return
    path = self._workdir / METRICS
    if path.exists():
      with open(path, encoding="utf-8", errors="replace") as lines:
        kept = [line for line in lines if _is_before(line, task, step)]
      replace(path, "".join(kept))
    if self._events:
      self._events.close()
    self._events = Events(self._workdir / EVENTS, step)

  def scalars(self, task: int, step: int, values: Mapping[str, Any]) -> None:
    """Appends one line per value to metrics.jsonl (null for NaN), and TensorBoard events."""
    if not self._writes:
      return
    self._events = self._events or Events(self._workdir / EVENTS)
    place = {"task": int(task), "step": int(step)}
    lines = [place | {"name": k, "value": plain(float(v), k)} for k, v in values.items()]
    path, text = self._workdir / METRICS, "".join(json.dumps(line) + "\n" for line in lines)
    with disk.writing(path, len(text)), open(path, "a", encoding="utf-8") as file:
      file.write(text)
    for name, value in values.items():
      self._events.add(name, float(value), int(step))

  def not_finite(self, found: Mapping[str, Any]) -> None:
    """Writes what a `NonFiniteError` found to non_finite.json."""
    if found and self._writes:
      path = self._workdir / NOT_FINITE
      replace(path, json.dumps(found, indent=1) + "\n")
      self.note(f"the step's numbers and images are in {path}")

  def note(self, text: str) -> None:
    """Shows one line as it is; long ones are left to the terminal to wrap."""
    self.console.print(Text(text), soft_wrap=True)  # Text: "[0-9]" is no markup, ":cat:" no emoji

  def task_started(self, plan: TaskPlan) -> None:
    """Shows what task comes, and on a terminal starts its bar."""
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
    """Says what goes on besides training steps, such as "decoding" or "testing"."""
    if self._bar:
      self._bar.update(self._bar.task_ids[0], detail=text)
    else:
      self.note(f"  {text}")

  def progress(self, done: int, *, loss: float, images_per_second: float) -> None:
    """Shows how far the task is; call it as often as you like.

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
    self, accuracy: metrics.Accuracy, n_test: metrics.Counts, facts: Mapping[str, Any] | None = None
  ) -> None:
    """Shows the accuracy matrix so far, its summary and what the method says of the task."""
    self._stop_bar()
    learned = metrics.num_learned(accuracy)
    part, n_part = accuracy[:learned, :learned], n_test[:learned]
    self.note(f"{_title(self._plan)}: done in {duration(time.monotonic() - self._began)}")
    if facts:
      self.note("  " + ", ".join(f"{name} {_short(value)}" for name, value in facts.items()))
    self.console.print(matrix_table(part, n_part, self.console))
    acc, aaa = metrics.acc(part, n_part), metrics.aaa(part, n_part)
    line = f"  accuracy {acc:.2f}, mean so far {aaa:.2f}"
    if learned > 1:
      line += f", forgetting {metrics.forgetting(part):.2f}"
    self.note(line)

  def close(self) -> None:
    """Stops the bar, closes the events; safe to call twice."""
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


def matrix_table(accuracy: metrics.Accuracy, n_test: metrics.Counts, console: Console) -> Table:
  """Returns the matrix in percent as a table that fits the console: fewer digits, then columns."""
  tasks = len(accuracy)
  ends = [[*range(k), *range(tasks - k, tasks)] for k in range(min(8, tasks // 2), 0, -1)]
  choices = [(1, range(tasks)), (0, range(tasks)), *((0, shown) for shown in ends)]
  endless = console.options.update(width=10_000)  # measure() never answers more than the width
  for digits, shown in choices if tasks <= 24 else choices[2:]:
    table = _table(accuracy, metrics.pooled(accuracy, n_test), list(shown), digits)
    if console.measure(table, options=endless).maximum <= console.width:
      break
  return table


def _table(accuracy: metrics.Accuracy, total: np.ndarray, shown: list[int], digits: int) -> Table:
  """Returns the rows and columns `shown`, with an ellipsis where some are left out."""
  cuts = [i for i, task in enumerate(shown) if i and task != shown[i - 1] + 1]
  table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1), header_style="dim")

  def cells(values, gap="…"):
    values = list(values)
    for i in cuts:
      values.insert(i, gap)
    return values

  for name in ["after task", *cells(f"{task + 1}" for task in shown), "all"]:
    table.add_column(name, justify="right", no_wrap=True)
  for i, row in enumerate(shown):
    if i in cuts:
      table.add_row(*["…"] * len(table.columns))
    numbers = cells("" if row < j else f"{100 * accuracy[row, j]:.{digits}f}" for j in shown)
    is_last = row == len(accuracy) - 1
    table.add_row(f"{row + 1}", *numbers, f"{total[row]:.2f}", style="bold" if is_last else None)
  return table


def write_result(workdir: str | os.PathLike, result: Mapping[str, Any]) -> Path:
  """Writes result.json in one piece: readers see the old file or the whole new one.

  NumPy and JAX values become plain numbers and lists, NaN and infinity null.

  Raises:
    TypeError: on a value that JSON can't hold, with its path.
  """
  path = Path(workdir) / RESULT
  fields = [f"  {json.dumps(k)}: {json.dumps(plain(v, k))}" for k, v in result.items()]
  replace(path, "{\n" + ",\n".join(fields) + "\n}\n")
  return path


def read_result(path: str | os.PathLike) -> dict[str, Any]:
  """Returns the finished result of a run, given as its folder or its result.json.

  Raises:
    ValueError: if there is none, or the run is not finished, or the file is damaged; one line.
  """
  path = Path(path)
  file = path / RESULT if path.is_dir() else path
  mend = "delete the file, and the command of the run makes it again"
  try:
    result = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    if not path.exists():
      raise ValueError(f"{path}: no such file or folder") from None
    raise ValueError(f"{path}: no {RESULT}; a run writes it at its very end") from None
  except (OSError, ValueError) as error:  # json and unicode errors are ValueErrors
    raise ValueError(f"{file}: can't be read as a result ({error}); {mend}") from None
  if not isinstance(result, dict) or not result.get("finished"):
    raise ValueError(f"{file}: not the result of a finished run; {mend}")
  if missing := [name for name in FIELDS if name not in result]:
    raise ValueError(f"{file}: lacks {', '.join(missing)}, of another version?; {mend}")
  return result


def plain(value: Any, path: str) -> Any:
  """Returns `value` as JSON holds it, NaN and infinity as None; `path` is for the error."""
  if isinstance(value, Mapping):
    return {str(k): plain(v, f"{path}.{k}") for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(v, f"{path}[{i}]") for i, v in enumerate(value)]
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if hasattr(value, "__array__"):  # NumPy and JAX arrays and scalars
    return plain(np.asarray(value).tolist(), path)
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if value is None or isinstance(value, (bool, int, str)):
    return value
  raise TypeError(f"{path} is of type {type(value).__name__}: must be something JSON can hold")


def printable(text: str) -> str:
  """Returns one line without control characters, lone surrogates and repeated blanks."""
  return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def duration(seconds: float) -> str:
  """Returns "8.1 s", "2:05 min" or "1:02:05 h"."""
  if seconds < 59.95:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes}:{rest:02d} min"
  return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def replace(path: Path, text: str) -> None:
  """Writes `path` so that a crash leaves the old or the new text, never a mixture.

  Raises:
    ConfigError: if the disk is full; the old text is then still there.
  """
  draft = path.with_name(f"{_draft_start(path)}{os.getpid()}")
  with disk.writing(path, len(text)):
    with open(draft, "w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(draft, path)
    disk.sync_name(path)


def is_draft(path: Path, of: Path) -> bool:
  """Returns whether `path` is what `replace` left when it was killed while it wrote `of`."""
  return path.name.startswith(_draft_start(of))


def _draft_start(path: Path) -> str:
  return f".{path.name}."


def _title(plan: TaskPlan) -> str:
  return f"task {plan.index + 1}/{plan.num_tasks} {plan.name}"


def _short(value: Any) -> str:
  value = plain(value, "facts")
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_before(line: str, task: int, step: int) -> bool:
  """Returns whether a line is whole, and of an earlier task or a step of this one's training."""
  try:
    record = json.loads(line)
    if not line.endswith("\n") or record["task"] > task:
      return False
    is_step = record["name"].startswith("train/") and record["step"] < step
    return record["task"] < task or is_step
  except (ValueError, KeyError, TypeError):
    return False
