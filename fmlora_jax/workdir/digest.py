"""Digests of arrays, computed where large arrays lie, and equal on any number of devices.

They reveal rot and bugs, not forgery: a single changed element always, any other change but for a
probability of 2^-64.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

LANES = np.array((0, 0x9E3779B9), np.uint32)  # independent sums, which make a digest of 64 bits
HOST_SIZE = 2**17  # elements; the host digests smaller arrays, a device would compile each shape


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


def _sums(leaf: Array) -> UInt32[Array, " lanes"] | UInt32[np.ndarray, " lanes"]:
  """Returns the sum of each lane over all elements; integers add up to the same in any order."""
  if not isinstance(leaf, jax.Array):
    return _host_sums(np.asarray(leaf))
  at_hand = leaf.is_fully_addressable or leaf.is_fully_replicated
  return _host_sums(np.asarray(leaf)) if at_hand and leaf.size <= HOST_SIZE else _device_sums(leaf)


def _host_sums(leaf: np.ndarray) -> UInt32[np.ndarray, " lanes"]:
  bits = np.ascontiguousarray(leaf).view(f"uint{8 * leaf.dtype.itemsize}").ravel()
  bits, index = bits.astype(np.uint32), np.arange(bits.size, dtype=np.uint32)
  return np.stack([np.sum(_mix(bits ^ _mix(index + lane)), dtype=np.uint32) for lane in LANES])


@jax.jit
def _device_sums(leaf: Array) -> UInt32[Array, " lanes"]:
  leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
  word = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
  bits = jax.lax.bitcast_convert_type(leaf, word).astype(jnp.uint32)
  index = jnp.zeros(bits.shape, jnp.uint32)
  for axis, size in enumerate(bits.shape):
    index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
  return jnp.stack([jnp.sum(_mix(bits ^ _mix(index + lane)), dtype=jnp.uint32) for lane in LANES])


def _mix(x):
  """Returns MurmurHash3's finaliser of each word, a bijection."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    x = (x ^ (x >> shift)) * np.uint32(factor)
  return x ^ (x >> 16)
