"""Checks of single settings, and the error of an invalid one."""

from collections.abc import Sequence
from typing import Any


class ConfigError(ValueError):
  """An invalid setting. The message gives the field, its value, what is allowed, how to fix it."""


class ConfigErrors(ConfigError):
  """Several invalid settings or missing things at once.

  Attributes:
    problems: a line for each.
  """

  def __init__(self, problems: Sequence[str]):
    super().__init__("; ".join(problems))
    self.problems = tuple(problems)


def problems_of(error: ConfigError) -> tuple[str, ...]:
  """Returns a line for each problem."""
  return error.problems if isinstance(error, ConfigErrors) else (str(error),)


def raise_problems(problems: Sequence[str]) -> None:
  """Raises a ConfigError of all problems; none if there are none."""
  if len(problems) == 1:
    raise ConfigError(problems[0])
  if problems:
    raise ConfigErrors(problems)


def require(ok: bool, field: str, value: Any, allowed: str) -> None:
  """Raises ConfigError unless `ok`; `field` is relative to the dataclass that is checked."""
  if not ok:
    raise ConfigError(f"{field} is {value!r}: must be {allowed}")


def require_within(record: Any, least: int, most: int, *names: str) -> None:
  """Raises ConfigError if one of these fields is outside of least..most; None is allowed."""
  for name in names:
    value = getattr(record, name)
    allowed = f">= {least} and <= {most}"
    require(value is None or least <= value <= most, name, value, allowed)


def require_path(record: Any, *names: str) -> None:
  """Raises ConfigError if one of these fields is a path that no file can have."""
  for name in names:
    value = getattr(record, name)
    require(value is None or value.isprintable(), name, value, "a path of printable characters")
    sizes = [len(part.encode()) for part in (value or "").split("/")]
    shown = value if sum(sizes) < 4000 else f"{str(value)[:80]}..."
    is_short = max(sizes) <= 255 and sum(sizes) + len(sizes) <= 4096
    require(is_short, name, shown, "a path of at most 4096 bytes, of names of at most 255")


MOST_STEPS = 10**6  # epochs, and steps between checkpoints
MOST_AT_ONCE = 2**20  # numbers of things in memory at the same time: images of a batch, say
MOST_WIDE = 2**14  # ranks, tokens, centroids and sides of images
