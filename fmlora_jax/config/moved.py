"""Fields of the config that have moved; old files and old flags have their old names."""

from collections.abc import Collection, Mapping
from typing import Any

MOVED = {
  "bases": "method.bases",
  "drs": "method.drs",
  "prompt": "method.prompt",
  "tasks.stream": "tasks.task_file",
}
REMOVED = {"method.drs.price": 0.001}  # fields of old files, with the default that they had


def moved_field(field: str) -> str:
  """Returns the new name of a field such as "bases.max_rank"; unchanged if it has not moved."""
  for old, new in MOVED.items():
    if field == old or field.startswith(f"{old}."):
      return new + field.removeprefix(old)
  return field


def upgrade_config(values: Mapping[str, Any], method_fields: Collection[str]) -> dict[str, Any]:
  """Returns a config as nested dicts with the new name of every field.

  Args:
    values: of any version.
    method_fields: fields of the config's method; moved groups of other methods are left out.
  """
  upgraded = {name: dict(v) if isinstance(v, Mapping) else v for name, v in values.items()}
  for old, new in MOVED.items():
    *old_groups, old_name = old.split(".")
    new_group, new_name = new.split(".")
    parent = upgraded
    for group in old_groups:
      parent = parent.get(group, {})
    if not isinstance(parent, dict) or old_name not in parent:  # build refuses what is no group
      continue
    value = parent.pop(old_name)
    if new_group != "method" or new_name in method_fields:
      target = upgraded.setdefault(new_group, {})
      both_groups = isinstance(value, Mapping) and isinstance(target.get(new_name), Mapping)
      target[new_name] = {**target[new_name], **value} if both_groups else value
  for field, default in REMOVED.items():  # another value is left for `build` to refuse
    *groups, name = field.split(".")
    place = upgraded
    for group in groups:
      if not isinstance(place.get(group), Mapping):
        break
      inner = dict(place[group])
      place[group] = inner
      place = inner
    else:
      if place.get(name) == default:
        del place[name]
  return upgraded
