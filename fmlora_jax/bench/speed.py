"""FM-LoRA's training step timed beside its floor, the plain forward and PyTorch, turn by turn."""

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from rich.table import Table

from fmlora_jax.bench import floor, tables
from fmlora_jax.bench.counts import RANKS
from fmlora_jax.bench.peer import VARIANTS, Peer
from fmlora_jax.bench.workload import BenchSettings, Workload
from fmlora_jax.experiment.costs import Cost
from fmlora_jax.experiment.noise import TASK_CLASSES

TURN_SECONDS = 0.5  # a turn has as many steps as take this long
COLUMNS = (
  *("GFLOP/image", "x forward", "x floor", "compile s", "ms", "x floor"),
  *("images/s", "temp MiB", "MFU", "ours/it"),
)


def take_turns(
  runners: Mapping[str, Callable[[int], float]], repeats: int
) -> dict[str, list[float]]:
  """Returns the seconds of a step in each of `repeats` rounds; in a round each runner has a turn.

  Other work on the machine so slows all of them alike.
  """
  steps = {}
  for name, run in runners.items():
    run(1)  # warms up
    steps[name] = max(1, round(TURN_SECONDS / run(1)))
  seconds = {name: [] for name in runners}
  for _ in range(repeats):
    for name, run in runners.items():
      seconds[name].append(run(steps[name]) / steps[name])
  return seconds


def measure(
  setting: BenchSettings,
  repeats: int,
  variants: Sequence[str] = (),
  peers_python: str | None = None,
) -> dict[str, Any]:
  """Returns the contents of the file that --json names.

  Args:
    setting: of the benchmark.
    repeats: timed rounds.
    variants: peers, of peer.VARIANTS; without any, PyTorch does not start.
    peers_python: the interpreter that has them.
  """
  workload = Workload(setting)
  weights = workload.weights()
  programs = {"forward": workload.plain_forward(weights)}
  programs |= {
    f"task_{task}": workload.training_step(weights, task - 1) for task in set(setting.measured)
  }
  product = workload.large_product()
  runners: dict[str, Any] = programs | {"product": product}
  with contextlib.ExitStack() as stack:
    peers = None
    if variants:
      peer = stack.enter_context(Peer(_request(setting, variants), str(peers_python)))
      peers = dict(peer.facts)
      runners = runners | {name: functools.partial(peer.run, name) for name in peers["variants"]}
    seconds = take_turns(runners, repeats)
  result = tables.circumstances(setting) | {
    "floor": _floor(setting, product.cost, seconds["product"])
  }
  for name, program in programs.items():
    facts = tables.facts(program.cost, programs["forward"].cost)
    result[name] = facts | _beside_floor(facts, seconds[name], name, result)
  if peers is not None:
    result["peers"] = peers | _beside_ours(seconds, setting, peers["variants"])
  return result


def _request(setting: BenchSettings, variants: Sequence[str]) -> dict[str, Any]:
  sizes = dataclasses.asdict(setting.sizes) | {"num_classes": TASK_CLASSES}
  return dataclasses.asdict(setting) | sizes | {"variants": list(variants)}


def _floor(setting: BenchSettings, product: Cost, seconds: list[float]) -> dict[str, Any]:
  """Returns the least that a step can cost here, at the rate of one large product."""
  least = floor.flops(setting)
  rate = product.flops_as_written * setting.batch / statistics.median(seconds)
  return {
    "flops_per_image": least,
    "ratio": least["step"] / least["forward"],
    "kept_bytes": floor.residual_bytes(setting),
    "product_flops_per_second": rate,
    "peak_flops_per_second": floor.peak_flops(jax.devices()[0].device_kind, setting.dtype),
    "step_seconds": floor.seconds(setting, rate),
  }


