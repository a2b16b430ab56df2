"""Plain LoRA: one adapter trained on and on, or a fresh one per task with the past folded in.

Source: LoRA (arXiv:2106.09685); used as "SeqLoRA" or as "IncLoRA".
"""

import dataclasses
from typing import Any, Literal

import jax
from jaxtyping import PRNGKeyArray

from fmlora_jax import config as config_lib
from fmlora_jax.methods.common import base, recipes
from fmlora_jax.methods.common.base import AdaptedViT, StepInputs
from fmlora_jax.models import low_rank
from fmlora_jax.types import Adapters, Facts, Params, Rules, TaskView, Variables

DRAWS = {"normal": low_rank.random_factor, "torch_linear": low_rank.torch_uniform}
VARIANTS = ({"mode": "incremental"}, {"mode": "sequential"})  # in a comparison of all methods


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.LowRankConfig):
  """Settings of LoRA; alpha equals the rank, so dW = A·Bᵀ.

  Attributes:
    mode: sequential trains one (A, B) through all tasks; incremental adds a fresh pair per task
      and freezes the earlier ones.
    init: of A. normal is N(0, 1/d_in); torch_linear U(-1/√d_in, 1/√d_in), the Kaiming start with
      a = √5 that most codes of LoRA have, a third of that variance.
  """

  name: str = "lora"
  mode: Literal["sequential", "incremental"] = "incremental"
  rank: int = 16
  init: Literal["normal", "torch_linear"] = "normal"


# Exceptions, beside those of common/recipes.py and sd_lora.py:
# - no code has official settings of this method. These are SD-LoRA's, whose LoRA this is without
#   its magnitudes (SD/backbone/lora.py:341-348, 378-384)
# - the sequential LoRA of HiDe-Prompt's code is another one: key and value of five blocks, alpha 1,
#   A from U(-1/√r, 1/√r) (HD/peft/lora/continual_lora.py:13-34)
OFFICIAL = recipes.like_sd_lora(rank=10, init="torch_linear")


@dataclasses.dataclass(frozen=True, eq=False)
class LoRA(AdaptedViT[Config]):
  """LoRA: factors in `shared`, or in `cur` and, of all tasks, in `mem`.

  Raises:
    ConfigError: if the rank is above min(d_in, d_out) of a target.
  """

  reports = (base.RANK, *AdaptedViT.reports)

  def __post_init__(self):
    base.check_rank(self.settings.rank, "method.rank", self.backbone, self.settings.targets)

  @property
  def group(self) -> str:
    """The group of `Variables` that holds the factors in training."""
    return "cur" if self.settings.mode == "incremental" else "shared"

  def fresh(self, key: PRNGKeyArray) -> Params:
    """Returns the factors of a new pair for each target."""
    settings, draw = self.settings, DRAWS[self.settings.init]
    return low_rank.fresh(key, self.backbone.sizes, settings.targets, settings.rank, draw=draw)

  def init(self, key: PRNGKeyArray, weights: Params) -> Variables:
    variables, factors = super().init(key, weights), self.fresh(key)
    if self.group == "shared":
      return variables.update(shared={"lora": factors})
    return variables.update(mem={"lora": base.empty_slots(factors, self.spec.num_tasks)})

  def begin_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    variables, facts = super().begin_task(variables, view)
    if self.group == "cur":
      variables = variables.update(cur={"lora": self.fresh(view.key("lora"))})
    return variables, facts | {"rank": self.settings.rank}

  def adapters(self, variables: Variables, inputs: StepInputs) -> Adapters:
    del inputs
    return Adapters(deltas=low_rank.deltas_of(getattr(variables, self.group)["lora"]))

  def end_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    if self.group == "cur":
      stacks = base.put_slot(variables.mem["lora"], view.index, variables.cur["lora"])
      variables = variables.update(mem={"lora": stacks})
    return super().end_task(variables, view)

  def past(self, weights: Params, variables: Variables) -> Params:
    if self.group == "shared":
      return weights
    # tasks to come are zero; their ranks are stacked next to those of the past
    joined = jax.tree.map(low_rank.join_ranks, variables.mem["lora"])
    return low_rank.fold_deltas(weights, low_rank.deltas_of(joined))

  def folded(self, weights: Params, variables: Variables) -> tuple[Params, Adapters]:
    if self.group == "cur":
      return super().folded(weights, variables)
    deltas = low_rank.deltas_of(variables.shared["lora"])
    return low_rank.fold_deltas(weights, deltas), Adapters()

  def rules(self, task: int) -> Rules:
    return ((f"{self.group}/lora/.*", "adapter"), *super().rules(task))

  def stored(self, facts: list[Facts]) -> dict[str, Any]:
    settings = self.settings
    count = low_rank.num_parameters(self.backbone.sizes, settings.targets, settings.rank)
    if self.group == "shared":
      return super().stored(facts) | {"shared": count}
    return super().stored(facts) | {"per_task": [count] * len(facts)}


METHOD = LoRA
