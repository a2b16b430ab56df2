"""Bottleneck adapters: narrow MLPs beside or behind the branches of a block.

Source: Houlsby et al. (arXiv:1902.00751), behind both branches; AdaptFormer (arXiv:2205.13535),
beside the MLP.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmlora_jax.models import products
from fmlora_jax.types import Bottleneck


def apply(x: Float[Array, "*B D"], layer: Bottleneck) -> Float[Array, "*B D"]:
  """Returns act(x·down + down_bias)·up + up_bias for one layer's adapter, in the dtype of x."""
  hidden = products.multiply(x, layer.down.astype(x.dtype)) + layer.down_bias.astype(x.dtype)
  hidden = (
    jax.nn.relu(hidden) if layer.activation == "relu" else jax.nn.gelu(hidden, approximate=False)
  )
  if layer.dropout_keys is not None:
    active = jax.random.bernoulli(layer.dropout_keys, 1 - layer.dropout, hidden.shape)
    hidden = jnp.where(active, hidden / (1 - layer.dropout), 0)
  return products.multiply(hidden, layer.up.astype(x.dtype)) + layer.up_bias.astype(x.dtype)
