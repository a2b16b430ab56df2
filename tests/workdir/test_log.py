"""What a run writes and shows: on a terminal, in a log file, after a crash."""

import errno
import io
import json
import os
import re
import struct
import types

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from fmlora_jax.train import metrics
from fmlora_jax.workdir import log as writer
from fmlora_jax.workdir.matrix_table import matrix_table

PLAN = writer.TaskPlan(
  index=1,
  num_tasks=5,
  name="bird[0-9] :cat:",
  num_classes=2,
  num_train=1000,
  epochs=3,
  steps_per_epoch=10,
  batch_size=100,
)


def plain_console(width=80):
  return Console(file=io.StringIO(), width=width, force_terminal=False)


def terminal(width=100):
  return Console(file=io.StringIO(), width=width, force_terminal=True)


def shown(log):
  return log.console.file.getvalue()


def lines_of(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events_of(workdir):
  """Returns the events of all files, oldest file first."""
  events = []
  for path in sorted((workdir / "events").iterdir()):
    data = path.read_bytes()
    while data:  # a TFRecord: length, its checksum, the event, its checksum
      (length,) = struct.unpack("<Q", data[:8])
      events.append(Event.FromString(data[12 : 12 + length]))
      data = data[16 + length :]
  return events


def matrix(tasks):
  n_test = np.arange(50, 50 + tasks)
  return metrics.accuracy_matrix(np.tile(n_test - 7, (tasks, 1)), n_test), n_test


def test_scalars_become_json_lines_and_events(tmp_path):
  with writer.open_run(tmp_path / "new" / "run", console=plain_console()) as log:
    log.scalars(0, 7, {"train/loss": np.float32(0.5), "lr": 1})
    log.scalars(1, 8, {"train/loss": float("nan")})
  assert lines_of(tmp_path / "new" / "run") == [
    {"task": 0, "step": 7, "name": "train/loss", "value": 0.5},
    {"task": 0, "step": 7, "name": "lr", "value": 1.0},
    {"task": 1, "step": 8, "name": "train/loss", "value": None},
  ]
  values = [
    (e.step, v.simple_value) for e in events_of(tmp_path / "new" / "run") for v in e.summary.value
  ]
  assert values[:2] == [(7, 0.5), (7, 1.0)]


def test_events_that_the_disk_refuses_stop_and_the_run_goes_on(tmp_path, monkeypatch):
  refused = []

  def refuse(self, event):
    refused.append(event)
    raise OSError(errno.ENOSPC, "no space")

  with writer.open_run(tmp_path, console=plain_console()) as log:
    log.truncate(0, 0)
    log.scalars(0, 0, {"loss": 0.0})
    monkeypatch.setattr(EventsWriter, "write_event", refuse)
    for step in range(1, 40):
      log.scalars(0, step, {"loss": step})
  assert len(refused) == 1 and len(lines_of(tmp_path)) == 40
  assert [v.simple_value for e in events_of(tmp_path) for v in e.summary.value] == [0.0]


def test_a_resumed_run_logs_nothing_twice(tmp_path):
  with writer.open_run(tmp_path, console=plain_console()) as log:
    log.truncate(0, 0)
    for task, step in [(0, 0), (0, 1), (0, 2), (1, 2), (1, 3)]:
      log.scalars(task, step, {"loss": step})
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"task": 0, "st')  # killed while writing
  with writer.open_run(tmp_path, console=plain_console()) as log:
    log.truncate(1, 2)
    log.scalars(1, 2, {"loss": -1})
  assert [(x["task"], x["step"], x["value"]) for x in lines_of(tmp_path)] == [
    (0, 0, 0),
    (0, 1, 1),
    (0, 2, 2),
    (1, 2, -1),
  ]
  starts = [e.step for e in events_of(tmp_path) if e.HasField("session_log")]
  assert starts == [0, 2]  # TensorBoard hides older events from these steps on


def test_what_was_said_of_a_tasks_end_is_said_once_if_it_comes_again(tmp_path):
  with writer.open_run(tmp_path, console=plain_console()) as log:
    for name in ("train/loss", "test/task_1", "method/rank"):
      log.scalars(0, 1, {name: 1})
    log.truncate(0, 2)  # resumed after the last step of task 0, before its end
    assert [line["name"] for line in lines_of(tmp_path)] == ["train/loss"]
    log.scalars(0, 1, {"test/task_1": 1})
    log.truncate(1, 2)  # resumed after task 0
    assert [line["name"] for line in lines_of(tmp_path)] == ["train/loss", "test/task_1"]


def logged(workdir):
  """Logs five lines; returns what a checkpoint notes of them."""
  with writer.open_run(workdir, console=plain_console()) as log:
    for step in range(5):
      log.scalars(0, step, {"train/loss": step})
    return log.sync()


def cut(lines):
  return b"".join(lines[:3])


def empty(lines):
  return b""


def garble(lines):
  return b"".join([lines[0], b"\xff\x00?\n", *lines[2:]])


def edit(lines):
  return b"".join(lines).replace(b'"value": 3', b'"value": 7')


@pytest.mark.parametrize(
  ("change", "what"),
  [
    (cut, "2 of 5 lines are missing"),
    (empty, "5 of 5 lines are missing"),
    (garble, "1 of 5 lines are missing"),
    (edit, "lines were changed"),
  ],
)
def test_what_the_log_lost_between_sessions_is_said_and_what_is_left_kept(tmp_path, change, what):
  saved, path = logged(tmp_path), tmp_path / "metrics.jsonl"
  path.write_bytes(change(path.read_bytes().splitlines(keepends=True)))
  found = path.read_bytes()
  with writer.open_run(tmp_path, console=plain_console()) as log:
    log.truncate(0, 5, saved)
  line = shown(log)
  assert line.startswith(f"warning    {path} is not what it was at the checkpoint, {what}: ")
  kept = [one.read_bytes() for one in tmp_path.glob("metrics.jsonl.*.unusable")]
  assert kept == ([found] if found else []) and line.count("\n") == 1


def test_lines_after_the_checkpoint_are_no_loss(tmp_path):
  saved, path = logged(tmp_path), tmp_path / "metrics.jsonl"
  before = path.read_bytes()
  path.write_bytes(before + b'{"task": 0, "step": 5, "name": "train/loss", "value": 1.0}\n{"ta')
  with writer.open_run(tmp_path, console=plain_console()) as log:
    log.truncate(0, 5, saved)
  assert not shown(log) and path.read_bytes() == before
  path.unlink()
  with writer.open_run(tmp_path, console=plain_console()) as log:
    log.truncate(0, 5, saved)
  assert "5 of 5 lines are missing" in shown(log)


def test_the_log_is_on_the_disk_before_a_checkpoint_counts(tmp_path, monkeypatch):
  synced = []
  name = "/proc/self/fd/{}".format
  monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(name(file))))
  saved = logged(tmp_path)
  assert {str(tmp_path / "metrics.jsonl"), str(tmp_path)} <= {*synced} and saved["lines"] == 5


