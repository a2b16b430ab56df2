"""The records that cross module borders, and the axis letters.

Axis letters: B batch, N tokens, D width, F mlp width, H heads, L depth, R rank, P prompt length,
T tasks, C classes (whole sequence), K classes of one task at most, S image side in pixels.

Variables of a method live in four groups (plain nested dicts of arrays):
  frozen   read-only, a function of the pre-trained weights and the other groups; never saved
  shared   trained and carried from task to task
  cur      trained now, fresh or copied at each task start
  mem      read-only during a step; written between tasks; leading axis T where it grows
Gradients and optimiser state exist for leaves of `shared` and `cur` only.
"""

import dataclasses
from collections.abc import Callable, Generator, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, UInt8

AnyArray = jax.Array | np.ndarray  # on devices or on the host
Params = dict[str, Any]  # nested dict of arrays
Facts = dict[str, Any]  # JSON values by name


class NonFiniteError(ValueError):
  """Training gave NaN or infinity; the run stops and keeps its last checkpoint.

  Attributes:
    found: what is known of the step, for a file: JSON values by name; empty outside of a step.
  """

  def __init__(self, message: str, found: Mapping[str, Any] | None = None):
    super().__init__(message)
    self.found = found or {}


class FrozenError(RuntimeError):
  """Training changed what it must leave alone; the run stops and keeps its last checkpoint."""


class LowRank(flax.struct.PyTreeNode):
  """A change of one projection, in every layer or in one: y += ((x·A)·core)·Bᵀ.

  Attributes:
    a: input factors.
    b: output factors.
    core: between them, [*L, R, R], or its diagonal alone, [*L, R]; None means the identity.
  """

  a: Float[Array, "*L D_in R"]
  b: Float[Array, "*L D_out R"]
  core: Float[Array, "... R"] | None = None


class Prefix(flax.struct.PyTreeNode):
  """Keys and values put before a layer's own; one for all samples (B = 1) or one for each."""

  key: Float[Array, "B P H d"]
  value: Float[Array, "B P H d"]


class Bottleneck(flax.struct.PyTreeNode):
  """A narrow MLP, in every layer or in one: act(x·down + down_bias)·up + up_bias.

  Attributes:
    activation: "relu" or "gelu".
    dropout_keys: of each layer; hidden units are then dropped with probability `dropout`.
  """

  down: Float[Array, "*L D M"]
  down_bias: Float[Array, "*L M"]
  up: Float[Array, "*L M D"]
  up_bias: Float[Array, "*L D"]
  dropout_keys: Key[Array, "*L"] | None = None
  dropout: float = flax.struct.field(pytree_node=False, default=0.0)
  activation: str = flax.struct.field(pytree_node=False, default="relu")


Deltas = Mapping[str, LowRank | tuple[LowRank, ...]]


class Adapters(flax.struct.PyTreeNode):
  """All that a method may add to the plain ViT; each part may be absent.

  Attributes:
    deltas: projection name (query, key, value, out, fc1, fc2) -> its low-rank change, or several
      whose sum it is.
    prompt: tokens put after the class token, without a position; [P, D] or [B, P, D].
    prefix: for each layer, from the first on, what its attention sees besides; None is nothing.
    bottlenecks: site -> MLPs. "attention" and "mlp" add a function of the branch's output to it,
      "parallel" a function of the MLP's input before its LayerNorm to the MLP's output.
  """

  deltas: Deltas = flax.struct.field(default_factory=dict)
  prompt: Float[Array, "*B P D"] | None = None
  prefix: tuple[Prefix | None, ...] = ()
  bottlenecks: Mapping[str, Bottleneck] = flax.struct.field(default_factory=dict)

  def at_layer(self, layer: int) -> "LayerAdapters":
    """Returns what changes block `layer`: a row of each stacked array."""
    stacked = jax.tree.map(lambda leaf: leaf[layer], (self.deltas, self.bottlenecks))
    prefix = self.prefix[layer] if layer < len(self.prefix) else None
    return LayerAdapters(deltas=stacked[0], prefix=prefix, bottlenecks=stacked[1])


