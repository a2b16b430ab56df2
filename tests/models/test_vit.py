"""What the ViT does its own way: only the tokens that are wanted, and its attention and GELU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax.models import vit
from fmlora_jax.types import Adapters, LowRank, Prefix, Sizes

SIZES = Sizes(image_size=32, patch_size=8, width=32, depth=3, num_heads=4)


def normal(seed, *shape, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def assert_near(ours, reference, atol):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0, atol=atol
    ),
    ours,
    reference,
  )


def test_the_class_token_alone_is_that_of_all_tokens_and_so_are_its_gradients():
  backbone = vit.make_vit(SIZES)
  params = backbone.init(jax.random.key(0))
  images = normal(1, 2, 32, 32, 3)
  heads = (1, 5, SIZES.num_heads, SIZES.width // SIZES.num_heads)
  adapters = Adapters(
    deltas={
      name: LowRank(a=0.3 * normal(2, 3, 32, 4), b=0.3 * normal(3, 3, 32, 4))
      for name in ("query", "value", "out")
    },
    prompt=normal(4, 6, 32),
    prefix=tuple(
      Prefix(key=normal(5 + 10 * i, *heads), value=normal(6 + 10 * i, *heads)) for i in range(3)
    ),
  )

  def loss(features):
    return lambda adapters: jnp.sum(features(params, images, adapters) * normal(7, 2, 32))

  alone = jax.jit(jax.value_and_grad(loss(backbone.apply)))(adapters)
  of_all = jax.jit(jax.value_and_grad(loss(lambda *args: backbone.tokens(*args)[:, 0])))(adapters)
  assert_near(alone, of_all, 2e-4)


@pytest.mark.parametrize("queries", [7, 1])
@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_attention_is_that_of_jax(queries, dtype, atol):
  query = normal(0, 2, queries, 3, 8, dtype=dtype)
  key, value = normal(1, 2, 7, 3, 8, dtype=dtype), normal(2, 2, 7, 3, 8, dtype=dtype)
  weight = normal(3, 2, queries, 3, 8)

  @functools.partial(jax.jit, static_argnums=0)
  def run(attention):
    output, pull = jax.vjp(attention, query, key, value)
    assert output.dtype == dtype
    return output, pull(weight.astype(dtype))

  assert_near(run(vit.attention), run(jax.nn.dot_product_attention), atol)


@pytest.mark.parametrize("kind", ["erf", "tanh"])
@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_gelu_is_that_of_jax(kind, dtype, atol):
  x = jnp.linspace(-6, 6, 97).astype(dtype)

  @functools.partial(jax.jit, static_argnums=0)
  def run(gelu):
    output, pull = jax.vjp(gelu, x)
    assert output.dtype == dtype
    return output, pull(jnp.ones_like(x))

  reference = run(lambda x: jax.nn.gelu(x, approximate=kind == "tanh"))
  assert_near(run(lambda x: vit.gelu(x, kind)), reference, atol)


def test_every_block_says_what_its_attention_sees_prompts_included():
  backbone = vit.make_vit(SIZES)
  params, images = backbone.init(jax.random.key(0)), normal(1, 2, 32, 32, 3)
  adapters = Adapters(prompt=normal(2, 5, SIZES.width))
  plain = backbone.attention_inputs(params, images)[0]
  seen = backbone.attention_inputs(params, images, adapters)
  assert seen.shape == (SIZES.depth, 2, SIZES.num_tokens + 5, SIZES.width)
  assert_near(seen[0, :, :1], plain[:, :1], 1e-5)
  assert_near(seen[0, :, 6:], plain[:, 1:], 1e-5)
