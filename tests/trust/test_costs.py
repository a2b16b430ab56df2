"""Costs of digests, re-reading, the lock and the NaN check for a ViT-B/16."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).with_name("costs_of_trust.py")


@pytest.mark.tier(3)
def test_trust_costs_two_percent_of_a_step_and_seconds_a_task(tmp_path):
  env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  done = subprocess.run(
    [sys.executable, PROGRAM, tmp_path], env=env, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  step, run, saved = found["step"], found["run"], found["checkpoint"]
  print("a step with the checks over one without: " + ", ".join(
    f"{name} {ratio:.5f}" for name, ratio in step.items()))  # fmt: skip
  start = [sum(run[name]) for name in ("lock.hold_lock", "FrozenGuard.__init__")]
  print(f"added to the start: lock and digest of the weights {sum(start):.2f} s")
  own = [all_of - orbax for all_of, orbax in zip(
    run["CheckpointStore.save"], run["v1.save"], strict=True)]  # fmt: skip
  names = ("FrozenGuard.begin", "FrozenGuard.check", "guards.require_finite")
  ends = [sum(calls) for calls in zip(own, *(run[name] for name in names), strict=True)]
  print("added to each task's end: " + ", ".join(f"{seconds:.2f} s" for seconds in ends))
  print("" + ", ".join(f"{name} {value:.4g}" for name, value in saved.items()))
  assert step["flops"] < 1.02 and step["bytes"] < 1.02
  assert sum(start) < 5 and max(ends) < 5 and saved["digest of what was restored"] < 5
