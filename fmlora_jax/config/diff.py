"""Comparison of nested dicts, such as the configs in results and checkpoints."""

from collections.abc import Iterable, Iterator
from typing import Any


def differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
  """Yields (path, before, now) of every leaf that differs between two nested dicts."""
  if isinstance(before, dict) or isinstance(now, dict):
    before, now = before or {}, now or {}
    for name in sorted(before.keys() | now.keys()):
      yield from differences(before.get(name), now.get(name), f"{path}.{name}" if path else name)
  elif before != now:
    yield path, before, now


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  """Yields (path, value) of every leaf of nested dicts, with paths such as "optim.name"."""
  if isinstance(tree, dict):
    for name, value in tree.items():
      yield from leaves(value, f"{path}.{name}" if path else name)
  else:
    yield path, tree


def paths_to(name: str, paths: Iterable[str]) -> list[str]:
  """Returns the paths that end in a field's name, those within the fewest groups."""
  found = [path for path in paths if path.rpartition(".")[2] == name]
  fewest = min((path.count(".") for path in found), default=0)
  return [path for path in found if path.count(".") == fewest]
