"""DualPrompt: general prompts for all tasks in the first blocks, an expert prompt per task behind.

Source: Wang et al., DualPrompt, arXiv:2204.04799; settings from the official JAX code (LP) and
HiDe-Prompt (HD).

On purpose unlike the public codes: a query is compared with the keys of learned tasks only, where
they look at the untrained keys of tasks to come too; keys and values of a prefix stay apart from
samples, where the PyTorch ports mix them by a reshape; each sample chooses its expert,
where LP's CIFAR-100 and the ports let the batch vote, whose images are of one task (`batchwise`
brings the vote back). A length counts the tokens before the keys, and as many again stand before
the values, as in LP; CODA-Prompt's port splits it between the two.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fmlora_jax import config as config_lib
from fmlora_jax.methods.common import base, recipes
from fmlora_jax.methods.common.base import AdaptedViT, StepInputs
from fmlora_jax.models import heads, prompts
from fmlora_jax.types import Adapters, Facts, Features, Params, Rules, Scalar, TaskView, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.MethodConfig):
  """Settings of DualPrompt.

  Attributes:
    general_layers: numbers of blocks, from 0, that see the general prefixes.
    general_length: general tokens before the keys of a block, and before its values.
    expert_layers: numbers of blocks, from 0, that see the prefixes of the task.
    expert_length: tokens of the task before the keys of a block, and before its values.
    pull: lambda, weight of the cosine between a query and the key of its task.
    batchwise: at test time all samples of a batch get the expert that most of them chose; training
      uses the expert of the task either way.
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


SLOT = ("expert", "key")  # of a task


