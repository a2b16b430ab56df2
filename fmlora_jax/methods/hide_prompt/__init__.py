"""HiDe-Prompt: a prefix per task, a classifier that finds the task, and heads aligned afterwards.

Source: Wang et al., NeurIPS 2023, arXiv:2310.07234; HD is its public code (0ed4333). Before a task
a classifier of the untouched ViT's features learns to tell tasks apart (`task_identity.py`); the
task then trains its own prefixes and head rows; at its end the whole head is trained on features
drawn from what is kept of each class (`class_statistics.py`, `alignment.py`). At test time the
first pass names the task, the second sees its prefixes.

Different from the public code on purpose: keys, values and samples stay apart, where its reshape
(HD/peft/prompt/hide_prompt.py:115-119) hands a sample the prefixes of others in its batch; at test
time only classes seen are predicted; batches that alignment draws are not cut from a larger pool.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fmlora_jax import config as config_lib
from fmlora_jax.config import AlignmentConfig, ConfigError
from fmlora_jax.methods.common import base, class_statistics, recipes
from fmlora_jax.methods.common.alignment import HeadAlignment
from fmlora_jax.methods.hide_prompt import task_identity
from fmlora_jax.methods.hide_prompt.task_identity import IdentityConfig
from fmlora_jax.models import heads, prompts
from fmlora_jax.types import Adapters, Backbone, Method, SequenceSpec, Variables

_SHARED_CLASSES = (
  "HiDe-Prompt is made for tasks that share no classes; here its task classifier has an output for "
  "each class of each task",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.MethodConfig):
  """Settings of HiDe-Prompt; by default those of HD/training_scripts/train_imr_vit.sh.

  Attributes:
    prompt_length: keys in front of each layer's own, and as many values.
    layers: those that see a prefix, ascending from 0.
    past_share: of the mean of earlier tasks' prefixes in a task's own.
    repulsion: weight of what keeps features apart from each other and from earlier centroids.
    temperature: of the repulsion, > 0, in units of squared features.
    num_centroids: kept of each class at most.
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


def make(config: config_lib.Config, backbone: Backbone, spec: SequenceSpec) -> Method:
  """Returns HiDe-Prompt as a Method.

  Raises:
    ConfigError: if the ViT lacks a layer, or the head can't be aligned, or would be once more.
  """
  settings, sizes = config.method, backbone.sizes
  base.check_layers(settings.layers, "method.layers", backbone)
  if config.head.kind == "class_mean":
    raise ConfigError(
      "config.head.kind is 'class_mean': must be linear or cosine, which hide_prompt can train on "
      "features drawn at a task's end"
    )
  if epochs := config.head.alignment.epochs:
    raise ConfigError(
      f"config.head.alignment.epochs is {epochs}: must be 0, hide_prompt has an alignment of its "
      "own; set config.method.alignment instead"
    )
  dtype = jnp.dtype(config.compute_dtype)
  rows = class_statistics.Rows(spec)
  slot_shape = (len(settings.layers), 2, settings.prompt_length, sizes.width)
  head = heads.make_head(config.head.kind, spec.num_classes, sizes.width)
  learner = task_identity.Learner(config, backbone, rows)
  aligned = HeadAlignment(
    settings.alignment,
    "method.alignment",
    num_centroids=settings.num_centroids,
    spec=spec,
    width=sizes.width,
    logits=head.logits,
    features=lambda model, images: backbone.apply(
      model["trunk"], images, prefixed(model["slot"][None])
    ),
  )

  def init(key, weights):
    del weights
    first = jax.random.uniform(jax.random.fold_in(key, 0), slot_shape, minval=-1, maxval=1)
    return Variables(
      frozen={},
      shared={"identity": task_identity.fresh(jax.random.fold_in(key, 1), sizes.width, len(rows))},
      cur={},
      mem={
        "prompt": jnp.zeros((spec.num_tasks, *slot_shape)).at[0].set(first),
        "seen": jnp.zeros(spec.num_tasks, bool),
        "identity_statistics": aligned.empty(),
        "statistics": aligned.empty(),
      },
    )

  def prefixed(slots):
    return Adapters(prefix=prompts.prefixes(slots, settings.layers, sizes.num_heads))

  def slot_in_training(variables):
    return mixed(
      variables.cur["prompt"], variables.mem["prompt"], variables.mem["seen"], settings.past_share
    )

  def adapters(variables, inputs):
    del inputs
    return prefixed(slot_in_training(variables)[None])

  def penalty(variables, inputs, features):
    kept = variables.mem["statistics"]
    vectors = jnp.concatenate([kept["mean"].reshape(-1, sizes.width), features])
    exists = jnp.concatenate([kept["exists"].ravel(), inputs.valid])
    return settings.repulsion * repulsion(vectors, exists, settings.temperature)

  def begin_task(variables, view):
    identity, statistics, facts = learner.learn(
      variables.shared["identity"],
      variables.mem["identity_statistics"],
      base.cast_kernels(view.weights, dtype),
      view,
    )
    prompt = variables.mem["prompt"][max(view.index - 1, 0)]
    variables = variables.replace(
      shared=variables.shared | {"identity": identity},
      cur=variables.cur | {"prompt": prompt},
      mem=variables.mem | {"identity_statistics": statistics},
    )
    return variables, facts

  def end_task(variables, view):
    task, mem = view.index, variables.mem
    slot = slot_in_training(variables)
    model = {"trunk": base.cast_kernels(view.weights, dtype), "slot": slot}
    rows_so_far, statistics, facts = aligned.after(mem["head"], mem["statistics"], model, view)
    mem = mem | {
      "prompt": mem["prompt"].at[task].set(slot),
      "seen": mem["seen"].at[task].set(True),
      "statistics": statistics,
      "head": rows_so_far,
    }
    return variables.replace(mem=mem), facts

  def folded(weights, variables):
    memory = {name: variables.mem[name] for name in ("prompt", "seen")}
    return weights, memory | {"identity": variables.shared["identity"]}

  def recall(memory, query):
    task = task_identity.predict_tasks(memory["identity"], query, rows, memory["seen"])
    return prefixed(memory["prompt"][task])

  def stored(facts):
    network = jax.eval_shape(lambda: task_identity.fresh(jax.random.key(0), sizes.width, len(rows)))
    slot = len(settings.layers) * 2 * settings.prompt_length * sizes.width
    return {
      "shared": sum(leaf.size for leaf in jax.tree.leaves(network)),
      "per_task": [slot] * len(facts),
      "statistics": 2 * aligned.num_kept,  # of two kinds of features
    }

  return base.with_head(
    config,
    backbone,
    spec,
    init=init,
    adapters=adapters,
    penalty=penalty,
    begin_task=begin_task,
    end_task=end_task,
    folded=folded,
    recall=recall,
    query="test",
    rules=lambda task: (("cur/prompt", "adapter"), ("shared/identity/.*", "frozen")),
    stored=stored,
    feature_epochs=settings.identity.epochs + 2,
    caveats=_SHARED_CLASSES if spec.shares_classes else (),
  )


