"""Bottleneck adapters, one set trained on and on through all tasks.

Source: Houlsby et al. (arXiv:1902.00751), a narrow MLP behind both branches of each block;
AdaptFormer (arXiv:2205.13535), one beside the MLP. No public code trains them through a sequence of
tasks: that of APER and SimpleCIL does so in the first task alone. A fresh adapter changes nothing
(up is zero), where Houlsby's code draws it near zero.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from fmlora_jax import config as config_lib
from fmlora_jax.methods.common import recipes
from fmlora_jax.methods.common.base import AdaptedViT, StepInputs
from fmlora_jax.models import low_rank
from fmlora_jax.types import Adapters, Bottleneck, Facts, Params, Rules, Sizes, Variables

VARIANTS = ({"kind": "houlsby"}, {"kind": "adaptformer"})  # in a comparison of all methods


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
  """The differences between the adapters of two papers; `scale` multiplies their output."""

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


OFFICIAL = recipes.like_sd_lora()  # there is no official code for a sequence of tasks


@dataclasses.dataclass(frozen=True, eq=False)
class SequentialAdapter(AdaptedViT[Config]):
  """One set of bottlenecks in `shared`, which every task trains."""

  @property
  def kind(self) -> Kind:
    return KINDS[self.settings.kind]

  @property
  def dropout(self) -> float:
    return self.kind.dropout if self.settings.dropout is None else self.settings.dropout

  def init(self, key: PRNGKeyArray, weights: Params) -> Variables:
    layers = {
      site: fresh(jax.random.fold_in(key, i), self.backbone.sizes, self.settings.width)
      for i, site in enumerate(self.kind.sites)
    }
    return super().init(key, weights).update(shared={"adapter": layers})

  def bottlenecks(self, variables: Variables) -> dict[str, Bottleneck]:
    """Returns the bottlenecks at each site, scaled and without dropout."""
    return {
      site: Bottleneck(
        down=leaves["down"],
        down_bias=leaves["down_bias"],
        up=self.kind.scale * leaves["up"],
        up_bias=self.kind.scale * leaves["up_bias"],
        dropout=self.dropout,
        activation=self.kind.activation,
      )
      for site, leaves in variables.shared["adapter"].items()
    }

  def adapters(self, variables: Variables, inputs: StepInputs) -> Adapters:
    layers, depth = self.bottlenecks(variables), self.backbone.sizes.depth
    if self.dropout:
      for i, site in enumerate(self.kind.sites):
        keys = jax.random.split(jax.random.fold_in(inputs.key, i), depth)
        layers[site] = layers[site].replace(dropout_keys=keys)
    return Adapters(bottlenecks=layers)

  def folded(self, weights: Params, variables: Variables) -> tuple[Params, Adapters]:
    return weights, Adapters(bottlenecks=self.bottlenecks(variables))

  def rules(self, task: int) -> Rules:
    return (("shared/adapter/.*", "adapter"), *super().rules(task))

  def stored(self, facts: list[Facts]) -> dict[str, Any]:
    sizes, hidden = self.backbone.sizes, self.settings.width
    count = sizes.depth * (2 * sizes.width * hidden + hidden + sizes.width)
    return super().stored(facts) | {"shared": len(self.kind.sites) * count}


def fresh(key: PRNGKeyArray, sizes: Sizes, hidden: int) -> dict[str, Float[Array, "..."]]:
  """Returns the layers of a new bottleneck: `up` is zero, so that it adds nothing."""
  depth, width = sizes.depth, sizes.width
  return {
    "down": low_rank.torch_uniform(key, depth, width, hidden),
    "down_bias": jnp.zeros((depth, hidden)),
    "up": jnp.zeros((depth, hidden, width)),
    "up_bias": jnp.zeros((depth, width)),
  }


METHOD = SequentialAdapter
