"""Parts of `bench.gpu`: measurements that fit into the given time, and their report."""

import dataclasses
import functools
import json
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from fmlora_jax import methods
from fmlora_jax.bench import kernels, speed
from fmlora_jax.bench.workload import BenchSettings, Workload
from fmlora_jax.experiment import run
from fmlora_jax.tasks.benchmarks import random_images

MAIN_BATCH = 256  # beside PyTorch, of the profile and of the whole run, if it is among the batches
VARIANTS = ("peft_compiled", "peft", "sd_lora")
SWEEP_SHARE = 0.6  # of the time; then no further batch is measured and the whole run starts
COMPILE_SECONDS = 90.0  # of the whole run, for its programs and its evaluations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Settings of all parts; the flags of the same names."""

  out: pathlib.Path
  peers_python: str
  seconds: float
  batches: tuple[int, ...]
  architecture: str
  dtype: str
  epochs: int

  @property
  def main_batch(self) -> int:
    return MAIN_BATCH if MAIN_BATCH in self.batches else self.batches[-1]

  def setting(self, batch: int) -> BenchSettings:
    # the second of two tasks is both the early and the late one: one program
    return BenchSettings(architecture=self.architecture, dtype=self.dtype, batch=batch, tasks=2)


class Report:
  """Measurements so far: on the console, and on disk after each part."""

  def __init__(self, plan: Plan):
    self._plan, self._began = plan, time.monotonic()
    self.parts: dict[str, dict] = {}
    plan.out.mkdir(parents=True, exist_ok=True)
    self._text = plan.out / "gpu.txt"
    self._text.write_text("")

  def passed(self) -> float:
    """Returns the share of the time that is over."""
    return (time.monotonic() - self._began) / self._plan.seconds

  def left(self) -> float:
    """Returns the seconds that are left."""
    return (1 - self.passed()) * self._plan.seconds

  def part(self, name: str, measure: Callable[[], dict[str, Any]], show: Callable) -> dict:
    """Returns and writes the numbers of `measure`; a part that fails does not end the others."""
    began = time.monotonic()
    try:
      numbers = measure()
      shown = [numbers["left_out"]] if "left_out" in numbers else show(numbers)
    except Exception as error:  # one part must not cost the others
      traceback.print_exc()
      numbers = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}
      shown = [numbers["failed"]]
    numbers |= {"seconds": time.monotonic() - began}
    self.parts[name] = numbers
    (self._plan.out / "gpu.json").write_text(json.dumps(self.parts, indent=1) + "\n")
    with open(self._text, "a") as file:
      for target in (sys.stdout, file):
        console = Console(file=target, width=140)
        console.print(f"{name}, {numbers['seconds']:.0f} s", style="bold")
        for each in shown:
          console.print(each)
    return numbers


def show_speed(numbers: Mapping[str, Any]) -> list:
  return [speed.speed_table(numbers)]


def trace_step(setting: BenchSettings) -> dict[str, Any]:
  """Returns the kernels of ten steps."""
  workload = Workload(setting)
  step = workload.training_step(workload.weights(), 1)
  step(2)
  return kernels.trace(lambda: step(10))


def show_kernels(numbers: Mapping[str, Any]) -> list[str]:
  return [f"{row['share']:6.1%}  {row['calls']:6d} x  {row['name']}" for row in numbers["top"]]


def whole_run(plan: Plan, rate: float, seconds: float) -> dict[str, Any]:
  """Returns the wall time of a whole run, of as many epochs as fit into `seconds`.

  Args:
    plan: of all parts.
    rate: training images per second.
    seconds: time left.
  """
  images = 0.7 * random_images.NUM_CLASSES * random_images.PER_CLASS
  epochs = min(plan.epochs, int((0.8 * seconds - COMPILE_SECONDS) * rate / images))
  if epochs < 1:
    return {"left_out": f"{seconds:.0f} s are left, not enough for an epoch"}
  values = {
    "epochs": epochs,
    "batch_size": plan.main_batch,
    "compute_dtype": plan.dtype,
    "weights": {"tag": "random", "architecture": plan.architecture},
    "tasks": {"benchmark": "random_images", "num_tasks": 10},
    "input": {"mode": "resident", "source_size": 256},
    "drs": {"strategy": "fixed", "rank": 16},
  }
  config = methods.build_config(values)
  result = run.run(config, plan.out / "whole_run")
  spent = result["wall_seconds"]
  return {
    "epochs": epochs,
    "wall_seconds": spent,
    "wanted_epochs": plan.epochs,
    "total_seconds": spent["total"] + spent["train"] * (plan.epochs / epochs - 1),
    "is_extrapolated": epochs != plan.epochs,
  }


def show_run(numbers: Mapping[str, Any]) -> list[str]:
  spent = ", ".join(f"{kind} {value:.1f}" for kind, value in numbers["wall_seconds"].items())
  how = f"extrapolated from {numbers['epochs']}" if numbers["is_extrapolated"] else "measured"
  return [
    f"seconds of {numbers['epochs']} epochs: {spent}",
    f"{numbers['wanted_epochs']} epochs, {how}: {numbers['total_seconds']:.1f} s",
  ]


def measure(plan: Plan) -> dict[str, dict]:
  """Measures all parts; returns the contents of gpu.json."""
  report, batch = Report(plan), plan.main_batch
  setting = plan.setting(batch)

  def at_batch(batch, **peers):
    if report.passed() > SWEEP_SHARE:
      return {"left_out": "no time was left"}
    return speed.measure(plan.setting(batch), repeats=5, **peers)

  def beside_pytorch():
    return at_batch(batch, variants=VARIANTS, peers_python=plan.peers_python)

  alone = report.part(f"batch {batch}", lambda: at_batch(batch), show_speed)
  report.part(f"batch {batch} beside PyTorch", beside_pytorch, show_speed)
  report.part("kernels", lambda: trace_step(setting), show_kernels)
  for other in plan.batches:
    if other != batch:
      report.part(f"batch {other}", functools.partial(at_batch, other), show_speed)
  rate = alone["task_2"]["images_per_second"]
  report.part("whole run", lambda: whole_run(plan, rate, report.left()), show_run)
  return report.parts
