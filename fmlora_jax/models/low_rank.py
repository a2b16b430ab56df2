"""Low-rank changes of the ViT's projections: apply, fold, compare.

A stacked delta holds one (A, core, B) per layer: dW_l = A_l · core_l · B_lᵀ, d_in x d_out, for row
vectors y = x·W. Source: LoRA (arXiv:2106.09685); F-LoRA's core, FM-LoRA (arXiv:2504.08823) Eq. (1-2).
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from fmlora_jax.types import LowRank, Params


def apply(x: Float[Array, "*B D_in"], delta: LowRank) -> Float[Array, "*B D_out"]:
  """Returns x·A·core·Bᵀ for one layer's delta, in the dtype of x.

  The core is multiplied into Bᵀ first: r·r·d_out once, instead of r·r for every token.
  """
  b = delta.b if delta.core is None else delta.b @ delta.core.T
  return (x @ delta.a.astype(x.dtype)) @ b.T.astype(x.dtype)


def dense(delta: LowRank) -> Float[Array, "L D_in D_out"]:
  """Returns dW = A·core·Bᵀ of every layer in the dtype of the factors."""
  a = delta.a if delta.core is None else delta.a @ delta.core
  return a @ jnp.swapaxes(delta.b, -1, -2)


def fold(backbone: Params, deltas: Mapping[str, LowRank]) -> Params:
  """Returns the ViT's parameters with W + dW in place of W; other leaves are shared, not copied."""
  changes = {name: dense(delta) for name, delta in deltas.items()}
  folded = dict(backbone)
  for layer in range(_depth(backbone)):
    block = dict(backbone[f"block_{layer}"])
    block["attention"] = dict(block["attention"])
    for name, change in changes.items():
      place = block if name in block else block["attention"]
      linear = place[name]["dense"]
      place[name] = {"dense": linear | {"kernel": linear["kernel"] + change[layer]}}
    folded[f"block_{layer}"] = block
  return folded


def _depth(backbone: Params) -> int:
  return sum(name.startswith("block_") for name in backbone)
