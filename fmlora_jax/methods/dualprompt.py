"""DualPrompt: general prompts for all tasks in the first blocks, an expert prompt per task behind.

Source: Wang et al., DualPrompt, arXiv:2204.04799; settings from the official JAX code (LP) and
HiDe-Prompt (HD).

On purpose unlike the public codes: a query is compared with the keys of learned tasks only, where
they look at the untrained keys of tasks to come too; keys and values of a prefix are kept apart
from samples, where the PyTorch ports mix them by a reshape; each sample chooses its own expert,
where LP's CIFAR-100 and the ports let the batch vote, whose images are of one task (`batchwise`
brings the vote back). A length counts the tokens before the keys, and as many again stand before
the values, as in LP; CODA-Prompt's port splits it between the two.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from fmlora_jax import config as config_lib
from fmlora_jax.methods.common import base, recipes
from fmlora_jax.models import heads, prompts
from fmlora_jax.types import Adapters, Backbone, Method, SequenceSpec, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.MethodConfig):
  """Settings of DualPrompt.

  Attributes:
    general_layers, expert_layers: numbers of blocks, from 0, that see the one and the other.
    general_length, expert_length: tokens before the keys of a block, and before its values.
    pull: lambda, weight of the cosine between a query and the key of its task.
    batchwise: at test time all samples of a batch get the expert that most of them chose; in
      training the task's own serves either way.
  """

  name: str = "dualprompt"
  general_layers: tuple[int, ...] = (0, 1)
  general_length: int = 5
  expert_layers: tuple[int, ...] = (2, 3, 4)
  expert_length: int = 20
  pull: float = 1.0
  batchwise: bool = False

  def __post_init__(self):
    for name in ("general_length", "expert_length"):
      config_lib.require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
    apart = not set(self.general_layers) & set(self.expert_layers)
    config_lib.require(
      apart, "expert_layers", self.expert_layers, f"none of general_layers = {self.general_layers}"
    )
    config_lib.require(self.pull >= 0, "pull", self.pull, ">= 0")


def make(config: config_lib.Config, backbone: Backbone, spec: SequenceSpec) -> Method:
  """Returns DualPrompt as a Method.

  Raises:
    ConfigError: if the backbone lacks a block that has a prompt.
  """
  settings, sizes = config.method, backbone.sizes
  base.check_layers(settings.general_layers, "method.general_layers", backbone)
  base.check_layers(settings.expert_layers, "method.expert_layers", backbone)
  general_shape = (len(settings.general_layers), 2, settings.general_length, sizes.width)
  expert_shape = (len(settings.expert_layers), 2, settings.expert_length, sizes.width)

  def init(key, weights):
    del weights
    draw = jax.nn.initializers.uniform(0.01)  # LP/models/prompt.py:171-198
    keys = jax.random.split(key, 3)
    mem = {
      "expert": draw(keys[1], (spec.num_tasks, *expert_shape)),
      "key": draw(keys[2], (spec.num_tasks, sizes.width)),
      "learned": jnp.zeros(spec.num_tasks, bool),
    }
    return Variables(frozen={}, shared={"general": draw(keys[0], general_shape)}, cur={}, mem=mem)

  def adapted(general, expert):
    """Prefixes of both kinds; general [S, 2, P, D], expert [B or 1, S, 2, P, D]."""
    first = prompts.prefixes(general[None], settings.general_layers, sizes.num_heads)
    second = prompts.prefixes(expert, settings.expert_layers, sizes.num_heads)
    return Adapters(prefix=tuple(a or b for a, b in itertools.zip_longest(first, second)))

  def adapters(variables, inputs):
    del inputs
    return adapted(variables.shared["general"], variables.cur["expert"][None])

  def penalty(variables, inputs, features):
    """Pulls the task's key to the queries: arXiv:2204.04799 Sec. 4.3."""
    del features
    key = variables.cur["key"][None]
    pulled = prompts.similarity(inputs.query, key)[:, 0]
    return -settings.pull * heads.weighted_mean(pulled, inputs.valid)

  def begin_task(variables, view):
    """The expert goes on from that of the task before; the key is as it was drawn."""
    mem, t = variables.mem, view.index
    own = {"expert": mem["expert"][max(t - 1, 0)], "key": mem["key"][t]}
    return variables.replace(cur=variables.cur | own), {}

  def end_task(variables, view):
    own = {name: variables.cur[name] for name in ("expert", "key")} | {"learned": True}
    slots = base.put_slot({name: variables.mem[name] for name in own}, view.index, own)
    return variables.replace(mem=variables.mem | slots), {}

  def folded(weights, variables):
    slots = {name: variables.mem[name] for name in ("expert", "key", "learned")}
    return weights, variables.shared | slots

  def recall(memory, query):
    """Before any task is learned all similarities are equal, and slot 0 serves."""
    similarities = prompts.similarity(query, memory["key"])
    similarities = jnp.where(memory["learned"], similarities, -jnp.inf)
    chosen = prompts.choose(similarities, 1, batchwise=settings.batchwise)[:, 0]
    return adapted(memory["general"], memory["expert"][chosen])

  def stored(facts):
    general, expert = (
      2 * layers * length * width for layers, _, length, width in (general_shape, expert_shape)
    )
    return {"shared": general, "per_task": [expert + sizes.width] * len(facts)}

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
    query="always",
    rules=lambda task: (("shared/general|cur/(expert|key)", "adapter"),),
    stored=stored,
    caveats=(base.BATCH_VOTE,) if settings.batchwise else (),
  )


_PIXELS = {"augmentation": "pilot", "normalisation": "zero_one"}  # area from 0.05 in LP and HD
_NATURAL = {"order": "natural", "split": "full"}  # rand_seed = -1 in LP, --shuffle False in HD
_WEIGHTS = {"tag": "orig_in21k"}  # LP/README "Getting pretrained", HD the same

# LP/configs/cifar100_dualprompt.py: there the batch votes at test time
_CIFAR100 = {
  "epochs": 5,
  "batch_size": 192,  # 8 devices x 24
  "compute_dtype": "float32",
  "optim": recipes.optim("adam", 0.0225, clip_norm=1.0),  # 0.03 · 192 / 256
  "method": {"general_length": 5, "expert_length": 5, "pull": 1.0},
  "input": _PIXELS,
  "weights": _WEIGHTS,
  "tasks": _NATURAL,
}

OFFICIAL = {
  "cifar100": _CIFAR100,
  # LP/configs/imr_dualprompt.py:25-45, 103-126: each sample chooses
  "imagenet_r": _CIFAR100
  | {
    "epochs": 50,
    "optim": recipes.optim("adam", 0.00375, clip_norm=1.0),  # 0.005 · 192 / 256
    "method": {"general_length": 5, "expert_length": 20, "pull": 1.0},
    "tasks": {"order": "natural", "split": "slice80"},
  },
  # HD/configs/cub_dualprompt.py: its rate falls every 30 epochs, after the last
  "cub200": _CIFAR100
  | {
    "batch_size": 24,  # of one device
    "optim": recipes.optim("adam", 0.0028125, clip_norm=1.0),  # 0.03 · 24 / 256
    "method": {"general_length": 5, "expert_length": 20, "pull": 1.0},
  },
  "domainnet": _CIFAR100,  # no official settings; as suggested, CIFAR-100's with 5 epochs
}
