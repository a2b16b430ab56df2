"""Narrow MLPs beside and behind the branches of a block, against NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax.models import bottleneck, vit
from fmlora_jax.types import Adapters, Bottleneck, Sizes

SIZES = Sizes(image_size=16, patch_size=8, width=16, depth=2, num_heads=2)
HIDDEN = 5


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def random_layers(seed=0, depth=2, width=16, **changes):
  return Bottleneck(
    down=draw(depth, width, HIDDEN, seed=seed),
    down_bias=draw(depth, HIDDEN, seed=seed + 1),
    up=draw(depth, HIDDEN, width, seed=seed + 2),
    up_bias=draw(depth, width, seed=seed + 3),
    **changes,
  )


def layer_of(layers, index):
  return jax.tree.map(lambda leaf: leaf[index], layers)


def by_numpy(x, layers, index):
  down, down_bias, up, up_bias = (
    np.asarray(leaf[index], np.float64)
    for leaf in (layers.down, layers.down_bias, layers.up, layers.up_bias)
  )
  hidden = np.asarray(x, np.float64) @ down + down_bias
  if layers.activation == "relu":
    hidden = np.maximum(hidden, 0)
  else:
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
  return hidden @ up + up_bias


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_bottleneck_is_a_narrow_mlp(activation):
  layers, x = random_layers(activation=activation), draw(3, 4, 16, seed=9)
  got = bottleneck.apply(x, layer_of(layers, 1))
  np.testing.assert_allclose(got, by_numpy(x, layers, 1), rtol=1e-5, atol=1e-4)
  assert bottleneck.apply(x.astype(jnp.bfloat16), layer_of(layers, 1)).dtype == jnp.bfloat16


def test_gradients_are_those_of_the_chain_rule():
  layer, x, pull = layer_of(random_layers(), 0), draw(7, 16, seed=9), draw(7, 16, seed=10)

  def loss(layer, x):
    return jnp.sum(bottleneck.apply(x, layer) * pull)

  grads, to_input = jax.grad(loss, argnums=(0, 1))(layer, x)
  hidden = np.asarray(x @ layer.down + layer.down_bias)
  inner = np.asarray(pull @ layer.up.T) * (hidden > 0)
  expected = {
    "down": np.asarray(x).T @ inner,
    "down_bias": inner.sum(0),
    "up": np.maximum(hidden, 0).T @ np.asarray(pull),
    "up_bias": np.asarray(pull).sum(0),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(getattr(grads, name), value, rtol=1e-4, atol=1e-4, err_msg=name)
  np.testing.assert_allclose(to_input, inner @ np.asarray(layer.down).T, rtol=1e-4, atol=1e-4)


def test_dropout_drops_its_share_of_hidden_units_and_keeps_their_mean():
  ones = Bottleneck(
    down=jnp.zeros((500, 500)), down_bias=jnp.ones(500), up=jnp.eye(500), up_bias=jnp.zeros(500)
  )
  x = jnp.zeros((20, 500))
  np.testing.assert_array_equal(bottleneck.apply(x, ones.replace(dropout=0.2)), 1)
  noisy = ones.replace(dropout=0.2, dropout_keys=jax.random.key(0))
  got = np.asarray(bottleneck.apply(x, noisy))
  np.testing.assert_allclose(np.unique(got), [0, 1.25])
  assert abs((got == 0).mean() - 0.2) < 0.02  # 5 standard deviations of 10,000 draws
  assert (got[0] != got[1]).any()  # each sample its own


def test_sites_see_the_branches_output_or_the_residual_stream_before_its_norm():
  """With branches that put out their biases alone, NumPy can follow the class token."""
  backbone = vit.make_vit(SIZES)
  params = jax.tree.map(lambda leaf: leaf, backbone.init(jax.random.key(0)))
  biases = {"out": draw(2, 16, seed=20), "fc2": draw(2, 16, seed=21)}
  for i in range(2):
    block = params[f"block_{i}"]
    for place, name in ((block["attention"], "out"), (block, "fc2")):
      kernel = place[name]["dense"]["kernel"]
      place[name]["dense"] = {"kernel": jnp.zeros_like(kernel), "bias": biases[name][i]}
  sites = {
    "attention": random_layers(seed=30, activation="gelu"),
    "mlp": random_layers(seed=40),
    "parallel": random_layers(seed=50),
  }
  got = backbone.apply(params, draw(1, 16, 16, 3, seed=5), Adapters(bottlenecks=sites))[0]
  x = np.asarray(params["cls"][0] + params["position"][0], np.float64)
  for i in range(2):
    attended, mixed = (np.asarray(biases[name][i]) for name in ("out", "fc2"))
    x = x + attended + by_numpy(attended, sites["attention"], i)
    x = x + mixed + by_numpy(mixed, sites["mlp"], i) + by_numpy(x, sites["parallel"], i)
  expected = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
