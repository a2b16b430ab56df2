"""The records that cross module borders, and the axis letters.

Axis letters: B batch, N tokens, D width, F mlp width, H heads, L depth, R rank, P prompt length,
T tasks, C classes (whole sequence), K classes of one task at most, S image side in pixels.

Variables of a method live in four groups (plain nested dicts of arrays):
  frozen   read-only, a function of the pre-trained weights and the other groups; never saved
  shared   trained and carried from task to task
  cur      trained now, fresh or copied at each task start
  mem      read-only during a step; written between tasks; leading axis T where it grows; its entry
           "between" is what begin_task leaves for end_task, and no step sees it
Gradients and optimiser state exist for leaves of `shared` and `cur` only.
"""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, UInt8

AnyArray = jax.Array | np.ndarray  # on devices or on the host
Images = Float[Array, "B S S 3"]
Features = Float[Array, "B D"]
Scalar = Float[Array, ""]
Params = dict[str, Any]  # nested dict of arrays
Facts = dict[str, Any]  # JSON values by name


class NonFiniteError(ValueError):
  """Training gave NaN or infinity; the run stops, and its last checkpoint stays.

  Attributes:
    details: of the step, for a file: JSON values by name; empty outside of a step.
  """

  def __init__(self, message: str, details: Mapping[str, Any] | None = None):
    super().__init__(message)
    self.details = details or {}


class FrozenError(RuntimeError):
  """Training changed a frozen leaf; the run stops, and its last checkpoint stays."""


class LowRank(flax.struct.PyTreeNode):
  """A change of one projection, in every layer or in one: y += ((x·A)·core)·Bᵀ.

  Attributes:
    a: input factors.
    b: output factors.
    core: the matrix between them, [*L, R, R], or its diagonal, [*L, R]; None is the identity.
  """

  a: Float[Array, "*L D_in R"]
  b: Float[Array, "*L D_out R"]
  core: Float[Array, "... R"] | None = None


class Prefix(flax.struct.PyTreeNode):
  """Keys and values before those of a layer's tokens; for all samples (B = 1) or for each."""

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
  """The changes that a method may make to the plain ViT; each part may be absent.

  Attributes:
    deltas: projection name (query, key, value, out, fc1, fc2) -> its low-rank change, or several
      whose sum it is.
    prompt: tokens put after the class token, without a position; [P, D] or [B, P, D].
    prefix: of each layer, from the first on; None is none.
    bottlenecks: site -> MLPs. "attention" and "mlp" add a function of the branch's output to it,
      "parallel" a function of the MLP's input before its LayerNorm to the MLP's output.
  """

  deltas: Deltas = flax.struct.field(default_factory=dict)
  prompt: Float[Array, "*B P D"] | None = None
  prefix: tuple[Prefix | None, ...] = ()
  bottlenecks: Mapping[str, Bottleneck] = flax.struct.field(default_factory=dict)

  def at_layer(self, layer: int) -> "LayerAdapters":
    """Returns the adapters of block `layer`: a row of each stacked array."""
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
    gelu: "erf" (timm, torch, Hugging Face) or "tanh" (Google's code).
    epsilon: added to the variance in each LayerNorm.
  """

  image_size: int = 224
  patch_size: int = 16
  width: int = 768
  depth: int = 12
  num_heads: int = 12
  mlp_ratio: int = 4
  layer_scale: bool = False
  gelu: str = "erf"
  epsilon: float = 1e-6

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
    attention_inputs: the same, -> inputs of each block's query, key and value projections
      [L, B, N(+P), D].
    init: key -> random params.
  """

  apply: Callable[..., Float[Array, "B D"]]
  tokens: Callable[..., Float[Array, "B N D"]]
  attention_inputs: Callable[..., Float[Array, "L B N D"]]
  init: Callable[[PRNGKeyArray], Params]
  sizes: Sizes


class Batch(flax.struct.PyTreeNode):
  """A model's input: augmented, normalised images; rows where `valid` is False are padding.

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
  """The sizes of a task sequence, which a method knows before it sees any data.

  Attributes:
    scenario: "cil", "dil" or "til".
    num_tasks: T.
    num_classes: C.
    class_ranges: for each task (lo, hi): its labels are lo..hi-1.
    has_val: whether every task has validation images.
    val_splits: names of the benchmark's splits with validation images; () where it names none.
  """

  scenario: str
  num_tasks: int
  num_classes: int
  class_ranges: tuple[tuple[int, int], ...]
  has_val: bool = True
  val_splits: tuple[str, ...] = ()

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

  @property
  def mem_of_steps(self) -> Params:
    """`mem` as steps see it: without "between", whose shapes differ from task to task."""
    return {name: leaf for name, leaf in self.mem.items() if name != "between"}

  def update(self, **groups: Params) -> "Variables":
    """Returns the variables with the entries of some groups replaced or added, given by group."""
    return self.replace(**{name: getattr(self, name) | new for name, new in groups.items()})


class TaskArrays(flax.struct.PyTreeNode):
  """The task a step belongs to, as data, so that one compiled step serves all tasks."""

  index: Int[Array, ""]
  lo: Int[Array, ""]
  hi: Int[Array, ""]


class Output(flax.struct.PyTreeNode):
  """A method's output in training.

  Attributes:
    logits: over the K slots of the current task.
    penalty: what the method adds to the loss.
    old_logits: of fixed rows, of which those of earlier tasks' classes join the loss; None where it
      is over the task's classes.
  """

  logits: Float[Array, "B K"]
  penalty: Float[Array, ""]
  old_logits: Float[Array, "B C"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskView:
  """The current task as begin_task and end_task see it. Never test data.

  Attributes:
    index: t, from 0.
    num_classes: of this task.
    steps_per_epoch: batches of `train_batches`.
    earlier: the facts of the tasks before.
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
    gather: arrays on the devices -> NumPy arrays, the same on all hosts; for arrays with a batch
      axis, which is split over the devices. Others are whole on each and need no gathering.
    replicate: arrays made on the host -> process 0's, on all devices: CPUs of different hosts round
      differently.
    key: PRNG key of (run seed, task, name of the stream).
    seed: the run's, for libraries that take no key; runs of other seeds share method and config.
  """

  index: int
  num_classes: int
  steps_per_epoch: int
  earlier: Sequence[Facts]
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
  """Forward passes of the ViT that a method makes.

  Attributes:
    train: for each image of a step.
    test: for each image.
    between: over a task's training images before and after its steps, at most.
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
    field: key of result.json with the values of all tasks; None is for the log alone.
    is_final: whether `field` has the last task's value alone.
    column: header and format of a column in the report's tables; report/columns.py has the formats.
    label: of the axis where it is drawn; None takes the name. A list is drawn with a label alone;
      it then is final and holds a number in [-1, 1] for each pair of tasks.
  """

  name: str
  kind: type
  field: str | None = None
  is_final: bool = False
  column: tuple[str, str] | None = None
  label: str | None = None
