"""The dynamic rank selector: nested rank masks, drawn and chosen by Gumbel-Softmax.

Source: FM-LoRA (arXiv:2504.08823) Sec. 3.3, Eq. (11-12); Gumbel-Softmax arXiv:1611.01144.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


class RankSelector(nn.Module):
  """P(r_k) = softmax(alpha)_k over the candidate ranks; its collection is the group `cur`: alpha.

  Attributes:
    candidates: r_1 < ... < r_k.
    max_rank: R, length of a mask.
    tau: temperature of the Gumbel-Softmax, > 0.
  """

  candidates: tuple[int, ...]
  max_rank: int
  tau: float = 1.0

  def setup(self):
    self.alpha = self.variable("cur", "alpha", jnp.zeros, len(self.candidates))

  @property
  def masks(self) -> Float[Array, "k R"]:
    return rank_masks(self.candidates, self.max_rank)

  def __call__(self, key: PRNGKeyArray) -> Float[Array, " R"]:
    """Returns the mask of a drawn rank, Eq. (11); its gradient is the soft sample's."""
    return gumbel_one_hot(self.alpha.value, key, self.tau) @ self.masks

  def probabilities(self) -> Float[Array, " k"]:
    return jax.nn.softmax(self.alpha.value)

  def choice(self) -> Int[Array, ""]:
    """Returns the number of the likeliest candidate, without noise: Eq. (12)."""
    return jnp.argmax(self.alpha.value)

  def learn(
    self, costs: Float[Array, " k"], key: PRNGKeyArray, *, steps: int, learning_rate: float
  ) -> None:
    """Trains alpha on the costs of the candidates: see `learn_alpha`."""
    descent = {"tau": self.tau, "steps": steps, "learning_rate": learning_rate}
    self.alpha.value = learn_alpha(self.alpha.value, costs, key, **descent)


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
  """Returns M[:r, :r]·N[:r, :r]ᵀ, padded with zeros, for the mask of rank r."""
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

  The cost is linear in the draw, so the straight-through gradient compares all candidates. Source:
  FM-LoRA Eq. (11).
  """

  def step(i, alpha):
    draw = jax.random.fold_in(key, i)
    return alpha - learning_rate * jax.grad(lambda a: gumbel_one_hot(a, draw, tau) @ costs)(alpha)

  return jax.lax.fori_loop(0, steps, step, alpha)
