"""Named PRNG streams: equal arguments give equal keys, also after a restart."""

import zlib

import jax
from jaxtyping import Array, Int, PRNGKeyArray


def named_key(
  root: PRNGKeyArray, name: str, *, task: Int[Array, ""] | int, step: Int[Array, ""] | int = 0
) -> PRNGKeyArray:
  """Returns the key of the stream `name` at (task, step); works inside jit. Source: ours."""
  key = jax.random.fold_in(root, zlib.crc32(name.encode()))
  return jax.random.fold_in(jax.random.fold_in(key, task), step)
