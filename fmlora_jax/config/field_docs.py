"""Name, type, default and doc of each setting, read from the dataclasses and their docstrings."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class FieldDoc:
  """One setting.

  Attributes:
    path: such as "optim.learning_rate".
    kind: its type in words.
    default: its value where nothing else is said.
    doc: its entry in the docstring's Attributes; "" if there is none.
  """

  path: str
  kind: str
  default: Any
  doc: str


def field_docs(record: Any, path: str = "") -> Iterator[FieldDoc]:
  """Yields each setting of a settings dataclass, given with its defaults; groups come as fields."""
  hints, docs = typing.get_type_hints(type(record)), _attributes(type(record))
  for field in dataclasses.fields(record):
    value = getattr(record, field.name)
    name = f"{path}.{field.name}" if path else field.name
    if dataclasses.is_dataclass(value):
      yield from field_docs(value, name)
    else:
      kind = _kind(hints[field.name])
      yield FieldDoc(path=name, kind=kind, default=value, doc=docs.get(field.name, ""))


def _attributes(cls: type) -> dict[str, str]:
  """Returns the entries under Attributes in the docstrings of a class and its bases."""
  entries = {}
  for base in reversed(cls.__mro__):
    _, _, section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
    for names, text in re.findall(r"^  ([\w, ]+): (.*(?:\n    .*)*)", section, re.MULTILINE):
      entries |= dict.fromkeys(names.split(", "), " ".join(text.split()))
  return entries


def _kind(hint: Any) -> str:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    return " or ".join("None" if arg is types.NoneType else _kind(arg) for arg in args)
  if origin is Literal:
    return "|".join(map(str, args))
  if origin is tuple:
    return f"tuple of {_kind(args[0])}"
  return hint.__name__
