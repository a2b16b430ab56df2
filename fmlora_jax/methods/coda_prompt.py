"""CODA-Prompt: prompts that are weighted sums of components, of which each task adds some.

Source: Smith et al., CODA-Prompt, arXiv:2211.13218; settings from the official code (CO).

On purpose unlike the official code: the slots of earlier tasks are data, not trained leaves that
are detached, so neither moments nor weight decay touch them, and slots of tasks to come are zero
and add exactly nothing.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fmlora_jax import config as config_lib
from fmlora_jax.config import ConfigError
from fmlora_jax.methods.common import base, recipes
from fmlora_jax.methods.common.base import AdaptedViT, StepInputs
from fmlora_jax.models import prompts
from fmlora_jax.types import Adapters, Facts, Features, Params, Rules, Scalar, TaskView, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.MethodConfig):
  """Settings of CODA-Prompt.

  Attributes:
    pool_size: components of all tasks together; each task gets pool_size // num_tasks.
    length: of a component; the first half stands before a block's keys, the second before its
      values.
    layers: numbers of the blocks, from 0, that have a prompt.
    orthogonality: mu, weight of the penalty on slots that are not orthonormal.
  """

  name: str = "coda_prompt"
  pool_size: int = 100
  length: int = 8
  layers: tuple[int, ...] = (0, 1, 2, 3, 4)
  orthogonality: float = 0.0  # as released: the start makes it unnecessary; the paper has 0.1

  def __post_init__(self):
    even = self.length >= 2 and self.length % 2 == 0
    config_lib.require(even, "length", self.length, "even and >= 2: half keys, half values")
    mu = self.orthogonality
    config_lib.require(mu >= 0, "orthogonality", mu, ">= 0")


@dataclasses.dataclass(frozen=True, eq=False)
class CODAPrompt(AdaptedViT[Config]):
  """CODA-Prompt: the slots of the current task in `cur`, of all tasks in `mem`, "components".

  Components are prompts, keys and attentions: [layers, slots, ...] of a task, and in `mem` with an
  axis of tasks in front.

  Raises:
    ConfigError: if a task gets no slot, if there are more slots than can be orthonormal, or if the
      backbone lacks a block of `layers`.
  """

  query = "always"

  def __post_init__(self):
    base.check_layers(self.settings.layers, "method.layers", self.backbone)
    num_tasks, width = self.spec.num_tasks, self.backbone.sizes.width
    if not num_tasks <= num_tasks * self.num_slots <= width:
      raise ConfigError(
        f"config.method.pool_size is {self.settings.pool_size}: must give each of {num_tasks} "
        f"tasks a slot, and all together at most {width}, as many as can be orthonormal"
      )

  @property
  def num_slots(self) -> int:
    """Of each task."""
    return self.settings.pool_size // self.spec.num_tasks

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The shape of a task's components, by their name."""
    width = self.backbone.sizes.width
    shapes = {"prompt": (self.settings.length, width), "key": (width,), "attention": (width,)}
    layers = len(self.settings.layers)
    return {name: (layers, self.num_slots, *shape) for name, shape in shapes.items()}

  def init(self, key: PRNGKeyArray, weights: Params) -> Variables:
    stacks = {name: jnp.zeros((self.spec.num_tasks, *s)) for name, s in self.shapes.items()}
    return super().init(key, weights).update(mem={"components": stacks})

  def begin_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    """Draws the slots of the task, orthonormal to each other."""
    variables, facts = super().begin_task(variables, view)
    components = {}
    for i, (name, shape) in enumerate(self.shapes.items()):
      earlier = joined(variables.mem["components"][name])
      key = jax.random.fold_in(view.key("components"), i)
      drawn = jax.random.normal(key, (*shape[:2], earlier.shape[-1]))
      components[name] = prompts.gram_schmidt(earlier, drawn).reshape(shape)
    return variables.update(cur={"components": components}), facts

  def slots_of_all_tasks(self, variables: Variables, task: int | Int[Array, ""]) -> Params:
    """Returns the components of all tasks, those of `task` the ones in training."""
    return base.put_slot(variables.mem["components"], task, variables.cur["components"])

  def adapters(self, variables: Variables, inputs: StepInputs) -> Adapters:
    return self.recall(self.slots_of_all_tasks(variables, inputs.task.index), inputs.class_tokens)

  def recall(self, memory: Params, query: Features) -> Adapters:
    prefixes = prefix_prompts(memory, query)
    heads = self.backbone.sizes.num_heads
    return Adapters(prefix=prompts.prefixes(prefixes, self.settings.layers, heads))

  def penalty(self, variables: Variables, inputs: StepInputs, features: Features) -> Scalar:
    del features
    components = self.slots_of_all_tasks(variables, inputs.task.index)
    used = jnp.arange(self.spec.num_tasks * self.num_slots)
    used = used < (inputs.task.index + 1) * self.num_slots
    kinds = (prompts.orthogonality(joined(kind), used) for kind in components.values())
    return self.settings.orthogonality * sum(kinds, jnp.zeros(()))

  def end_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    stacks = self.slots_of_all_tasks(variables, view.index)
    return super().end_task(variables.update(mem={"components": stacks}), view)

  def folded(self, weights: Params, variables: Variables) -> tuple[Params, Params]:
    return weights, variables.mem["components"]

  def rules(self, task: int) -> Rules:
    return (("cur/components/.*", "adapter"), *super().rules(task))

  def stored(self, facts: list[Facts]) -> dict[str, Any]:
    count = sum(map(math.prod, self.shapes.values()))
    return super().stored(facts) | {"per_task": [count] * len(facts)}


