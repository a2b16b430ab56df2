"""Functions that config files (`configs/*.py`) call to state what differs from the defaults."""

import dataclasses
import types
import typing
from typing import Any, cast

import ml_collections
from ml_collections import config_dict

from fmlora_jax import methods
from fmlora_jax.config import Config, ConfigError, require

RECIPES = ("unified", "official")
KINDS_OF_HEADS = ("plain", "aligned", "lda")


def defaults(*, recipe: str = "unified", **groups: Any) -> ml_collections.ConfigDict:
  """Returns every field of `Config` at its default, changed by nested dicts.

  Fields that may be None become typed placeholders, so that the command line can set them.

  Args:
    recipe: unified trains every method with `groups`; official replaces them by the settings that
      the official code of the method has for the benchmark.

  Raises:
    ConfigError: if there is no such recipe, or none for this method, benchmark and scenario.
  """
  require(recipe in RECIPES, "recipe", recipe, f"one of {', '.join(RECIPES)}")
  config = methods.build_config(groups)
  if recipe == "official":
    config = methods.build_config(merged(groups, _official(config)))
  return to_config_dict(config)


def paper(
  variant: str | None, *, source_size: int = 256, **tasks: Any
) -> ml_collections.ConfigDict:
  """Returns the config of one of the paper's benchmarks.

  Args:
    variant: the file's argument: method=NAME, tasks=N, split=NAME, recipe=unified|official. Its
      split replaces that of the recipe.
    source_size: of `InputConfig`, pixels.
    tasks: of `TasksConfig`, where the variant says nothing else.
  """
  chosen = parse_variant(variant, "method", "tasks", "split", "recipe")
  if "tasks" in chosen:
    tasks["num_tasks"] = int(chosen["tasks"])
  tree = defaults(
    recipe=chosen.get("recipe", "unified"),
    method={"name": chosen.get("method", "fm_lora")},
    tasks=tasks,
    input={"source_size": source_size, "augmentation": "pilot", "normalisation": "zero_one"},
  )
  tree.update({"tasks": {"split": chosen["split"]}} if "split" in chosen else {})
  return tree


def _official(config: Config) -> dict[str, Any]:
  """Returns the settings that the official code of the method has for the benchmark."""
  name, tasks = config.method.name, config.tasks
  if tasks.scenario != "cil":  # under this name; domainnet_dil has the same images as domainnet
    raise ConfigError(
      "recipe is 'official': must be unified, the official codes learn new classes in each task "
      f"(cil), and the scenario is {tasks.scenario}"
    )
  known: dict[str, Any] = getattr(methods.find(name), "OFFICIAL", {})
  if tasks.benchmark not in known:
    have = f"has none for {tasks.benchmark!r}, but for {', '.join(known)}" if known else "has none"
    raise ConfigError(f"recipe is 'official': must be unified, {name} {have}")
  groups = known[tasks.benchmark]
  return cast(dict, groups(tasks.num_tasks) if callable(groups) else groups)


def merged(groups: dict, changes: dict) -> dict:
  """Returns nested dicts in which the values of `changes` replace those of `groups`."""
  both = dict(groups)
  for name, value in changes.items():
    is_group = isinstance(value, dict) and isinstance(both.get(name), dict)
    both[name] = merged(both[name], value) if is_group else value
  return both


def to_config_dict(record: Any) -> ml_collections.ConfigDict:
  """Returns a config or a group of it; fields that are None are placeholders of their type."""
  hints = typing.get_type_hints(type(record))
  tree = ml_collections.ConfigDict()
  for field in dataclasses.fields(record):
    value = getattr(record, field.name)
    if dataclasses.is_dataclass(value):
      tree[field.name] = to_config_dict(value)
    elif value is None:
      (kind,) = (a for a in typing.get_args(hints[field.name]) if a is not types.NoneType)
      tree[field.name] = config_dict.placeholder(str if typing.get_origin(kind) else kind)
    else:
      tree[field.name] = value
  return tree


def head_settings(
  chosen: dict[str, str], heads: dict[str, dict], default: str = "lda"
) -> dict[str, Any]:
  """Returns the settings of the head that a variant names.

  Args:
    chosen: the variant: method=NAME, head=plain|aligned|lda.
    heads: settings by head; and by method, for methods that have none of them.
    default: the head of all methods if the variant names none.

  Raises:
    ConfigError: if there is no such head.
  """
  method = chosen.get("method", "fm_lora")
  name = chosen.get("head", default)
  require(name in KINDS_OF_HEADS, "head", name, "plain, aligned or lda")
  return heads.get(method, heads[name])


def parse_variant(text: str | None, *known: str) -> dict[str, str]:
  """Returns {key: value} of a config file's argument such as "method=lora,tasks=10".

  Raises:
    ConfigError: if a part has no value, or a key that is not `known` or was there before, or if
      its number of tasks is none.
  """
  chosen = {}
  for part in (text or "").split(","):
    key, equals, value = part.partition("=")
    if part and not (equals and value):
      raise ConfigError(f"config variant {part!r}: must be key=value, as in method=lora,tasks=10")
    if part and key not in known:
      raise ConfigError(f"config variant {part!r}: the key must be one of {', '.join(known)}")
    if key == "tasks" and not value.isdecimal():
      example = "as in method=lora,tasks=10"
      raise ConfigError(f"config variant {part!r}: tasks must be a whole number, {example}")
    if key in chosen:
      raise ConfigError(f"config variant {part!r}: {key} must be given once, is {chosen[key]} too")
    if part:
      chosen[key] = value
  return chosen
