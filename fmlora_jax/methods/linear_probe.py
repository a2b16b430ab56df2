"""A head on the frozen ViT: its features without any adaptation. Source: baseline."""

import dataclasses

from fmlora_jax import config as config_lib
from fmlora_jax.methods.common.base import AdaptedViT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.MethodConfig):
  """The linear probe has no settings."""

  name: str = "linear_probe"


METHOD = AdaptedViT