@dataclasses.dataclass(frozen=True, eq=False)
class DualPrompt(AdaptedViT[Config]):
  """DualPrompt: the general prompt in `shared`, the task's expert and key in `cur`.

  `mem` holds those of all tasks, drawn at the start, and which tasks are learned.

  Raises:
    ConfigError: if the backbone lacks a block that has a prompt.
  """

  query = "always"

  def __post_init__(self):
    for name in ("general_layers", "expert_layers"):
      base.check_layers(getattr(self.settings, name), f"method.{name}", self.backbone)

  @property
  def caveats(self) -> tuple[str, ...]:
    return (base.BATCH_VOTE,) if self.settings.batchwise else ()

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The shape of the general prompt and of an expert: [layers, 2, P, D]."""
    settings, width = self.settings, self.backbone.sizes.width
    return {
      "general": (len(settings.general_layers), 2, settings.general_length, width),
      "expert": (len(settings.expert_layers), 2, settings.expert_length, width),
    }

  def init(self, key: PRNGKeyArray, weights: Params) -> Variables:
    draw = jax.nn.initializers.uniform(0.01)  # LP/models/prompt.py:171-198
    keys, num_tasks = jax.random.split(key, 3), self.spec.num_tasks
    mem = {
      "expert": draw(keys[1], (num_tasks, *self.shapes["expert"])),
      "key": draw(keys[2], (num_tasks, self.backbone.sizes.width)),
      "learned": jnp.zeros(num_tasks, bool),
    }
    shared = {"general": draw(keys[0], self.shapes["general"])}
    return super().init(key, weights).update(shared=shared, mem=mem)

  def begin_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    """The expert starts from that of the task before; the key as it was drawn."""
    variables, facts = super().begin_task(variables, view)
    mem, t = variables.mem, view.index
    slot = {"expert": mem["expert"][max(t - 1, 0)], "key": mem["key"][t]}
    return variables.update(cur=slot), facts

  def prefixes(
    self, general: Float[Array, "S 2 P D"], expert: Float[Array, "B E 2 Q D"]
  ) -> Adapters:
    """Returns the prefixes of both kinds; experts of all samples (B = 1) or of each."""
    heads, settings = self.backbone.sizes.num_heads, self.settings
    first = prompts.prefixes(general[None], settings.general_layers, heads)
    second = prompts.prefixes(expert, settings.expert_layers, heads)
    return Adapters(prefix=tuple(a or b for a, b in itertools.zip_longest(first, second)))

  def adapters(self, variables: Variables, inputs: StepInputs) -> Adapters:
    del inputs
    return self.prefixes(variables.shared["general"], variables.cur["expert"][None])

  def penalty(self, variables: Variables, inputs: StepInputs, features: Features) -> Scalar:
    del features
    return -self.settings.pull * pull(inputs.class_tokens, variables.cur["key"], inputs.valid)

  def end_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    slot = {name: variables.cur[name] for name in SLOT} | {"learned": True}
    stacks = base.put_slot({name: variables.mem[name] for name in slot}, view.index, slot)
    return super().end_task(variables.update(mem=stacks), view)

  def folded(self, weights: Params, variables: Variables) -> tuple[Params, Params]:
    return weights, variables.shared | {n: variables.mem[n] for n in (*SLOT, "learned")}

  def recall(self, memory: Params, query: Features) -> Adapters:
    chosen = nearest_task(
      query, memory["key"], memory["learned"], batchwise=self.settings.batchwise
    )
    return self.prefixes(memory["general"], memory["expert"][chosen])

  def rules(self, task: int) -> Rules:
    return (("shared/general|cur/(expert|key)", "adapter"), *super().rules(task))

  def stored(self, facts: list[Facts]) -> dict[str, Any]:
    general, expert = (math.prod(self.shapes[name]) for name in ("general", "expert"))
    each = expert + self.backbone.sizes.width
    return super().stored(facts) | {"shared": general, "per_task": [each] * len(facts)}


def pull(query: Features, key: Float[Array, " D"], valid: Bool[Array, " B"]) -> Scalar:
  """Returns the mean cosine between the samples' queries and the key of their task.

  Source: DualPrompt (arXiv:2204.04799) Sec. 4.3.
  """
  return heads.weighted_mean(prompts.similarity(query, key[None])[:, 0], valid)


def nearest_task(
  query: Features,
  keys: Float[Array, "T D"],
  learned: Bool[Array, " T"],
  *,
  batchwise: bool,
) -> Int[Array, " B"]:
  """Returns the learned task whose key is nearest to each query; 0 before any is learned.

  Args:
    batchwise: all samples get the task that most of the batch chose.

  Source: DualPrompt (arXiv:2204.04799), task inference, here over learned tasks only.
  """
  similarities = jnp.where(learned, prompts.similarity(query, keys), -jnp.inf)
  return prompts.choose(similarities, 1, batchwise=batchwise)[:, 0]


METHOD = DualPrompt

_PIXELS = {"augmentation": "pilot", "normalisation": "zero_one"}  # area from 0.05 in LP and HD
_NATURAL = {"order": "natural", "split": "full"}  # rand_seed = -1 in LP, --shuffle False in HD
_WEIGHTS = {"tag": "orig_in21k"}  # LP/README "Getting pretrained", HD the same

# LP/configs/cifar100_dualprompt.py
_CIFAR100 = {
  "epochs": 5,
  "batch_size": 192,  # 8 devices x 24
  "compute_dtype": "float32",
  "optim": recipes.optim("adam", 0.0225, clip_norm=1.0),  # 0.03 · 192 / 256
  "method": {"general_length": 5, "expert_length": 5, "pull": 1.0},
  "head": {"start": "zero"},  # LP/models/vit.py:472-475
  "input": _PIXELS,
  "weights": _WEIGHTS,
  "tasks": _NATURAL,
}

# exceptions, beside those of common/recipes.py:
# - LP and HD let all classes be predicted at test time, and the keys of tasks to come be chosen
# - LP clips by the norm of all gradients, those of the frozen ViT among them
#   (LP/train_continual.py:308-313), which it computes and never applies. Here, as in HD, by
#   the norm of those that are trained, so steps are clipped less
# - CIFAR-100: LP lets the batch vote at test time; here each sample chooses, unless
#   method.batchwise is set
# - LP squashes images to squares without antialiasing, bilinearly at test time too (here bicubic,
#   sides in proportion), and compresses training images as JPEG once more
# - CUB-200: HD draws prompts and keys from U(-1, 1), here it is LP's U(0, 0.01); its reshape gives
#   a sample the prompts of others (HD/peft/prompt/dp_prompt.py), here each has its own
# - DomainNet: there are no settings; as suggested, CIFAR-100's
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
    "head": {"start": "truncated_normal"},  # HD/vits/dp_vision_transformer.py:651-656
    "optim": recipes.optim("adam", 0.0028125, clip_norm=1.0),  # 0.03 · 24 / 256
    "method": {"general_length": 5, "expert_length": 20, "pull": 1.0},
  },
  "domainnet": _CIFAR100,
}
