"""Kinds of JSON values, and the check that a value is of its kind.

A kind is a type, None, COUNT or AMOUNT for a number that is not negative, [kind] for a list,
{name: kind} for an object that has these names and perhaps more, {...: kind} for the values of all
its names, or a tuple of kinds of which one fits.
"""

import dataclasses
import math
from typing import Any

LARGEST = 2**53  # of a whole number that a float holds


@dataclasses.dataclass(frozen=True)
class NotNegative:
  """A number of this type that is at least 0."""

  type: type


COUNT, AMOUNT = NotNegative(int), NotNegative(float)


def fits(value: Any, kind: Any) -> bool:
  """Returns whether a value is of a kind; an int is a float, a bool is no int."""
  if isinstance(kind, tuple):
    return any(fits(value, one) for one in kind)
  if isinstance(kind, NotNegative):
    return fits(value, kind.type) and value >= 0
  if isinstance(kind, list):
    return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
  if isinstance(kind, dict):
    named = {name: one for name, one in kind.items() if name is not ...}
    return (
      isinstance(value, dict)
      and all(name in value and fits(value[name], one) for name, one in named.items())
      and all(fits(item, kind[...]) for item in value.values() if ... in kind)
    )
  if type(value) is int and kind in (int, float):
    return abs(value) < LARGEST
  if kind is float:
    return type(value) is float and math.isfinite(value)
  return value is None if kind is None else type(value) is kind
