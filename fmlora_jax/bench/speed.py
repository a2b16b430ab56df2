"""FM-LoRA's training step timed beside the plain forward and beside PyTorch, turn by turn."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
from rich.table import Table

from fmlora_jax.bench import floor, tables
from fmlora_jax.bench.lab import NUM_TASKS, TASK_CLASSES, Lab, Setting
from fmlora_jax.bench.peer import Peer
from fmlora_jax.bench.programs import RANKS, TASKS, count_programs

TURN_SECONDS = 0.5  # a turn has as many steps as take this long
COLUMNS = ("GFLOP/image", "x forward", "compile s", "ms", "images/s", "temp MiB", "MFU", "ours/it")


def take_turns(
  runners: Mapping[str, Callable[[int], float]], repeats: int
) -> dict[str, list[float]]:
  """Returns the seconds a step took in each of `repeats` rounds; in a round each runner has a turn.

  Side by side, so that what else the machine does slows all of them alike.
  """
  steps = {}
  for name, run in runners.items():
    run(1)  # with what is done only once
    steps[name] = max(1, round(TURN_SECONDS / run(1)))
  seconds = {name: [] for name in runners}
  for _ in range(repeats):
    for name, run in runners.items():
      seconds[name].append(run(steps[name]) / steps[name])
  return seconds


def measure(setting: Setting, repeats: int, peers_python: str | None = None) -> dict[str, Any]:
  """Returns what --json writes; peers_python: the interpreter for the peer, None leaves it out."""
  lab = Lab(setting)
  weights = lab.weights()
  programs = {"forward": lab.plain_forward(weights)}
  programs |= {f"task_{task}": lab.training_step(weights, task - 1) for task in TASKS}
  if peers_python is None:
    seconds, peers = take_turns(programs, repeats), None
  else:
    sizes = dataclasses.asdict(setting.sizes) | {"num_classes": TASK_CLASSES}
    with Peer(dataclasses.asdict(setting) | sizes, peers_python) as peer:
      runners = {
        f"peer_{name}": functools.partial(peer.run, name) for name in peer.facts["variants"]
      }
      seconds, peers = take_turns(programs | runners, repeats), dict(peer.facts)
  peak = floor.peak_flops(jax.devices()[0].device_kind, setting.dtype)
  least = floor.flops(setting)
  result = tables.circumstances(setting) | {
    "floor_flops_per_image": least,
    "floor_ratio": least["step"] / least["forward"],
    "rank_of_10_tasks": list(RANKS),
    "programs_of_10_tasks": count_programs(),
  }
  base = programs["forward"].facts
  for name, program in programs.items():
    facts = tables.with_ratios(program.facts, base) | _speed(seconds[name], setting.batch)
    rate = facts["flops_per_image_as_written"] * facts["images_per_second"]
    result[name] = facts | {"mfu": None if peak is None else rate / peak}
  if peers is not None:
    ours = seconds[f"task_{TASKS[0]}"]
    for name in peers["variants"]:
      theirs = seconds[f"peer_{name}"]
      ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
      peers[name] = _speed(theirs, setting.batch) | {"ours_over_theirs": ratio}
    result["peers"] = peers
  return result


def _speed(seconds: list[float], batch: int) -> dict[str, Any]:
  middle = statistics.median(seconds)
  return {"step_seconds": middle, "images_per_second": batch / middle, "all_step_seconds": seconds}


def table(result: Mapping[str, Any]) -> Table:
  """Returns the result for people."""
  shown = tables.empty(result, _caption(result), COLUMNS)
  rows = {"plain forward": "forward"} | {
    f"step at task {t} of {NUM_TASKS}": f"task_{t}" for t in TASKS
  }
  for label, name in rows.items():
    facts = result[name]
    shown.add_row(
      label,
      f"{facts['flops_per_image'] / 1e9:.2f}",
      f"{facts['ratio']:.3f}",
      f"{facts['compile_seconds']:.1f}",
      *_timing(facts),
      f"{facts['temp_bytes'] / 2**20:.0f}",
      "-" if facts["mfu"] is None else f"{facts['mfu']:.1%}",
    )
  least = result["floor_flops_per_image"]
  shown.add_row("least possible step", f"{least['step'] / 1e9:.2f}", f"{result['floor_ratio']:.3f}")
  peers = result.get("peers") or {"variants": []}
  for name in peers["variants"]:
    facts = peers[name]
    shown.add_row(
      f"HF + PEFT, {name}", "", "", "", *_timing(facts), "", "", f"{facts['ours_over_theirs']:.2f}"
    )
  return shown


def _timing(facts) -> tuple[str, str]:
  return f"{facts['step_seconds'] * 1e3:.1f}", f"{facts['images_per_second']:.1f}"


def _caption(result: Mapping[str, Any]) -> str:
  first, last = (result[f"task_{task}"]["flops_per_image"] for task in TASKS)
  lines = [
    tables.where(result),
    f"FLOPs at task {TASKS[1]} over task {TASKS[0]}: {last / first:.4f}",
    f"{len(RANKS)} tasks of {len(set(RANKS[1:]))} ranks compile "
    f"{result['programs_of_10_tasks']} training steps, one of them task 1's",
  ]
  peers = result.get("peers")
  if peers:
    lines += [f"peer: {peers['device']}, {tables.versions(peers['versions'])}"]
    lines += [f"peer: {line}" for line in peers["notes"]]
  return "\n".join(lines)
