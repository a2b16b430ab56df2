"""Bottleneck adapters, one set trained on and on through all tasks.

Source: Houlsby et al. (arXiv:1902.00751), a narrow MLP behind both branches of each block;
AdaptFormer (arXiv:2205.13535), one beside the MLP. No public code trains them through a sequence of
tasks: that of APER and SimpleCIL does so in the first task alone. A fresh adapter changes nothing
(up is zero), where Houlsby's code draws it near zero.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from fmlora_jax import config as config_lib
from fmlora_jax.methods.common import base, recipes
from fmlora_jax.types import Adapters, Backbone, Bottleneck, Method, SequenceSpec, Variables

VARIANTS = ({"kind": "houlsby"}, {"kind": "adaptformer"})  # of a comparison of all methods


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
  """What tells the adapters of two papers apart; `scale` multiplies what they add."""

  sites: tuple[str, ...]
  activation: str
  scale: float
  dropout: float


KINDS = {
  "houlsby": Kind(sites=("attention", "mlp"), activation="gelu", scale=1.0, dropout=0.0),
  # PI/backbone/vit_adapter.py:31-90, SD/utils/inc_net.py:74-86
  "adaptformer": Kind(sites=("parallel",), activation="relu", scale=0.1, dropout=0.1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.MethodConfig):
  """Settings of the adapters.

  Attributes:
    kind: houlsby (GELU, behind attention and MLP) or adaptformer (ReLU, beside the MLP, times 0.1).
    width: hidden units.
    dropout: of hidden units in training; None takes the kind's: 0 and 0.1.
  """

  name: str = "adapter"
  kind: Literal["houlsby", "adaptformer"] = "houlsby"
  width: int = 64
  dropout: float | None = None

  def __post_init__(self):
    config_lib.require(self.width >= 1, "width", self.width, ">= 1")
    fits = self.dropout is None or 0 <= self.dropout < 1
    config_lib.require(fits, "dropout", self.dropout, "in [0, 1)")


OFFICIAL = recipes.like_sd_lora()  # there are none of its own


def make(config: config_lib.Config, backbone: Backbone, spec: SequenceSpec) -> Method:
  """Returns sequential adapters as a Method."""
  settings, kind = config.method, KINDS[config.method.kind]
  depth, width, hidden = backbone.sizes.depth, backbone.sizes.width, config.method.width
  dropout = kind.dropout if settings.dropout is None else settings.dropout

  def fresh(key):
    return {
      "down": base.torch_uniform(key, depth, width, hidden),
      "down_bias": jnp.zeros((depth, hidden)),
      "up": jnp.zeros((depth, hidden, width)),
      "up_bias": jnp.zeros((depth, width)),
    }

  def init(key, weights):
    del weights
    found = {site: fresh(jax.random.fold_in(key, i)) for i, site in enumerate(kind.sites)}
    return Variables(frozen={}, shared={"adapter": found}, cur={}, mem={})

  def bottlenecks(variables):
    return {
      site: Bottleneck(
        down=leaves["down"],
        down_bias=leaves["down_bias"],
        up=kind.scale * leaves["up"],
        up_bias=kind.scale * leaves["up_bias"],
        dropout=dropout,
        activation=kind.activation,
      )
      for site, leaves in variables.shared["adapter"].items()
    }

  def adapters(variables, inputs):
    found = bottlenecks(variables)
    if dropout:
      keys = {site: jax.random.fold_in(inputs.key, i) for i, site in enumerate(kind.sites)}
      found = {
        site: layers.replace(dropout_keys=jax.random.split(keys[site], depth))
        for site, layers in found.items()
      }
    return Adapters(bottlenecks=found)

  def folded(weights, variables):
    return weights, Adapters(bottlenecks=bottlenecks(variables))

  def stored(facts):
    each = depth * (2 * width * hidden + hidden + width)
    return {"shared": len(kind.sites) * each, "per_task": [0] * len(facts)}

  return base.with_head(
    config,
    backbone,
    spec,
    init=init,
    adapters=adapters,
    folded=folded,
    rules=lambda task: (("shared/adapter/.*", "adapter"),),
    stored=stored,
  )
