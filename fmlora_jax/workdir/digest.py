"""Digests of arrays, computed on their devices, and equal on any number of them.

They reveal rot and bugs, not forgery: a single changed element always, any other change but for a
probability of 2^-64.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

LANES = np.uint32((0, 0x9E3779B9))  # independent sums, which make a digest of 64 bits


def tree_digests(tree: Any) -> dict[str, str]:
  """Returns the digest of each leaf by its path, such as "float32[2,3] 0123456789abcdef".

  Args:
    tree: arrays of at most 2^32 elements of at most 32 bits, on one or many devices; all processes
      that have such devices must call this.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  sums = jax.device_get([_sums(leaf) for _, leaf in leaves])
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): _text(leaf, lanes)
    for (path, leaf), lanes in zip(leaves, sums, strict=True)
  }


def abstract_array(text: str, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  """Returns shape and dtype of an array with the digest `text`, and its sharding."""
  dtype, _, shape = text.partition("]")[0].partition("[")
  sizes = tuple(int(size) for size in shape.split(",") if size)
  return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype), sharding=sharding)


def _text(leaf, lanes) -> str:
  return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}] " + "".join(f"{n:08x}" for n in lanes)


@jax.jit
def _sums(leaf: Array) -> UInt32[Array, " lanes"]:
  """Returns the sum of each lane over all elements; integer sums do not depend on the order."""
  leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
  word = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
  bits = jax.lax.bitcast_convert_type(leaf, word).astype(jnp.uint32)
  index = jnp.zeros(bits.shape, jnp.uint32)
  for axis, size in enumerate(bits.shape):
    index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
  return jnp.stack([jnp.sum(_mix(bits ^ _mix(index + lane)), dtype=jnp.uint32) for lane in LANES])


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
  """Returns MurmurHash3's finaliser of each word, a bijection."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    x = (x ^ (x >> shift)) * np.uint32(factor)
  return x ^ (x >> 16)
