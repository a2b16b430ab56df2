"""Processes that differ in config, data or checkpoint end before a step; lost ones end the rest."""

import json
import random
import shutil
import signal
import sys
import time

import processes
import pytest
import stopping
from PIL import Image

from fmlora_jax.cli.errors import guard
from fmlora_jax.distributed import hosts, stop, watchdog
from fmlora_jax.experiment.run import run

CHEAP = {"method": {"name": "linear_probe"}}


def start(workdirs, changes):
  """Starts two processes, each with a workdir and with changes of the settings."""
  started = []
  for place, own, environment in zip(workdirs, changes, processes.environment(2), strict=True):
    arguments = [sys.executable, stopping.__file__, place, json.dumps(own)]
    started += processes.start(arguments, [environment])
  return started


def refused(workdirs, changes, text) -> float:
  """Returns the seconds until both have ended with one line that has `text`."""
  began = time.monotonic()
  ends = processes.ended(start(workdirs, changes))
  took = time.monotonic() - began
  for code, _, errors in ends:
    assert code == 2 and errors.startswith("error: processes differ (") and text in errors, ends
    assert errors.count("\n") == 1
  return took


def saved(workdir) -> list[str]:
  return sorted(path.name for path in (workdir / "checkpoints").glob("*"))


def write_images(folder, shade):
  for split in ("train", "test"):
    for blue, label in ((0, "ant"), (40, "bee")):  # no image is in two classes
      place = folder / split / label
      place.mkdir(parents=True)
      for number in range(4):
        Image.new("RGB", (16, 16), (shade, 60 * number, 80 * (split == "test") + blue)).save(
          place / f"{label}{number}.png"
        )


@pytest.mark.tier(2)
def test_processes_that_differ_are_refused_within_30_seconds(tmp_path, capsys):
  took = []
  fast = {"optim": {"learning_rate": 0.5}}
  workdir = tmp_path / "config"
  differs = "config.optim.learning_rate: 0.001 in process 0, 0.5 in 1"
  took.append(refused([workdir, workdir], [CHEAP, CHEAP | fast], differs))
  assert not saved(workdir)

  changes = []
  for index in range(2):
    write_images(tmp_path / str(index), 100 + index)
    data = {"benchmark": "image_folder", "data_dir": str(tmp_path / str(index)), "num_tasks": 1}
    changes.append(CHEAP | {"tasks": data, "batch_size": 2})
  workdir = tmp_path / "data"
  took.append(refused([workdir, workdir], changes, "manifest_sha256: "))
  assert not saved(workdir)

  workdir, other = tmp_path / "run", tmp_path / "other"
  for moment in ("save", "training"):
    with stop.caught(), stopping.sent_at(moment), pytest.raises(SystemExit), guard():
      run(stopping.settings(**CHEAP), workdir)
  capsys.readouterr()
  shutil.copytree(workdir, other)
  *_, newest = saved(other)
  shutil.rmtree(other / "checkpoints" / newest)
  before = saved(workdir), saved(other)
  assert [len(steps) for steps in before] == [2, 1]
  one, other_step = (int(steps[-1]) for steps in before)
  differs = f"(checkpoint.step: {one} in process 0, {other_step} in 1)"
  took.append(refused([workdir, other], [CHEAP, CHEAP], differs))
  assert (saved(workdir), saved(other)) == before
  print(f"3/3 refused, the slowest in {max(took):.1f} s, no step written")
  assert max(took) < 30


def until_trained(workdir, lines):
  """Waits until so many numbers are logged."""
  metrics, began = workdir / "metrics.jsonl", time.monotonic()
  while time.monotonic() - began < 240:
    if metrics.exists() and len(metrics.read_text().splitlines()) >= lines:
      return
    time.sleep(0.005)
  raise TimeoutError(f"{metrics} has no {lines} lines")


LONG = CHEAP | {"epochs": 400, "checkpoint": {"every_steps": 100}}


@pytest.mark.tier(2)
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_is_suspended_ends_the_other(tmp_path, index):
  started = start([tmp_path / "run"] * 2, [LONG, LONG])
  try:
    until_trained(tmp_path / "run", 10)
    started[index].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    _, errors = started[1 - index].communicate(timeout=120)
    took = time.monotonic() - began
    assert started[1 - index].returncode == hosts.PEER_LOST
    assert errors == (
      f"error: process {index} was silent for 20 s: suspended or unreachable. {watchdog.FIX}\n"
    )
    started[index].send_signal(signal.SIGCONT)
    _, errors = started[index].communicate(timeout=30)
    assert started[index].returncode == hosts.PEER_LOST
    assert errors.splitlines()[-1].startswith("error: process ")  # jax may have logged before
  finally:
    for process in started:
      process.kill()
  print(f"process {index} suspended, the other gone after {took:.1f} s")
  assert took < 2 * watchdog.HEARTBEAT_S


@pytest.mark.tier(3)
def test_ten_kills_of_either_of_two_processes(tmp_path):
  settings = {"checkpoint": {"every_steps": 2}}
  whole = tmp_path / "whole"
  assert [code for code, *_ in processes.ended(start([whole] * 2, [settings] * 2))] == [0, 0]
  expected = json.loads((whole / "result.json").read_text())
  logged = (whole / "metrics.jsonl").read_text()
  drawn, same, gone = random.Random(0), [], []
  for trial in range(10):
    workdir = tmp_path / str(trial)
    started = start([workdir] * 2, [settings] * 2)
    until_trained(workdir, drawn.randrange(1, logged.count("\n") - 8))
    killed = drawn.randrange(2)
    started[killed].kill()
    began = time.monotonic()
    ends = processes.ended(started)
    gone.append(time.monotonic() - began)
    assert ends[1 - killed][0] == hosts.PEER_LOST, ends
    again = processes.ended(start([workdir] * 2, [settings] * 2))
    assert [code for code, *_ in again] == [0, 0], again
    result = json.loads((workdir / "result.json").read_text())
    equal = all(result.get(name) == expected.get(name) for name in stopping.SAME)
    same.append(equal and (workdir / "metrics.jsonl").read_text() == logged)
  print(f"{sum(same)}/10 identical, survivors gone within {max(gone):.1f} s")
  assert all(same) and max(gone) <= watchdog.HEARTBEAT_S
