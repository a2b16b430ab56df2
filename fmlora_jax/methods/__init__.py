"""The methods: one module each, looked up by its name; `common` holds the parts that several use.

A module has `Config`, its settings, and `METHOD`, its class: a `common.base.AdaptedViT` made from
the run's config, a `Backbone` and a `SequenceSpec`. It may have `OFFICIAL`, the settings of the
official code by benchmark, and `VARIANTS`, the settings in which a comparison of all methods runs.
"""

import dataclasses
import importlib
import pkgutil
import types
from collections.abc import Mapping
from typing import Any

from fmlora_jax import config as config_lib
from fmlora_jax.config import Config, MethodConfig


def names() -> list[str]:
  """Returns the names of all methods."""
  return [m.name for m in pkgutil.iter_modules(__path__) if m.name != "common"]


def find(name: str) -> types.ModuleType:
  """Returns the module of the method `name`.

  Raises:
    ConfigError: if there is none.
  """
  allowed = f"one of {', '.join(names())}"
  config_lib.require(name in names(), "config.method.name", name, allowed)
  return importlib.import_module(f"fmlora_jax.methods.{name}")


def config_class(name: str) -> type[MethodConfig]:
  """Returns the settings class of the method `name`.

  Raises:
    ConfigError: if there is no such method.
  """
  return find(name).Config


def build_config(values: Mapping[str, Any]) -> Config:
  """Returns the config of a run from nested dicts; fields may also be where they were earlier.

  Raises:
    ConfigError: if a field is unknown or a value invalid, with the field's full path.
  """
  upgraded = upgrade_config({"method": {}, **values})
  method = upgraded["method"]
  name = method.get("name", MethodConfig.name) if isinstance(method, dict) else MethodConfig.name
  return config_lib.build(Config, upgraded, method_config=config_class(name))


def upgrade_config(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the nested dicts of a config of any version with every field where it is now."""
  method = values.get("method", {})
  name = method.get("name", MethodConfig.name) if isinstance(method, Mapping) else None
  known = dataclasses.fields(config_class(name)) if name in names() else ()
  return config_lib.upgrade_config(values, {field.name for field in known})


def variants(name: str) -> tuple[dict, ...]:
  """Returns the settings in which a comparison of all methods runs `name`; most have one."""
  return getattr(find(name), "VARIANTS", ({},))


def reports(name: str | None) -> tuple[Any, ...]:  # of Reported, whose module imports jax
  """Returns the facts that the method `name` declares; none of a method of another version."""
  return find(name).METHOD.reports if name and name in names() else ()


def make_method(config: Config, backbone: Any, spec: Any) -> Any:
  """Returns the AdaptedViT that `config.method.name` names, for a Backbone and a SequenceSpec.

  Raises:
    ConfigError: if its settings do not fit the backbone or the sequence.
  """
  return find(config.method.name).METHOD(config, backbone, spec)