def test_a_fresh_run_drops_the_log_of_another(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"task": 0, "step": 0, "name": "a", "value": 1}\n')
  with writer.open_run(tmp_path, console=plain_console()) as log:
    log.truncate(0, 0)
  assert lines_of(tmp_path) == []


def test_a_log_file_gets_few_plain_lines(tmp_path, monkeypatch):
  clock = types.SimpleNamespace(now=0.0)
  clock.monotonic = lambda: clock.now
  monkeypatch.setattr(writer, "time", clock)
  with writer.open_run(tmp_path, console=plain_console()) as log:
    log.task_started(PLAN)
    log.phase("decoding 1,000 images")
    for done in range(1, 31):
      clock.now += 6.0
      log.progress(done, loss=2.0 / done, images_per_second=50.0)
    facts = {"rank": 8, "complexity": np.float32(0.51234)}
    log.task_ended(*matrix(2), facts, names=["ant, bee", PLAN.name, "not yet learned"])
  text = shown(log)
  assert "\x1b" not in text
  title = "task 2/5 (bird[0-9] :cat:)"
  assert f"{title}: 2 classes, 1,000 training images, 3 epochs of 10 steps" in text
  assert "  decoding 1,000 images\n" in text
  assert len(re.findall("images/s", text)) == 15  # every second step: 10 s apart at least
  assert "  step 2/30  epoch 1/3  loss 1.0000  50 images/s  56.0 s left\n" in text
  assert "  step 30/30  epoch 3/3  loss 0.0667  50 images/s\n" in text
  assert "done in 3:00 min" in text
  assert re.search(r"\n +1  ant, bee +86\.0 .*\n +2  bird\[0-9\] :cat: +86", text)
  assert "not yet" not in text
  assert "  rank 8, complexity 0.5123\n" in text
  assert re.search(r"accuracy 86\.\d\d, mean so far 86\.\d\d, forgetting 0\.00", text)


