"""`head.drift`: stored means follow the features that a task's training moves."""

import numpy as np
import pytest

from fmlora_jax.config import AlignmentConfig, HeadConfig
from fmlora_jax.methods.common import drift
from fmlora_jax.methods.common.drift import Drift

WIDTH = 5


def draw(*shape, seed=0):
  return np.random.default_rng([seed, *shape]).normal(size=shape)


def settings(kind, **changes):
  return HeadConfig(drift=kind, alignment=AlignmentConfig(), **changes)


@pytest.mark.parametrize("bandwidth", [0.1, 0.3, 2.0])
def test_a_mean_drifts_as_the_weighted_average_of_the_images_in_a_plain_loop(bandwidth):
  """More means than are taken at once, one of them far from all images."""
  before, after = draw(40, WIDTH), draw(40, WIDTH, seed=1)
  means = np.concatenate([2 * draw(69, WIDTH, seed=2), np.full((1, WIDTH), 1e3)])
  got = drift.local_drift(before, after, means, bandwidth)
  assert got.shape == means.shape and np.isfinite(got).all()
  for i, mean in enumerate(means[:-1]):
    distances = [np.sqrt(sum((f - m) ** 2 for f, m in zip(x, mean, strict=True))) for x in before]
    middle = np.sqrt(np.median(np.square(distances)))
    total, weights = np.zeros(WIDTH), 0.0
    for x, y, distance in zip(before, after, distances, strict=True):
      weight = np.exp(-(distance**2) / (2 * (bandwidth * middle) ** 2))
      total, weights = total + weight * (y - x), weights + weight
    np.testing.assert_allclose(got[i], total / weights, rtol=1e-6, atol=1e-9)


def test_near_images_decide_and_a_wide_gaussian_gives_the_mean_drift():
  before = np.concatenate([draw(20, WIDTH) / 10, 5 + draw(20, WIDTH, seed=1) / 10])
  moves = np.repeat([[1.0] * WIDTH, [-1.0] * WIDTH], 20, axis=0)
  means = np.array([[0.0] * WIDTH, [5.0] * WIDTH])
  got = drift.local_drift(before, before + moves, means, 0.1)
  np.testing.assert_allclose(got, moves[[0, -1]], atol=1e-6)
  np.testing.assert_allclose(drift.local_drift(before, before + moves, means, 1e3), 0, atol=1e-5)


def test_images_that_all_lie_on_a_mean_count_alike():
  before, moves = np.ones((4, WIDTH)), draw(4, WIDTH)
  got = drift.local_drift(before, before + moves, np.ones((1, WIDTH)), 0.3)
  np.testing.assert_allclose(got[0], moves.mean(0))


@pytest.mark.parametrize("kind", ["sdc", "linear"])
def test_without_a_drift_nothing_moves(kind):
  """Also of images that are all alike, whose map is not determined."""
  means, variances = draw(6, WIDTH, seed=1), draw(6, WIDTH, seed=2) ** 2
  for images in (draw(9, WIDTH).astype(np.float32), np.ones((9, WIDTH), np.float32)):
    moved, spread = Drift(settings(kind), images, images).move(means, variances)
    np.testing.assert_array_equal(moved, means)
    np.testing.assert_array_equal(spread, variances)


def test_a_known_affine_map_is_recovered_and_moves_means_and_variances():
  before, means = draw(200, WIDTH), 3 * draw(4, WIDTH, seed=1)
  matrix, shift = np.eye(WIDTH) + draw(WIDTH, WIDTH, seed=2) / 4, draw(WIDTH, seed=3)
  config = settings("linear", drift_ridge=1e-9)
  variances = draw(4, WIDTH, seed=4) ** 2
  moved, spread = Drift(config, before, before @ matrix + shift).move(means, variances)
  np.testing.assert_allclose(moved, means @ matrix + shift, rtol=1e-5, atol=1e-6)
  for v, got in zip(variances, spread, strict=True):
    np.testing.assert_allclose(got, np.diag(matrix.T @ np.diag(v) @ matrix), rtol=1e-5)


def test_the_affine_map_is_the_least_of_its_loss_and_a_large_ridge_leaves_the_mean_drift():
  before, after, ridge = draw(12, WIDTH), draw(12, WIDTH, seed=1), 0.2
  fitted = drift.fit_affine(before, after, ridge)
  spread = before.var(0).mean()

  def loss(change):
    errors = after - before - fitted.shift - (before - fitted.center) @ change
    return (errors**2).sum() / len(before) + ridge * spread * (change**2).sum()

  for seed in range(8):
    assert loss(fitted.change + 1e-3 * draw(WIDTH, WIDTH, seed=seed)) > loss(fitted.change)
  rigid = drift.fit_affine(before, after, 1e9)
  means = 5 * draw(3, WIDTH, seed=2)
  np.testing.assert_allclose(rigid.of_means(means), means + (after - before).mean(0), atol=1e-6)
  np.testing.assert_allclose(rigid.of_variances(means**2), means**2, rtol=1e-6)


def test_sdc_leaves_variances_as_they_are():
  variances = draw(3, WIDTH) ** 2
  moved = Drift(settings("sdc"), draw(9, WIDTH, seed=1), draw(9, WIDTH, seed=2))
  np.testing.assert_array_equal(moved.move(draw(3, WIDTH, seed=3), variances)[1], variances)
