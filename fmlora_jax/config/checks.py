"""Checks of single settings, and the error that an invalid one raises."""

from typing import Any


class ConfigError(ValueError):
  """A setting that can't be: the message names the field, the value, what is allowed, the mend."""


def require(ok: bool, field: str, value: Any, allowed: str) -> None:
  """Raises ConfigError unless `ok`; `field` is relative to the dataclass that checks it."""
  if not ok:
    raise ConfigError(f"{field} is {value!r}: must be {allowed}")


def require_within(record: Any, least: int, most: int, *names: str) -> None:
  """Raises ConfigError if one of these fields is outside of least..most; None is within."""
  for name in names:
    value = getattr(record, name)
    allowed = f">= {least} and <= {most}"
    require(value is None or least <= value <= most, name, value, allowed)


def require_path(record: Any, *names: str) -> None:
  """Raises ConfigError if one of these fields is a path that no file can have."""
  for name in names:
    value = getattr(record, name)
    require(value is None or value.isprintable(), name, value, "a path of printable characters")


MOST_STEPS = 10**6  # of what is done in turn: epochs, steps between checkpoints
MOST_AT_ONCE = 2**20  # of what lies in memory at a time: images of a batch, say
MOST_WIDE = 2**14  # of ranks, tokens, centroids and sides of images
