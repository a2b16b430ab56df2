"""Matrix products in the form that is fastest on the device.

XLA's CPU compiler turns a bfloat16 product with a bfloat16 result into a float32 one, with both
factors converted first; with a float32 result it uses the processor's bfloat16 instructions
(AVX512-BF16 and the like), twice as fast. The sum is float32 and is rounded once either way.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def multiply(x: Float[Array, "*B K"], w: Float[Array, "K N"]) -> Float[Array, "*B N"]:
  """Returns x·w in the dtype of both, forward and backward."""
  if jax.default_backend() != "cpu" or x.dtype != jnp.bfloat16:
    return x @ w
  return _rounded_once(x, w)


@jax.custom_vjp
def _rounded_once(x, w):
  return contract("...k,kn->...n", x, w)


def _forward(x, w):
  # a factor is saved for the other one's gradient alone
  saved = x.value if w.perturbed else None, w.value if x.perturbed else None
  return contract("...k,kn->...n", x.value, w.value), saved


def _backward(saved, g):
  x, w = saved
  by_x = None if w is None else contract("...n,kn->...k", g, w)
  by_w = None if x is None else contract("bk,bn->kn", *(y.reshape(-1, y.shape[-1]) for y in (x, g)))
  return by_x, by_w


_rounded_once.defvjp(_forward, _backward, symbolic_zeros=True)


def contract(subscripts: str, *factors: Array) -> Array:
  """Returns the einsum of two factors of one dtype in that dtype, summed in float32."""
  product = jnp.einsum(subscripts, *factors, preferred_element_type=jnp.float32)
  return product.astype(factors[0].dtype)
