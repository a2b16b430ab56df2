"""The base of all methods: a ViT with a method's adapters, and a head on its features."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fmlora_jax.config import Config, ConfigError, MethodConfig
from fmlora_jax.methods.common.alignment import LOSS, HeadAlignment
from fmlora_jax.models import heads
from fmlora_jax.types import (
  Adapters,
  Backbone,
  Facts,
  OptimizerGroup,
  Output,
  Params,
  Passes,
  Reported,
  Rules,
  SequenceSpec,
  TaskArrays,
  TaskView,
  Variables,
)

RANK = Reported(name="rank", kind=int, field="ranks", column=("rank", "modes"))
BATCH_VOTE = (
  "batchwise: a batch votes on its prompts, so a prediction depends on the batch it is in, and "
  "batches of one task's images tell which task it is"
)

Settings = TypeVar("Settings", bound=MethodConfig)


class StepInputs(flax.struct.PyTreeNode):
  """A training step's inputs besides variables and images.

  Attributes:
    task: the current one.
    key: of this step alone.
    valid: False for padding rows.
    query: class tokens of the unadapted ViT, float32, without a gradient; None where the method
      asks for none.
  """

  task: TaskArrays
  key: PRNGKeyArray
  valid: Bool[Array, " B"]
  query: Float[Array, "B D"] | None = None

  @property
  def class_tokens(self) -> Float[Array, "B D"]:
    """The query of a method that always has one."""
    assert self.query is not None
    return self.query


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedViT(Generic[Settings]):
  """A `Method` whose features are the adapted ViT's and whose head is that of `config.head`.

  A method overrides the hooks in which it differs, calls `super()` in each of those that have a
  part of the head, and adds its own part. This class alone trains a head on the frozen ViT. Methods
  are compared by identity, so that a bound hook may be a static argument of a jitted function.

  Attributes:
    run: config of the run; `settings` is the method's part of it.
    backbone: the ViT.
    spec: sizes of the task sequence.
    query: when the class token of the unadapted ViT is needed, at one more forward pass: "never",
      "test" or "always".
    feature_epochs: forward passes over the training images in begin_task and end_task.
    reports, caveats: as of `Method`.
  """

  run: Config
  backbone: Backbone
  spec: SequenceSpec

  query: ClassVar[Literal["never", "test", "always"]] = "never"
  feature_epochs: ClassVar[int] = 0
  reports: ClassVar[tuple[Reported, ...]] = (LOSS,)
  caveats: ClassVar[tuple[str, ...]] = ()

  @property
  def settings(self) -> Settings:
    return cast(Settings, self.run.method)

  @property
  def dtype(self) -> jnp.dtype:
    """Of the ViT's matrices and activations."""
    return jnp.dtype(self.run.compute_dtype)

  @functools.cached_property
  def head(self) -> heads.Head:
    return heads.make_head(self.run.head.kind, self.spec.num_classes, self.backbone.sizes.width)

  @functools.cached_property
  def alignment(self) -> HeadAlignment | None:
    """The alignment of the head after each task, where `config.head` asks for it."""
    settings = self.run.head
    if not settings.alignment.epochs:
      return None
    return HeadAlignment(
      settings.alignment,
      "head.alignment",
      num_centroids=settings.num_centroids,
      spec=self.spec,
      width=self.backbone.sizes.width,
      logits=self.head.logits,
      features=self.features,
    )

  @functools.cached_property
  def class_sums(self) -> Callable[..., tuple[Float[Array, "C D"], Float[Array, " C"]]]:
    """Sums and counts of the folded model's features by class: see `make_class_sums`."""
    return make_class_sums(self.features, self.spec.num_classes)

  @property
  def groups(self) -> dict[str, OptimizerGroup]:
    return {"adapter": OptimizerGroup(), "head": OptimizerGroup(is_head=True)}

  @property
  def passes(self) -> Passes:
    test = 1 + (self.query != "never")
    of_head = self._starts_at_means + self.head.needs_means + (self.alignment is not None)
    return Passes(
      train=1 + (self.query == "always"), test=test, between=self.feature_epochs + test * of_head
    )

  @property
  def _starts_at_means(self) -> bool:
    return self.run.head.start == "class_mean"

  def init(self, key: PRNGKeyArray, weights: Params) -> Variables:
    """Returns the variables before the first task: in `mem` the head and its statistics."""
    del weights
    mem = {"head": self.head.init(_head_key(key, 0))}
    if self.alignment:
      mem["head_statistics"] = self.alignment.empty()
    return Variables(frozen={}, shared={}, cur={}, mem=mem)

  def begin_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    """Adds to `cur` the rows of the head that the task trains; returns no facts."""
    key = _head_key(view.key("init"), 1)
    rows = heads.start(self.head, variables.mem["head"], self.spec, view.index, key)
    if self._starts_at_means and not (self.spec.shares_classes and view.index):
      sums = self.class_sums(self.fold(view.weights, variables), view)
      rows = heads.imprint(rows, *sums, view.arrays)
    return variables.update(cur={"head": rows}), {}

  def adapters(self, variables: Variables, inputs: StepInputs) -> Adapters:
    """Returns the adapters of a training step."""
    del variables, inputs
    return Adapters()

  def penalty(
    self, variables: Variables, inputs: StepInputs, features: Float[Array, "B D"]
  ) -> Float[Array, ""]:
    """Returns the term that the method adds to the loss."""
    del variables, inputs, features
    return jnp.float32(0)

  def end_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    """Writes the trained rows to `mem`, updates class means and aligns the head."""
    head = heads.commit(variables.mem["head"], variables.cur["head"], self.spec, view.index)
    variables = variables.update(mem={"head": head})
    if self.head.needs_means:
      sums = self.class_sums(self.fold(view.weights, variables), view)
      variables = variables.update(mem={"head": heads.add_means(head, *sums)})
    if not self.alignment:
      return variables, {}
    mem, model = variables.mem, self.fold(view.weights, variables)
    head, statistics, facts = self.alignment.after(mem["head"], mem["head_statistics"], model, view)
    return variables.update(mem={"head": head, "head_statistics": statistics}), facts

  def past(self, weights: Params, variables: Variables) -> Params:
    """Returns the float32 ViT that a task trains on, with the earlier tasks folded in.

    It is not used where `shared` has a "backbone", which is then trained.
    """
    del variables
    return weights

  def folded(self, weights: Params, variables: Variables) -> tuple[Params, Any]:
    """Returns the ViT for inference and the memory that `recall` reads."""
    return self.past(weights, variables), Adapters()

  def recall(self, memory: Any, query: Float[Array, "B D"] | None) -> Adapters:
    """Returns the adapters at test time; by default the memory is these adapters."""
    del query
    return memory

  def read(
    self, backbone: Params, images: Float[Array, "B S S 3"], adapters: Adapters
  ) -> Float[Array, "B D"]:
    """Returns the features that the head sees; by default the class token."""
    return self.backbone.apply(backbone, images, adapters)

  def features(self, model: Params, images: Float[Array, "B S S 3"]) -> Float[Array, "B D"]:
    """Returns the features of the folded model."""
    query = self.backbone.apply(model["backbone"], images) if self.query != "never" else None
    return self.read(model["backbone"], images, self.recall(model["memory"], query))

  def freeze(self, weights: Params, variables: Variables) -> Params:
    """Returns the `frozen` group of a task: the ViT in the compute dtype, unless it is trained."""
    if "backbone" in variables.shared:
      return {}
    return {"backbone": cast_kernels(self.past(weights, variables), self.dtype)}

  def apply(
    self,
    variables: Variables,
    images: Float[Array, "B S S 3"],
    task: TaskArrays,
    key: PRNGKeyArray,
    valid: Bool[Array, " B"] | None = None,
  ) -> Output:
    """Returns the logits of the task's classes and the penalty of a training step."""
    query = None
    if self.query == "always":
      query = self.backbone.apply(variables.frozen["backbone"], images)
      query = jax.lax.stop_gradient(query)
    if valid is None:
      valid = jnp.ones(len(images), bool)
    inputs = StepInputs(task=task, key=key, valid=valid, query=query)
    trunk = variables.shared.get("backbone") or variables.frozen["backbone"]
    features = self.read(trunk, images, self.adapters(variables, inputs))
    return Output(
      logits=self.head.logits(variables.cur["head"], features),
      penalty=self.penalty(variables, inputs, features),
    )

  def fold(self, weights: Params, variables: Variables) -> Params:
    """Returns the model for inference: ViT in the compute dtype, memory and head."""
    trunk, memory = self.folded(weights, variables)
    return {
      "backbone": cast_kernels(trunk, self.dtype),
      "memory": memory,
      "head": variables.mem["head"],
    }

  def predict(self, model: Params, images: Float[Array, "B S S 3"]) -> Float[Array, "B C"]:
    """Returns the logits of all classes."""
    return self.head.predict(model["head"], self.features(model, images))

  def rules(self, task: int) -> Rules:
    """Returns the labels of the head's rows."""
    del task
    return (("cur/head/.*", "head"),)

  def stored(self, facts: list[Facts]) -> dict[str, Any]:
    """Returns no parameters, and the numbers of the head's statistics."""
    counts = {"shared": 0, "per_task": [0] * len(facts)}
    return counts | ({"statistics": self.alignment.num_stored} if self.alignment else {})


