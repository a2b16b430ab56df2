"""What a run has reached: in every checkpoint its progress, at its end result.json."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from fmlora_jax.experiment import provenance
from fmlora_jax.experiment.setup import RunSetup
from fmlora_jax.train import metrics
from fmlora_jax.types import Facts, Reported, Variables


@dataclasses.dataclass
class Progress:
  """What a run knows besides arrays; JSON in every checkpoint.

  Attributes:
    task: the current one, from 0.
    training: whether the checkpoint lies within the task, not at its end.
    facts: what the method said of each task so far.
    correct: rows of counts of right answers, [after task][test set].
    ahead: dil only: right answers on each task's test set just before it is learned.
    baseline: dil only: the same with the untrained head.
    seconds: wall time of all sessions up to this checkpoint, as `clock.Clock` tells it: what a
      session did after its last one is lost, and so is its time.
    trained: trained parameters of the last task.
    devices: what it was computed on, in words; of several sessions one after the other where it
      changed.
    code: the same of the commit and the versions of libraries.
    val_read: whether the method read validation images.
  """

  task: int = 0
  training: bool = False
  facts: list[dict] = dataclasses.field(default_factory=list)
  correct: list[list[int]] = dataclasses.field(default_factory=list)
  ahead: list[int | None] = dataclasses.field(default_factory=list)
  baseline: list[int | None] = dataclasses.field(default_factory=list)
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  trained: int = 0
  devices: list[str] = dataclasses.field(default_factory=list)
  code: list[str] = dataclasses.field(default_factory=list)
  val_read: bool = False

  def counts(self, num_tasks: int) -> Int[np.ndarray, "T T"]:
    """Returns right answers, [after task][test set]; 0 where nothing was measured."""
    counts = np.zeros((num_tasks, num_tasks), int)
    for i, row in enumerate(self.correct):
      counts[i, : len(row)] = row
    return counts

  def matrix(self, n_test: Int[np.ndarray, " T"]) -> Float[np.ndarray, "T T"]:
    """Returns the accuracy matrix so far; n_test is how many images each test set has."""
    return metrics.accuracy_matrix(self.counts(len(n_test)), n_test, len(self.correct))


def build_result(
  parts: RunSetup,
  progress: Progress,
  variables: Variables,
  n_test: Int[np.ndarray, " T"],
  alone: dict[str, int],
) -> dict[str, Any]:
  """Returns what result.json holds of a run that has learned all tasks; design.md section 5.

  Args:
    n_test: images of each test set.
    alone: right answers on some of them, in one batch and each in one of its own.
  """
  trainer, info = parts.trainer, parts.info
  config, sequence, method = trainer.config, trainer.sequence, trainer.method
  ahead, baseline = (
    [None if c is None else c / n for c, n in zip(counts, n_test, strict=True)] if counts else None
    for counts in (progress.ahead, progress.baseline)
  )
  stored = method.stored(progress.facts)
  head = variables.mem["head"]
  means = sum(head[name].size for name in ("mean", "count") if name in head)
  statistics = 4 * (means + stored.get("statistics", 0))
  learned = {name: getattr(variables, name) for name in ("shared", "cur", "mem")}
  return {
    "method": config.method.name,
    "benchmark": config.tasks.benchmark,
    "scenario": sequence.scenario,
    "split_id": sequence.split_id,
    "manifest_sha256": sequence.manifest_sha256,
    "seed": config.seed,
    "class_order": sequence.class_order,
    "task_names": [task.name for task in sequence.tasks],
    **metrics.summarise(progress.counts(len(n_test)), n_test, before=ahead, baseline=baseline),
    **reported(method.reports, progress.facts),
    "params": {
      "trained": progress.trained,
      "stored_per_task": stored["per_task"],
      "stored_total": stored["shared"] + sum(stored["per_task"]) + _num_params(head),
      "backbone": _num_params(trainer.weights),
    },
    "rehearsal_bytes": statistics,
    "protocol": provenance.protocol(
      trainer, kept=statistics, val_read=progress.val_read, code=progress.code, alone=alone
    ),
    "passes": dataclasses.asdict(method.passes),
    "caveats": list(method.caveats),
    "weights": {"tag": info.tag, "sha256": info.sha256},
    "normalisation": parts.normalisation,
    "augmentation": config.input.augmentation,
    "input": {
      "mode": "stream" if trainer.streams else "resident",
      "workers": config.input.workers,
    },
    "epochs": config.epochs,
    "batch_size": config.batch_size,
    "wall_seconds": progress.seconds,
    "params_sha256": provenance.params_sha256(learned),
    "devices": progress.devices,
    "versions": provenance.versions(),
    "git_commit": provenance.git_commit(),
    "config": dataclasses.asdict(config),
    "finished": True,
  }


def reported(reports: Iterable[Reported], facts: Sequence[Facts]) -> dict[str, Any]:
  """Returns the fields of result.json that a method declares; None without a value in any task."""
  fields = {}
  for report in reports:
    if report.field:
      values = [fact.get(report.name) for fact in facts]
      has_value = any(value is not None for value in values)
      fields[report.field] = (values[-1] if report.is_final else values) if has_value else None
  return fields


def _num_params(tree: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
