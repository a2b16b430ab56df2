"""A head on the frozen ViT: what the features give without any adaptation. Source: baseline."""

import dataclasses

from fmlora_jax import config as config_lib
from fmlora_jax.methods.common import base
from fmlora_jax.types import Backbone, Method, SequenceSpec, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.MethodConfig):
  """No settings of its own."""

  name: str = "linear_probe"


def make(config: config_lib.Config, backbone: Backbone, spec: SequenceSpec) -> Method:
  """Returns the linear probe as a Method."""

  def init(key, weights):
    del key, weights
    return Variables(frozen={}, shared={}, cur={}, mem={})

  def stored(facts):
    return {"shared": 0, "per_task": [0] * len(facts)}

  return base.with_head(config, backbone, spec, init=init, stored=stored)
