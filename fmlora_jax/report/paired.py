"""Differences between the rows of a table, seed by seed.

Two runs are a pair if they learned the same tasks of the same split, in the same order, with the
same seed. What seeds and orders do to both is left out of their difference.
"""

import collections
from collections.abc import Mapping
from typing import Any

from fmlora_jax.report.runs import Group, Groups, RunResult, mean_std

METHOD = "fm_lora"  # whose first row the others are compared with


def reference(groups: Groups) -> str | None:
  """Returns the label of the row that others are compared with; None if no run has a partner."""
  labels = [label for label, runs in groups.items() if runs[0]["method"] == METHOD] or [*groups]
  others = [runs for label, runs in groups.items() if label != labels[0]]
  has_pairs = any(_single(groups[labels[0]]).keys() & _single(runs).keys() for runs in others)
  return labels[0] if has_pairs else None


def difference(runs: Group, others: Group, field: str) -> str:
  """Returns mean ± std (ddof 1) over pairs of the field of `runs` less that of `others`.

  "-" without a pair.
  """
  ours, theirs = _single(runs), _single(others)
  pairs = [ours[key][field] - theirs[key][field] for key in ours.keys() & theirs.keys()]
  return mean_std(pairs) if pairs else "-"


def _single(runs: Group) -> Mapping[Any, RunResult]:
  """Returns the runs by what a pair must share; of several with the same none is taken."""
  keys = [
    (run["seed"], run["split_id"], tuple(run["task_names"]), tuple(run["class_order"]))
    for run in runs
  ]
  counts = collections.Counter(keys)
  return {key: run for key, run in zip(keys, runs, strict=True) if counts[key] == 1}
