"""Fields of the config that have moved: old files and old flags name them as they were."""

from collections.abc import Collection, Mapping
from typing import Any

MOVED = {
  "bases": "method.bases",
  "drs": "method.drs",
  "prompt": "method.prompt",
  "tasks.stream": "tasks.task_file",
}


def moved_field(field: str) -> str:
  """Returns where a field such as "bases.max_rank" is now; unchanged unless it has moved."""
  for old, new in MOVED.items():
    if field == old or field.startswith(f"{old}."):
      return new + field.removeprefix(old)
  return field


def upgrade_config(values: Mapping[str, Any], method_fields: Collection[str]) -> dict[str, Any]:
  """Returns a config as nested dicts with every field where it is now.

  Args:
    values: of any version.
    method_fields: fields of the config's method; moved groups of other methods are left out.
  """
  upgraded = {name: dict(v) if isinstance(v, Mapping) else v for name, v in values.items()}
  for old, new in MOVED.items():
    *old_groups, old_name = old.split(".")
    new_group, new_name = new.split(".")
    place = upgraded
    for group in old_groups:
      place = place.get(group, {})
    if old_name not in place:
      continue
    value = place.pop(old_name)
    if new_group != "method" or new_name in method_fields:
      target = upgraded.setdefault(new_group, {})
      both_groups = isinstance(value, Mapping) and isinstance(target.get(new_name), Mapping)
      target[new_name] = {**value, **target[new_name]} if both_groups else value
  return upgraded
