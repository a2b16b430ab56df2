"""Learned prompts: selection and weighting for each sample, and prefixes of keys and values.

Selection and weighting have full float32 precision, whatever the ViT runs in: the order of two
close similarities decides which prompt a sample sees.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from fmlora_jax.types import Prefix

EPS = 1e-12


def prefixes(
  prompts: Float[Array, "B S 2 P D"], layers: Sequence[int], num_heads: int
) -> tuple[Prefix | None, ...]:
  """Returns the prefix of each layer, with None for those that have none.

  Args:
    prompts: keys (index 0 of axis 2) and values (index 1) for S layers; one for all samples (B = 1)
      or one for each.
    layers: ascending, S of them.

  Source: prefix tuning as in DualPrompt (arXiv:2204.04799) Eq. (5); axes stay apart, where some
  public codes reshape samples into keys.
  """
  split = rearrange(prompts, "b s two p (h d) -> s two b p h d", h=num_heads)
  by_layer: list[Prefix | None] = [None] * (max(layers) + 1)
  for layer, (key, value) in zip(layers, split, strict=True):
    by_layer[layer] = Prefix(key=key, value=value)
  return tuple(by_layer)


@jax.default_matmul_precision("highest")
def similarity(query: Float[Array, "B D"], keys: Float[Array, "M D"]) -> Float[Array, "B M"]:
  """Returns the cosine of each query and key. Source: L2P (arXiv:2112.08654) Sec. 4.2."""
  return _unit(query) @ _unit(keys).T


def choose(similarities: Float[Array, "B M"], count: int, *, batchwise: bool) -> Int[Array, "B n"]:
  """Returns the `count` most similar of M for each sample; the lower number where two are equal.

  Args:
    batchwise: all samples get the ones that most of the batch chose, so the prompts of a sample
      depend on its batch.

  Source: L2P (arXiv:2112.08654) Sec. 4.2; the vote is its official code's,
  google-research/l2p models/prompt.py:211.
  """
  chosen = jax.lax.top_k(similarities, count)[1]
  if not batchwise:
    return chosen
  votes = jnp.bincount(chosen.ravel(), length=similarities.shape[1])
  return jnp.broadcast_to(jax.lax.top_k(votes, count)[1], chosen.shape)


@jax.default_matmul_precision("highest")
def attended_similarity(
  query: Float[Array, "B D"], attention: Float[Array, "L M D"], keys: Float[Array, "L M D"]
) -> Float[Array, "B L M"]:
  """Returns cos(q * a, k) of each query with each slot's attention a and key k; 0 of a zero slot.

  Two products over D give numerator and squared norm, so no [B, L, M, D] is made.
  Source: CODA-Prompt (arXiv:2211.13218) Sec. 4.2.
  """
  inner = jnp.einsum("bd,lmd->blm", query, attention * _unit(keys))
  squares = jnp.einsum("bd,lmd->blm", query**2, attention**2)
  return inner * jax.lax.rsqrt(squares + EPS)


@jax.default_matmul_precision("highest")
def mix(
  weights: Float[Array, "B L M"], components: Float[Array, "L M P D"]
) -> Float[Array, "B L P D"]:
  """Returns the sums of components by weight. Source: CODA-Prompt (arXiv:2211.13218) Sec. 4.1."""
  return jnp.einsum("blm,lmpd->blpd", weights, components)


@jax.jit
@jax.default_matmul_precision("highest")
def gram_schmidt(
  earlier: Float[Array, "L K D"], drawn: Float[Array, "L M D"]
) -> Float[Array, "L M D"]:
  """Returns the drawn vectors v as unit vectors along v - sum_j (v·u_j / u_j·u_j) u_j, in turn.

  The u_j are all `earlier` ones, as they are, and those that came before v. This is orthogonal to
  the earlier ones where they are orthogonal to each other: single projections are subtracted, not
  the one on their span. Zero vectors, slots still to come, subtract nothing.

  Source: CODA-Prompt (arXiv:2211.13218) Sec. 4.3; the start is its official code's,
  GT-RIPL/CODA-Prompt models/zoo.py:75.
  """

  def of_layer(earlier, drawn):
    def append(basis, item):
      row, v = item
      squares = jnp.sum(basis**2, axis=-1)
      shares = jnp.where(squares > 0, basis @ v / jnp.where(squares > 0, squares, 1), 0)
      rest = v - shares @ basis
      u = rest / jnp.linalg.norm(rest)
      return basis.at[row].set(u), u

    basis = jnp.concatenate([earlier, jnp.zeros_like(drawn)])
    rows = len(earlier) + jnp.arange(len(drawn))
    return jax.lax.scan(append, basis, (rows, drawn))[1]

  return jax.vmap(of_layer)(earlier, drawn)


@jax.default_matmul_precision("highest")
def orthogonality(vectors: Float[Array, "L M D"], used: Bool[Array, " M"]) -> Float[Array, ""]:
  """Returns the mean of (X·Xᵀ - I)² over pairs of used rows, summed over layers.

  Source: CODA-Prompt (arXiv:2211.13218) Sec. 4.3, as a mean over entries, which its official code
  takes.
  """
  gram = jnp.einsum("lmd,lnd->lmn", vectors, vectors)
  pairs = used[:, None] & used
  return jnp.sum(jnp.where(pairs, gram - jnp.eye(len(used)), 0) ** 2) / pairs.sum()


def _unit(x):
  return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + EPS)
