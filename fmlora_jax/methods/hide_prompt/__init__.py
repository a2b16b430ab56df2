"""HiDe-Prompt: prefixes for each task, a task classifier, and a head that is aligned afterwards.

Source: Wang et al., NeurIPS 2023, arXiv:2310.07234, and its public code (HD). Before a task a
classifier of the untouched ViT's features learns to tell tasks apart (`task_identity.py`); the task
then trains prefixes and head rows; at its end the whole head is trained on features drawn from the
statistics of each class (`class_statistics.py`, `alignment.py`). At test time the first pass names
the task, the second sees its prefixes.

Different from the public code on purpose: keys, values and samples stay apart, where its reshape
(HD/peft/prompt/hide_prompt.py:115-119) gives a sample the prefixes of others in its batch; at test
time only classes seen are predicted; batches that alignment draws are not cut from a larger pool.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from fmlora_jax import config as config_lib
from fmlora_jax.config import AlignmentConfig, ConfigError
from fmlora_jax.methods.common import base, class_statistics, recipes
from fmlora_jax.methods.common.alignment import HeadAlignment
from fmlora_jax.methods.common.base import AdaptedViT, StepInputs
from fmlora_jax.methods.hide_prompt import task_identity
from fmlora_jax.methods.hide_prompt.task_identity import IdentityConfig
from fmlora_jax.models import heads, prompts
from fmlora_jax.types import (
  Adapters,
  Facts,
  Features,
  Params,
  Reported,
  Rules,
  Scalar,
  TaskView,
  Variables,
)

_SHARED_CLASSES = (
  "HiDe-Prompt is made for tasks that share no classes; here its task classifier has an output for "
  "each class of each task",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.MethodConfig):
  """Settings of HiDe-Prompt; by default those of HD/training_scripts/train_imr_vit.sh.

  Attributes:
    prompt_length: keys in front of those of a layer's tokens, and as many values.
    layers: those that see a prefix, ascending from 0.
    past_share: share of the mean of earlier tasks' prefixes in those of a task.
    repulsion: weight of the repulsion between features, and between features and old centroids.
    temperature: of the repulsion, > 0, in units of squared features.
    num_centroids: stored of each class at most.
    identity: the classifier of tasks.
    alignment: of the head, after each task from the second on.
  """

  name: str = "hide_prompt"
  prompt_length: int = 20
  layers: tuple[int, ...] = (0, 1, 2, 3, 4)
  past_share: float = 0.01
  repulsion: float = 0.5
  temperature: float = 0.8  # HD/engines/hide_promtp_wtp_and_tap_engine.py:528-546
  num_centroids: int = 10
  identity: IdentityConfig = dataclasses.field(default_factory=IdentityConfig)
  alignment: AlignmentConfig = dataclasses.field(default_factory=AlignmentConfig)

  def __post_init__(self):
    require = config_lib.require
    require(self.prompt_length >= 1, "prompt_length", self.prompt_length, ">= 1")
    require(0 <= self.past_share < 1, "past_share", self.past_share, "in [0, 1)")
    require(self.repulsion >= 0, "repulsion", self.repulsion, ">= 0")
    require(self.temperature > 0, "temperature", self.temperature, "> 0")
    require(self.num_centroids >= 1, "num_centroids", self.num_centroids, ">= 1")


@dataclasses.dataclass(frozen=True, eq=False)
class HiDePrompt(AdaptedViT[Config]):
  """HiDe-Prompt: the task's prefixes in `cur`, those of all tasks in `mem`, the task classifier.

  The classifier is in shared["identity"] and trained before each task; `mem` has the statistics of
  both kinds of features, untouched and prefixed.

  Raises:
    ConfigError: if the ViT lacks a layer, or the head cannot be aligned or would be aligned twice.
  """

  query = "test"
  reports = (
    Reported(name="identity_loss", kind=float),
    Reported(name="identity_alignment_loss", kind=float),
    *AdaptedViT.reports,
  )

  def __post_init__(self):
    base.check_layers(self.settings.layers, "method.layers", self.backbone)
    head = self.run.head
    if head.kind not in ("linear", "cosine"):
      raise ConfigError(
        f"config.head.kind is {head.kind!r}: must be linear or cosine, which hide_prompt can train "
        "on features drawn at a task's end"
      )
    if epochs := head.alignment.epochs:
      raise ConfigError(
        f"config.head.alignment.epochs is {epochs}: must be 0, hide_prompt aligns the head itself; "
        "set config.method.alignment instead"
      )

  @property
  def caveats(self) -> tuple[str, ...]:
    return _SHARED_CLASSES if self.spec.shares_classes else ()

  @property
  def feature_epochs(self) -> int:
    return self.settings.identity.epochs + 2

  @functools.cached_property
  def rows(self) -> class_statistics.Rows:
    """The outputs of the task classifier."""
    return class_statistics.Rows(self.spec)

  @functools.cached_property
  def learner(self) -> task_identity.Learner:
    return task_identity.Learner(self.run, self.settings.identity, self.backbone, self.rows)

  @functools.cached_property
  def prefixed_alignment(self) -> HeadAlignment:
    """The alignment of the head on features under the prefixes of the drawn class's task."""
    settings, field = self.settings, "method.alignment"
    return self.head.make_alignment(
      settings.alignment, field, settings.num_centroids, self._prefixed_features
    )

  @property
  def slot_shape(self) -> tuple[int, ...]:
    """The shape of a task's prefixes: [layers, 2, P, D]."""
    settings = self.settings
    return len(settings.layers), 2, settings.prompt_length, self.backbone.sizes.width

  def init(self, key: PRNGKeyArray, weights: Params) -> Variables:
    num_tasks, shape = self.spec.num_tasks, self.slot_shape
    first = jax.random.uniform(jax.random.fold_in(key, 0), shape, minval=-1, maxval=1)
    identity = task_identity.fresh(jax.random.fold_in(key, 1), shape[-1], len(self.rows))
    mem = {
      "prompt": jnp.zeros((num_tasks, *shape)).at[0].set(first),
      "seen": jnp.zeros(num_tasks, bool),
      "identity_statistics": self.prefixed_alignment.empty(),
      "statistics": self.prefixed_alignment.empty(),
    }
    return super().init(key, weights).update(shared={"identity": identity}, mem=mem)

  def begin_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    """The prefixes start from those of the task before; the task classifier learns the task."""
    variables, _ = super().begin_task(variables, view)
    mem, trunk = variables.mem, base.cast_kernels(view.weights, self.dtype)
    identity, statistics, facts = self.learner.learn(
      variables.shared["identity"], mem["identity_statistics"], trunk, view
    )
    variables = variables.update(
      shared={"identity": identity},
      cur={"prompt": mem["prompt"][max(view.index - 1, 0)]},
      mem={"identity_statistics": statistics},
    )
    return variables, facts

  def slot_in_training(self, variables: Variables) -> Float[Array, "S 2 P D"]:
    """Returns the prefixes that a step sees: the task's, mixed with the mean of the past's."""
    mem = variables.mem
    return mixed(variables.cur["prompt"], mem["prompt"], mem["seen"], self.settings.past_share)

  def prefixed(self, slots: Float[Array, "B S 2 P D"]) -> Adapters:
    """Returns the prefixes of all samples (B = 1) or of each as adapters."""
    heads = self.backbone.sizes.num_heads
    return Adapters(prefix=prompts.prefixes(slots, self.settings.layers, heads))

  def _prefixed_features(self, model, images):
    return self.backbone.apply(model["trunk"], images, self.prefixed(model["slot"][None]))

  def adapters(self, variables: Variables, inputs: StepInputs) -> Adapters:
    del inputs
    return self.prefixed(self.slot_in_training(variables)[None])

  def penalty(self, variables: Variables, inputs: StepInputs, features: Features) -> Scalar:
    past = variables.mem["statistics"]
    vectors = jnp.concatenate([past["mean"].reshape(-1, features.shape[-1]), features])
    exists = jnp.concatenate([past["exists"].ravel(), inputs.valid])
    return self.settings.repulsion * repulsion(vectors, exists, self.settings.temperature)

  def end_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    variables, _ = super().end_task(variables, view)  # first: the alignment trains these rows too
    mem, slot = variables.mem, self.slot_in_training(variables)
    model = {"trunk": base.cast_kernels(view.weights, self.dtype), "slot": slot}
    images = self.prefixed_alignment.collect(model, view)
    head, statistics, facts = self.prefixed_alignment.after(
      mem["head"], mem["statistics"], images, view
    )
    mem = {
      "prompt": mem["prompt"].at[view.index].set(slot),
      "seen": mem["seen"].at[view.index].set(True),
      "statistics": statistics,
      "head": head,
    }
    return variables.update(mem=mem), facts

  def folded(self, weights: Params, variables: Variables) -> tuple[Params, Params]:
    memory = {name: variables.mem[name] for name in ("prompt", "seen")}
    return weights, memory | {"identity": variables.shared["identity"]}

  def recall(self, memory: Params, query: Features) -> Adapters:
    task = task_identity.predict_tasks(
      memory["identity"], query, self.rows, memory["seen"], self.settings.identity.epsilon
    )
    return self.prefixed(memory["prompt"][task])

  def rules(self, task: int) -> Rules:
    table = ("cur/prompt", "adapter"), ("shared/identity/.*", "frozen")
    return (*table, *super().rules(task))

  def stored(self, facts: list[Facts]) -> dict[str, Any]:
    """Counts the task classifier, the prefixes, and the statistics of two kinds of features."""
    fresh = functools.partial(task_identity.fresh, jax.random.key(0))
    network = jax.eval_shape(lambda: fresh(self.slot_shape[-1], len(self.rows)))
    return super().stored(facts) | {
      "shared": base.num_parameters(network),
      "per_task": [math.prod(self.slot_shape)] * len(facts),
      "statistics": 2 * self.prefixed_alignment.num_stored,
    }


