"""The settings of a run: frozen dataclasses that declare, type and check each field.

A config file makes an `ml_collections.ConfigDict` (cli/config_files.py), which `build` turns into
these; the rest of the package sees no ConfigDict. `fmlora_jax main --list` prints the first
sentence of each field's doc.
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
from fmlora_jax.config.head import HeadConfig

# settings that may differ between the processes of a run; files at a path are compared by hash
OWN_FIELDS = ("input.workers", "tasks.data_dir", "tasks.task_file", "weights.path")
# settings that change neither the numbers of a run, except for rounding, nor its shapes; all others
# are its identity. Of those only `seeds` can be extended, as each seed is a run: with more tasks or
# epochs the class ranges and learning rates differ from the first step on
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
  """The data and how they are divided into tasks.

  Attributes:
    benchmark: a file in fmlora_jax/tasks/benchmarks, or tfds:NAME for any classification set that
      TFDS knows.
    scenario: cil (new classes per task), dil (new domain per task, shared classes), til (cil with
      the task's identity given at test time).
    num_tasks: T; in a dil benchmark at most the number of its domains.
    order_seed: seed of the class order (cil, til) or domain order (dil); None takes the run's seed.
    order: shuffled by order_seed, or natural, the order of the data.
    data_dir: folder of the images; benchmarks that ship their data need none. For those of TFDS,
      None is the folder array_record in TFDS's data folder.
    split: name of a split into train, val and test; None takes the benchmark's first.
    domains: of benchmarks with domains: only these; () takes all.
    task_file: the task file of a run, for the same images in the same tasks. Then order,
      order_seed, split, test_from and the fractions below have no effect.
    val_fraction: share of the training images held out for validation, per class. A validation
      split of the data is used instead, and a named split has its own or none.
    test_fraction: share held out for test, per class, where the data have no test split.
    test_from: where test images come from if the data have training and validation images alone:
      train draws test_fraction of the training images; val takes the validation images, as is usual
      for ImageNet, and those for validation are drawn from training.
    split_seed: seed of the two splits above; independent of the run's seed.
    evaluate_on: split that fills the accuracy matrix. With "val", which is for choosing
      hyper-parameters, the test images are never read. The rank selector reads the validation
      images too.
    broken_files: refuse the whole folder, or skip the file with a warning.
    copies: report or refuse files that are in two splits or two classes. Published sets have some.
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
  test_from: Literal["train", "val"] = "train"
  split_seed: int = 0
  evaluate_on: Literal["test", "val"] = "test"
  broken_files: Literal["refuse", "skip"] = "refuse"
  copies: Literal["report", "refuse"] = "report"
  max_pixels: int = 178_956_970  # from here on Pillow raises an error

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
  """The way of images to the model.

  Attributes:
    mode: resident holds the task's images on the device as uint8, decoded once; stream decodes each
      batch shortly before it is used; auto is resident where memory suffices. The numbers of a run
      do not depend on it.
    workers: processes that decode in mode stream, each a block of batches. 0 decodes in threads of
      this process, which suffices where one process can keep the device busy. Processes pass images
      through /dev/shm, which is too small in many containers.
    image_size: side in pixels that the ViT sees; None takes the architecture's.
    source_size: shorter side in pixels that images are stored at. None takes image_size, at which
      augmentations that crop would enlarge.
    augmentation: a name in fmlora_jax/input/augment.py.
    normalisation: of pixels; None takes that of the weights' training.
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
  """The pre-trained ViT.

  Attributes:
    tag: a name in fmlora_jax/models/weights/registry.py; "" for your file at `path`.
    path: a file, local or gs://, in any format of the tag. None takes the tag's file, downloaded
      from the Hugging Face Hub if huggingface_hub is installed.
    depth: number of blocks that are used, from the first; None takes all.
    architecture: a name in fmlora_jax/models/vit.py, for tag "random" or "".
    gelu: None takes the tag's; Google's code computes "tanh" where timm computes "erf".
    epsilon: added to the variance in each LayerNorm; None takes that of the file's library, 1e-12
      for ViTs of Hugging Face, else 1e-6.
  """

  tag: str = "augreg2_in21k_ft_in1k"
  path: str | None = None
  depth: int | None = None
  architecture: str | None = None
  gelu: Literal["erf", "tanh"] | None = None
  epsilon: float | None = None

  def __post_init__(self):
    require_within(self, 1, 1024, "depth")
    fits = self.epsilon is None or 0 < self.epsilon <= 1
    require(fits, "epsilon", self.epsilon, "in (0, 1]")
    require_path(self, "path")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
  """The optimizer, new at each task; by default AdamW with cosine annealing, FM-LoRA Sec. 4.1.

  The paper's public text lacks the learning rates and weight decays; the defaults are ours. The
  other optimizers and schedules are those of the official codes of other methods.

  Attributes:
    name: adamw, adam or sgd. Weight decay is decoupled in adamw and times the learning rate; in the
      other two it is added to the gradient, as torch does.
    momentum: of sgd.
    learning_rate: peak, for all parameters except the head.
    weight_decay: for all parameters except the head and those that a method exempts.
    head_learning_rate: peak, for the head. AdamW moves each weight by about the rate at each step,
      and a logit by up to the rate times the sum of |features|: 1e-2 is 4 nats at a ViT-S, and
      destroys what the head knows of other domains and tasks.
    head_weight_decay: for the head.
    schedule: cosine (to 0, by steps, without warm-up), constant, steps (times `decay` at each epoch
      in `milestones`), coda_cosine or timm_cosine; see fmlora_jax/train/schedules.py.
    milestones: epochs at which schedule steps multiplies the rate by `decay`, ascending and
      below the `epochs` of a task.
    decay: factor of schedule steps.
    final_learning_rate: rate at the end of timm_cosine.
    later_lr_scale: factor on `learning_rate` and its schedule from the second task on, beside those
      of a method, so that features move less under the classes that are learned. Ours; SLCA
      (arXiv:2303.05118) has a low rate in all tasks.
    later_head_lr_scale: the same factor on `head_learning_rate`. Ours.
    clip_norm: limit of the global L2 norm of the gradients; None does not clip.
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
  later_lr_scale: float = 1.0
  later_head_lr_scale: float = 1.0
  clip_norm: float | None = None

  def __post_init__(self):
    rates = "learning_rate", "head_learning_rate", "later_lr_scale", "later_head_lr_scale"
    for name in rates:
      require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
    for name in ("weight_decay", "head_weight_decay", "final_learning_rate"):
      require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
    for name in ("momentum", "decay"):
      require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
    marks = self.milestones
    ascending = all(a < b for a, b in itertools.pairwise((0, *marks)))
    require(ascending, "milestones", marks, "ascending epochs >= 1")
    steps = self.schedule == "steps"
    require(bool(marks) or not steps, "milestones", marks, "epochs, such as (8, 12)")
    for name, setting, value in (
      ("milestones", "schedule", "steps"),
      ("momentum", "name", "sgd"),
      ("decay", "schedule", "steps"),
      ("final_learning_rate", "schedule", "timm_cosine"),
    ):  # else it would have no effect
      own, default = getattr(self, name), getattr(OptimConfig, name)
      is_used = own == default or getattr(self, setting) == value
      require(is_used, name, own, f"left out, or given with {setting}={value}")
    require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "> 0")


