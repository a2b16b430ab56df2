"""What checks cost a ViT-B/16 in float32, of programs compiled as users' are; prints JSON.

python tests/trust/costs_of_trust.py FOLDER [BATCH ROUNDS]: of the step that is measured
"""

import json
import pathlib
import statistics
import sys
import time

import jax
from rich.console import Console

from fmlora_jax import methods
from fmlora_jax.bench.workload import BenchSettings, Workload
from fmlora_jax.experiment import guards, run
from fmlora_jax.train import mesh, step
from fmlora_jax.workdir import checkpoint, digest, lock

SETTINGS = {  # a whole ViT-B/16 on images of four patches: training is short, its leaves are not
  "epochs": 1,
  "batch_size": 256,
  "compute_dtype": "float32",
  "tasks": {"num_tasks": 2},
  "weights": {"tag": "random", "architecture": "vit_b16"},
  "input": {"normalisation": "half", "image_size": 32, "augmentation": "none"},
  "drs": {"strategy": "fixed", "rank": 16},
}


class Stopwatch:
  """Appends the seconds of each call of functions to `seconds`, by name; inner ones count twice."""

  def __init__(self, watched):
    self.seconds = {}
    for owner, name in watched:
      self._watch(owner, name)

  def _watch(self, owner, name):
    original = getattr(owner, name)
    calls = self.seconds[f"{owner.__name__.rpartition('.')[2]}.{name}"] = []

    def timed(*args, **kwargs):
      began = time.monotonic()
      try:
        return original(*args, **kwargs)
      finally:
        calls.append(time.monotonic() - began)

    setattr(owner, name, timed)


def of_a_step(batch: int, rounds: int) -> dict[str, float]:
  """Returns ratios of a training step with the checks and without."""
  lab, programs, checked = Workload(BenchSettings(batch=batch, tasks=2)), {}, step.is_finite
  weights = lab.weights()
  for kind, function in {"with": checked, "without": lambda tree: True}.items():
    step.is_finite = function
    state, *rest = lab.arguments(weights, lab.variables(weights, 1), 1)
    program = jax.jit(lab.train_step(1).step, donate_argnums=0).lower(state, *rest).compile()
    programs[kind] = [program, state, rest]
  step.is_finite = checked
  ratios = []
  for index in range(rounds + 1):
    took = {}
    for kind in ("with", "without") if index % 2 else ("without", "with"):
      program, state, rest = programs[kind]
      began = time.monotonic()
      programs[kind][1] = jax.block_until_ready(program(state, *rest)[0])
      took[kind] = time.monotonic() - began
    ratios.append(took["with"] / took["without"])
  facts = {kind: program.cost_analysis() for kind, (program, *_) in programs.items()}
  names = {"flops": "flops", "bytes": "bytes accessed"}
  counts = {name: facts["with"][key] / facts["without"][key] for name, key in names.items()}
  return counts | {"seconds": statistics.median(ratios[1:])}  # the first warms up


def of_a_run(workdir: pathlib.Path) -> dict[str, list[float]]:
  """Returns the seconds of each call of a run's checks."""
  watched = [
    (lock, "hold_lock"),
    (guards.FrozenGuard, "__init__"),
    (guards.FrozenGuard, "begin"),
    (guards.FrozenGuard, "check"),
    (guards, "require_finite"),
    (checkpoint.CheckpointStore, "save"),
    (checkpoint.ocp, "save"),
  ]
  clock = Stopwatch(watched)
  run.run(methods.build_config(SETTINGS), workdir, console=Console(quiet=True))
  return {name: list(calls) for name, calls in clock.seconds.items()}  # it goes on to watch


def of_a_checkpoint(folder: pathlib.Path) -> dict[str, float]:
  """Returns the seconds of saving and restoring all parameters, as fine-tuning does."""
  whole = mesh.replicated(mesh.make_mesh())
  arrays = mesh.place(checkpoint.flatten(Workload(BenchSettings()).weights()), whole)
  digest.tree_digests(arrays)  # compiles
  clock = Stopwatch(
    [(digest, "tree_digests"), (checkpoint.ocp, "save"), (checkpoint.CheckpointStore, "_load")]
  )
  took = {"bytes": checkpoint.num_bytes(arrays)}
  began = time.monotonic()
  store = checkpoint.CheckpointStore(folder, whole, identity={})
  store.save(1, checkpoint.Snapshot(arrays=arrays, record={}), keep=True)
  took["save"] = time.monotonic() - began
  took |= {name: sum(calls) for name, calls in clock.seconds.items()}
  began = time.monotonic()
  checkpoint.CheckpointStore(folder, whole, identity={}).latest()
  took["restore"] = time.monotonic() - began
  took["digest of what was restored"] = clock.seconds["digest.tree_digests"][-1]
  return took


def main(folder: str, *sizes: str) -> None:
  batch, rounds = map(int, sizes or (8, 8))
  found = {
    "step": of_a_step(batch, rounds),
    "run": of_a_run(pathlib.Path(folder, "run")),
    "checkpoint": of_a_checkpoint(pathlib.Path(folder, "checkpoint")),
  }
  print(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])
