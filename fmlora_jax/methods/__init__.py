"""One module per method, found by its name; `common` holds what several of them use."""

import importlib
import pkgutil


def names() -> list[str]:
  """Returns the names of all methods."""
  return [m.name for m in pkgutil.iter_modules(__path__) if m.name != "common"]


def variants(name: str) -> tuple[dict, ...]:
  """Returns the settings in which a comparison of all methods runs `name`; most have one."""
  module = importlib.import_module(f"fmlora_jax.methods.{name}")
  return getattr(module, "VARIANTS", ({},))


def make_method(config, backbone, spec):
  """Returns the Method that `config.method.name` names, for a Backbone and a SequenceSpec.

  Raises:
    ConfigError: if its settings do not fit the backbone or the sequence.
  """
  module = importlib.import_module(f"fmlora_jax.methods.{config.method.name}")
  return module.make(config, backbone, spec)
