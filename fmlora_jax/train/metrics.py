"""Continual-learning metrics from counts; NumPy only.

Row t of a matrix is "after task t", column i is "on the test images of task i"; entries above the
diagonal are NaN. The matrix holds fractions; every summary is in percent. Each function names the
source of its definition. A run calls `summarise` alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

Accuracy = Float[np.ndarray, "T T"]
Counts = Int[np.ndarray, " T"]


def accuracy_matrix(
  correct: Int[np.ndarray, "rows columns"], n_test: Counts, learned: int | None = None
) -> Accuracy:
  """Returns accuracies as fractions, NaN above the diagonal and in rows not reached yet.

  Source: GEM (arXiv:1706.08840) Sec. 2, the matrix R.

  Args:
    correct: right answers on each task's test images; entries above the diagonal are ignored.
    n_test: test images of each task.
    learned: tasks learned so far, in [0, T]; None means all.

  Raises:
    ValueError: on a wrong shape, an empty test set, or counts outside [0, n_test].
  """
  correct, n_test = np.asarray(correct), np.asarray(n_test)
  tasks = len(n_test)
  learned = tasks if learned is None else learned
  if correct.shape != (tasks, tasks):
    raise ValueError(f"correct has shape {correct.shape}: must be ({tasks}, {tasks}), as n_test")
  if not 0 <= learned <= tasks:
    raise ValueError(f"learned is {learned}: must be in [0, {tasks}]")
  if np.any(n_test < 1):
    raise ValueError(f"n_test is {n_test.tolist()}: every task needs a test image")
  measured = np.tri(tasks, dtype=bool) & (np.arange(tasks) < learned)[:, None]
  if np.any(measured & ((correct < 0) | (correct > n_test))):
    raise ValueError(f"correct is {correct.tolist()}: must be in [0, n_test] = {n_test.tolist()}")
  return np.where(measured, correct / n_test, np.nan)


def num_learned(accuracy: Accuracy) -> int:
  """Returns the number of rows that are measured. Source: ours."""
  return int(np.sum(~np.isnan(np.diag(accuracy))))


def pooled(accuracy: Accuracy, n_test: Counts) -> Float[np.ndarray, " T"]:
  """Returns A_w(t), percent of all test images of tasks 0..t that are right after task t.

  Source: PILOT's and SD-LoRA's "total"; the paper's tables follow SD-LoRA. NaN where not reached.
  """
  weights = np.tri(len(accuracy)) * n_test
  return 100 * np.sum(_lower(accuracy) * weights, axis=1) / np.sum(weights, axis=1)


def task_mean(accuracy: Accuracy) -> Float[np.ndarray, " T"]:
  """Returns A_m(t), the mean over tasks 0..t of their accuracies after task t, in percent.

  Source: L2P, CODA-Prompt, HiDe-Prompt. NaN where not reached.
  """
  return 100 * np.sum(_lower(accuracy), axis=1) / np.arange(1, len(accuracy) + 1)


def acc(accuracy: Accuracy, n_test: Counts) -> float:
  """Returns A_w after the last task, in percent. Source: FM-LoRA Sec. 4.1, Acc."""
  return float(pooled(accuracy, n_test)[-1])


def aaa(accuracy: Accuracy, n_test: Counts) -> float:
  """Returns the mean of A_w over all tasks, in percent. Source: FM-LoRA Sec. 4.1, AAA."""
  return float(np.mean(pooled(accuracy, n_test)))


def acc_task_mean(accuracy: Accuracy) -> float:
  """Returns A_m after the last task, in percent. Source: L2P (arXiv:2112.08654)."""
  return float(task_mean(accuracy)[-1])


def aaa_task_mean(accuracy: Accuracy) -> float:
  """Returns the mean of A_m over all tasks, in percent. Source: CODA-Prompt (arXiv:2211.13218)."""
  return float(np.mean(task_mean(accuracy)))


def forgetting(accuracy: Accuracy) -> float | None:
  """Returns the mean drop from the best accuracy before the last task; None for one task.

  Source: Chaudhry et al. (arXiv:1801.10112). In percent; negative where the last task helped.
  """
  if len(accuracy) < 2:
    return None
  best = np.nanmax(accuracy[:-1, :-1], axis=0)
  return float(100 * np.mean(best - accuracy[-1, :-1]))


def forgetting_clipped(accuracy: Accuracy) -> float | None:
  """Returns `forgetting` with the last row among the best, so no term is negative; in percent.

  Source: the code of L2P, HiDe-Prompt, PILOT and mammoth.
  """
  if len(accuracy) < 2:
    return None
  best = np.nanmax(accuracy[:, :-1], axis=0)
  return float(100 * np.mean(best - accuracy[-1, :-1]))


def bwt(accuracy: Accuracy) -> float | None:
  """Returns backward transfer, the mean of a[T, i] - a[i, i], in percent; None for one task.

  Source: GEM (arXiv:1706.08840) Eq. (3).
  """
  if len(accuracy) < 2:
    return None
  return float(100 * np.mean((accuracy[-1] - np.diag(accuracy))[:-1]))


def fwt(
  before: Sequence[float | None] | None, baseline: Sequence[float | None] | None
) -> float | None:
  """Returns forward transfer, the mean of a[i-1, i] - b_i, in percent.

  Source: GEM (arXiv:1706.08840) Eq. (4). Only dil runs have it: unseen classes are never predicted.

  Args:
    before: [T] accuracy (fraction) on each task right before it is trained; entry 0 is ignored.
    baseline: [T] accuracy (fraction) of the untrained head; entry 0 is ignored.

  Returns:
    None for one task, or where anything was not measured (None or NaN).
  """
  if before is None or baseline is None or len(before) < 2:
    return None
  gain = np.asarray(before[1:], float) - np.asarray(baseline[1:], float)  # None becomes NaN
  return None if np.any(np.isnan(gain)) else float(100 * np.mean(gain))


def learning_accuracy(accuracy: Accuracy) -> float:
  """Returns the mean accuracy on each task right after it, in percent. Source: L2P's code."""
  return float(100 * np.mean(np.diag(accuracy)))


def summarise(
  correct: Int[np.ndarray, "T T"],
  n_test: Counts,
  *,
  before: Sequence[float | None] | None = None,
  baseline: Sequence[float | None] | None = None,
) -> dict[str, Any]:
  """Returns every metric under its name in result.json, as plain numbers, lists and None.

  Args:
    correct: see `accuracy_matrix`.
    n_test: see `accuracy_matrix`.
    before: see `fwt`.
    baseline: see `fwt`.

  Raises:
    ValueError: see `accuracy_matrix`.
  """
  accuracy = accuracy_matrix(correct, n_test)
  return {
    "n_test": [int(n) for n in n_test],
    "accuracy": [[None if np.isnan(a) else float(a) for a in row] for row in accuracy],
    "acc": acc(accuracy, n_test),
    "aaa": aaa(accuracy, n_test),
    "acc_task_mean": acc_task_mean(accuracy),
    "aaa_task_mean": aaa_task_mean(accuracy),
    "forgetting": forgetting(accuracy),
    "forgetting_clipped": forgetting_clipped(accuracy),
    "bwt": bwt(accuracy),
    "fwt": fwt(before, baseline),
    "learning_accuracy": learning_accuracy(accuracy),
  }


def _lower(accuracy: Accuracy) -> Accuracy:
  """Returns `accuracy` with 0 above the diagonal: NaN is left only in rows not reached yet."""
  return np.where(np.tri(len(accuracy), dtype=bool), accuracy, 0.0)
