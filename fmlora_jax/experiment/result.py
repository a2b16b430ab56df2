"""The contents of result.json."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from fmlora_jax.experiment import provenance
from fmlora_jax.experiment.session import GROUPS, Progress
from fmlora_jax.experiment.setup import RunSetup
from fmlora_jax.tasks.copies import find_copies
from fmlora_jax.train import metrics
from fmlora_jax.types import Facts, Params, Reported, Variables
from fmlora_jax.workdir import result_file


def build_result(
  setup: RunSetup, progress: Progress, variables: Variables, n_test: Int[np.ndarray, " T"]
) -> dict[str, Any]:
  """Builds the contents of result.json for a run that has learned all tasks.

  Args:
    n_test: images of each test set.
  """
  config, sequence, method = setup.config, setup.sequence, setup.method
  ahead, baseline = (
    [None if c is None else c / n for c, n in zip(counts, n_test, strict=True)] if counts else None
    for counts in (progress.ahead, progress.baseline)
  )
  head = variables.mem["head"]
  means = sum(head[name].size for name in ("mean", "count") if name in head)
  statistics = 4 * (means + method.stored(progress.facts).get("statistics", 0))
  learned = {name: getattr(variables, name) for name in GROUPS}
  return {
    "schema": result_file.SCHEMA,
    "method": config.method.name,
    "benchmark": config.tasks.benchmark,
    "scenario": sequence.scenario,
    "split_id": sequence.split_id,
    "manifest_sha256": sequence.manifest_sha256,
    "seed": config.seed,
    "class_order": sequence.class_order,
    "class_names": sequence.class_names,
    "class_ranges": sequence.spec.class_ranges,
    "task_names": [task.name for task in sequence.tasks],
    **metrics.summarise(progress.counts(len(n_test)), n_test, before=ahead, baseline=baseline),
    **reported(method.reports, progress.facts),
    "params": _params(setup, progress, head),
    "statistics_bytes": statistics,
    "protocol": _protocol(setup, progress, statistics),
    "passes": dataclasses.asdict(method.passes),
    "caveats": setup.caveats,
    "weights": {"tag": setup.info.tag, "sha256": setup.info.sha256},
    "normalisation": setup.normalisation,
    "augmentation": config.input.augmentation,
    "input": {
      "mode": "stream" if setup.loader.is_streaming else "resident",
      "workers": config.input.workers,
    },
    "epochs": config.epochs,
    "batch_size": config.batch_size,
    "wall_seconds": progress.seconds,
    "params_sha256": provenance.params_sha256(learned),
    "devices": progress.devices,
    "versions": provenance.versions(),
    "environment": provenance.environment(),
    "git_commit": provenance.git_commit(),
    "config": dataclasses.asdict(config),
    "finished": True,
  }


def _protocol(setup: RunSetup, progress: Progress, statistics: int) -> dict[str, Any]:
  """Returns how the numbers came about, as JSON values.

  Split, weights, pixels and devices have other fields of a result.

  Args:
    statistics: stored bytes of statistics of the data.
  """
  copies = find_copies(setup.sequence)
  return {
    "old_image_bytes": 0,  # a method can't reach a task's images once it is over: see TaskView
    "old_statistics_bytes": statistics,
    "task_identity_at_test": setup.sequence.scenario == "til",
    "measured_on": setup.config.tasks.evaluate_on,
    "validation_images": sum(len(task.val) for task in setup.sequence.tasks),
    "validation_read_by_method": progress.val_read,
    "copies": None if copies is None else dataclasses.asdict(copies),
    "code": progress.code,
    "checks": {
      "finite": "loss, gradient and parameters at each step, all that is saved",
      "frozen": "weights and frozen parameters at each task's end and each checkpoint",
    },
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


def _params(setup: RunSetup, progress: Progress, head: Params) -> dict[str, Any]:
  """Returns the numbers of parameters."""
  stored = setup.method.stored(progress.facts)
  return {
    "trained": progress.trained,
    "stored_per_task": stored["per_task"],
    "stored_total": stored["shared"] + sum(stored["per_task"]) + _num_params(head),
    "backbone": _num_params(setup.weights),
  }


def _num_params(tree: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