def mixed(
  own: Float[Array, "S 2 P D"],
  slots: Float[Array, "T S 2 P D"],
  seen: Bool[Array, " T"],
  share: float,
) -> Float[Array, "S 2 P D"]:
  """Returns (1 - share)·own + share·(mean of the slots seen), or `own` where there are none.

  Source: HD/peft/prompt/hide_prompt.py:105-108.
  """
  count = jnp.sum(seen)
  mean = jnp.einsum("t,t...->...", seen.astype(own.dtype), slots) / jnp.maximum(count, 1)
  share = jnp.where(count > 0, share, 0)
  return (1 - share) * own + share * mean


@jax.default_matmul_precision("highest")  # differences of large numbers, exponentiated
def repulsion(
  vectors: Float[Array, "M D"], exists: Bool[Array, " M"], temperature: float
) -> Float[Array, ""]:
  """Returns the mean over vectors of -log softmax(v_i·v_j / temperature)_i, in nats.

  Vectors are not normalised: one that is long beside its products with others is left alone.
  Source: HD/engines/hide_promtp_wtp_and_tap_engine.py:528-546.
  """
  products = jnp.where(exists, vectors @ vectors.T / temperature, -1e9)
  losses = jax.nn.logsumexp(products, axis=-1) - jnp.diagonal(products)
  return heads.weighted_mean(losses, exists)


# rates are per 256 images and scaled by the 24 of one of its 8 GPUs, HD/trainers/
# hideprompt_trainer.py:101-115: 0.03·24/256, 5e-4·24/256, 0.01·24/256, 0.005·24/256
_PROMPT, _IDENTITY, _IDENTITY_CUB, _ALIGNMENT = 2.8125e-3, 4.6875e-5, 9.375e-4, 4.6875e-4
# timm's, HD/configs: times 0.1 after 30 epochs, the first one counted twice
_STEP = {"schedule": "steps", "milestones": (31,), "decay": 0.1}


def _official(
  split: str, *, epochs: int, identity: dict, method: dict, schedule: dict, head: float = 0.1
) -> dict:
  """Returns the groups of one benchmark; `head` is the factor on the head's rate."""
  alignment = {"epochs": 30, "momentum": 0.9}  # without weight decay: baselines.md 2.7, 8b
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
      | {"alignment": alignment | {"batch_size": 24, "learning_rate": _ALIGNMENT}},
      "alignment": alignment | {"batch_size": 120, "learning_rate": 5e-3},
    }
    | method,
    "optim": recipes.optim(
      "adam", _PROMPT, head_learning_rate=_PROMPT * head, clip_norm=1.0, **schedule
    ),
    "input": {"augmentation": "pilot", "normalisation": "zero_one"},
    "weights": {"tag": "orig_in21k"},
    "tasks": {"order": "natural", "split": split},
  }


# HD/training_scripts/train_{imr,cifar100,cub}_vit.sh
OFFICIAL = {
  "imagenet_r": _official(
    "slice80",
    epochs=150,
    identity={"epochs": 20, "learning_rate": _IDENTITY},
    method={"prompt_length": 20, "repulsion": 0.5},
    schedule={"schedule": "timm_cosine", "final_learning_rate": 1e-5},
  ),
  # without its colour jitter and CIFAR's own mean and deviation, HD/datasets.py:339-361
  "cifar100": _official(
    "full",
    epochs=50,
    identity={"epochs": 20, "learning_rate": _IDENTITY},
    method={"prompt_length": 5, "repulsion": 0.1},
    schedule=_STEP,
  ),
  # which takes the published cut whole, HD/continual_datasets.py:453; here the budget of the others
  "cub200": _official(
    "full",
    epochs=50,
    identity={"epochs": 20, "learning_rate": _IDENTITY_CUB},
    method={"prompt_length": 20, "repulsion": 0.01},
    schedule=_STEP,
    head=1.0,  # without --larger_prompt_lr
  ),
  # no official settings: CIFAR-100's with 5 epochs
  "domainnet": _official(
    "full",
    epochs=5,
    identity={"epochs": 5, "learning_rate": _IDENTITY},
    method={"prompt_length": 5, "repulsion": 0.1},
    schedule={"schedule": "constant"},
  ),
}
