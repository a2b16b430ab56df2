"""The head of a method from task to task: rows, class means, and alignment with earlier classes."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jaxtyping import PRNGKeyArray

from fmlora_jax.config import AlignmentConfig, HeadConfig
from fmlora_jax.methods.common import class_statistics
from fmlora_jax.methods.common.alignment import HeadAlignment
from fmlora_jax.models import heads
from fmlora_jax.types import Facts, Features, Params, SequenceSpec, TaskView, Variables


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
    return heads.make_head(self.config.kind, self.spec.num_classes, self.width, rows=rows)

  @functools.cached_property
  def alignment(self) -> HeadAlignment | None:
    """The alignment after each task, where the config asks for it; mem["head_statistics"]."""
    config = self.config
    if not config.alignment.epochs:
      return None
    field = "head.alignment"
    return self.make_alignment(config.alignment, field, config.num_centroids, self.features)

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

  @property
  def _starts_at_means(self) -> bool:
    return self.config.start == "class_mean"

  @property
  def num_passes(self) -> int:
    """Passes over a task's training images before and after its steps."""
    return self._starts_at_means + self.layer.needs_means + (self.alignment is not None)

  def init(self, key: PRNGKeyArray) -> Params:
    """Returns the entries of `mem` before the first task."""
    mem = {"head": self.layer.init(_fold_in(key, 0))}
    return mem | ({"head_statistics": self.alignment.empty()} if self.alignment else {})

  def starts_at_means(self, task: int) -> bool:
    """Whether the rows of a task, from 0, start at the means of its features."""
    return self._starts_at_means and not (self.spec.shares_classes and task)

  @property
  def reads_features(self) -> bool:
    """Whether a task's end needs the features of its images."""
    return self.layer.needs_means or self.alignment is not None

  def begin_task(self, variables: Variables, view: TaskView, model: Params | None) -> Params:
    """Returns the rows that the task trains.

    Args:
      model: the folded one, needed where `starts_at_means`.
    """
    mem, key = variables.mem["head"], _fold_in(view.key("init"), 1)
    rows = heads.start(self.layer, mem, self.spec, view.index, key)
    if self.starts_at_means(view.index):
      rows = heads.imprint(rows, *self.class_sums(model, view), view.arrays)
    return rows

  def end_task(
    self, variables: Variables, view: TaskView, model: Params | None
  ) -> tuple[Variables, Facts]:
    """Writes the trained rows to `mem`, updates class means and aligns the head.

    Args:
      model: the folded one, needed where `reads_features`.
    """
    head = heads.commit(variables.mem["head"], variables.cur["head"], self.spec, view.index)
    if self.layer.needs_means:
      head = heads.add_means(head, *self.class_sums(model, view))
    if self.alignment is None or model is None:
      return variables.update(mem={"head": head}), {}
    statistics = variables.mem["head_statistics"]
    head, statistics, facts = self.alignment.after(head, statistics, model, view)
    return variables.update(mem={"head": head, "head_statistics": statistics}), facts


def _fold_in(key: PRNGKeyArray, purpose: int) -> PRNGKeyArray:
  return jax.random.fold_in(key, 7 + purpose)