def _beside_floor(
  facts: Mapping[str, Any], seconds: list[float], name: str, result: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns a program's speed, and its FLOPs and time over those of its floor."""
  least, kind = result["floor"], "forward" if name == "forward" else "step"
  speed = _speed(seconds, result["setting"]["batch"])
  peak = least["peak_flops_per_second"]
  rate = facts["flops_per_image_as_written"] * speed["images_per_second"]
  return speed | {
    "flops_over_floor": facts["flops_per_image"] / least["flops_per_image"][kind],
    "seconds_over_floor": speed["step_seconds"] / least["step_seconds"][kind],
    "mfu": None if peak is None else rate / peak,
  }


def _beside_ours(
  seconds: Mapping[str, list[float]], setting: BenchSettings, variants: Sequence[str]
) -> dict[str, Any]:
  """Returns each peer's speed and our time over its; beside SD-LoRA's, that of the late task."""
  early, late = (seconds[f"task_{task}"] for task in setting.measured)
  rows = {}
  for name in variants:
    ours = late if name.startswith("sd_lora") else early
    ratio = statistics.median(a / b for a, b in zip(ours, seconds[name], strict=True))
    rows[name] = _speed(seconds[name], setting.batch) | {"ours_over_theirs": ratio}
  return rows


def _speed(seconds: list[float], batch: int) -> dict[str, Any]:
  middle = statistics.median(seconds)
  return {"step_seconds": middle, "images_per_second": batch / middle, "all_step_seconds": seconds}


def speed_table(result: Mapping[str, Any]) -> Table:
  """Returns the result for people."""
  table = tables.empty(result, _caption(result), COLUMNS)
  setting = BenchSettings(**result["setting"])
  rows = {"plain forward": "forward"} | {
    f"step at task {t} of {setting.tasks}": f"task_{t}" for t in setting.measured
  }
  for label, name in rows.items():
    facts = result[name]
    table.add_row(
      label,
      f"{facts['flops_per_image'] / 1e9:.2f}",
      f"{facts['ratio']:.3f}",
      f"{facts['flops_over_floor']:.3f}",
      f"{facts['compile_seconds']:.1f}",
      *_timing(facts["step_seconds"], setting, f"{facts['seconds_over_floor']:.2f}"),
      f"{facts['temp_bytes'] / 2**20:.0f}",
      "-" if facts["mfu"] is None else f"{facts['mfu']:.1%}",
    )
  least = result["floor"]
  table.add_row(
    "floor of a step",
    f"{least['flops_per_image']['step'] / 1e9:.2f}",
    f"{least['ratio']:.3f}",
    "",
    "",
    *_timing(least["step_seconds"]["step"], setting, ""),
    f"{least['kept_bytes'] / 2**20:.0f}",
  )
  peers: dict[str, Any] = result.get("peers") or {"variants": []}
  for name in peers["variants"]:
    facts = peers[name]
    timing = _timing(facts["step_seconds"], setting, "")
    ratio = f"{facts['ours_over_theirs']:.2f}"
    table.add_row(VARIANTS[name], "", "", "", "", *timing, "", "", ratio)
  return table


def _timing(seconds: float, setting: BenchSettings, over_floor: str) -> tuple[str, str, str]:
  return f"{seconds * 1e3:.1f}", over_floor, f"{setting.batch / seconds:.1f}"


def _caption(result: Mapping[str, Any]) -> str:
  early, late = BenchSettings(**result["setting"]).measured
  first, last = result[f"task_{early}"], result[f"task_{late}"]
  rate = result["floor"]["product_flops_per_second"]
  lines = [
    tables.where(result),
    f"floor: the products alone at {rate / 1e9:,.0f} GFLOP/s, the rate of a large one here; of "
    "memory, the activations for the backward pass",
  ]
  if late != early:
    lines.append(
      f"task {late} over task {early}: "
      f"FLOPs {last['flops_per_image'] / first['flops_per_image']:.4f}, "
      f"temp {last['temp_bytes'] / first['temp_bytes']:.4f}"
    )
  if "programs_of_10_tasks" in result:
    lines.append(
      f"{len(RANKS)} tasks of {len(set(RANKS[1:]))} ranks compile "
      f"{result['programs_of_10_tasks']} training steps, one of them task 1's"
    )
  peers = result.get("peers")
  if peers:
    lines += [f"peer: {peers['device']}, {tables.versions(peers['versions'])}"]
    lines += [f"peer: {line}" for line in peers["notes"]]
  return "\n".join(lines)
