"""The head of a method from task to task: rows, class means, and alignment with earlier classes."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from fmlora_jax.config import AlignmentConfig, HeadConfig
from fmlora_jax.methods.common.alignment import HeadAlignment
from fmlora_jax.models import heads
from fmlora_jax.types import Facts, Features, Params, SequenceSpec, TaskView, Variables

ClassSums = tuple[Float[Array, "C D"], Float[Array, " C"]]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedHead:
  """The head's part in the hooks of a method; its state is mem["head"], and cur["head"] of a task.

  Attributes:
    config: of the head.
    spec: sizes of the task sequence.
    width: D.
    fold: (weights, variables) -> the folded model.
    features: (folded model, images) -> [B, D].
  """

  config: HeadConfig
  spec: SequenceSpec
  width: int
  fold: Callable[..., Params]
  features: Callable[..., Features]

  @functools.cached_property
  def layer(self) -> heads.Head:
    """The classifier on features."""
    return heads.make_head(self.config.kind, self.spec.num_classes, self.width)

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
  def class_sums(self) -> Callable[..., ClassSums]:
    """(folded model, view) -> sums of features and numbers of images by class."""
    return make_class_sums(self.features, self.spec.num_classes)

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

  def begin_task(self, variables: Variables, view: TaskView) -> Params:
    """Returns the rows that the task trains."""
    mem, key = variables.mem["head"], _fold_in(view.key("init"), 1)
    rows = heads.start(self.layer, mem, self.spec, view.index, key)
    if self._starts_at_means and not (self.spec.shares_classes and view.index):
      sums = self.class_sums(self.fold(view.weights, variables), view)
      rows = heads.imprint(rows, *sums, view.arrays)
    return rows

  def end_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    """Writes the trained rows to `mem`, updates class means and aligns the head."""
    head = heads.commit(variables.mem["head"], variables.cur["head"], self.spec, view.index)
    variables = variables.update(mem={"head": head})
    if self.layer.needs_means:
      sums = self.class_sums(self.fold(view.weights, variables), view)
      variables = variables.update(mem={"head": heads.add_means(head, *sums)})
    if not self.alignment:
      return variables, {}
    mem, model = variables.mem, self.fold(view.weights, variables)
    head, statistics, facts = self.alignment.after(mem["head"], mem["head_statistics"], model, view)
    return variables.update(mem={"head": head, "head_statistics": statistics}), facts


def _fold_in(key: PRNGKeyArray, purpose: int) -> PRNGKeyArray:
  return jax.random.fold_in(key, 7 + purpose)


def make_class_sums(
  features: Callable[..., Features], num_classes: int
) -> Callable[..., ClassSums]:
  """Returns the function (model, view) -> sums of features [C, D], numbers of images [C].

  They are of each class in the view's training images, as at test time; `features` is a function of
  (model, images).
  """

  @functools.partial(jax.jit, static_argnames="center")
  def batch_sums(model, examples, rows, *, center):
    batch = center(examples, rows)
    one_hot = jax.nn.one_hot(batch.labels, num_classes) * batch.valid[:, None]
    sums = jnp.matmul(one_hot.T, features(model, batch.images), precision="highest")
    return sums, one_hot.sum(0)

  def class_sums(model, view: TaskView):
    totals = [batch_sums(model, *batch, center=view.center) for batch in view.train_batches(0)]
    return jax.tree.map(lambda *parts: sum(parts), *totals)

  return class_sums
