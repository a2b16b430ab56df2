"""The dynamic rank selector: nested rank masks, drawn and chosen by Gumbel-Softmax.

Source: FM-LoRA (arXiv:2504.08823) Sec. 3.3, Eq. (11-12); Gumbel-Softmax arXiv:1611.01144.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


class RankSelector(nn.Module):
  """P(r_k) = softmax(alpha + difficulty)_k over the candidate ranks; alpha is the group `cur`.

  alpha_k is what validation images say of rank r_k, and `difficulty` are the logits that the task's
  complexity adds, of `difficulty_logits`.

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

  def __call__(self, difficulty: Float[Array, " k"], key: PRNGKeyArray) -> Float[Array, " R"]:
    """Returns the mask of a drawn rank, Eq. (11); its gradient is the soft sample's."""
    return gumbel_one_hot(self.alpha.value + difficulty, key, self.tau) @ self.masks

  def probabilities(self, difficulty: Float[Array, " k"]) -> Float[Array, " k"]:
    """Returns P(r_k); the likeliest candidate is the choice, without noise: Eq. (12)."""
    return jax.nn.softmax(self.alpha.value + difficulty)

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


def complexity(loss: Float[Array, "*k"], num_classes: int) -> Float[Array, "*k"]:
  """Returns H_t: a loss on unseen images in nats over that of guessing, 1 = no better than chance.

  Source: FM-LoRA Sec. 3.3; the division, which makes tasks comparable, is ours.
  """
  return loss / jnp.log(max(num_classes, 2))


def rank_share(
  complexity: Float[Array, ""] | float, earlier: Sequence[float], reference: float
) -> Float[Array, ""]:
  """Returns q(H_t), the share of r_max that a task of complexity H_t asks for.

  q(H_t) = min(1, H_t / (2·max(mean of the earlier H, reference))). So a task that is as hard as the
  tasks so far asks for half of r_max, and one that the model can do already for the smallest rank.
  The reference keeps a sequence of easy tasks from asking for large ranks. Source: ours.
  """
  usual = max([reference, sum(earlier) / len(earlier)] if earlier else [reference])
  return jnp.minimum(1.0, jnp.asarray(complexity) / (2 * usual))


def difficulty_logits(
  share: Float[Array, ""], candidates: Sequence[int], max_rank: int, weight: float
) -> Float[Array, " k"]:
  """Returns what the complexity of a task adds to the logits of the candidate ranks.

  s(H_t)·x_k - weight·x_k² with x_k = r_k / r_max and s(H_t) = 2·weight·q(H_t): up to a constant the
  log density of a normal distribution of x around the share q(H_t). Therefore
    - log P(r_k) - log P(r_j) rises with H_t for r_k > r_j, so for the same alpha a harder task
      never gets a smaller rank;
    - where alpha tells no candidate from another, the one next to q(H_t)·r_max is chosen.
  Source: FM-LoRA Sec. 3.3, where the complexity enters Eq. (11); its form is ours.
  """
  x = jnp.asarray(candidates, jnp.float32) / max_rank
  return weight * (2 * share * x - x**2)


def significant_gains(losses: Float[Array, "n k"], deviations: float) -> Float[Array, " k"]:
  """Returns each candidate's mean loss less the first one's, as far as it exceeds its noise.

  The mean of the paired differences over n images is moved towards 0 by `deviations` standard
  errors; what is closer to 0 is no evidence and becomes 0. Source: ours (soft thresholding).
  """
  apart = losses - losses[:, :1]
  noise = deviations * apart.std(0) / jnp.sqrt(len(losses))
  mean = apart.mean(0)
  return jnp.sign(mean) * jnp.maximum(jnp.abs(mean) - noise, 0)


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
