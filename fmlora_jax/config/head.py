"""The settings of the classifier."""

import dataclasses
from typing import Literal

from fmlora_jax.config.checks import MOST_AT_ONCE, MOST_STEPS, MOST_WIDE, require, require_within


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
  """Training of a classifier on drawn features by SGD, its rate annealed epoch by epoch to 0.

  Attributes:
    epochs: each of one minibatch per class of the tasks so far; 0 is no alignment.
    batch_size: features in a minibatch.
    learning_rate, momentum: of SGD.
  """

  epochs: int = 30
  batch_size: int = 120
  learning_rate: float = 5e-3
  momentum: float = 0.9

  def __post_init__(self):
    require_within(self, 0, MOST_STEPS, "epochs")
    require_within(self, 1, MOST_AT_ONCE, "batch_size")
    require(self.learning_rate > 0, "learning_rate", self.learning_rate, "> 0")
    require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
  """The classifier; linear is the paper's, the others are not.

  Attributes:
    kind: linear, cosine (normalised features and rows, learned scale per task), class_mean (nearest
      mean of the adapted features), or lda (linear discriminant analysis of the adapted features,
      with one covariance of all classes; Deep SLDA, arXiv:1909.01520). The last two train as linear
      and predict by statistics that are stored at each task's end. lda costs one feature pass per
      task.
    start: initial value of new rows. zero; class_mean: the nearest-mean classifier of the task's
      training images, which separates its classes from those of other tasks before cross-entropy
      within the task separates them from each other, and costs one feature pass per task; or a
      draw of the official codes: torch_linear is U(-1/√D, 1/√D), biases too, kaiming_uniform
      U(-√(3/D), √(3/D)) and truncated_normal N(0, 0.02²), both with zero biases.
    loss: task, cross-entropy over the classes of the current task; or seen, over all classes so
      far, where the rows of earlier classes are fixed. Ours. Seen has no effect where tasks share
      their classes, and FM-LoRA chooses ranks by the loss over the task's classes either way.
    alignment: of the rows of all classes so far, after each task from the second on, on features
      drawn from statistics of each class. It separates tasks, which cross-entropy within a task
      never trains. Off with 0 epochs, as in the paper. Costs one feature pass per task.
    num_centroids: stored of each class at most, with variances, if there is an alignment.
    drift: how stored statistics and class means follow the features at a task's end; of lda the
      means alone. none; sdc, by the drift of the task's images near a mean (semantic drift
      compensation, arXiv:2004.00440); or linear, by an affine map fitted to the images' features
      before and after the task (ours). Costs one feature pass per task before its steps, the same
      as that of start.
    drift_bandwidth: of sdc, the width of its Gaussian weights over the median distance between a
      mean and the task's images. The source has 0.3 for features of length 1.
    drift_ridge: of linear, the weight that pulls the map to a translation, over the mean variance
      of the features and the number of images.
  """

  kind: Literal["linear", "cosine", "class_mean", "lda"] = "linear"
  start: Literal["zero", "class_mean", "torch_linear", "kaiming_uniform", "truncated_normal"] = (
    "zero"
  )
  loss: Literal["task", "seen"] = "task"
  alignment: AlignmentConfig = dataclasses.field(default_factory=lambda: AlignmentConfig(epochs=0))
  num_centroids: int = 10
  drift: Literal["none", "sdc", "linear"] = "none"
  drift_bandwidth: float = 0.3
  drift_ridge: float = 1.0

  def __post_init__(self):
    by_statistics = self.kind in ("class_mean", "lda")
    fits = self.start == "zero" or self.kind != "cosine"
    require(fits, "kind", self.kind, "linear, class_mean or lda, or head.start zero")
    fits = not self.alignment.epochs or not by_statistics
    require(fits, "kind", self.kind, "linear or cosine, or head.alignment.epochs 0")
    fits = self.drift == "none" or self.alignment.epochs or by_statistics
    stored = "head.alignment.epochs > 0, or head.kind class_mean or lda"
    allowed = f"none, or statistics must be stored: {stored}"
    require(bool(fits), "drift", self.drift, allowed)
    require_within(self, 1, MOST_WIDE, "num_centroids")
    for name in ("drift_bandwidth", "drift_ridge"):
      require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