def joined(stack: Float[Array, "T L M ..."]) -> Float[Array, "L TM D"]:
  """Returns the slots of all tasks in one row, each as a vector."""
  return rearrange(stack, "t l m ... -> l (t m) (...)")


def prefix_prompts(components: Params, query: Features) -> Float[Array, "B L 2 P D"]:
  """Returns each sample's prompt for each layer: keys (0) and values (1), the halves of a mixture.

  Components are weighted by the cosine between their key and the query under their attention.
  Source: CODA-Prompt (arXiv:2211.13218) Sec. 4.1 and 4.2.
  """
  by_layer = {n: rearrange(c, "t l m ... -> l (t m) ...") for n, c in components.items()}
  weights = prompts.attended_similarity(query, by_layer["attention"], by_layer["key"])
  mixed = prompts.mix(weights, by_layer["prompt"])
  return rearrange(mixed, "b l (two p) d -> b l two p d", two=2)


METHOD = CODAPrompt

# CO/configs/imnet-r_prompt.yaml, CO/experiments/imagenet-r.sh (`--prompt_param 100 8 0.0`); classes
# are shuffled in all its trials but the first, and its last batch is dropped where ours is padded
_IMAGENET_R = {
  "epochs": 50,
  "batch_size": 128,
  "compute_dtype": "float32",
  "optim": recipes.optim("adam", 1e-3, schedule="coda_cosine"),
  "method": {"pool_size": 100, "length": 8, "orthogonality": 0.0},
  "head": {"start": "torch_linear"},  # CO/models/zoo.py:374
  "input": {"augmentation": "coda", "normalisation": "zero_one"},
  "weights": {"tag": "augreg_in21k_ft_in1k"},  # timm 0.4.12's, CO/models/zoo.py:368-371
  "tasks": {"order": "shuffled", "split": "slice80"},
}
_FULL = {"order": "shuffled", "split": "full"}

# exceptions, beside those of common/recipes.py:
# - the class order: CO keeps the data's for seed 0, and shuffles by Python's random for others
# - the weights: CO's install-requirements.sh upgrades timm, to weights augreg2_in21k_ft_in1k
# - CUB-200: CO has no settings; as suggested, ImageNet-R's
OFFICIAL = {
  "imagenet_r": _IMAGENET_R,
  "cifar100": _IMAGENET_R  # CO/configs/cifar-100_prompt.yaml
  | {
    "epochs": 20,
    # CO/dataloaders/utils.py:57-62
    "input": {"augmentation": "coda_uncropped", "normalisation": "zero_one"},
    "tasks": _FULL,
  },
  "domainnet": _IMAGENET_R | {"epochs": 5, "tasks": _FULL},  # CO/configs/domainnet_prompt.yaml
  "cub200": _IMAGENET_R | {"tasks": _FULL},
}
