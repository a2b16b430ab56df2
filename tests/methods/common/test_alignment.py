"""Training of a classifier on drawn features: against NumPy, and what it must not touch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax.config import AlignmentConfig, ConfigError
from fmlora_jax.methods.common import class_statistics
from fmlora_jax.methods.common.alignment import Aligner
from fmlora_jax.models import heads
from fmlora_jax.types import NonFiniteError

OUTPUT = np.array([0, 1, 0, 2])  # a class may have several rows


@pytest.fixture
def statistics():
  rng = np.random.default_rng(0)
  return {
    "mean": jnp.asarray(rng.normal(size=(4, 2, 5)), jnp.float32),
    "variance": jnp.asarray(rng.uniform(0.1, 1, (4, 2, 5)), jnp.float32),
    "exists": jnp.ones((4, 2), bool),
  }


def new_head():
  kernel = jax.random.normal(jax.random.key(1), (3, 5))
  return {"kernel": kernel, "bias": jnp.zeros(3)}


def aligner(**changes):
  settings = AlignmentConfig(**{"epochs": 4, "batch_size": 6, "learning_rate": 0.1} | changes)
  return Aligner(settings, "method.alignment", heads.linear, OUTPUT)


def by_hand(params, draws, known, *, num_old, epochs, rate, momentum):
  """Softmax regression by SGD with momentum, in float64."""
  weight, bias = np.asarray(params["kernel"], np.float64), np.asarray(params["bias"], np.float64)
  velocity = [np.zeros_like(weight), np.zeros_like(bias)]
  for i, (x, target) in enumerate(draws):
    scores = x @ weight.T + bias
    scores[:, ~known] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    loss = -np.mean(np.log(p[np.arange(len(x)), target]))
    p[np.arange(len(x)), target] -= 1
    grads = [p.T @ x / len(x), p.mean(0)]
    velocity = [momentum * v + g for v, g in zip(velocity, grads, strict=True)]
    now = rate * 0.5 * (1 + np.cos(np.pi * (i // num_old) / epochs))
    weight, bias = weight - now * velocity[0], bias - now * velocity[1]
  return weight, bias, loss


@pytest.mark.parametrize(("num_old", "rows"), [(2, (1, 1, 1, 0)), (3, (1, 1, 1, 1))])
def test_it_is_softmax_regression_by_annealed_sgd_with_momentum(statistics, num_old, rows):
  rows, key = np.array(rows, bool), jax.random.key(7)
  chances = class_statistics.chances(statistics, rows)
  draws = []
  for i in range(4 * num_old):
    x, row = class_statistics.draw(statistics, chances, jax.random.fold_in(key, i), 6)
    draws.append((np.asarray(x, np.float64), OUTPUT[np.asarray(row)]))
  known = np.array([True, True, rows[3]])
  weight, bias, loss = by_hand(
    new_head(), draws, known, num_old=num_old, epochs=4, rate=0.1, momentum=0.9
  )
  got, last = aligner().align(new_head(), statistics, rows, num_old, key)
  np.testing.assert_allclose(got["kernel"], weight, atol=1e-5)
  np.testing.assert_allclose(got["bias"], bias, atol=1e-5)
  np.testing.assert_allclose(last, loss, rtol=1e-4)
  assert np.abs(weight - new_head()["kernel"]).max() > 0.05
  if not rows[3]:  # an output that is masked stays bit for bit
    np.testing.assert_array_equal(got["kernel"][2], new_head()["kernel"][2])


def test_the_number_of_minibatches_is_data(statistics):
  made = aligner()
  for num_old in (1, 2, 3):
    made.align(new_head(), statistics, np.ones(4, bool), num_old, jax.random.key(0))
  assert made._descend._cache_size() == 1


def test_more_minibatches_than_can_be_counted_are_refused(statistics):
  with pytest.raises(ConfigError, match=r"config\.method\.alignment\.epochs is 1000000: must be l"):
    aligner(epochs=1_000_000).align(
      new_head(), statistics, np.ones(4, bool), 2148, jax.random.key(0)
    )


def test_no_epochs_leave_it_alone(statistics):
  params = new_head()
  got, loss = aligner(epochs=0).align(params, statistics, np.ones(4, bool), 2, jax.random.key(0))
  assert loss is None
  jax.tree.map(np.testing.assert_array_equal, got, params)


def test_a_descent_that_diverges_is_refused(statistics):
  with pytest.raises(NonFiniteError, match=r"lower config\.method\.alignment\.learning_rate"):
    aligner(learning_rate=1e38).align(
      new_head(), statistics, np.ones(4, bool), 3, jax.random.key(0)
    )
