"""Rows 1, 2 and 6 of the bar: a run that is killed anywhere ends as if nothing had been."""

import json
import random
import shutil
import time

import micro_runs
import pytest

from fmlora_jax import checkpoint
from fmlora_jax.parts import Workshop
from fmlora_jax.run import run


def finish(child) -> None:
  child.join(300)
  assert child.exitcode == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """method -> (settings, outcome, seconds) of a run in a process, which nothing stopped."""
  made = {}

  def of(method):
    if method not in made:
      settings, folder = micro_runs.settings(method), tmp_path_factory.mktemp(method)
      finish(micro_runs.in_child(settings, folder / "first"))  # compiles for all that follow
      began = time.monotonic()
      finish(micro_runs.in_child(settings, folder / "run"))
      made[method] = settings, micro_runs.outcome(folder / "run"), time.monotonic() - began
    return made[method]

  return of


def redone(workdir) -> int:
  """Returns how many steps were logged after the newest checkpoint."""
  steps = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal()]
  metrics = workdir / "metrics.jsonl"
  lines = metrics.read_text().splitlines() if metrics.exists() else []
  logged = [json.loads(line)["step"] + 1 for line in lines if line.endswith("}")]
  return max(logged, default=0) - max(steps, default=0)


def kill_at_random(settings, workdir, seconds, rng) -> int:
  """Kills a run once at a random moment; returns the steps that it lost, -1 if it was done."""
  child = micro_runs.in_child(settings, workdir)
  child.join(rng.uniform(0, 1.1 * seconds))
  if child.exitcode == 0:
    return -1
  child.kill()
  child.join()
  return redone(workdir) if workdir.exists() else 0


@pytest.mark.tier(2)
def test_a_run_killed_at_random_ends_bit_identical(whole, tmp_path):
  settings, expected, seconds = whole("fm_lora")
  rng, kills, lost, equal, runs = random.Random(0), 0, [], 0, 0
  while kills < 20:
    runs, workdir = runs + 1, tmp_path / str(runs)
    for _ in range(2):
      steps = kill_at_random(settings, workdir, seconds, rng)
      if steps >= 0:
        kills, lost = kills + 1, [*lost, steps]
    finish(micro_runs.in_child(settings, workdir))
    equal += micro_runs.outcome(workdir) == expected
  print(f"row 1: {kills} kills in {runs} runs, {equal}/{runs} bit-identical, most steps redone "
        f"{max(lost)} of at most {micro_runs.EVERY}")  # fmt: skip
  assert equal == runs and max(lost) <= micro_runs.EVERY


@pytest.mark.tier(2)
def test_a_run_killed_at_any_named_point_ends_bit_identical(whole, tmp_path):
  settings, expected, _ = whole("fm_lora")
  equal = []
  for i, point in enumerate(micro_runs.POINTS):
    workdir = tmp_path / str(i)
    child = micro_runs.in_child(settings, workdir, point)
    child.join(300)
    assert child.exitcode == -9, f"{point}: not reached"
    finish(micro_runs.in_child(settings, workdir))
    if micro_runs.outcome(workdir) == expected:
      equal.append(point)
  print(f"row 2: {len(equal)}/{len(micro_runs.POINTS)} points bit-identical")
  assert equal == list(micro_runs.POINTS)


@pytest.mark.tier(2)
def test_a_run_resumes_at_every_step(tmp_path, monkeypatch):
  """In one process: what lay in the workdir after each save is taken up once more."""
  settings = micro_runs.settings("fm_lora", checkpoint={"every_steps": 1}, epochs=4)
  save, copies = checkpoint.Store.save, []

  def save_and_copy(self, step, *args, **kwargs):
    save(self, step, *args, **kwargs)
    copies.append(shutil.copytree(tmp_path / "run", tmp_path / f"after {step}"))

  with micro_runs.small_parts():
    workshop = Workshop()
    with monkeypatch.context() as patch:
      patch.setattr(checkpoint.Store, "save", save_and_copy)
      run(settings, tmp_path / "run", workshop=workshop)
    expected = micro_runs.outcome(tmp_path / "run")
    equal = sum(micro_runs.resumed(settings, copy, workshop) == expected for copy in copies)
  print(f"row 6: resumed at {equal}/{len(copies)} steps bit-identical")
  assert equal == len(copies) >= 24


@pytest.mark.tier(3)
@pytest.mark.parametrize("method", ["fm_lora", "inflora", "hide_prompt", "sd_lora"])
def test_methods_with_work_between_tasks_survive_kills(whole, tmp_path, method):
  settings, expected, seconds = whole(method)
  rng, equal, kills = random.Random(method), 0, 0
  for i in range(10):
    while kill_at_random(settings, tmp_path / str(i), seconds, rng) < 0:
      shutil.rmtree(tmp_path / str(i))  # it had ended before the kill
    kills += 1
    finish(micro_runs.in_child(settings, tmp_path / str(i)))
    equal += micro_runs.outcome(tmp_path / str(i)) == expected
  print(f"{method}: {kills} random kills, {equal}/10 results equal")
  assert equal == 10
