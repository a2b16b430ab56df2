"""The dynamic rank selector's algebra: nested rank masks, drawn and chosen by Gumbel-Softmax.

Source: FM-LoRA (arXiv:2504.08823) Sec. 3.3, Eq. (11-12); Gumbel-Softmax arXiv:1611.01144.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def rank_masks(candidates: Sequence[int], max_rank: int) -> Float[Array, "k R"]:
  """Returns one row per candidate r: 1 for the leading r columns, 0 for the rest."""
  return (jnp.arange(max_rank) < jnp.asarray(candidates)[:, None]).astype(jnp.float32)


def gumbel_one_hot(alpha: Float[Array, " k"], key: PRNGKeyArray, tau: float) -> Float[Array, " k"]:
  """Samples a one-hot choice with P = softmax(alpha); its gradient is the soft sample's.

  The draw does not depend on tau > 0; the gradient sharpens as tau falls. Source: FM-LoRA Eq. (11).
  """
  noisy = alpha + jax.random.gumbel(key, alpha.shape)
  soft = jax.nn.softmax(noisy / tau)
  hard = jax.nn.one_hot(jnp.argmax(noisy), alpha.size)
  return hard + soft - jax.lax.stop_gradient(soft)


def mask_core(
  m: Float[Array, "L R R"], n: Float[Array, "L R R"], mask: Float[Array, " R"]
) -> Float[Array, "L R R"]:
  """Returns M·Nᵀ of the leading columns and rows only: that of M[:r, :r] and N[:r, :r], padded."""
  corner = mask[:, None] * mask[None, :]
  return (m * corner) @ jnp.swapaxes(n * corner, -1, -2)


def complexity(loss: Float[Array, ""], num_classes: Int[Array, ""] | int) -> Float[Array, ""]:
  """Returns H_t: the validation loss over that of guessing, 1 = no better than chance.

  Source: FM-LoRA Sec. 3.3; the division, which makes tasks comparable, is ours.
  """
  return loss / jnp.log(jnp.maximum(num_classes, 2))


def selection_costs(
  losses: Float[Array, " k"],
  *,
  candidates: Sequence[int],
  max_rank: int,
  price: float,
  num_classes: Int[Array, ""] | int,
) -> Float[Array, " k"]:
  """Returns CE_val + (price / H_t)·r / r_max of each candidate r.

  H_t is the mean complexity at the candidates: a harder task pays less for rank. Source: FM-LoRA
  Sec. 3.3, with the price ours.
  """
  difficulty = jnp.maximum(complexity(losses.mean(), num_classes), 1e-3)
  return losses + price / difficulty * jnp.asarray(candidates, jnp.float32) / max_rank


def learn_alpha(
  alpha: Float[Array, " k"],
  costs: Float[Array, " k"],
  key: PRNGKeyArray,
  *,
  tau: float,
  steps: int,
  learning_rate: float,
) -> Float[Array, " k"]:
  """Returns alpha after gradient descent on the cost of a candidate drawn at each step.

  The cost is linear in the draw, so that the straight-through gradient compares all candidates,
  those beyond the drawn one too. Source: FM-LoRA Eq. (11).
  """

  def step(i, alpha):
    draw = jax.random.fold_in(key, i)
    return alpha - learning_rate * jax.grad(lambda a: gumbel_one_hot(a, draw, tau) @ costs)(alpha)

  return jax.lax.fori_loop(0, steps, step, alpha)
