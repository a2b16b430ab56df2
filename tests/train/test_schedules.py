"""Schedules against their formulas; acceptance test 11 of the baselines: CODA's as it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax import methods
from fmlora_jax.train import schedules


def factors(epochs, points, learning_rate=1.0, **optim):
  """Returns the factors at (progress, epoch), by one traced function."""
  settings = {"epochs": epochs, "optim": optim | {"learning_rate": learning_rate}}
  config = methods.build_config(settings)
  schedule = jax.jit(schedules.make_schedule(config, learning_rate))
  return [float(schedule(jnp.float32(p), jnp.int32(e))) for p, e in points]


def each_epoch(epochs):
  return [(0.0, epoch) for epoch in range(epochs)]


def test_cosine_falls_by_steps_to_zero_whatever_the_epoch():
  points = [(step / 12, epoch) for epoch, step in ((0, 0), (9, 3), (0, 6), (1, 12))]
  expected = [1, 0.5 + np.sqrt(0.125), 0.5, 0]
  np.testing.assert_allclose(factors(2, points, schedule="cosine"), expected, atol=1e-7)


def test_constant_is_one():
  assert factors(3, [(0.9, 2)], schedule="constant") == [1]


def test_steps_decay_at_each_milestone_from_its_epoch_on():
  got = factors(6, each_epoch(6), schedule="steps", milestones=(2, 5), decay=0.1)
  np.testing.assert_allclose(got, [1, 1, 0.1, 0.1, 0.1, 0.01], rtol=1e-6)


def test_coda_cosine_is_what_the_official_loop_runs():
  """Nominally 1, .9254, .7126, .3935, .0157 for five epochs; the first comes twice."""
  nominal = [np.cos(99 * np.pi * e / (200 * 4)) for e in range(5)]
  np.testing.assert_allclose(nominal, [1, 0.9254, 0.7126, 0.3935, 0.0157], atol=5e-5)
  got = factors(5, each_epoch(5), schedule="coda_cosine")
  np.testing.assert_allclose(got, [nominal[0], *nominal[:4]], rtol=1e-5)


def test_coda_cosine_of_one_epoch_is_one():
  assert factors(1, each_epoch(1), schedule="coda_cosine") == [1]


def test_timm_cosine_ends_above_its_floor_with_the_first_epoch_twice():
  rate, floor, epochs = 5e-3, 1e-3, 4
  rates = [floor + 0.5 * (rate - floor) * (1 + np.cos(np.pi * e / epochs)) for e in (0, 0, 1, 2)]
  got = factors(
    epochs,
    each_epoch(epochs),
    learning_rate=rate,
    schedule="timm_cosine",
    final_learning_rate=floor,
  )
  np.testing.assert_allclose(np.multiply(got, rate), rates, rtol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "constant", "steps", "coda_cosine", "timm_cosine"])
def test_every_schedule_starts_at_the_peak(name):
  marks = {"milestones": (1,)} if name == "steps" else {}
  assert factors(7, [(0.0, 0)], schedule=name, **marks) == [1]
