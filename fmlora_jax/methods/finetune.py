"""Sequential fine-tuning of the whole ViT: the lower bound on forgetting. Source: baseline."""

import dataclasses

import jax
import jax.numpy as jnp

from fmlora_jax import config as config_lib
from fmlora_jax.methods import frame
from fmlora_jax.types import Adapters, Backbone, Method, SequenceSpec, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.MethodConfig):
  """No settings of its own; `optim.learning_rate` is the ViT's."""

  name: str = "finetune"


def make(config: config_lib.Config, backbone: Backbone, spec: SequenceSpec) -> Method:
  """Returns full fine-tuning as a Method."""

  def init(key, weights):
    del key
    # a copy: the pre-trained weights outlive the training state, which is donated
    return Variables(
      frozen={}, shared={"backbone": jax.tree.map(jnp.array, weights)}, cur={}, mem={}
    )

  def folded(weights, variables):
    del weights
    return variables.shared["backbone"], Adapters()

  def stored(facts):
    size = sum(
      leaf.size for leaf in jax.tree.leaves(jax.eval_shape(backbone.init, jax.random.key(0)))
    )
    return {"shared": size, "per_task": [0] * len(facts)}

  return frame.with_head(
    config,
    backbone,
    spec,
    init=init,
    folded=folded,
    rules=lambda task: (("shared/backbone/.*", "adapter"),),
    stored=stored,
  )