def _head_key(key: PRNGKeyArray, purpose: int) -> PRNGKeyArray:
  return jax.random.fold_in(key, 7 + purpose)


def cast_kernels(backbone: Params, dtype: DTypeLike) -> Params:
  """Returns the backbone with its matrices in `dtype`; vectors stay as they are."""
  return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, backbone)


def make_class_sums(features: Callable[..., Float[Array, "B D"]], num_classes: int) -> Callable:
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


def empty_slots(slot: Params, num: int) -> Params:
  """Returns zeros with one row for each of `num` tasks: [T, ...] of each leaf of `slot`."""
  return jax.tree.map(lambda leaf: jnp.zeros((num, *leaf.shape)), slot)


def put_slot(stacks: Params, task: int | Int[Array, ""], slot: Params) -> Params:
  """Returns stacks [T, ...] with the leaves of `slot` as row `task`."""
  return jax.tree.map(lambda stack, leaf: stack.at[task].set(leaf), stacks, slot)


def clipping(config: Config) -> optax.GradientTransformation:
  """Returns the gradient clipping of `config.optim`, for a training between tasks."""
  limit = config.optim.clip_norm
  return optax.identity() if limit is None else optax.clip_by_global_norm(limit)


def check_rank(rank: int, field: str, backbone: Backbone, targets: Iterable[str]) -> None:
  """Raises ConfigError if `rank` is above min(d_in, d_out) of a target."""
  for name in targets:
    limit = min(backbone.sizes.projection(name))
    if rank > limit:
      raise ConfigError(
        f"config.{field} is {rank}: must be at most {limit}, the smaller side of {name!r}"
      )


def check_layers(layers: tuple[int, ...], field: str, backbone: Backbone) -> None:
  """Raises ConfigError unless `layers` are numbers of blocks, from 0, ascending."""
  depth = backbone.sizes.depth
  ascending = all(a < b for a, b in itertools.pairwise((-1, *layers)))
  if not (layers and ascending and layers[-1] < depth):
    raise ConfigError(
      f"config.{field} is {layers}: must be ascending numbers of blocks in 0..{depth - 1}"
    )
