"""Drift compensation: stored means follow the features that a task's training moves.

No image of an earlier task is left, so its drift is estimated from the current task's images, whose
features are known before the task's steps and after them. Source: semantic drift compensation, Yu
et al. (arXiv:2004.00440), for "sdc"; the affine map of "linear" is ours. Both are float64 on the
host.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from fmlora_jax.config import HeadConfig

AT_ONCE = 64  # means whose distances to all images are in memory


@dataclasses.dataclass(frozen=True)
class Drift:
  """The features of a task's images before and after its steps, in one order.

  Attributes:
    config: of the head.
    before, after: the features.
  """

  config: HeadConfig
  before: Float[np.ndarray, "n D"]
  after: Float[np.ndarray, "n D"]

  def move(
    self, means: Float[np.ndarray, "m D"], variances: Float[np.ndarray, "m D"]
  ) -> tuple[Float[np.ndarray, "m D"], Float[np.ndarray, "m D"]]:
    """Returns means and variances of earlier classes where the features are after the task.

    sdc leaves variances as they are, as its source does.
    """
    before, after = self.before.astype(np.float64), self.after.astype(np.float64)
    means = means.astype(np.float64)
    if self.config.drift == "sdc":
      return means + local_drift(before, after, means, self.config.drift_bandwidth), variances
    fitted = fit_affine(before, after, self.config.drift_ridge)
    return fitted.of_means(means), fitted.of_variances(variances)


def local_drift(
  before: Float[np.ndarray, "n D"],
  after: Float[np.ndarray, "n D"],
  means: Float[np.ndarray, "m D"],
  bandwidth: float,
) -> Float[np.ndarray, "m D"]:
  """Returns the drift of each mean: the average drift of the images, near ones with more weight.

  The weight of an image is exp(-|f - mean|²/(2σ²)), with f its feature before the task. σ is the
  bandwidth times the median distance between the mean and the images (ours), so it needs no tuning
  to the scale of the features. Source: arXiv:2004.00440, whose σ is one constant for features of
  length 1.
  """
  moves, squares = after - before, np.sum(before**2, axis=1)
  parts = [np.zeros((0, means.shape[1]))]
  for first in range(0, len(means), AT_ONCE):
    some = means[first : first + AT_ONCE]
    distances = squares - 2 * some @ before.T + np.sum(some**2, axis=1)[:, None]  # squared
    distances = np.maximum(distances, 0)
    variance = bandwidth**2 * np.median(distances, axis=1, keepdims=True)
    above = distances - distances.min(axis=1, keepdims=True)  # a common factor on all weights
    weights = np.exp(-above / np.maximum(2 * variance, 1e-100))
    parts.append(weights @ moves / weights.sum(axis=1, keepdims=True))
  return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class Affine:
  """The map f -> f + (f - center)·change + shift."""

  center: Float[np.ndarray, " D"]
  change: Float[np.ndarray, "D D"]
  shift: Float[np.ndarray, " D"]

  def of_means(self, means: Float[np.ndarray, "m D"]) -> Float[np.ndarray, "m D"]:
    """Returns the mapped means."""
    return means + (means - self.center) @ self.change + self.shift

  def of_variances(self, variances: Float[np.ndarray, "m D"]) -> Float[np.ndarray, "m D"]:
    """Returns the variances of mapped features whose coordinates were independent."""
    return variances @ (np.eye(len(self.change)) + self.change) ** 2


def fit_affine(
  before: Float[np.ndarray, "n D"], after: Float[np.ndarray, "n D"], ridge: float
) -> Affine:
  """Returns the affine map from features before the task to those after it, by ridge regression.

  It minimises the mean squared error plus ridge · v · |change|², where v is the mean variance of
  the features before. A large ridge leaves the identity and the mean drift. Ours.
  """
  center, shift = before.mean(0), (after - before).mean(0)
  x, moves = before - center, after - before - shift
  gram = x.T @ x
  weight = ridge * np.trace(gram) / len(gram)
  change = np.linalg.solve(gram + (weight or 1.0) * np.eye(len(gram)), x.T @ moves)
  return Affine(center, change, shift)
