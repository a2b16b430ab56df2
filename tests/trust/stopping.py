"""A small run that may get a signal at a named moment, in this process or as one of several.

python tests/trust/stopping.py WORKDIR CHANGES [MOMENT PROCESS]: CHANGES of SETTINGS as JSON;
PROCESS alone gets SIGTERM.
"""

import contextlib
import json
import pathlib
import signal
import sys
from collections.abc import Iterator

import pytest

from fmlora_jax import config, methods
from fmlora_jax.cli import config_files, errors, program
from fmlora_jax.distributed import hosts
from fmlora_jax.experiment import clock, run
from fmlora_jax.experiment.task_loop import TaskLearner
from fmlora_jax.train import evaluator
from fmlora_jax.train.loop import Trainer
from fmlora_jax.workdir import checkpoint, log

SETTINGS = {
  "epochs": 1,
  "batch_size": 64,
  "eval_batch_size": 64,
  "compute_dtype": "float32",
  "tasks": {"num_tasks": 2},
  "weights": {"tag": "random", "architecture": "micro", "depth": 1},
  "input": {
    "normalisation": "half",
    "image_size": 16,
    "augmentation": "mild",
    "steps_per_dispatch": 2,
  },
  "bases": {"max_rank": 4},
  "drs": {"strategy": "gumbel", "candidate_ranks": (1, 2, 4), "selector_steps": 5},
  "prompt": {"num_tokens": 2},
}
SAME = ("params_sha256", "accuracy", "ranks", "interference", "complexity", "devices")

# what is called, one after the other, until the signal comes with the last: in the order in which
# sessions that resume each other meet them
MOMENTS = {
  "compilation": [(Trainer, "step_context"), (clock.Clock, "_compiled")],
  "training": [(log.RunLog, "progress")],
  "end_task": [(TaskLearner, "_adopt")],
  "evaluation": [(evaluator, "count_correct")],
  "save": [(checkpoint.CheckpointStore, "save")],
  "task switch": [(log.RunLog, "task_started")],
  "begin_task": [(log.RunLog, "phase"), (clock.Clock, "_compiled")],
}


def settings(**changes) -> config.Config:
  return methods.build_config(config_files.merged(SETTINGS, changes))


@contextlib.contextmanager
def sent_at(moment: str, signum: int = signal.SIGTERM) -> Iterator[None]:
  """Sends this process a signal at `moment`, once."""
  left = list(MOMENTS[moment])

  def count(place):
    if left and left[0] == place:
      left.pop(0)
      if not left:
        signal.raise_signal(signum)

  with pytest.MonkeyPatch.context() as patch:
    for owner, name in MOMENTS[moment]:
      patch.setattr(owner, name, _counted(getattr(owner, name), count, (owner, name)))
    yield


def _counted(original, count, place):
  def call(*args, **kwargs):
    count(place)
    return original(*args, **kwargs)

  return call


def steps(workdir: pathlib.Path) -> tuple[int, int]:
  """Returns (steps that were logged, steps that are saved)."""
  metrics = workdir / "metrics.jsonl"
  logged = map(json.loads, metrics.read_text().splitlines() if metrics.exists() else [])
  losses = [line for line in logged if line["name"] == "train/loss"]
  saved = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
  return len(losses), max(saved, default=0)


def main(argv: list[str]) -> None:
  program.join_hosts()
  workdir, changes, *when = argv[1:]
  with contextlib.ExitStack() as stack:
    if when and int(when[1]) == hosts.sys.modules["jax"].process_index():
      stack.enter_context(sent_at(when[0]))
    run.run(settings(**json.loads(changes)), pathlib.Path(workdir))


if __name__ == "__main__":
  from fmlora_jax.distributed import stop

  with stop.caught(), errors.guard():
    main(sys.argv)