def test_a_slow_task_still_shows_a_line_a_minute(tmp_path, monkeypatch):
  clock = types.SimpleNamespace(now=0.0)
  clock.monotonic = lambda: clock.now
  monkeypatch.setattr(writer, "time", clock)
  long = writer.TaskPlan(**{**vars(PLAN), "steps_per_epoch": 100_000})
  with writer.open_run(tmp_path, console=plain_console()) as log:
    log.task_started(long)
    for done in range(1, 61):
      clock.now += 5.0
      log.progress(done, loss=1.0, images_per_second=1.0)
  assert len(re.findall("images/s", shown(log))) == 5


def test_a_terminal_gets_a_bar_that_is_gone_after_an_error(tmp_path):
  with (
    pytest.raises(KeyboardInterrupt),
    writer.open_run(tmp_path, console=terminal()) as log,
  ):
    log.task_started(PLAN)
    log.phase("decoding")
    log.progress(15, loss=0.25, images_per_second=1234.0)
    log._bar.refresh()
    raise KeyboardInterrupt
  text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(log))
  assert "task 2/5 (bird[0-9] :cat:)" in text
  assert "epoch 2/3  loss 0.2500  1,234 images/s  1.2 s left" in text
  assert log._bar is None
  assert shown(log).count("\x1b[?25h") == 1  # the cursor is back


@pytest.mark.parametrize("tasks", [1, 2, 10, 20, 100])
@pytest.mark.parametrize("width", [80, 40])
@pytest.mark.parametrize("name", ["", "ant, bee", "n01440764 ... n02123045\n(100 classes) " * 9])
def test_the_matrix_fits_the_console_and_cuts_no_number(tasks, width, name):
  console = plain_console(width)
  console.print(matrix_table(*matrix(tasks), console, [name] * tasks if name else []))
  text = console.file.getvalue()
  assert all(len(line) <= width for line in text.splitlines())
  assert not re.search(r"\d…|a…", text)
  assert text.splitlines()[-1].split()[0] == str(tasks)
  assert len(text.splitlines()) < 30


@pytest.mark.parametrize(("tasks", "shown"), [(5, True), (10, True), (20, False)])
def test_names_stand_in_the_matrix_where_all_its_columns_fit(tasks, shown):
  console = plain_console(80)
  names = [f"n{i:04} ... n0212 (100 classes)" for i in range(tasks)]
  console.print(matrix_table(*matrix(tasks), console, names))
  rows = console.file.getvalue().splitlines()[2:]
  assert [f"n{i:04}" in row for i, row in enumerate(rows)] == [shown] * len(rows)


def test_the_matrix_shows_the_right_cell_when_columns_are_left_out():
  console = plain_console(80)
  accuracy = np.tril((np.arange(30)[:, None] + np.arange(30)) / 100)
  accuracy[np.triu_indices(30, 1)] = np.nan
  console.print(matrix_table(accuracy, np.full(30, 10), console))
  last = console.file.getvalue().splitlines()[-1].split()
  assert last == ["30", *map(str, range(29, 36)), "…", *map(str, range(52, 59)), "43.50"]
