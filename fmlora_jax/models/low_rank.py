"""Low-rank changes of the ViT's projections: apply, fold, orthonormalise, compare.

A stacked delta holds one (A, core, B) per layer: dW_l = A_l · core_l · B_lᵀ, d_in x d_out, for row
vectors y = x·W. Source: LoRA (arXiv:2106.09685); the core between shared bases is F-LoRA's,
FM-LoRA (arXiv:2504.08823) Eq. (1-2).

Products that are computed once per task have full float32 precision; a GPU's default is TF32, a
TPU's bfloat16.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, PRNGKeyArray

from fmlora_jax.models import products
from fmlora_jax.types import LowRank, Params, Sizes


def random_factor(
  key: PRNGKeyArray, depth: int, width: int, rank: int
) -> Float[Array, "{depth} {width} {rank}"]:
  """Returns normal entries; columns have an expected norm of 1."""
  return jax.random.normal(key, (depth, width, rank)) / jnp.sqrt(width)


def torch_uniform(
  key: PRNGKeyArray, depth: int, width: int, rank: int
) -> Float[Array, "{depth} {width} {rank}"]:
  """Returns entries of U(-1/√width, 1/√width), the start of torch's linear layer."""
  limit = width**-0.5
  return jax.random.uniform(key, (depth, width, rank), minval=-limit, maxval=limit)


def fresh(
  key: PRNGKeyArray,
  sizes: Sizes,
  targets: Sequence[str],
  rank: int,
  draw: Callable[..., Float[Array, "L D_in R"]],
) -> dict[str, dict[str, Array]]:
  """Returns factors a and b of each target, B zero: dW = 0.

  Args:
    draw: (key, depth, d_in, rank) -> A.
  """
  factors = {}
  for i, name in enumerate(targets):
    d_in, d_out = sizes.projection(name)
    a = draw(jax.random.fold_in(key, i), sizes.depth, d_in, rank)
    factors[name] = {"a": a, "b": jnp.zeros((sizes.depth, d_out, rank))}
  return factors


def deltas_of(factors: Mapping[str, Mapping[str, Array]]) -> dict[str, LowRank]:
  """Returns the deltas of factors a and b, and a core where there is one, of each target."""
  return {name: LowRank(**leaves) for name, leaves in factors.items()}


def num_parameters(sizes: Sizes, targets: Sequence[str], rank: int) -> int:
  """Returns how many numbers A and B of the targets hold over all layers."""
  return sizes.depth * rank * sum(sum(sizes.projection(name)) for name in targets)


def join_ranks(stack: Float[Array, "T L D R"]) -> Float[Array, "L D T*R"]:
  """Returns the factors of T deltas side by side: one delta of rank T·R, which is their sum."""
  return rearrange(stack, "t l d r -> l d (t r)")


def apply(x: Float[Array, "*B D_in"], delta: LowRank) -> Float[Array, "*B D_out"]:
  """Returns x·A·core·Bᵀ for one layer's delta, in the dtype of x.

  The core stays in the middle: where only it is trained, its gradient then needs no product with
  the full width.
  """
  y = products.multiply(x, delta.a.astype(x.dtype))
  if delta.core is not None:
    core = delta.core.astype(x.dtype)
    y = y * core if core.ndim == 1 else products.multiply(y, core)
  return products.multiply(y, delta.b.T.astype(x.dtype))


@jax.default_matmul_precision("highest")
def dense(delta: LowRank) -> Float[Array, "L D_in D_out"]:
  """Returns dW = A·core·Bᵀ of every layer in the dtype of the factors."""
  a = delta.a
  if delta.core is not None:
    a = a * delta.core[:, None] if delta.core.ndim == 2 else a @ delta.core
  return a @ jnp.swapaxes(delta.b, -1, -2)


def fold_deltas(backbone: Params, deltas: Mapping[str, LowRank]) -> Params:
  """Returns the ViT's parameters with W + dW in place of W; other leaves are shared, not copied."""
  return add(backbone, {name: dense(delta) for name, delta in deltas.items()})


def add(backbone: Params, changes: Mapping[str, Float[Array, "L D_in D_out"]]) -> Params:
  """Returns the same for dense matrices dW."""
  folded = dict(backbone)
  for layer in range(sum(name.startswith("block_") for name in backbone)):
    block = dict(backbone[f"block_{layer}"])
    block["attention"] = dict(block["attention"])
    for name, change in changes.items():
      module = block if name in block else block["attention"]
      linear = module[name]["dense"]
      module[name] = {"dense": linear | {"kernel": linear["kernel"] + change[layer]}}
    folded[f"block_{layer}"] = block
  return folded


@jax.default_matmul_precision("highest")
def orthonormalise(delta: LowRank) -> LowRank:
  """Returns the same dW with AᵀA = BᵀB = I and a diagonal core, its entries descending.

  QR of both bases, then the SVD of the small core between the two triangles; so the leading columns
  of the new bases carry the most of dW. Source: ours (FM-LoRA Eq. (7) needs orthonormal bases).
  """
  q_a, r_a = jnp.linalg.qr(delta.a)
  q_b, r_b = jnp.linalg.qr(delta.b)
  core = r_a if delta.core is None else r_a @ delta.core
  u, s, vt = jnp.linalg.svd(core @ jnp.swapaxes(r_b, -1, -2))
  eye = jnp.eye(s.shape[-1], dtype=s.dtype)
  return LowRank(a=q_a @ u, b=q_b @ jnp.swapaxes(vt, -1, -2), core=eye * s[..., None, :])


def pad_core(core: Float[Array, "*L r r"], rank: int) -> Float[Array, "*L R R"]:
  """Returns the core in the upper left corner of a zero rank x rank matrix."""
  extra = rank - core.shape[-1]
  return jnp.pad(core, [(0, 0)] * (core.ndim - 2) + [(0, extra), (0, extra)])


@jax.default_matmul_precision("highest")
def interference(
  cores: Float[Array, "T L R R"], a: Float[Array, "L D_in R"], b: Float[Array, "L D_out R"]
) -> Float[Array, "T T"]:
  """Returns <dW_i, dW_j>_F summed over layers, computed in R x R.

  With G = AᵀA and H = BᵀB it is <G·C_i·H, C_j>; orthonormal bases make both the identity.
  Source: FM-LoRA Eq. (5-7).
  """
  gram_a = jnp.einsum("ldr,lds->lrs", a, a)
  gram_b = jnp.einsum("ldr,lds->lrs", b, b)
  weighted = jnp.einsum("lrs,tlsu,luv->tlrv", gram_a, cores, gram_b)
  return jnp.einsum("tlrv,ulrv->tu", weighted, cores)


def cosine(inner: Float[Array, "T T"]) -> Float[Array, "T T"]:
  """Returns inner products as cosines; rows of a zero delta are 0."""
  norm = jnp.sqrt(jnp.diagonal(inner))
  scale = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)
  return inner * scale[:, None] * scale[None, :]