Projection = Literal["query", "key", "value", "out", "fc1", "fc2"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """Checkpoints.

  Attributes:
    every_steps: steps between checkpoints within a task; 0 saves at task ends only.
    on_damage: if the newest checkpoint is damaged, fall back to the newest good one, which leads to
      the same bits, or refuse to run.
  """

  every_steps: int = 0
  on_damage: Literal["fall_back", "refuse"] = "fall_back"

  def __post_init__(self):
    require_within(self, 0, 2**31 - 1, "every_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Sharding over devices; each batch is always sharded over all of them.

  Attributes:
    fsdp: devices that share one copy of the frozen backbone, each with a part of each large array.
      Must divide the number of devices. 1 is a copy on each.
  """

  fsdp: int = 1

  def __post_init__(self):
    require_within(self, 1, MOST_AT_ONCE, "fsdp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
  """Base of each method's settings, which its file extends.

  Attributes:
    name: the method, a file in fmlora_jax/methods.
  """

  name: str = "fm_lora"

  def largest(self) -> tuple["MethodConfig", list[str]]:
    """Returns the settings with values that a run selects at their largest, and notes on that."""
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
  """Settings of a run.

  Attributes:
    seed: of parameters, batches and class order.
    seeds: one run with each, instead of `seed`, in one process; see experiment/seeds.py.
    epochs: passes over the training images of each task.
    batch_size: images in a training step, over all devices; padded where they do not divide it.
    eval_batch_size: images in a test step, over all devices; rounded up to a multiple of them.
    compute_dtype: type of the ViT's matrix products; parameters are float32.
    method, tasks, input, weights, optim, head, checkpoint, mesh: groups of settings.
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
  head: HeadConfig = dataclasses.field(default_factory=HeadConfig)
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
    apart = self.head.loss == "seen" and self.tasks.scenario == "til"
    allowed = "task where tasks.scenario is til, whose tests compare the classes of one task"
    require(not apart, "head.loss", self.head.loss, allowed)
    marks = self.optim.milestones
    allowed = f"below config.epochs, {self.epochs}; lower them, raise it, or take another schedule"
    require(not marks or marks[-1] < self.epochs, "optim.milestones", marks, allowed)
