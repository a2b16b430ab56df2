"""SIGTERM and SIGINT: the run saves, says how to go on, and the resumed one ends bit-equal."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import processes
import pytest
import stopping

from fmlora_jax.cli.errors import guard
from fmlora_jax.distributed import stop
from fmlora_jax.experiment.run import run
from fmlora_jax.experiment.setup import SetupCache


def stopped(
  capsys, settings, workdir, moment, signum=signal.SIGTERM, cache=None
) -> tuple[int, str]:
  """Returns (exit code, last line) of a session that gets a signal at a moment."""
  with stop.caught(), stopping.sent_at(moment, signum), pytest.raises(SystemExit) as left, guard():
    run(settings, workdir, cache=cache)
  return left.value.code, capsys.readouterr().err


def assert_same_run(workdir, result, whole, expected):
  for name in stopping.SAME:
    assert result.get(name) == expected.get(name), name
  assert (workdir / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
  """(config, cache, workdir, result) of a run of linear_probe that no signal met."""
  settings, cache = stopping.settings(method={"name": "linear_probe"}), SetupCache()
  workdir = tmp_path_factory.mktemp("probe") / "run"
  return settings, cache, workdir, run(settings, workdir, cache=cache)


@pytest.fixture
def heeded():
  """SIGHUP as a terminal starts a program; nohup, which tests may run under, has ignored it."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize(
  ("signum", "code"),
  [
    (signal.SIGTERM, 143),
    (signal.SIGINT, 130),
    (signal.SIGHUP, 129),
    (signal.SIGUSR1, 138),
  ],
)
def test_a_signal_in_training_loses_no_chunk(capsys, probe, tmp_path, signum, code):
  settings, cache, whole, expected = probe
  workdir = tmp_path / "run"
  name = signal.Signals(signum).name
  left, line = stopped(capsys, settings, workdir, "training", signum, cache)
  assert (left, line) == (code, f"stopped by {name}; the same command resumes\n")
  assert stopping.steps(workdir) == (2, 2)
  assert_same_run(workdir, run(settings, workdir, cache=cache), whole, expected)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  """(workdir, result) of the run that no signal met."""
  workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
  return workdir, run(stopping.settings(), workdir)


@pytest.mark.tier(2)
@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_a_signal_at_any_moment_loses_no_chunk(capsys, uninterrupted, tmp_path, mode):
  workdir, settings = tmp_path / "run", stopping.settings(input={"mode": mode})
  lost = []
  for moment in stopping.MOMENTS:
    code, line = stopped(capsys, settings, workdir, moment)
    assert (code, line) == (143, "stopped by SIGTERM; the same command resumes\n"), moment
    logged, saved = stopping.steps(workdir)
    lost.append(logged - saved)
  assert_same_run(workdir, run(settings, workdir), *uninterrupted)
  assert lost == [0] * len(stopping.MOMENTS)
  count = len(lost)
  print(f"1 process, {mode}: {count}/{count} SIGTERM saved, exit 143, {sum(lost)} steps lost")


def in_two(workdir, *when):
  arguments = [sys.executable, stopping.__file__, workdir, "{}", *when]
  return processes.ended(processes.start(arguments, processes.environment(2)))


@pytest.mark.tier(2)
def test_one_of_two_processes_is_signalled_and_both_stop_at_one_step(tmp_path):
  whole, workdir = tmp_path / "whole", tmp_path / "run"
  lost = []
  for i, moment in enumerate(stopping.MOMENTS):
    ends = in_two(workdir, moment, str(i % 2))
    for code, _, errors in ends:
      assert code == 143, (moment, ends)
      assert errors.endswith("stopped by SIGTERM; the same command resumes\n"), (moment, ends)
    logged, saved = stopping.steps(workdir)
    lost.append(logged - saved)
  for place in (workdir, whole):
    assert [code for code, _, _ in in_two(place)] == [0, 0]
  results = [json.loads((place / "result.json").read_text()) for place in (workdir, whole)]
  assert_same_run(workdir, results[0], whole, results[1])
  count = len(lost)
  print(f"2 processes: {count}/{count} SIGTERM saved, exit 143, {sum(lost)} steps lost")
  assert lost == [0] * count


def start_program(workdir, **changes):
  """Starts the run as a program with two processes that decode, in a group of its own."""
  settings = {"input": {"mode": "stream", "workers": 2}, "epochs": 200} | changes
  arguments = [sys.executable, stopping.__file__, workdir, json.dumps(settings)]
  path = f"{processes.ROOT}:{processes.ROOT / 'tests'}"
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  environment = os.environ | {"PYTHONPATH": path}
  return subprocess.Popen(arguments, env=environment, start_new_session=True, **pipes)


@pytest.mark.tier(2)
@pytest.mark.parametrize("times", [1, 2])
def test_a_group_of_processes_gets_a_signal_once_or_twice(tmp_path, times):
  """Slurm sends it to the processes that decode too; a second one does not wait for a save."""
  with start_program(tmp_path / "run", method={"name": "linear_probe"}) as running:
    try:
      while not stopping.steps(tmp_path / "run")[0]:
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)
      for _ in range(times):
        os.killpg(running.pid, signal.SIGTERM)
        time.sleep(0.02)
      _, errors = running.communicate(timeout=120)
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
  assert running.returncode == 143
  how = "by" if times == 1 else "at once by a second"
  # after the second Python's resource tracker may have its say about the processes that decode
  assert f"stopped {how} SIGTERM; the same command resumes" in errors.splitlines()
  if times == 1:
    logged, saved = stopping.steps(tmp_path / "run")
    assert logged == saved > 0 and errors.count("\n") == 1