class LayerAdapters(flax.struct.PyTreeNode):
  """The part of `Adapters` that one block sees; its arrays have no layer axis but for prefixes."""

  deltas: Deltas = flax.struct.field(default_factory=dict)
  prefix: Prefix | None = None
  bottlenecks: Mapping[str, Bottleneck] = flax.struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """The shape of a ViT. Lengths in pixels or in units.

  Attributes:
    layer_scale: whether attention and MLP outputs are multiplied by a learned vector (DINOv2).
    gelu: "erf" (timm, torch, Hugging Face) or "tanh" (Google's own code).
  """

  image_size: int = 224
  patch_size: int = 16
  width: int = 768
  depth: int = 12
  num_heads: int = 12
  mlp_ratio: int = 4
  layer_scale: bool = False
  gelu: str = "erf"

  def __post_init__(self):
    if self.image_size % self.patch_size:
      raise ValueError(
        f"image_size is {self.image_size}: must be a multiple of the patch size {self.patch_size}"
      )
    if self.width % self.num_heads:
      raise ValueError(f"num_heads is {self.num_heads}: must divide the width {self.width}")
    if self.gelu not in ("erf", "tanh"):
      raise ValueError(f"gelu is {self.gelu!r}: must be 'erf' or 'tanh'")

  @property
  def grid(self) -> int:
    return self.image_size // self.patch_size

  @property
  def num_tokens(self) -> int:
    """Class token and patches."""
    return self.grid**2 + 1

  def projection(self, name: str) -> tuple[int, int]:
    """Returns (d_in, d_out) of the projection `name`."""
    d, f = self.width, self.width * self.mlp_ratio
    square = dict.fromkeys(("query", "key", "value", "out"), (d, d))
    return (square | {"fc1": (d, f), "fc2": (f, d)})[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
  """A frozen feature extractor as pure functions.

  Attributes:
    apply: (params, images [B, S, S, 3], adapters or None) -> features [B, D] float32, the class
      token after the final LayerNorm.
    tokens: the same, -> all tokens [B, N(+P), D] after the final LayerNorm, or the leading
      `num_queries` of them: class token, prompt, patches.
    attention_inputs: the same, -> what each block's query, key and value projections see
      [L, B, N(+P), D].
    init: key -> random params.
  """

  apply: Callable[..., Float[Array, "B D"]]
  tokens: Callable[..., Float[Array, "B N D"]]
  attention_inputs: Callable[..., Float[Array, "L B N D"]]
  init: Callable[[PRNGKeyArray], Params]
  sizes: Sizes


class Batch(flax.struct.PyTreeNode):
  """What a model sees: augmented, normalised images; rows where `valid` is False are padding.

  Labels are positions in the class order of the sequence, in [0, C).
  """

  images: Float[Array, "B S S 3"]
  labels: Int[Array, " B"]
  valid: Bool[Array, " B"]


class Examples(flax.struct.PyTreeNode):
  """Images of a task's split, or of some batches of it, padded to a fixed capacity n.

  Attributes:
    images: decoded pixels in the upper left corner of a canvas.
    sizes: (height, width) in pixels of each image within its canvas.
    labels: positions in the class order.
    valid: False for padding rows.
  """

  images: UInt8[AnyArray, "n h w 3"]
  sizes: Int[AnyArray, "n 2"]
  labels: Int[AnyArray, " n"]
  valid: Bool[AnyArray, " n"]


Batches = Generator[tuple[Examples, Any], None, None]  # with the rows of each


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceSpec:
  """What a method needs to know of a task sequence before it sees any data.

  Attributes:
    scenario: "cil", "dil" or "til".
    num_tasks: T.
    num_classes: C.
    class_ranges: for each task (lo, hi): its labels are lo..hi-1.
    has_val: whether every task has validation images.
  """

  scenario: str
  num_tasks: int
  num_classes: int
  class_ranges: tuple[tuple[int, int], ...]
  has_val: bool = True

  @property
  def max_task_classes(self) -> int:
    """K: rows of the head that one task trains at most."""
    return max(hi - lo for lo, hi in self.class_ranges)

  @property
  def shares_classes(self) -> bool:
    """Whether all tasks have the same labels, and so one head."""
    return len(set(self.class_ranges)) == 1 and self.num_tasks > 1


class Variables(flax.struct.PyTreeNode):
  """The four groups; see the module docstring."""

  frozen: Params
  shared: Params
  cur: Params
  mem: Params

  def update(self, **groups: Params) -> "Variables":
    """Returns the variables with the entries of some groups replaced or added, given by group."""
    return self.replace(**{name: getattr(self, name) | new for name, new in groups.items()})


class TaskArrays(flax.struct.PyTreeNode):
  """The task a step belongs to, as data, so that one compiled step serves all tasks."""

  index: Int[Array, ""]
  lo: Int[Array, ""]
  hi: Int[Array, ""]


class Output(flax.struct.PyTreeNode):
  """What a training step needs: logits over the K slots of the current task, and a penalty."""

  logits: Float[Array, "B K"]
  penalty: Float[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskView:
  """What the host-side hooks of a method may see of the current task. Never test data.

  Attributes:
    index: t, from 0.
    num_classes: of this task.
    arrays: t, lo, hi on the device.
    weights: the pre-trained backbone, float32, untouched.
    train_batches: epoch -> iterator of (examples, rows int32 [B]) over the training images, in
      the order that training itself uses; -1 is padding. Each pair is one batch for `augment` or
      `center`: the examples may be the whole task, the same each time, or this batch alone.
    val_batches: the same over the validation images; None where the split has none.
    train_chunks: first step -> iterator of (examples, rows [K, B]) of all training steps from
      there on; K steps at a time, -1 where there are fewer.
    augment: (examples, rows [B], key) -> Batch with random crops and flips. Jittable.
    center: (examples, rows [B]) -> Batch as at test time. Jittable.
    gather: arrays on the devices -> NumPy arrays, the same on all hosts; for what has a batch axis,
      which is split over the devices. What has none is on each and needs no fetching.
    replicate: arrays made on the host -> the first host's, on all devices: another CPU may round
      otherwise, and what is computed from them must not drift apart.
    key: PRNG key of (run seed, task, name of the stream).
    seed: the run's, for what takes no key. Not the config's: runs of other seeds share a method.
  """

  index: int
  num_classes: int
  arrays: TaskArrays
  weights: Params
  train_batches: Callable[[int], Batches]
  val_batches: Callable[[int], Batches] | None
  train_chunks: Callable[[int], Batches]
  augment: Callable[..., Batch]
  center: Callable[..., Batch]
  gather: Callable[[Any], Any]
  replicate: Callable[[Any], Any]
  key: Callable[[str], PRNGKeyArray]
  seed: int


Rules = tuple[tuple[str, str], ...]  # (regex over "group/path/of/leaf", label)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerGroup:
  """Leaves that train alike; a method's rules name the group of each leaf.

  Attributes:
    lr_scale: factor on the learning rate.
    decays: whether weight decay pulls the leaves to 0; not where their neutral value is another.
    is_head: whether the rate and weight decay of the head apply.
  """

  lr_scale: float = 1.0
  decays: bool = True
  is_head: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passes:
  """Forward passes of the ViT: what a method costs besides its step.

  Attributes:
    train: for each image of a step.
    test: for each image.
    between: over the task's training images, before and after its steps.
  """

  train: int = 1
  test: int = 1
  between: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reported:
  """A fact about each task that a method declares: for the log, result.json and the report.

  Attributes:
    name: key in the facts that begin_task and end_task return; a task may lack it or have None.
    kind: type of the value: int, float, or list of numbers, which may be nested.
    field: key of result.json with the values of all tasks; None keeps the fact to the log.
    is_final: whether `field` has the last task's value alone.
    column: header and format of a column in the report's tables; report/tables.py has the formats.
  """

  name: str
  kind: type
  field: str | None = None
  is_final: bool = False
  column: tuple[str, str] | None = None


@runtime_checkable
class Method(Protocol):
  """A continual-learning method as the trainer sees it: pure functions over `Variables`.

  A task t runs: begin_task, freeze, training steps with `apply`, end_task; then fold once and
  `predict` on every test image. `begin_task` and `end_task` run on the host between tasks: they
  may look at the task's data through the `TaskView` and may change the shapes in `cur`.

  Attributes:
    reports: the facts that begin_task and end_task return.
    groups: groups of the optimizer, by name.
    passes: forward passes of the ViT.
    caveats: notes for a reader of the results, one line each.
  """

  reports: tuple[Reported, ...]
  groups: Mapping[str, OptimizerGroup]
  passes: Passes
  caveats: tuple[str, ...]

  def init(self, key: PRNGKeyArray, weights: Params) -> Variables:
    """Returns the variables before the first task, with `frozen` empty."""
    ...

  def begin_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    """Returns the variables that a task starts from, and facts of it."""
    ...

  def freeze(self, weights: Params, variables: Variables) -> Params:
    """Returns the `frozen` group for training at the current task."""
    ...

  def apply(
    self,
    variables: Variables,
    images: Float[Array, "B S S 3"],
    task: TaskArrays,
    key: PRNGKeyArray,
    valid: Bool[Array, " B"] | None = None,
  ) -> Output:
    """Returns logits and penalty of a training step; all images are valid unless told."""
    ...

  def end_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    """Returns the variables that a task leaves behind, and facts of it."""
    ...

  def fold(self, weights: Params, variables: Variables) -> Params:
    """Returns a pytree for inference, with all learned tasks folded in."""
    ...

  def predict(self, model: Params, images: Float[Array, "B S S 3"]) -> Float[Array, "B C"]:
    """Returns the logits of all classes from a folded model; unseen ones are masked outside."""
    ...

  def rules(self, task: int) -> Rules:
    """Returns the labels of the leaves of shared and cur: a name in `groups`, or "frozen"."""
    ...

  def stored(self, facts: list[Facts]) -> dict[str, Any]:
    """Returns how many parameters the tasks with these facts leave behind, besides head and ViT.

    {"shared": n, "per_task": [n, ...]}, and "statistics": n where numbers computed from the data
    are stored too, such as means of features.
    """
    ...
