"""One file per method, found by its name; SHARED_FILES hold what several of them use."""

import importlib
import pkgutil

SHARED_FILES = (
  "alignment",
  "class_statistics",
  "drs",
  "dualgpm",
  "frame",
  "recipes",
  "rules",
  "task_identity",
)


def names() -> list[str]:
  """Returns the names of all methods."""
  return [m.name for m in pkgutil.iter_modules(__path__) if m.name not in SHARED_FILES]


def variants(name: str) -> tuple[dict, ...]:
  """Returns the settings in which a comparison of all methods runs `name`; most have one."""
  module = importlib.import_module(f"fmlora_jax.methods.{name}")
  return getattr(module, "VARIANTS", ({},))


def make(config, backbone, spec):
  """Returns the Method that `config.method.name` names, for a Backbone and a SequenceSpec.

  Raises:
    ConfigError: if its settings do not fit the backbone or the sequence.
  """
  module = importlib.import_module(f"fmlora_jax.methods.{config.method.name}")
  return module.make(config, backbone, spec)
