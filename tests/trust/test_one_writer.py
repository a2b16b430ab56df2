"""Two runs in one workdir: the second is refused at once, the first goes on as if nothing was."""

import os
import pathlib
import subprocess
import sys
import time

import pytest
import stopping

from fmlora_jax.config import ConfigError
from fmlora_jax.experiment.run import run
from fmlora_jax.experiment.setup import SetupCache
from fmlora_jax.models.weights import registry
from fmlora_jax.workdir import lock, log
from fmlora_jax.workdir.checkpoint import CheckpointStore

ROOT = pathlib.Path(__file__).parents[2]


SETTINGS = stopping.settings(method={"name": "linear_probe"}, checkpoint={"every_steps": 4})
CACHE = SetupCache()  # one config in all runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(workdir, result) of a run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  return workdir, run(SETTINGS, workdir, cache=CACHE)


def assert_same(finished, workdir, result):
  whole, expected = finished
  for name in stopping.SAME:
    assert result.get(name) == expected.get(name), name
  assert (workdir / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


@pytest.mark.parametrize("owner, name", [(log.RunLog, "scalars"), (CheckpointStore, "_save")])
@pytest.mark.parametrize("renamed", [False, True], ids=["lock removed", "folder renamed"])
def test_a_run_that_lost_its_lock_writes_no_more_and_another_ends_the_same(
  finished, tmp_path, monkeypatch, owner, name, renamed
):
  workdir, original, calls, results = tmp_path / "run", getattr(owner, name), [], []
  elsewhere = tmp_path / "elsewhere" if renamed else workdir

  def then_lose(self, *arguments):
    calls.append(name)
    original(self, *arguments)
    if len(calls) == 3:
      workdir.rename(elsewhere) if renamed else (workdir / lock.FILE).unlink()
      if not renamed:
        results.append(run(SETTINGS, workdir, cache=CACHE))

  monkeypatch.setattr(owner, name, then_lose)
  with pytest.raises(ConfigError, match=f"^workdir {workdir} is not this run's any more"):
    run(SETTINGS, workdir, cache=CACHE)
  assert workdir.exists() is not renamed
  result = results[0] if results else run(SETTINGS, elsewhere, cache=CACHE)
  assert_same(finished, elsewhere, result)


def test_a_second_run_is_refused_at_ten_moments_and_the_first_ends_the_same(
  finished, tmp_path, monkeypatch
):
  settings, workdir = SETTINGS, tmp_path / "run"
  scalars, load, took = log.RunLog.scalars, registry.load, []

  def nothing(*arguments):
    raise AssertionError("weights are loaded before the lock is tried")

  def then_start_another(self, *arguments):
    if len(took) < 10:
      began = time.monotonic()
      monkeypatch.setattr(registry, "load", nothing)
      with pytest.raises(ConfigError, match=f"is in use by process {os.getpid()} on "):
        run(settings, workdir)
      monkeypatch.setattr(registry, "load", load)
      took.append(time.monotonic() - began)
    scalars(self, *arguments)

  monkeypatch.setattr(log.RunLog, "scalars", then_start_another)
  result = run(settings, workdir, cache=CACHE)
  assert_same(finished, workdir, result)
  print(f"{len(took)}/10 second runs refused, the slowest in {1e3 * max(took):.1f} ms")
  assert len(took) == 10 and max(took) < 5


@pytest.mark.tier(2)
def test_a_second_program_is_refused_in_five_seconds(tmp_path):
  command = [sys.executable, "-m", "fmlora_jax.main", "--config=configs/digits.py"]
  command += ["--config.epochs=1000", f"--workdir={tmp_path / 'run'}"]
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as first:
    try:
      first.stdout.readline()  # it runs
      took = []
      for _ in range(10):
        began = time.monotonic()
        second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        took.append(time.monotonic() - began)
        assert second.returncode == 2 and not second.stdout
        assert second.stderr.startswith(f"error: workdir {tmp_path / 'run'} is in use by process ")
        assert f"process {first.pid} on" in second.stderr and second.stderr.count("\n") == 1
    finally:
      first.terminate()
    assert first.wait(timeout=120) == 143
  print(f"programs: 10/10 refused, the slowest in {max(took):.1f} s, imports and all")
