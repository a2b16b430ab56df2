"""The head of a method from task to task: rows, statistics of classes, drift, alignment."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from fmlora_jax.config import AlignmentConfig, HeadConfig
from fmlora_jax.methods.common import class_statistics
from fmlora_jax.methods.common.alignment import HeadAlignment
from fmlora_jax.methods.common.discriminant import Discriminant
from fmlora_jax.methods.common.drift import Drift
from fmlora_jax.models import heads
from fmlora_jax.types import (
  Facts,
  Features,
  Params,
  Reported,
  SequenceSpec,
  TaskView,
  Variables,
)

MEAN_DRIFT = Reported(name="mean_drift", kind=float)  # length by which stored means were moved


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedHead:
  """The head's part in the hooks of a method; its state is mem["head"], and cur["head"] of a task.

  Attributes:
    config: of the head.
    spec: sizes of the task sequence.
    width: D.
    features: (folded model, images) -> [B, D].
  """

  config: HeadConfig
  spec: SequenceSpec
  width: int
  features: Callable[..., Features]

  @functools.cached_property
  def layer(self) -> heads.Head:
    """The classifier on features."""
    rows = "zero" if self._starts_at_means else self.config.start
    per_class = self.spec.num_tasks if self.spec.shares_classes else 1
    num_classes, kind = self.spec.num_classes, self.config.kind
    return heads.make_head(kind, num_classes, self.width, rows=rows, per_class=per_class)

  @functools.cached_property
  def alignment(self) -> HeadAlignment | None:
    """The alignment after each task, where the config asks for it; mem["head_statistics"]."""
    config = self.config
    if not config.alignment.epochs:
      return None
    field = "head.alignment"
    return self.make_alignment(config.alignment, field, config.num_centroids, self.features)

  @functools.cached_property
  def discriminant(self) -> Discriminant | None:
    """The statistics of a head of kind lda; mem["head_statistics"]."""
    return Discriminant(self.spec, self.width) if self.config.kind == "lda" else None

  @property
  def statistics(self) -> HeadAlignment | Discriminant | None:
    """What keeps mem["head_statistics"], and makes the head of them after each task."""
    return self.alignment or self.discriminant

  def make_alignment(
    self,
    settings: AlignmentConfig,
    field: str,
    num_centroids: int,
    features: Callable[..., Features],
  ) -> HeadAlignment:
    """Returns the alignment of this head by some settings on some features: see `HeadAlignment`."""
    return HeadAlignment(
      settings,
      field,
      num_centroids=num_centroids,
      spec=self.spec,
      width=self.width,
      logits=self.layer.logits,
      features=features,
    )

  @functools.cached_property
  def class_sums(self) -> Callable[..., class_statistics.Sums]:
    """(folded model, view) -> sums of features and numbers of images by class."""
    return class_statistics.make_class_sums(self.features, self.spec.num_classes)

  @functools.cached_property
  def collect(self) -> Callable:
    """(folded model, view) -> features and labels of the training images, on the host."""
    return class_statistics.make_collector(self.features)

  @property
  def _starts_at_means(self) -> bool:
    return self.config.start == "class_mean"

  @property
  def _drifts(self) -> bool:
    return self.config.drift != "none"

  @property
  def num_passes(self) -> int:
    """Passes over a task's training images before and after its steps."""
    return (self._starts_at_means or self._drifts) + self.reads_features

  def init(self, key: PRNGKeyArray) -> Params:
    """Returns the entries of `mem` before the first task."""
    mem = {"head": self.layer.init(_fold_in(key, 0))}
    return mem | ({"head_statistics": self.statistics.empty()} if self.statistics else {})

  def starts_at_means(self, task: int) -> bool:
    """Whether the rows of a task, from 0, start at the means of its features."""
    return self._starts_at_means and not (self.spec.shares_classes and task)

  def reads_before(self, task: int) -> bool:
    """Whether the start of a task, from 0, needs the features of its images."""
    return self.starts_at_means(task) or (self._drifts and task > 0)

  @property
  def reads_features(self) -> bool:
    """Whether a task's end needs the features of its images."""
    return self.layer.needs_means or self.statistics is not None

  def begin_task(self, variables: Variables, view: TaskView, model: Params | None) -> Variables:
    """Returns the variables with the rows that the task trains.

    Where there is a drift to follow, mem["between"] has the features of the task's images, [n, D].

    Args:
      model: the folded one, needed where `reads_before`.
    """
    mem, key, between = variables.mem["head"], _fold_in(view.key("init"), 1), {}
    rows = heads.start(self.layer, mem, self.spec, view.index, key)
    sums = None
    if self._drifts and view.index:
      features, labels = self.collect(model, view)
      sums = class_statistics.sums_of(features, labels, self.spec.num_classes)
      between = {"between": jnp.asarray(features)}
    if self.starts_at_means(view.index):
      rows = heads.imprint(rows, *(sums or self.class_sums(model, view)), view.arrays)
    return variables.update(cur={"head": rows}, mem=between)

  def old_logits(self, variables: Variables, features: Features) -> Float[Array, "B C"] | None:
    """Returns the logits that join the loss of a step, None where it is of the task's classes."""
    if self.config.loss == "task" or self.spec.shares_classes:
      return None
    return heads.old_logits(self.layer, variables.mem["head"], variables.cur["head"], features)

  def end_task(
    self, variables: Variables, view: TaskView, model: Params | None
  ) -> tuple[Variables, Facts]:
    """Writes the trained rows to `mem`, updates what is stored of classes and aligns the head.

    Args:
      model: the folded one, needed where `reads_features`.
    """
    mem, facts = dict(variables.mem), {}
    before = mem.pop("between", None)
    mem["head"] = heads.commit(mem["head"], variables.cur["head"], self.spec, view.index)
    if before is None and self.statistics is None:
      if self.layer.needs_means:
        mem["head"] = heads.add_means(mem["head"], *self.class_sums(model, view))
      return variables.replace(mem=mem), facts
    features, labels = self.collect(model, view)
    if before is not None:
      mem, facts = follow(mem, Drift(self.config, np.asarray(before), features))
    if self.statistics is None:
      sums = class_statistics.sums_of(features, labels, self.spec.num_classes)
      mem["head"] = heads.add_means(mem["head"], *sums)
    else:
      mem["head"], mem["head_statistics"], found = self.statistics.after(
        mem["head"], mem["head_statistics"], (features, labels), view
      )
      facts |= found
    return variables.replace(mem=mem), facts


def follow(mem: Params, drift: Drift) -> tuple[Params, Facts]:
  """Returns `mem` with the statistics or class means of earlier tasks moved, and facts of it."""
  group = "head_statistics" if "head_statistics" in mem else "head"
  stored = mem[group]
  exists = np.asarray(stored["exists"] if "exists" in stored else stored["count"] > 0)
  new = {name: np.array(stored[name]) for name in ("mean", "variance") if name in stored}
  means = new["mean"][exists]
  variances = new["variance"][exists] if "variance" in new else np.zeros_like(means)
  moved, variances = drift.move(means, variances)
  for name, values in (("mean", moved), ("variance", variances)):
    if name in new:
      new[name][exists] = values
  length = np.linalg.norm(moved - means, axis=1).mean()
  return mem | {group: stored | jax.tree.map(jnp.asarray, new)}, {"mean_drift": float(length)}


def _fold_in(key: PRNGKeyArray, purpose: int) -> PRNGKeyArray:
  return jax.random.fold_in(key, 7 + purpose)
