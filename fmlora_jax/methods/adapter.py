"""Bottleneck adapters, one set trained on and on through all tasks.

Source: Houlsby et al. (arXiv:1902.00751), a narrow MLP behind both branches of each block;
AdaptFormer (arXiv:2205.13535), one beside the MLP. No public code trains them through a sequence of
tasks: that of APER and SimpleCIL does so in the first task alone. A fresh adapter changes nothing
(up is zero), where Houlsby's code draws it near zero. Houlsby et al. train the LayerNorms too;
here `train_norms` does, which is off by default.
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
from fmlora_jax.types import (
  Adapters,
  Bottleneck,
  Facts,
  OptimizerGroup,
  Params,
  Rules,
  Sizes,
  Variables,
)

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
    train_norms: of houlsby, train the LayerNorms of the ViT too, as its paper does.
  """

  name: str = "adapter"
  kind: Literal["houlsby", "adaptformer"] = "houlsby"
  width: int = 64
  dropout: float | None = None
  train_norms: bool = False

  def __post_init__(self):
    config_lib.require(self.width >= 1, "width", self.width, ">= 1")
    fits = self.dropout is None or 0 <= self.dropout < 1
    config_lib.require(fits, "dropout", self.dropout, "in [0, 1)")


# exceptions, beside those of common/recipes.py and sd_lora.py:
# - there is no official code for a sequence of tasks; these are SD-LoRA's settings
# - LayerNorms are trained, as in the paper (Houlsby et al., Sec. 2.1), but by all tasks, not anew
# - fresh weights: up is zero and down uniform, where Houlsby's code draws both near zero
OFFICIAL = recipes.like_sd_lora(train_norms=True)


@dataclasses.dataclass(frozen=True, eq=False)
class SequentialAdapter(AdaptedViT[Config]):
  """One set of bottlenecks, and of LayerNorms, in `shared`, which every task trains."""

  @property
  def kind(self) -> Kind:
    return KINDS[self.settings.kind]

  @property
  def dropout(self) -> float:
    return self.kind.dropout if self.settings.dropout is None else self.settings.dropout

  @property
  def trains_norms(self) -> bool:
    return self.settings.train_norms and self.settings.kind == "houlsby"

  @property
  def groups(self) -> dict[str, OptimizerGroup]:
    # no decay: a scale of 0 would switch a branch off
    norms = {"norm": OptimizerGroup(decays=False)} if self.trains_norms else {}
    return super().groups | norms

  def init(self, key: PRNGKeyArray, weights: Params) -> Variables:
    layers = {
      site: fresh(jax.random.fold_in(key, i), self.backbone.sizes, self.settings.width)
      for i, site in enumerate(self.kind.sites)
    }
    shared = {"adapter": layers}
    if self.trains_norms:  # a copy: the training state is donated
      shared["norms"] = jax.tree.map(jnp.array, norms_of(weights))
    return super().init(key, weights).update(shared=shared)

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

  def trunk(self, variables: Variables) -> Params:
    return with_norms(super().trunk(variables), variables.shared.get("norms", {}))

  def folded(self, weights: Params, variables: Variables) -> tuple[Params, Adapters]:
    weights = with_norms(weights, variables.shared.get("norms", {}))
    return weights, Adapters(bottlenecks=self.bottlenecks(variables))

  def rules(self, task: int) -> Rules:
    norms = (("shared/norms/.*", "norm"),) if self.trains_norms else ()
    return (("shared/adapter/.*", "adapter"), *norms, *super().rules(task))

  def stored(self, facts: list[Facts]) -> dict[str, Any]:
    sizes, hidden = self.backbone.sizes, self.settings.width
    count = sizes.depth * (2 * sizes.width * hidden + hidden + sizes.width)
    norms = 2 * sizes.width * (2 * sizes.depth + 1) if self.trains_norms else 0
    return super().stored(facts) | {"shared": len(self.kind.sites) * count + norms}


def fresh(key: PRNGKeyArray, sizes: Sizes, hidden: int) -> dict[str, Float[Array, "..."]]:
  """Returns the layers of a new bottleneck: `up` is zero, so that it adds nothing."""
  depth, width = sizes.depth, sizes.width
  return {
    "down": low_rank.torch_uniform(key, depth, width, hidden),
    "down_bias": jnp.zeros((depth, hidden)),
    "up": jnp.zeros((depth, hidden, width)),
    "up_bias": jnp.zeros((depth, width)),
  }


def norms_of(backbone: Params) -> Params:
  """Returns the LayerNorms of a ViT: two of each block, and the last one."""
  blocks = {name: part for name, part in backbone.items() if name.startswith("block_")}
  norms = {name: {n: part[n] for n in ("norm1", "norm2")} for name, part in blocks.items()}
  return norms | {"norm": backbone["norm"]}


def with_norms(backbone: Params, norms: Params) -> Params:
  """Returns the ViT with LayerNorms as `norms_of` returns them; other leaves are shared."""
  return backbone | {name: {**backbone[name], **part} for name, part in norms.items()}


METHOD = SequentialAdapter
