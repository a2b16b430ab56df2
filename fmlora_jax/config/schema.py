"""The settings of a run: declared, typed and checked here, and nowhere else.

A config file makes an `ml_collections.ConfigDict` (config_files.py); `build` turns it into the
frozen dataclasses below, and after that nobody sees a ConfigDict.
"""

import dataclasses
import itertools
import re
from typing import Literal

from fmlora_jax.config.checks import (
  MOST_AT_ONCE,
  MOST_STEPS,
  MOST_WIDE,
  require,
  require_path,
  require_within,
)

# settings that each process of a run may have for itself; what lies at a path is hashed
OWN_FIELDS = ("input.workers", "tasks.data_dir", "tasks.task_file", "weights.path")
# settings that change neither the numbers of a run, but for rounding, nor its shapes; all others
# are its identity. What can be extended is the list of seeds alone, as each is a run: more tasks
# or epochs would cut the classes and anneal the rates in another way from the first step on
FREE_FIELDS = (
  "checkpoint.every_steps",
  "checkpoint.on_damage",
  "eval_batch_size",
  "input.mode",
  "input.steps_per_dispatch",
  "mesh.fsdp",
  "seeds",
  "tasks.copies",
  *OWN_FIELDS,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TasksConfig:
  """Which data, cut into which tasks.

  Attributes:
    benchmark: a file in fmlora_jax/tasks/benchmarks, or tfds:NAME for any classification set that
      TFDS knows.
    scenario: cil (new classes per task), dil (new domain per task, shared classes), til (cil with
      the task's identity given at test time).
    num_tasks: T; in a dil benchmark at most the number of its domains.
    order_seed: seed of the class order (cil, til) or domain order (dil); None takes the run's seed.
    order: shuffled by order_seed, or the data's own.
    data_dir: where the images lie; benchmarks that ship their data need none. For TFDS's, None is
      the folder array_record where TFDS keeps its data.
    split: a named cut into train, val and test, of benchmarks that have some; None takes the first.
    domains: of benchmarks with domains: only these; () takes all.
    task_file: the task_file.json of a run, to see the same images in the same tasks; then order,
      order_seed, split and the fractions below decide nothing.
    val_fraction: share of the training images held out for validation, per class; where the data
      bring a validation split, that one is taken.
    test_fraction: share held out for test, per class, where the data bring no test split.
    split_seed: of the two cuts above; never tied to the run's seed.
    evaluate_on: what fills the accuracy matrix; "val" is for choosing hyper-parameters: the test
      images are then never read. The rank selector looks at the validation images too.
    broken_files: refuse the whole folder, or skip the file with a warning.
    copies: report or refuse validation and test images whose file is that of a training image too,
      and test images whose file is that of a validation image: published sets do hold some.
    max_pixels: larger images are refused before they are decoded (decompression bombs).
  """

  benchmark: str = "digits"
  scenario: Literal["cil", "dil", "til"] = "cil"
  num_tasks: int = 5
  order_seed: int | None = None
  order: Literal["shuffled", "natural"] = "shuffled"
  data_dir: str | None = None
  split: str | None = None
  domains: tuple[str, ...] = ()
  task_file: str | None = None
  val_fraction: float = 0.125  # of what is not test: 70/10/20 with test_fraction 0.2
  test_fraction: float = 0.2
  split_seed: int = 0
  evaluate_on: Literal["test", "val"] = "test"
  broken_files: Literal["refuse", "skip"] = "refuse"
  copies: Literal["report", "refuse"] = "report"
  max_pixels: int = 178_956_970  # Pillow's own limit for an error

  def __post_init__(self):
    require_within(self, 1, MOST_WIDE, "num_tasks")
    require_within(self, 0, 2**32 - 1, "order_seed", "split_seed")
    require_path(self, "data_dir", "task_file")
    name = self.benchmark
    is_name = re.fullmatch(r"[\w.-]+(:[\w.-]+(/[\w.-]+)?(:[\w.*]+)?)?", name, re.ASCII)
    ok = is_name and len(name) <= 100 and ".." not in name
    require(bool(ok), "benchmark", name, "NAME or tfds:NAME, of letters, digits, '_', '-' and '.'")
    require(0 <= self.val_fraction < 1, "val_fraction", self.val_fraction, "in [0, 1)")
    require(0 < self.test_fraction < 1, "test_fraction", self.test_fraction, "in (0, 1)")
    require_within(self, 1, 2**32, "max_pixels")
    require(len(set(self.domains)) == len(self.domains), "domains", self.domains, "distinct")
    if self.evaluate_on == "val":
      require(self.val_fraction > 0, "val_fraction", self.val_fraction, "> 0 to evaluate_on val")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputConfig:
  """How images reach the model.

  Attributes:
    mode: resident keeps the task's images on the device as uint8, decoded once; stream decodes
      each batch when its turn comes, ahead of the device; auto is resident where it fits the
      memory. No number of the run depends on it.
    workers: of stream: processes that decode, each a block of batches; 0 decodes in threads of this
      process, which serves where one process can keep the device busy. Processes hand images over
      in /dev/shm, which containers often make too small.
    image_size: side in pixels that the ViT sees; None takes the architecture's.
    source_size: shorter side in pixels that images are kept at; None takes image_size, which
      augmentations that crop should not (they would enlarge).
    augmentation: a name in fmlora_jax/input/augment.py.
    normalisation: of pixels; None takes what the weights were trained with.
    steps_per_dispatch: training steps in one device program.
  """

  mode: Literal["auto", "resident", "stream"] = "auto"
  workers: int = 0
  image_size: int | None = None
  source_size: int | None = None
  augmentation: str = "pilot"
  normalisation: Literal["zero_one", "half", "imagenet"] | None = None
  steps_per_dispatch: int = 32

  def __post_init__(self):
    require_within(self, 1, MOST_WIDE, "image_size", "source_size")
    require_within(self, 1, MOST_AT_ONCE, "steps_per_dispatch")
    require_within(self, 0, 1024, "workers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsConfig:
  """Which pre-trained ViT.

  Attributes:
    tag: a name in fmlora_jax/models/weights/registry.py; "" for a file of your own at `path`.
    path: a file, local or gs://, in any format of the tag; None takes the tag's own, downloaded
      from the Hugging Face Hub if huggingface_hub is installed.
    depth: use the first blocks only; None takes all.
    architecture: of tag "random" or of a file of your own: a name in fmlora_jax/models/vit.py.
    gelu: None takes the tag's; Google's own code runs "tanh" where timm runs "erf".
  """

  tag: str = "augreg2_in21k_ft_in1k"
  path: str | None = None
  depth: int | None = None
  architecture: str | None = None
  gelu: Literal["erf", "tanh"] | None = None

  def __post_init__(self):
    require_within(self, 1, 1024, "depth")
    require_path(self, "path")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
  """The optimiser, fresh at each task; by default AdamW with cosine annealing, FM-LoRA Sec. 4.1.

  The learning rates and weight decays were lost in the paper's public text; the defaults are ours.
  The other optimisers and schedules are those of the official codes of other methods.

  Attributes:
    name: adamw, adam or sgd. Weight decay is decoupled in adamw and times the learning rate; in the
      other two it is added to the gradient, as torch does.
    momentum: of sgd.
    learning_rate: peak, for everything but the head.
    weight_decay: for everything but the head and what a method exempts.
    head_learning_rate, head_weight_decay: the same for the linear head. AdamW moves each weight by
      about the rate at each step, and a logit by up to the rate times the sum of |features|: 1e-2
      is 4 nats at a ViT-S, and destroys what the head knows of other domains and tasks.
    schedule: cosine (to 0, by steps, without warm-up), constant, steps (times `decay` at each epoch
      in `milestones`), coda_cosine or timm_cosine; see fmlora_jax/train/schedules.py.
    final_learning_rate: where timm_cosine ends.
    clip_norm: global L2 norm over the trained leaves; None does not clip.
  """

  name: Literal["adamw", "adam", "sgd"] = "adamw"
  momentum: float = 0.9
  learning_rate: float = 1e-3
  weight_decay: float = 1e-2
  head_learning_rate: float = 1e-3
  head_weight_decay: float = 0.0
  schedule: Literal["cosine", "constant", "steps", "coda_cosine", "timm_cosine"] = "cosine"
  milestones: tuple[int, ...] = ()
  decay: float = 0.1
  final_learning_rate: float = 0.0
  clip_norm: float | None = None

  def __post_init__(self):
    for name in ("learning_rate", "head_learning_rate"):
      require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
    for name in ("weight_decay", "head_weight_decay", "final_learning_rate"):
      require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
    for name in ("momentum", "decay"):
      require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
    marks = self.milestones
    ascending = all(a < b for a, b in itertools.pairwise((0, *marks)))
    require(ascending, "milestones", marks, "ascending epochs >= 1")
    require(
      bool(marks) == (self.schedule == "steps"),
      "milestones",
      marks,
      "given with schedule=steps only",
    )
    require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "> 0")


Projection = Literal["query", "key", "value", "out", "fc1", "fc2"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
  """Stochastic gradient descent on drawn features, its rate annealed epoch by epoch to 0.

  Attributes:
    epochs: each of one minibatch per class of the tasks before; 0 leaves the classifier alone.
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
  """The classifier; linear is the paper's, the other two are ours.

  Attributes:
    kind: linear, cosine (normalised features and rows, learned scale per task), or class_mean
      (nearest mean of the adapted features; trained as linear, means stored at each task end).
    start: of new rows. zero, or class_mean: the nearest-mean classifier of the task's training
      images, so that what tells its classes from other tasks' is there before local cross-entropy
      trains what tells them from each other. Costs one feature pass per task.
    alignment: of the rows of all classes so far, after each task from the second on, on features
      drawn from what is kept of each class: what tells tasks apart, which local cross-entropy never
      trains. Of 0 epochs: off, as in the paper. Costs one feature pass per task.
    num_centroids: kept of each class at most, with variances, if there is an alignment.
  """

  kind: Literal["linear", "cosine", "class_mean"] = "linear"
  start: Literal["zero", "class_mean"] = "zero"
  alignment: AlignmentConfig = dataclasses.field(default_factory=lambda: AlignmentConfig(epochs=0))
  num_centroids: int = 10

  def __post_init__(self):
    fits = self.start == "zero" or self.kind != "cosine"
    require(fits, "kind", self.kind, "linear or class_mean, or head.start zero")
    fits = not self.alignment.epochs or self.kind != "class_mean"
    require(fits, "kind", self.kind, "linear or cosine, or head.alignment.epochs 0")
    require_within(self, 1, MOST_WIDE, "num_centroids")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When state is saved besides each task's end.

  Attributes:
    every_steps: within a task; 0 saves at task ends only.
    on_damage: where the newest checkpoint can't be used, fall back to the newest good one, which
      leads to the same bits, or refuse to run.
  """

  every_steps: int = 0
  on_damage: Literal["fall_back", "refuse"] = "fall_back"

  def __post_init__(self):
    require_within(self, 0, 2**31 - 1, "every_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """How a run is spread over devices; batches always are over all of them.

  Attributes:
    fsdp: devices that share one copy of the frozen backbone, a part of each large array on each;
      must divide the number of devices. 1 keeps a copy on each.
  """

  fsdp: int = 1

  def __post_init__(self):
    require_within(self, 1, MOST_AT_ONCE, "fsdp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
  """Base of each method's settings; a method file extends it. `name` is the file's name."""

  name: str = "fm_lora"

  def largest(self) -> tuple["MethodConfig", list[str]]:
    """Returns these settings with what a run chooses task by task at its largest, and says so."""
    return self, []


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankConfig(MethodConfig):
  """Base of the settings of methods that add dW = A·Bᵀ to projections.

  Attributes:
    rank: columns of A and B.
    targets: the projections that are adapted.
  """

  rank: int = 10
  targets: tuple[Projection, ...] = ("query", "value")

  def __post_init__(self):
    require_within(self, 1, MOST_WIDE, "rank")
    distinct = 0 < len(self.targets) == len(set(self.targets))
    require(distinct, "targets", self.targets, "at least one projection, each once")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One run. `epochs` are per task; `batch_size` is over all devices.

  Attributes:
    seeds: in place of `seed`: one run with each, in one process; see experiment/seeds.py.
  """

  seed: int = 1993
  seeds: tuple[int, ...] = ()
  epochs: int = 30
  batch_size: int = 256
  eval_batch_size: int = 256
  compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
  method: MethodConfig = MethodConfig()
  tasks: TasksConfig = TasksConfig()
  input: InputConfig = InputConfig()
  weights: WeightsConfig = WeightsConfig()
  optim: OptimConfig = OptimConfig()
  head: HeadConfig = HeadConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    require(0 <= self.seed < 2**32, "seed", self.seed, "in [0, 2**32)")
    in_range = all(0 <= seed < 2**32 for seed in self.seeds)
    distinct = len(set(self.seeds)) == len(self.seeds)
    require(in_range and distinct, "seeds", self.seeds, "distinct, each in [0, 2**32)")
    alone = not self.seeds or self.seed == Config.seed
    require(alone, "seed", self.seed, "left out where seeds are given")
    require_within(self, 1, MOST_STEPS, "epochs")
    require_within(self, 1, MOST_AT_ONCE, "batch_size", "eval_batch_size")
