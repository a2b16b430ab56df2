"""Products are what plain ones are, and in bfloat16 on a CPU what its instructions can do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax.models import products


def factors(dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (2, 5, 8), (8, 6), (2, 5, 6)
  return [
    jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)
  ]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_and_its_gradients_are_the_plain_ones(dtype):
  x, w, g = factors(dtype)
  ours, back = jax.vjp(products.multiply, x, w)
  wide = [y.astype(jnp.float32) for y in (x, w, g)]
  plain, plain_back = jax.vjp(jnp.matmul, *wide[:2])
  for found, expected in zip((ours, *back(g)), (plain, *plain_back(wide[2])), strict=True):
    assert found.dtype == dtype
    # one rounding of the exact sum, to a bfloat16 beside it at most
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=tolerance, atol=1e-6)


def dots(function, *arguments):
  return [
    eqn
    for eqn in jax.make_jaxpr(function)(*arguments).jaxpr.eqns
    if eqn.primitive is jax.lax.dot_general_p
  ]


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
def test_bfloat16_factors_are_summed_in_float32_and_only_for_gradients_that_are_wanted(wanted):
  x, w, g = factors(jnp.bfloat16)

  def gradients(x, w, g):
    return jax.grad(lambda x, w: (products.multiply(x, w) * g).sum(), argnums=wanted)(x, w)

  found = dots(gradients, x, w, g)
  assert len(found) == 1 + len(wanted)
  for eqn in found:
    assert {v.aval.dtype for v in eqn.invars} == {jnp.dtype(jnp.bfloat16)}
    assert eqn.outvars[0].aval.dtype == jnp.float32


def test_a_product_can_be_vectorised():
  x, w, _ = factors(jnp.bfloat16)
  many = jnp.stack([w, 2 * w])
  found = jax.vmap(products.multiply, in_axes=(None, 0))(x, many)
  np.testing.assert_array_equal(found[1], products.multiply(x, 2 * w))
