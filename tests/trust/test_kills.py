"""A run that is killed anywhere and resumed ends with the same numbers."""

import dataclasses
import json
import random
import shutil
import signal
import time

import micro_runs
import pytest

from fmlora_jax import config
from fmlora_jax.experiment.run import run
from fmlora_jax.experiment.setup import SetupCache
from fmlora_jax.workdir import checkpoint


@dataclasses.dataclass
class Whole:
  """A run that nothing stopped, and what goes on with others of the same settings.

  Attributes:
    seconds: that it took in a process of its own, all programs compiled.
  """

  settings: config.Config
  outcome: dict
  seconds: float
  cache: SetupCache

  def equals(self, workdir) -> bool:
    """Goes on with a run until its end; returns whether it is this one to the bit."""
    with micro_runs.small_parts():
      return micro_runs.resumed(self.settings, workdir, self.cache) == self.outcome


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """method -> Whole."""
  made = {}

  def of(method):
    if method not in made:
      settings, folder = micro_runs.settings(method), tmp_path_factory.mktemp(method)
      for name in ("compiles", "run"):
        began = time.monotonic()
        child = micro_runs.in_child(settings, folder / name)
        child.join(300)
        assert child.exitcode == 0
      seconds = time.monotonic() - began
      made[method] = Whole(settings, micro_runs.outcome(folder / "run"), seconds, SetupCache())
    return made[method]

  return of


def redone(workdir) -> int:
  """Returns how many steps were logged after the newest checkpoint."""
  steps = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal()]
  metrics = workdir / "metrics.jsonl"
  lines = metrics.read_text().splitlines() if metrics.exists() else []
  logged = [json.loads(line)["step"] + 1 for line in lines if line.endswith("}")]
  return max(logged, default=0) - max(steps, default=0)


def kill_at_random(whole, workdir, rng) -> int | None:
  """Kills a run at a random moment; returns the steps that it lost, None where it had ended."""
  child = micro_runs.in_child(whole.settings, workdir)
  child.join(rng.uniform(0, whole.seconds))
  if child.exitcode == 0:
    return None
  child.kill()
  child.join()
  return redone(workdir) if workdir.exists() else 0


@pytest.mark.tier(2)
def test_a_run_killed_at_random_ends_bit_identical(whole, tmp_path):
  uninterrupted, rng, lost, equal, runs = whole("lora"), random.Random(0), [], 0, 0
  while len(lost) < 20:
    runs += 1
    for _ in range(2):
      steps = kill_at_random(uninterrupted, tmp_path / str(runs), rng)
      lost += [] if steps is None else [steps]
    equal += uninterrupted.equals(tmp_path / str(runs))
  print(f"{len(lost)} kills in {runs} runs, {equal}/{runs} bit-identical, at most "
        f"{max(lost)} steps redone, {micro_runs.EVERY} lie between saves")  # fmt: skip
  assert equal == runs and max(lost) <= micro_runs.EVERY


@pytest.mark.tier(2)
def test_a_run_killed_at_any_named_point_ends_bit_identical(whole, tmp_path):
  uninterrupted, equal = whole("inflora"), []
  for i, point in enumerate(micro_runs.POINTS):
    child = micro_runs.in_child(uninterrupted.settings, tmp_path / str(i), point)
    child.join(300)
    assert child.exitcode == -signal.SIGKILL, f"{point}: not reached"
    equal += [point] if uninterrupted.equals(tmp_path / str(i)) else []
    print(f"{len(equal)}/{i + 1} points bit-identical, the last {point}")
  assert equal == list(micro_runs.POINTS)


@pytest.mark.tier(2)
def test_a_run_resumes_at_every_step(tmp_path, monkeypatch):
  """In one process: what lay in the workdir after each save is taken up once more."""
  settings = micro_runs.settings("fm_lora", checkpoint={"every_steps": 1}, epochs=4)
  save, copies = checkpoint.CheckpointStore.save, []

  def save_and_copy(self, step, *args, **kwargs):
    save(self, step, *args, **kwargs)
    copies.append(shutil.copytree(tmp_path / "run", tmp_path / f"after {step}"))

  with micro_runs.small_parts():
    cache = SetupCache()
    with monkeypatch.context() as patch:
      patch.setattr(checkpoint.CheckpointStore, "save", save_and_copy)
      run(settings, tmp_path / "run", cache=cache)
    expected = micro_runs.outcome(tmp_path / "run")
    equal = sum(micro_runs.resumed(settings, copy, cache) == expected for copy in copies)
  print(f"resumed at {equal}/{len(copies)} steps bit-identical")
  assert equal == len(copies) >= 24


@pytest.mark.tier(3)
@pytest.mark.parametrize("method", ["fm_lora", "inflora", "hide_prompt", "sd_lora"])
def test_methods_with_work_between_tasks_survive_kills(whole, tmp_path, method):
  uninterrupted, rng, equal = whole(method), random.Random(method), 0
  for i in range(10):
    while kill_at_random(uninterrupted, tmp_path / str(i), rng) is None:
      shutil.rmtree(tmp_path / str(i))  # it had ended before the kill
    equal += uninterrupted.equals(tmp_path / str(i))
    print(f"{method}: {equal}/{i + 1} results equal after a random kill")
  assert equal == 10
