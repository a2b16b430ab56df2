"""C-LoRA for classification: a LoRA per task, penalised where earlier tasks changed the weights.

Source: Smith et al. (arXiv:2304.06027), written for diffusion models. A reconstruction: there is no
official code for classification; its loss is known from a remark in InfLoRA's code
(IL/methods/inflora_ca1.py:247-254, an author's trace), which adapts key and value.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from fmlora_jax import config as config_lib
from fmlora_jax.config import Projection
from fmlora_jax.methods.common import base, recipes
from fmlora_jax.methods.common.base import AdaptedViT, StepInputs
from fmlora_jax.models import low_rank
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.LowRankConfig):
  """Settings of C-LoRA.

  Attributes:
    penalty_weight: lambda, of the squared products of old and new changes. They are summed over
      entries, and small: 0.5 hardly moves the changes.
  """

  name: str = "c_lora"
  rank: int = 64
  targets: tuple[Projection, ...] = ("key", "value")
  penalty_weight: float = 0.5

  def __post_init__(self):
    super().__post_init__()
    config_lib.require(self.penalty_weight >= 0, "penalty_weight", self.penalty_weight, ">= 0")


# Exception: nothing here is official code. Rank, rate and weight are from memory of InfLoRA's
# supplement, the rest is the setup of InfLoRA's code, with the exceptions of common/recipes.py.
OFFICIAL = {
  benchmark: recipes.like_inflora(
    benchmark,
    optim=recipes.optim("adam", 1e-3, schedule="coda_cosine"),
    method={"rank": 64, "penalty_weight": 0.5},
  )
  for benchmark in recipes.SPLITS
}


@dataclasses.dataclass(frozen=True, eq=False)
class CLoRA(AdaptedViT[Config]):
  """C-LoRA: factors in `cur`; the sum of all earlier changes, dense, in `mem`.

  Raises:
    ConfigError: if the rank is above min(d_in, d_out) of a target.
  """

  reports = (base.RANK, Reported(name="penalty", kind=float), *AdaptedViT.reports)

  def __post_init__(self):
    base.check_rank(self.settings.rank, "method.rank", self.backbone, self.settings.targets)

  @property
  def shapes(self) -> dict[str, tuple[int, int, int]]:
    """The shape of the change of each target, [L, D_in, D_out]."""
    sizes = self.backbone.sizes
    return {name: (sizes.depth, *sizes.projection(name)) for name in self.settings.targets}

  def init(self, key: PRNGKeyArray, weights: Params) -> Variables:
    merged = {name: jnp.zeros(shape) for name, shape in self.shapes.items()}
    return super().init(key, weights).update(mem={"merged": merged})

  def begin_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    variables, facts = super().begin_task(variables, view)
    settings, sizes, key = self.settings, self.backbone.sizes, view.key("lora")
    new = low_rank.fresh(key, sizes, settings.targets, settings.rank, draw=low_rank.torch_uniform)
    return variables.update(cur={"lora": new}), facts | {"rank": settings.rank}

  def adapters(self, variables: Variables, inputs: StepInputs) -> Adapters:
    del inputs
    return Adapters(deltas=low_rank.deltas_of(variables.cur["lora"]))

  def penalty(self, variables: Variables, inputs: StepInputs, features: Features) -> Scalar:
    del inputs, features
    return self.settings.penalty_weight * self.total_overlap(variables)

  def total_overlap(self, variables: Variables) -> Scalar:
    """Returns the overlap of the current change with the earlier ones over all targets."""
    merged, deltas = variables.mem["merged"], low_rank.deltas_of(variables.cur["lora"])
    return sum(
      (overlap(merged[n], low_rank.dense(new)) for n, new in deltas.items()), jnp.zeros(())
    )

  def end_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    facts = {"penalty": self.settings.penalty_weight * float(self.total_overlap(variables))}
    merged = {
      name: variables.mem["merged"][name] + low_rank.dense(new)
      for name, new in low_rank.deltas_of(variables.cur["lora"]).items()
    }
    variables, of_head = super().end_task(variables.update(mem={"merged": merged}), view)
    return variables, facts | of_head

  def past(self, weights: Params, variables: Variables) -> Params:
    return low_rank.add(weights, variables.mem["merged"])

  def rules(self, task: int) -> Rules:
    return (("cur/lora/.*", "adapter"), *super().rules(task))

  def stored(self, facts: list[Facts]) -> dict[str, Any]:
    """Counts all entries of the sum: of a ViT-B/16 as many as the factors of six tasks."""
    return super().stored(facts) | {"shared": sum(map(math.prod, self.shapes.values()))}


def overlap(old: Float[Array, "L D_in D_out"], new: Float[Array, "L D_in D_out"]) -> Scalar:
  """Returns the sum over layers and entries of (dW_old o dW_new)². Source: see the module."""
  return jnp.sum((old * new) ** 2)


METHOD = CLoRA