def mixed(
  slot: Float[Array, "S 2 P D"],
  past: Float[Array, "T S 2 P D"],
  seen: Bool[Array, " T"],
  share: float,
) -> Float[Array, "S 2 P D"]:
  """Returns (1 - share)·slot + share·(mean of the past slots seen), or `slot` if there are none.

  Source: HD/peft/prompt/hide_prompt.py:105-108.
  """
  count = jnp.sum(seen)
  mean = jnp.einsum("t,t...->...", seen.astype(slot.dtype), past) / jnp.maximum(count, 1)
  used = jnp.where(count > 0, share, 0)
  return (1 - used) * slot + used * mean


@jax.default_matmul_precision("highest")  # differences of large numbers, exponentiated
def repulsion(
  vectors: Float[Array, "M D"], exists: Bool[Array, " M"], temperature: float
) -> Scalar:
  """Returns the mean over vectors of -log softmax(v_i·v_j / temperature)_i, in nats.

  Vectors are not normalised: one that is long beside its products with others is left alone.
  Source: HD/engines/hide_promtp_wtp_and_tap_engine.py:528-546.
  """
  products = jnp.where(exists, vectors @ vectors.T / temperature, heads.NEVER)
  losses = jax.nn.logsumexp(products, axis=-1) - jnp.diagonal(products)
  return heads.weighted_mean(losses, exists)


