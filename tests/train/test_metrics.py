"""Metrics against hand-computed matrices, and what must hold for any counts."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmlora_jax.train import metrics

N_TEST = np.array([10, 20, 30])
# What stands above the diagonal is never read.
CORRECT = np.array([[8, 99, 99], [9, 18, 99], [5, 14, 27]])  # .8 | .9 .9 | .5 .7 .9


@st.composite
def counts(draw, min_tasks=1):
  """Draws (correct, n_test) of a run with up to six tasks."""
  tasks = draw(st.integers(min_tasks, 6))
  n_test = [draw(st.integers(1, 500)) for _ in range(tasks)]
  correct = [[draw(st.integers(0, n)) for n in n_test] for _ in range(tasks)]
  return np.array(correct), np.array(n_test)


def test_hand_computed_run_with_unequal_test_sets():
  summary = metrics.summarise(CORRECT, N_TEST)
  assert summary.pop("accuracy") == [[0.8, None, None], [0.9, 0.9, None], [0.5, 0.7, 0.9]]
  assert summary.pop("n_test") == [10, 20, 30]
  assert summary.pop("fwt") is None
  expected = {
    "acc": 100 * 46 / 60,
    "aaa": (80 + 90 + 100 * 46 / 60) / 3,
    "acc_task_mean": 70,
    "aaa_task_mean": (80 + 90 + 70) / 3,
    "forgetting": ((90 - 50) + (90 - 70)) / 2,
    "forgetting_clipped": ((90 - 50) + (90 - 70)) / 2,
    "bwt": ((50 - 80) + (70 - 90)) / 2,
    "learning_accuracy": (80 + 90 + 90) / 3,
  }
  assert summary == pytest.approx(expected)


def test_forgetting_is_negative_where_the_last_task_helped_and_clipped_is_not():
  accuracy = metrics.accuracy_matrix(np.array([[5, 0], [8, 9]]), np.array([10, 10]))
  assert metrics.forgetting(accuracy) == pytest.approx(-30)
  assert metrics.forgetting_clipped(accuracy) == 0
  assert metrics.bwt(accuracy) == pytest.approx(30)


def test_one_task_has_no_forgetting_and_no_transfer():
  summary = metrics.summarise(np.array([[3]]), np.array([4]), before=[0.5], baseline=[0.5])
  assert summary["acc"] == summary["aaa"] == summary["learning_accuracy"] == 75
  assert [summary[k] for k in ("forgetting", "forgetting_clipped", "bwt", "fwt")] == [None] * 4


def test_forward_transfer_is_the_mean_gain_before_training_and_none_where_unmeasured():
  assert metrics.fwt([None, 0.3, 0.5], [None, 0.1, 0.2]) == pytest.approx(25)
  assert metrics.fwt([None, 0.3], [None, 0.1]) == pytest.approx(20)
  assert metrics.fwt([None, 0.3, None], [None, 0.1, 0.2]) is None
  assert metrics.fwt([None, 0.3, float("nan")], [None, 0.1, 0.2]) is None
  assert metrics.fwt(None, [None, 0.1]) is None
  assert metrics.fwt([None, 0.3], None) is None


def test_an_unfinished_run_is_measured_over_the_tasks_it_has_learned():
  accuracy = metrics.accuracy_matrix(CORRECT, N_TEST, learned=2)
  assert metrics.num_learned(accuracy) == 2
  assert np.isnan(accuracy[2]).all()
  np.testing.assert_allclose(metrics.pooled(accuracy, N_TEST), [80, 90, np.nan])
  np.testing.assert_allclose(metrics.task_mean(accuracy), [80, 90, np.nan])
  assert np.isnan(metrics.accuracy_matrix(CORRECT, N_TEST, learned=0)).all()


@pytest.mark.parametrize(
  ("correct", "n_test", "learned", "message"),
  [
    (CORRECT[:2], N_TEST, None, r"correct has shape \(2, 3\): must be \(3, 3\)"),
    (CORRECT, np.array([10, 0, 30]), None, "every task needs a test image"),
    (CORRECT, np.array([10, 20, 26]), None, r"must be in \[0, n_test\]"),
    (-CORRECT, N_TEST, None, r"must be in \[0, n_test\]"),
    (np.minimum(CORRECT, 0) - np.eye(3, dtype=int), N_TEST, None, r"must be in \[0, n_test\]"),
    (CORRECT, N_TEST, 4, r"learned is 4: must be in \[0, 3\]"),
    (CORRECT, N_TEST, -1, r"learned is -1: must be in \[0, 3\]"),
  ],
)
def test_impossible_counts_are_refused(correct, n_test, learned, message):
  with pytest.raises(ValueError, match=message):
    metrics.accuracy_matrix(correct, n_test, learned)


@given(counts())
def test_pooled_accuracy_is_right_answers_over_images(run):
  correct, n_test = run
  accuracy = metrics.accuracy_matrix(correct, n_test)
  exact = [100 * correct[t, : t + 1].sum() / n_test[: t + 1].sum() for t in range(len(n_test))]
  np.testing.assert_allclose(metrics.pooled(accuracy, n_test), exact, atol=1e-10)


@given(counts())
def test_both_means_agree_on_equal_test_sets(run):
  correct, n_test = run
  n_test = np.full_like(n_test, n_test.max())
  accuracy = metrics.accuracy_matrix(correct, n_test)
  np.testing.assert_allclose(
    metrics.pooled(accuracy, n_test), metrics.task_mean(accuracy), atol=1e-10
  )


@given(counts(), st.randoms(use_true_random=False))
def test_relabelling_the_tasks_of_the_last_row_keeps_the_final_accuracies(run, random):
  correct, n_test = run
  order = list(range(len(n_test)))
  random.shuffle(order)
  accuracy = metrics.accuracy_matrix(correct, n_test)
  relabelled = accuracy.copy()
  relabelled[-1] = accuracy[-1, order]
  assert metrics.acc(relabelled, n_test[order]) == pytest.approx(metrics.acc(accuracy, n_test))
  assert metrics.acc_task_mean(relabelled) == pytest.approx(metrics.acc_task_mean(accuracy))


@given(counts(), st.integers(2, 9))
def test_copies_of_every_test_image_change_nothing(run, copies):
  correct, n_test = run
  once, often = (metrics.summarise(k * correct, k * n_test) for k in (1, copies))
  assert once.pop("n_test") != often.pop("n_test")
  assert once.pop("accuracy") == often.pop("accuracy")
  assert {k: v for k, v in once.items() if v is not None} == pytest.approx(
    {k: v for k, v in often.items() if v is not None}
  )


@given(counts(), st.integers(-5, 5))
def test_what_stands_above_the_diagonal_is_never_read(run, noise):
  correct, n_test = run
  changed = correct + np.triu(np.full_like(correct, noise), 1)
  assert metrics.summarise(correct, n_test) == metrics.summarise(changed, n_test)


@given(counts(min_tasks=2))
def test_forgetting_is_bounded_by_its_relatives(run):
  accuracy = metrics.accuracy_matrix(*run)
  forgetting, clipped = metrics.forgetting(accuracy), metrics.forgetting_clipped(accuracy)
  assert -100 - 1e-9 <= -metrics.bwt(accuracy) <= forgetting + 1e-9
  assert forgetting <= clipped + 1e-9
  assert 0 <= clipped <= 100 + 1e-9


@given(counts())
def test_a_summary_is_plain_json_without_nan(run):
  summary = metrics.summarise(*run)
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary
