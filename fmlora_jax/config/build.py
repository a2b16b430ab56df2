"""Frozen dataclasses filled from nested dicts, each value checked against its field's type."""

import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Literal, cast

from fmlora_jax.config.checks import ConfigError, problems_of, raise_problems
from fmlora_jax.config.schema import MethodConfig


def build(
  cls: type,
  values: dict,
  path: str = "config",
  base: Any = None,
  method_config: type[MethodConfig] | None = None,
) -> Any:
  """Returns `cls` filled from nested dicts; absent fields keep their defaults.

  Args:
    base: a record with the default of each field; None takes the defaults of `cls`.
    method_config: the settings class of the method, which a MethodConfig field is built as.

  Raises:
    ConfigError: on unknown fields (with the nearest known one), wrong types and values that a
      dataclass refuses; each message starts with the field's full path.
  """
  hints: dict[str, Any] = typing.get_type_hints(cls)
  known = [field.name for field in dataclasses.fields(cls)]
  filled, problems, made = {}, [], None
  for name, value in values.items():
    try:
      if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; fields are {', '.join(known)}"
        raise ConfigError(f"{path}.{name} is not a field{hint}")
      kind = hints[name]
      if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
          raise ConfigError(f"{path}.{name} is {value!r}: must be a group of fields")
        default = getattr(cls() if base is None else base, name)
        if kind is MethodConfig and method_config is not None:
          kind, default = method_config, None
        filled[name] = build(cast(type, kind), value, f"{path}.{name}", default, method_config)
      else:
        filled[name] = _convert(kind, value, f"{path}.{name}")
    except ConfigError as error:
      problems += problems_of(error)
  try:
    made = _with(cls, filled, base)
  except ConfigError as error:
    problems += _refused(cls, filled, base, path) or ([] if problems else [f"{path}.{error}"])
  except TypeError:  # a field without a default is among the invalid ones
    if not problems:
      raise
  raise_problems(problems)
  return made


def _with(cls: type, fields: dict[str, Any], base: Any) -> Any:
  return cls(**fields) if base is None else dataclasses.replace(base, **fields)


def _refused(cls: type, fields: dict[str, Any], base: Any, path: str) -> list[str]:
  """Returns why each of these fields is refused by itself, where it is."""
  problems = []
  for name, value in fields.items():
    try:
      _with(cls, {name: value}, base)
    except ConfigError as error:
      if str(error).startswith(f"{name} is "):  # not of another, which needs this one
        problems.append(f"{path}.{error}")
    except TypeError:  # another field has no default
      pass
  return problems


def _convert(kind: Any, value: Any, path: str) -> Any:
  """Returns `value` as `kind`; refuses conversions that lose or guess: True or 1.5 to int."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin in (types.UnionType, typing.Union):
    if value is None:
      return None
    (kind,) = (a for a in args if a is not types.NoneType)
    return _convert(kind, value, path)
  if origin is Literal:
    if value not in args or type(value) is bool:
      raise ConfigError(f"{path} is {value!r}: must be one of {', '.join(map(str, args))}")
    return value
  if origin is tuple:
    if not isinstance(value, (tuple, list)):
      raise ConfigError(f"{path} is {value!r}: must be a tuple, such as (1, 2)")
    return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
  if kind is float and type(value) is int:
    value = float(value)
  if type(value) is not kind:
    raise ConfigError(f"{path} is {value!r}: must be of type {kind.__name__}")
  if kind is float and not math.isfinite(value):
    raise ConfigError(f"{path} is {value!r}: must be finite")
  if kind is int and abs(value) > 2**32:  # also of fields that a method declares
    raise ConfigError(f"{path} is {value!r}: must be below 2**32")
  return value
