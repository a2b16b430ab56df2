"""The base of all methods: a ViT with a method's adapters, and a head on its features.

The hooks of a method are pure functions over `Variables`. A task runs: begin_task, freeze, training
steps with `apply`, end_task; then `fold` once and `predict` on every test image. begin_task and
end_task run on the host between tasks: they may look at the task's data through the `TaskView` and
may change the shapes in `cur`; their facts are JSON values, declared in `reports`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fmlora_jax.config import Config, ConfigError, MethodConfig
from fmlora_jax.methods.common.alignment import LOSS
from fmlora_jax.methods.common.head import MEAN_DRIFT, TrainedHead
from fmlora_jax.types import (
  Adapters,
  Backbone,
  Facts,
  Features,
  Images,
  OptimizerGroup,
  Output,
  Params,
  Passes,
  Reported,
  Rules,
  Scalar,
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
  query: Features | None = None

  @property
  def class_tokens(self) -> Float[Array, "B D"]:
    """The query of a method that always has one."""
    assert self.query is not None
    return self.query


# without __eq__, so that a bound hook may be a static argument of jax.jit
@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedViT(Generic[Settings]):
  """A continual-learning method: adapters of the frozen ViT, and the head of `config.head`.

  A method overrides the hooks in which it differs, and calls `super()` in those with a part of the
  head: init, begin_task, end_task, rules, stored. This class alone trains a head on the frozen ViT.

  Attributes:
    run: config of the run; `settings` is the method's part of it.
    backbone: the ViT.
    spec: sizes of the task sequence.
    query: when a further forward pass gives the class token of the unadapted ViT.
    feature_epochs: forward passes over the training images in begin_task and end_task.
    reports: the facts that begin_task and end_task return.
    caveats: notes for a reader of the results, one line each.
  """

  run: Config
  backbone: Backbone
  spec: SequenceSpec

  query: ClassVar[Literal["never", "test", "always"]] = "never"
  feature_epochs: ClassVar[int] = 0
  reports: ClassVar[tuple[Reported, ...]] = (LOSS, MEAN_DRIFT)
  caveats: ClassVar[tuple[str, ...]] = ()

  @property
  def settings(self) -> Settings:
    return cast(Settings, self.run.method)

  @property
  def dtype(self) -> jnp.dtype:  # of the ViT's matrices and activations
    return jnp.dtype(self.run.compute_dtype)

  @functools.cached_property
  def head(self) -> TrainedHead:
    width = self.backbone.sizes.width
    return TrainedHead(self.run.head, self.spec, width, self.features)

  @property
  def groups(self) -> dict[str, OptimizerGroup]:
    return {"adapter": OptimizerGroup(), "head": OptimizerGroup(is_head=True)}

  @property
  def passes(self) -> Passes:
    test = 1 + (self.query != "never")
    between = self.feature_epochs + test * self.head.num_passes
    return Passes(train=1 + (self.query == "always"), test=test, between=between)

  def init(self, key: PRNGKeyArray, weights: Params) -> Variables:
    """Returns the variables before the first task; `frozen` is empty."""
    del weights
    return Variables(frozen={}, shared={}, cur={}, mem=self.head.init(key))

  def begin_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    """Returns the variables that a task starts from, and facts of it."""
    model = self.fold(view.weights, variables) if self.head.reads_before(view.index) else None
    return self.head.begin_task(variables, view, model), {}

  def adapters(self, variables: Variables, inputs: StepInputs) -> Adapters:
    """Returns the adapters of a training step."""
    del variables, inputs
    return Adapters()

  def penalty(self, variables: Variables, inputs: StepInputs, features: Features) -> Scalar:
    """Returns the term that the method adds to the loss."""
    del variables, inputs, features
    return jnp.float32(0)

  def end_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    """Returns the variables that a task leaves behind, and facts of it."""
    model = self.fold(view.weights, variables) if self.head.reads_features else None
    return self.head.end_task(variables, view, model)

  def past(self, weights: Params, variables: Variables) -> Params:
    """Returns the float32 ViT under a task's adapters, with the earlier tasks folded in."""
    del variables
    return weights

  def folded(self, weights: Params, variables: Variables) -> tuple[Params, Any]:
    """Returns the ViT for inference and the memory that `recall` reads."""
    return self.past(weights, variables), Adapters()

  def recall(self, memory: Any, query: Features | None) -> Adapters:
    """Returns the adapters at test time; by default the memory is these adapters."""
    del query
    return memory

  def read(self, backbone: Params, images: Images, adapters: Adapters) -> Features:
    """Returns the features that the head sees; by default the class token."""
    return self.backbone.apply(backbone, images, adapters)

  def features(self, model: Params, images: Images) -> Features:
    """Returns the features of the folded model."""
    query = self.backbone.apply(model["backbone"], images) if self.query != "never" else None
    return self.read(model["backbone"], images, self.recall(model["memory"], query))

  def freeze(self, weights: Params, variables: Variables) -> Params:
    """Returns the `frozen` group of a task: the ViT in the compute dtype."""
    return {"backbone": cast_kernels(self.past(weights, variables), self.dtype)}

  def trunk(self, variables: Variables) -> Params:
    """Returns the ViT of a training step."""
    return variables.frozen["backbone"]

  def apply(
    self,
    variables: Variables,
    images: Images,
    task: TaskArrays,
    key: PRNGKeyArray,
    valid: Bool[Array, " B"] | None = None,
  ) -> Output:
    """Returns logits and penalty of a training step; without `valid` all images are valid."""
    query = None
    if self.query == "always":
      query = jax.lax.stop_gradient(self.backbone.apply(variables.frozen["backbone"], images))
    valid = jnp.ones(len(images), bool) if valid is None else valid
    inputs = StepInputs(task=task, key=key, valid=valid, query=query)
    features = self.read(self.trunk(variables), images, self.adapters(variables, inputs))
    return Output(
      logits=self.head.layer.logits(variables.cur["head"], features),
      penalty=self.penalty(variables, inputs, features),
      old_logits=self.head.old_logits(variables, features),
    )

  def fold(self, weights: Params, variables: Variables) -> Params:
    """Returns the model for inference, all learned tasks folded in: ViT, memory and head."""
    trunk, memory = self.folded(weights, variables)
    return {
      "backbone": cast_kernels(trunk, self.dtype),
      "memory": memory,
      "head": variables.mem["head"],
    }

  def predict(self, model: Params, images: Images) -> Float[Array, "B C"]:
    """Returns the logits of all classes; unseen ones are masked outside."""
    return self.head.layer.predict(model["head"], self.features(model, images))

  def rules(self, task: int) -> Rules:
    """Returns the labels of the leaves of shared and cur: a name in `groups`, or "frozen"."""
    del task
    return (("cur/head/.*", "head"),)

  def stored(self, facts: list[Facts]) -> dict[str, Any]:
    """Returns how many parameters the tasks with these facts leave behind, besides head and ViT.

    {"shared": n, "per_task": [n, ...]}, and "statistics": n of numbers computed from the data.
    """
    counts, statistics = {"shared": 0, "per_task": [0] * len(facts)}, self.head.statistics
    return counts | ({"statistics": statistics.num_stored} if statistics else {})


def cast_kernels(backbone: Params, dtype: DTypeLike) -> Params:
  """Returns the backbone with its matrices in `dtype`; vectors stay as they are."""
  return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, backbone)


def num_parameters(tree: Any) -> int:
  """Returns how many numbers a pytree of arrays, or of their shapes, holds."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


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
