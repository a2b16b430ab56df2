"""C-LoRA for classification: a LoRA per task, kept off the weights that earlier ones changed.

Source: Smith et al. (arXiv:2304.06027), written for diffusion models. A reconstruction: there is no
official code for classification; its loss is known from a remark in InfLoRA's code
(IL/methods/inflora_ca1.py:247-254, an author's trace), which adapts key and value.
"""

import dataclasses

import jax.numpy as jnp

from fmlora_jax import config as config_lib
from fmlora_jax.config import Projection
from fmlora_jax.methods.common import base, recipes
from fmlora_jax.models import low_rank
from fmlora_jax.types import Adapters, Backbone, LowRank, Method, SequenceSpec, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.LowRankConfig):
  """Settings of C-LoRA.

  Attributes:
    penalty_weight: lambda, of the squared products of old and new changes. They are summed over
      entries, and small: 0.5 hardly matters where changes are.
  """

  name: str = "c_lora"
  rank: int = 64
  targets: tuple[Projection, ...] = ("key", "value")
  penalty_weight: float = 0.5

  def __post_init__(self):
    super().__post_init__()
    config_lib.require(self.penalty_weight >= 0, "penalty_weight", self.penalty_weight, ">= 0")


# no official settings: from memory of InfLoRA's supplement, on what InfLoRA's code runs
OFFICIAL = {
  benchmark: recipes.like_inflora(
    benchmark,
    optim=recipes.optim("adam", 1e-3, schedule="coda_cosine"),
    method={"rank": 64, "penalty_weight": 0.5},
  )
  for benchmark in recipes.SPLITS
}


def make(config: config_lib.Config, backbone: Backbone, spec: SequenceSpec) -> Method:
  """Returns C-LoRA as a Method; the sum of the past is folded into the weights and kept in `mem`.

  Raises:
    ConfigError: if the rank is above min(d_in, d_out) of a target.
  """
  settings, sizes = config.method, backbone.sizes
  base.check_rank(settings.rank, "method.rank", backbone, settings.targets)
  shapes = {name: (sizes.depth, *sizes.projection(name)) for name in settings.targets}

  def init(key, weights):
    del key, weights
    merged = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    return Variables(frozen={}, shared={}, cur={}, mem={"merged": merged})

  def deltas(variables):
    return {name: LowRank(**f) for name, f in variables.cur["lora"].items()}

  def adapters(variables, inputs):
    del inputs
    return Adapters(deltas=deltas(variables))

  def overlap(variables):
    """Sum over layers, projections and entries of (dW_old o A·Bᵀ)²."""
    merged = variables.mem["merged"]
    products = (merged[name] * low_rank.dense(new) for name, new in deltas(variables).items())
    return sum(jnp.sum(product**2) for product in products)

  def penalty(variables, inputs, features):
    del inputs, features
    return settings.penalty_weight * overlap(variables)

  def begin_task(variables, view):
    key, rank = view.key("lora"), settings.rank
    new = low_rank.fresh(key, sizes, settings.targets, rank, draw=base.torch_uniform)
    return variables.replace(cur=variables.cur | {"lora": new}), {"rank": rank}

  def end_task(variables, view):
    del view
    facts = {"penalty": settings.penalty_weight * float(overlap(variables))}
    merged = {
      name: variables.mem["merged"][name] + low_rank.dense(new)
      for name, new in deltas(variables).items()
    }
    return variables.replace(mem=variables.mem | {"merged": merged}), facts

  def past(weights, variables):
    return low_rank.add(weights, variables.mem["merged"])

  def stored(facts):
    """The sum, whose entries the penalty needs: as much as the factors of 6 tasks of a ViT-B/16."""
    size = sum(depth * d_in * d_out for depth, d_in, d_out in shapes.values())
    return {"shared": size, "per_task": [0] * len(facts)}

  return base.with_head(
    config,
    backbone,
    spec,
    init=init,
    adapters=adapters,
    penalty=penalty,
    begin_task=begin_task,
    end_task=end_task,
    past=past,
    rules=lambda task: (("cur/lora/.*", "adapter"),),
    stored=stored,
  )
