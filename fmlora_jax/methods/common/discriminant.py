"""Linear discriminant analysis: a Gaussian for each class of a task, with one covariance for all.

The classifier follows from the statistics in closed form, so it does not depend on how the classes
of frozen features are split into tasks, nor on their order. Source: Deep SLDA (arXiv:1909.01520);
the shrinkage of the covariance is Ledoit and Wolf's (Journal of Multivariate Analysis 88, 2004)
where Deep SLDA has a constant. Computed in float64 on the host.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from fmlora_jax.methods.common import class_statistics
from fmlora_jax.models import heads
from fmlora_jax.types import Facts, NonFiniteError, Params, SequenceSpec, TaskView

LEAST = 1e-4  # shrinkage of Deep SLDA; Ledoit and Wolf's may be 0


class Discriminant:
  """The statistics of all classes so far, and the classifier that they give.

  Statistics are arrays {"mean": [R, D], "count": [R], "scatter": [D, D], "fourth": []}, a row for
  each class of a task: means and numbers of images, the sum of z·zᵀ and of |z|⁴, with z an image's
  feature less the mean of its row. A class that several tasks share has a row in each.

  Args:
    spec: of the sequence.
    width: D.
  """

  def __init__(self, spec: SequenceSpec, width: int):
    self._rows, self._width = class_statistics.Rows(spec), width

  @property
  def num_stored(self) -> int:
    """Numbers in the statistics of all tasks."""
    return len(self._rows) * (self._width + 1) + self._width**2 + 1

  def empty(self) -> Params:
    """Returns statistics without a class."""
    num, width = len(self._rows), self._width
    return {
      "mean": jnp.zeros((num, width)),
      "count": jnp.zeros(num),
      "scatter": jnp.zeros((width, width)),
      "fourth": jnp.float32(0),
    }

  def after(
    self,
    head: Params,
    statistics: Params,
    images: tuple[Float[np.ndarray, "n D"], Int[np.ndarray, " n"]],
    view: TaskView,
  ) -> tuple[Params, Params, Facts]:
    """Returns the head with the new classifier, the statistics with the task of `view`, no facts.

    Args:
      head: rows of all classes.
      statistics: of the tasks before.
      images: features and labels at the task's end.

    Raises:
      NonFiniteError: if a feature is NaN or infinite.
    """
    statistics = self.add(statistics, view.index, *images)
    classifier = view.replicate(self.classifier(statistics))
    return head | {"discriminant": classifier}, view.replicate(statistics), {}

  def add(
    self,
    statistics: Params,
    task: int,
    features: Float[np.ndarray, "n D"],
    labels: Int[np.ndarray, " n"],
  ) -> Params:
    """Returns `statistics` with the classes of `task`, from the features of its images.

    Raises:
      NonFiniteError: if a feature is NaN or infinite.
    """
    if not np.isfinite(features).all():
      raise NonFiniteError(
        f"features of task {task + 1} are NaN or infinite at its end: must be finite; lower "
        "config.optim.learning_rate"
      )
    new = {name: np.array(leaf, np.float64) for name, leaf in statistics.items()}
    for row in np.flatnonzero(self._rows.task == task):
      of_class = features[labels == self._rows.label[row]].astype(np.float64)
      if not len(of_class):
        continue
      new["mean"][row], new["count"][row] = of_class.mean(0), len(of_class)
      apart = of_class - new["mean"][row]
      new["scatter"] += apart.T @ apart
      new["fourth"] += np.sum(np.sum(apart**2, axis=1) ** 2)
    return {name: jnp.asarray(leaf, jnp.float32) for name, leaf in new.items()}

  def classifier(self, statistics: Params) -> Params:
    """Returns the rows {"kernel": [R, D], "bias": [R]} of the log density of each Gaussian.

    A term that all rows share is left out. Rows without an image have a bias that no other has.
    """
    known = {name: np.asarray(leaf, np.float64) for name, leaf in statistics.items()}
    exists = known["count"] > 0
    center = known["mean"][exists].mean(0)  # float32 logits are those of small numbers
    apart = known["mean"][exists] - center
    covariance = shrunk(known["scatter"], known["fourth"], known["count"].sum())
    kernel, bias = np.zeros_like(known["mean"]), np.full(len(exists), heads.NEVER)
    kernel[exists] = np.linalg.solve(covariance, apart.T).T
    bias[exists] = -np.sum(kernel[exists] * (0.5 * apart + center), axis=1)
    return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}


def shrunk(
  scatter: Float[np.ndarray, "D D"], fourth: Float[np.ndarray, ""] | float, count: float
) -> Float[np.ndarray, "D D"]:
  """Returns (1 - s)·S + s·m·I with S = scatter / count and m the mean of its diagonal.

  s is the estimate of the shrinkage with the least expected squared error. Without any spread it is
  the identity. Source: Ledoit and Wolf, Journal of Multivariate Analysis 88 (2004).

  Args:
    scatter: the sum of z·zᵀ over all images.
    fourth: the sum of |z|⁴.
    count: of images.
  """
  width, sample = len(scatter), scatter / max(count, 1)
  squares, level = np.sum(sample**2), np.trace(sample) / width
  if not level > 0:
    return np.eye(width)
  distance = squares / width - level**2  # of S from m·I
  noise = (fourth / count - squares) / (count * width)
  shrinkage = min(max(noise / distance, LEAST), 1.0) if distance > 0 else 1.0
  return (1 - shrinkage) * sample + shrinkage * level * np.eye(width)
