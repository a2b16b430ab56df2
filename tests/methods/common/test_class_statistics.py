"""What is kept of each class: against sums by hand."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax.methods.common import class_statistics as stats
from fmlora_jax.types import SequenceSpec


def rows_of(ranges, scenario="cil"):
  num_classes = max(hi for _, hi in ranges)
  return stats.Rows(
    SequenceSpec(
      scenario=scenario, num_tasks=len(ranges), num_classes=num_classes, class_ranges=ranges
    )
  )


def blobs(centres, each, seed=0):
  """Returns `each` features around every centre, far apart, one blob after the other."""
  rng = np.random.default_rng(seed)
  found = [10.0 * centre + rng.normal(size=(each, 3)) for centre in centres]
  return np.concatenate(found).astype(np.float32)


def test_a_row_is_a_class_of_a_task():
  rows = rows_of(((0, 2), (2, 5)))
  np.testing.assert_array_equal(rows.task, [0, 0, 1, 1, 1])
  np.testing.assert_array_equal(rows.label, [0, 1, 2, 3, 4])
  np.testing.assert_array_equal(rows.first, [0, 2])
  shared = rows_of(((0, 2), (0, 2)), "dil")
  np.testing.assert_array_equal(shared.task, [0, 0, 1, 1])
  np.testing.assert_array_equal(shared.label, [0, 1, 0, 1])
  np.testing.assert_array_equal(shared.first, [0, 2])


def test_centroids_are_the_means_and_variances_of_the_clusters():
  centres = np.eye(3)
  features = blobs(centres, 7)
  mean, variance = stats.centroids(features, 3, seed=0)
  parts = features.astype(np.float64).reshape(3, 7, 3)
  order = np.argmax(mean, axis=1)  # a blob's own axis is the largest
  assert sorted(order) == [0, 1, 2]
  np.testing.assert_allclose(mean, parts.mean(1)[order], rtol=1e-12)
  np.testing.assert_allclose(variance, parts.var(1)[order], rtol=1e-12)


@pytest.mark.parametrize(("distinct", "expected"), [(9, 4), (4, 4), (2, 2), (1, 1), (0, 0)])
def test_there_are_no_more_centroids_than_features_that_differ(distinct, expected):
  features = np.repeat(blobs(np.eye(3), 3)[:distinct], 2, axis=0)
  mean, variance = stats.centroids(features, 4, seed=0)
  assert mean.shape == variance.shape == (expected, 3)


def test_statistics_of_a_task_are_written_in_its_rows_alone():
  rows = rows_of(((0, 2), (2, 5)))
  features = blobs(np.eye(3), 5)
  labels = np.repeat([2, 3, 4], [5, 5, 5])
  labels[-1] = 3  # so that a class has four images
  empty = stats.empty(len(rows), 2, 3)
  kept = stats.add(empty, rows, 1, features, labels, seed=0)
  for row in (0, 1):
    for name, leaf in kept.items():
      np.testing.assert_array_equal(leaf[row], empty[name][row])
  for row, label in ((2, 2), (3, 3), (4, 4)):
    own = features[labels == label].astype(np.float64)
    members = stats.centroids(own, 2, seed=0)
    np.testing.assert_allclose(kept["mean"][row], members[0], rtol=1e-6)
    np.testing.assert_allclose(kept["variance"][row], members[1], rtol=1e-5)
    np.testing.assert_array_equal(kept["exists"][row], [True, True])
  one = stats.add(empty, rows, 0, features[:1], np.array([1]), seed=0)
  np.testing.assert_array_equal(one["exists"][:2], [[False, False], [True, False]])
  np.testing.assert_array_equal(one["mean"][1], [features[0], np.zeros(3)])


def made_up():
  """Two centroids with variance and one without; one of each; one single image; another row."""
  mean = np.arange(4 * 3 * 2, dtype=np.float32).reshape(4, 3, 2) * 10
  variance = np.ones((4, 3, 2), np.float32) * np.arange(1, 5)[:, None, None]
  exists = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
  variance[0, 2] = variance[1, 0] = variance[2, 0] = 0
  host = {"mean": mean, "variance": variance, "exists": exists}
  return {name: jnp.asarray(leaf) for name, leaf in host.items()}


def test_centroids_without_variance_are_left_out_where_a_class_has_others():
  chances = stats.chances(made_up(), np.array([True, True, True, False]))
  expected = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]]) / 4
  np.testing.assert_allclose(chances, expected, rtol=1e-6)


def test_draws_are_gaussian_around_the_centroids():
  kept = made_up()
  chances = stats.chances(kept, np.array([True, True, True, False]))
  draw = jax.jit(stats.draw, static_argnums=3)
  features, row = jax.tree.map(np.asarray, draw(kept, chances, jax.random.key(0), 40_000))
  np.testing.assert_allclose(np.bincount(row) / 40_000, [0.5, 0.25, 0.25], atol=0.01)
  for centroid, drawn in {(0, 0): row == 0, (0, 1): row == 0, (1, 1): row == 1}.items():
    mean, variance = (np.asarray(kept[name][centroid]) for name in ("mean", "variance"))
    near = drawn & (np.abs(features - mean).max(-1) < 9)  # others are 20 away
    np.testing.assert_allclose(features[near].mean(0), mean, atol=0.05)
    np.testing.assert_allclose(features[near].var(0), variance + 1e-4, rtol=0.05)
  single = features[row == 2]
  np.testing.assert_allclose(single.mean(0), kept["mean"][2, 0], atol=1e-3)
  np.testing.assert_allclose(single.var(0), 1e-4, rtol=0.05)


def test_a_run_without_statistics_does_not_wait_for_scikit_learn():
  code = (
    "import sys, fmlora_jax.main, fmlora_jax.methods.fm_lora; sys.exit('sklearn' in sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0
