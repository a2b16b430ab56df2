"""Plain LoRA: one adapter trained on and on, or a fresh one per task with the past folded in.

Source: LoRA (arXiv:2106.09685); used as "SeqLoRA" or as "IncLoRA".
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from fmlora_jax import config as config_lib
from fmlora_jax.methods.common import base, recipes
from fmlora_jax.models import low_rank
from fmlora_jax.types import Adapters, Backbone, LowRank, Method, SequenceSpec, Variables

VARIANTS = ({"mode": "incremental"}, {"mode": "sequential"})  # of a comparison of all methods


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.LowRankConfig):
  """Settings of LoRA; alpha equals the rank, so dW = A·Bᵀ.

  Attributes:
    mode: sequential trains one (A, B) through all tasks; incremental adds a fresh pair per task
      and keeps the old ones as they are.
  """

  name: str = "lora"
  mode: Literal["sequential", "incremental"] = "incremental"
  rank: int = 16


# SD-LoRA's, whose LoRA this is without its magnitudes (SD/backbone/lora.py:341-348); the sequential
# LoRA of HiDe-Prompt's code adapts key and value of five blocks (HD/peft/lora/continual_lora.py:13)
OFFICIAL = recipes.like_sd_lora(rank=10)


def make(config: config_lib.Config, backbone: Backbone, spec: SequenceSpec) -> Method:
  """Returns LoRA as a Method.

  Raises:
    ConfigError: if the rank is above min(d_in, d_out) of a target.
  """
  settings = config.method
  base.check_rank(settings.rank, "method.rank", backbone, settings.targets)
  home = "cur" if settings.mode == "incremental" else "shared"

  def fresh(key):
    return low_rank.fresh(
      key, backbone.sizes, settings.targets, settings.rank, draw=base.random_factor
    )

  def deltas(factors):
    return {name: LowRank(**f) for name, f in factors.items()}

  def init(key, weights):
    del weights
    empty = Variables(frozen={}, shared={}, cur={}, mem={})
    if home == "shared":
      return empty.replace(shared={"lora": fresh(key)})
    stacks = jax.tree.map(lambda leaf: jnp.zeros((spec.num_tasks, *leaf.shape)), fresh(key))
    return empty.replace(mem={"lora": stacks})

  def adapters(variables, inputs):
    del inputs
    return Adapters(deltas=deltas(getattr(variables, home)["lora"]))

  def begin_task(variables, view):
    if home == "cur":
      variables = variables.replace(cur=variables.cur | {"lora": fresh(view.key("lora"))})
    return variables, {"rank": settings.rank}

  def end_task(variables, view):
    if home == "cur":
      stacks = base.put_slot(variables.mem["lora"], view.index, variables.cur["lora"])
      variables = variables.replace(mem=variables.mem | {"lora": stacks})
    return variables, {}

  def past(weights, variables):
    if home == "shared":
      return weights
    # tasks to come are zero; their ranks are stacked next to those of the past
    stacked = jax.tree.map(low_rank.join_ranks, variables.mem["lora"])
    return low_rank.fold_deltas(weights, deltas(stacked))

  def folded(weights, variables):
    if home == "shared":
      return low_rank.fold_deltas(weights, deltas(variables.shared["lora"])), Adapters()
    return past(weights, variables), Adapters()

  def stored(facts):
    each = low_rank.num_parameters(backbone.sizes, settings.targets, settings.rank)
    growing = home == "cur"
    return {"shared": 0 if growing else each, "per_task": [each if growing else 0] * len(facts)}

  return base.with_head(
    config,
    backbone,
    spec,
    init=init,
    adapters=adapters,
    begin_task=begin_task,
    end_task=end_task,
    past=past,
    folded=folded,
    rules=lambda task: ((f"{home}/lora/.*", "adapter"),),
    stored=stored,
  )
