"""CODA-Prompt: prompts that are weighted sums of components, of which each task adds some.

Source: Smith et al., CODA-Prompt, arXiv:2211.13218; settings from the official code (CO).

On purpose unlike the official code: the slots of earlier tasks are data, not trained leaves that
are detached, so neither moments nor weight decay touch them, and slots of tasks to come are zero
and add exactly nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange

from fmlora_jax import config as config_lib
from fmlora_jax.config import ConfigError
from fmlora_jax.methods.common import base, recipes
from fmlora_jax.models import prompts
from fmlora_jax.types import Adapters, Backbone, Method, SequenceSpec, Variables


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


def make(config: config_lib.Config, backbone: Backbone, spec: SequenceSpec) -> Method:
  """Returns CODA-Prompt as a Method.

  Raises:
    ConfigError: if a task gets no slot, if there are more slots than can be orthonormal, or if the
      backbone lacks a block of `layers`.
  """
  settings, width, num_tasks = config.method, backbone.sizes.width, spec.num_tasks
  base.check_layers(settings.layers, "method.layers", backbone)
  slots, depth = settings.pool_size // num_tasks, len(settings.layers)
  if not num_tasks <= num_tasks * slots <= width:
    raise ConfigError(
      f"config.method.pool_size is {settings.pool_size}: must give each of {num_tasks} tasks a "
      f"slot, and all together at most {width}, as many as can be orthonormal"
    )
  shapes = {"prompt": (settings.length, width), "key": (width,), "attention": (width,)}

  def init(key, weights):
    del key, weights
    stacks = {name: jnp.zeros((num_tasks, depth, slots, *shape)) for name, shape in shapes.items()}
    return Variables(frozen={}, shared={}, cur={}, mem={"components": stacks})

  def begin_task(variables, view):
    """Draws the task's slots, orthonormal to each other."""
    fresh = {}
    for i, (name, shape) in enumerate(shapes.items()):
      earlier = _vectors(variables.mem["components"][name])
      key = jax.random.fold_in(view.key("components"), i)
      drawn = jax.random.normal(key, (depth, slots, earlier.shape[-1]))
      fresh[name] = prompts.gram_schmidt(earlier, drawn).reshape(depth, slots, *shape)
    return variables.replace(cur=variables.cur | {"components": fresh}), {}

  def joined(variables, task):
    """Returns the slots of all tasks, those of `task` the ones in training."""
    return base.put_slot(variables.mem["components"], task, variables.cur["components"])

  def recall(components, query):
    by_layer = {n: rearrange(c, "t l m ... -> l (t m) ...") for n, c in components.items()}
    weights = prompts.attended_similarity(query, by_layer["attention"], by_layer["key"])
    mixed = prompts.mix(weights, by_layer["prompt"])
    halves = rearrange(mixed, "b l (two p) d -> b l two p d", two=2)
    return Adapters(prefix=prompts.prefixes(halves, settings.layers, backbone.sizes.num_heads))

  def adapters(variables, inputs):
    return recall(joined(variables, inputs.task.index), inputs.query)

  def penalty(variables, inputs, features):
    del features
    used = jnp.arange(num_tasks * slots) < (inputs.task.index + 1) * slots
    kinds = joined(variables, inputs.task.index).values()
    total = sum(prompts.orthogonality(_vectors(kind), used) for kind in kinds)
    return settings.orthogonality * total

  def end_task(variables, view):
    stacks = joined(variables, view.index)
    return variables.replace(mem=variables.mem | {"components": stacks}), {}

  def stored(facts):
    each = depth * slots * (settings.length + 2) * width
    return {"shared": 0, "per_task": [each] * len(facts)}

  return base.with_head(
    config,
    backbone,
    spec,
    init=init,
    adapters=adapters,
    penalty=penalty,
    begin_task=begin_task,
    end_task=end_task,
    folded=lambda weights, variables: (weights, variables.mem["components"]),
    recall=recall,
    query="always",
    rules=lambda task: (("cur/components/.*", "adapter"),),
    stored=stored,
  )


def _vectors(stack):
  """[T, L, M, ...] -> [L, T·M, D]: each slot a vector."""
  return rearrange(stack, "t l m ... -> l (t m) (...)")


# CO/configs/imnet-r_prompt.yaml, CO/experiments/imagenet-r.sh (`--prompt_param 100 8 0.0`); classes
# are shuffled in all its trials but the first, and its last batch is dropped where ours is padded
_IMAGENET_R = {
  "epochs": 50,
  "batch_size": 128,
  "compute_dtype": "float32",
  "optim": recipes.optim("adam", 1e-3, schedule="coda_cosine"),
  "method": {"pool_size": 100, "length": 8, "orthogonality": 0.0},
  "input": {"augmentation": "coda", "normalisation": "zero_one"},
  "weights": {"tag": "augreg_in21k_ft_in1k"},  # timm 0.4.12's, CO/models/zoo.py:368-371
  "tasks": {"order": "shuffled", "split": "slice80"},
}
_FULL = {"order": "shuffled", "split": "full"}

OFFICIAL = {
  "imagenet_r": _IMAGENET_R,
  # CO/configs/cifar-100_prompt.yaml; there test images are resized to 224 and not cropped
  "cifar100": _IMAGENET_R | {"epochs": 20, "tasks": _FULL},
  "domainnet": _IMAGENET_R | {"epochs": 5, "tasks": _FULL},  # CO/configs/domainnet_prompt.yaml
  "cub200": _IMAGENET_R | {"tasks": _FULL},  # no official settings; as suggested, ImageNet-R's
}
