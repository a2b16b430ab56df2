"""Plain LoRA: one adapter trained on and on, or a fresh one per task with the past folded in.

Source: LoRA (arXiv:2106.09685); used as "SeqLoRA" or as "IncLoRA".
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from fmlora_jax import config as config_lib
from fmlora_jax.config import Projection
from fmlora_jax.methods import frame
from fmlora_jax.models import low_rank
from fmlora_jax.types import Adapters, Backbone, LowRank, Method, SequenceSpec, Variables

VARIANTS = ({"mode": "incremental"}, {"mode": "sequential"})  # of a comparison of all methods


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.MethodConfig):
  """Settings of LoRA; alpha equals the rank, so dW = A·Bᵀ.

  Attributes:
    mode: sequential trains one (A, B) through all tasks; incremental adds a fresh pair per task
      and keeps the old ones as they are.
    rank: columns of A and B.
    targets: the projections that are adapted.
  """

  name: str = "lora"
  mode: Literal["sequential", "incremental"] = "incremental"
  rank: int = 16
  targets: tuple[Projection, ...] = ("query", "value")


def make(config: config_lib.Config, backbone: Backbone, spec: SequenceSpec) -> Method:
  """Returns LoRA as a Method.

  Raises:
    ConfigError: if the rank is above min(d_in, d_out) of a target.
  """
  settings, depth = config.method, backbone.sizes.depth
  frame.check_rank(settings.rank, "method.rank", backbone, settings.targets)
  home = "cur" if settings.mode == "incremental" else "shared"

  def fresh(key):
    """A random, B zero: dW = 0."""
    factors = {}
    for i, name in enumerate(settings.targets):
      d_in, d_out = backbone.sizes.projection(name)
      a = frame.random_factor(jax.random.fold_in(key, i), depth, d_in, settings.rank)
      factors[name] = {"a": a, "b": jnp.zeros((depth, d_out, settings.rank))}
    return factors

  def deltas(factors):
    return {name: LowRank(a=f["a"], b=f["b"]) for name, f in factors.items()}

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
      stacks = jax.tree.map(
        lambda stack, leaf: stack.at[view.index].set(leaf),
        variables.mem["lora"],
        variables.cur["lora"],
      )
      variables = variables.replace(mem=variables.mem | {"lora": stacks})
    return variables, {}

  def past(weights, variables):
    if home == "shared":
      return weights
    # tasks to come are zero; their ranks are stacked next to those of the past
    stacked = {
      name: LowRank(a=_join_ranks(f["a"]), b=_join_ranks(f["b"]))
      for name, f in variables.mem["lora"].items()
    }
    return low_rank.fold(weights, stacked)

  def folded(weights, variables):
    if home == "shared":
      return low_rank.fold(weights, deltas(variables.shared["lora"])), Adapters()
    return past(weights, variables), Adapters()

  def stored(facts):
    each = depth * settings.rank * sum(sum(backbone.sizes.projection(n)) for n in settings.targets)
    growing = home == "cur"
    return {"shared": 0 if growing else each, "per_task": [each if growing else 0] * len(facts)}

  return frame.with_head(
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


def _join_ranks(stack):
  """[T, L, D, R] -> [L, D, T·R]."""
  return jnp.concatenate(list(stack), axis=-1)