METHOD = HiDePrompt

# rates are per 256 images and scaled by the 24 of one of its 8 GPUs, HD/trainers/
# hideprompt_trainer.py:101-115: 0.03·24/256, 5e-4·24/256, 0.01·24/256, 0.005·24/256
_PROMPT, _IDENTITY, _IDENTITY_CUB, _ALIGNMENT = 2.8125e-3, 4.6875e-5, 9.375e-4, 4.6875e-4
# timm's, HD/configs: times 0.1 after 30 epochs, the first one counted twice
_STEP = {"schedule": "steps", "milestones": (31,), "decay": 0.1}


def _official(
  split: str, *, epochs: int, identity: dict, method: dict, schedule: dict, head: float = 0.1
) -> dict:
  """Returns the groups of one benchmark; `head` is the factor on the head's rate."""
  # without weight decay: its two flags --weight-decay and --weight_decay set one value, and 0.0 of
  # the former stays, so its SGD never gets the 5e-4 of the latter
  alignment = {"epochs": 30, "momentum": 0.9}
  return {
    "epochs": epochs,
    "batch_size": 192,  # 8 GPUs x 24
    "compute_dtype": "float32",
    "method": {
      "layers": (0, 1, 2, 3, 4),
      "past_share": 0.01,
      "temperature": 0.8,
      "num_centroids": 10,
      "identity": identity
      | {"epsilon": 1e-5}  # torch's; HD/vits/hide_prompt_vision_transformer.py:321-361
      | {"alignment": alignment | {"batch_size": 24, "learning_rate": _ALIGNMENT}},
      "alignment": alignment | {"batch_size": 120, "learning_rate": 5e-3},
    }
    | method,
    "head": {"start": "truncated_normal"},  # HD/vits/hide_prompt_vision_transformer.py:677-682
    "optim": recipes.optim(
      "adam", _PROMPT, head_learning_rate=_PROMPT * head, clip_norm=1.0, **schedule
    ),
    "input": {"augmentation": "pilot", "normalisation": "zero_one"},
    "weights": {"tag": "orig_in21k"},
    "tasks": {"order": "natural", "split": split},
  }


# exceptions, beside those of common/recipes.py and in the module's docstring:
# - CIFAR-100: HD jitters the brightness of training images, crops at least 0.08 of their area
#   bicubically and normalises by CIFAR's own mean and deviation (HD/datasets.py:339-361)
# - CUB-200: HD takes the published split (HD/continual_datasets.py:453)
# - DomainNet: HD has no settings; CIFAR-100's with 5 epochs at a constant rate
# HD/training_scripts/train_{imr,cifar100,cub}_vit.sh
OFFICIAL = {
  "imagenet_r": _official(
    "slice80",
    epochs=150,
    identity={"epochs": 20, "learning_rate": _IDENTITY},
    method={"prompt_length": 20, "repulsion": 0.5},
    schedule={"schedule": "timm_cosine", "final_learning_rate": 1e-5},
  ),
  "cifar100": _official(
    "full",
    epochs=50,
    identity={"epochs": 20, "learning_rate": _IDENTITY},
    method={"prompt_length": 5, "repulsion": 0.1},
    schedule=_STEP,
  ),
  "cub200": _official(
    "full",
    epochs=50,
    identity={"epochs": 20, "learning_rate": _IDENTITY_CUB},
    method={"prompt_length": 20, "repulsion": 0.01},
    schedule=_STEP,
    head=1.0,  # without --larger_prompt_lr
  ),
  "domainnet": _official(
    "full",
    epochs=5,
    identity={"epochs": 5, "learning_rate": _IDENTITY},
    method={"prompt_length": 5, "repulsion": 0.1},
    schedule={"schedule": "constant"},
  ),
}
