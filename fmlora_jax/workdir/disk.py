"""A disk that is full, said in one line; and files that outlive a power cut."""

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator

from fmlora_jax.config import ConfigError

FULL = (errno.ENOSPC, errno.EDQUOT)


def require_room(folder: pathlib.Path, need: int, what: str) -> None:
  """Raises ConfigError if fewer than `need` bytes are free where `folder` lies."""
  free = shutil.disk_usage(folder).free
  if free < need:
    raise ConfigError(
      f"{folder}: {what} need {need:,} bytes, {free:,} are free: make room, or choose another "
      "--workdir"
    )


@contextlib.contextmanager
def writing(path: pathlib.Path, need: int) -> Iterator[None]:
  """Makes ConfigError of a full disk or quota while `path`, of `need` bytes, is written."""
  try:
    yield
  except Exception as error:  # orbax hands on what TensorStore says as one of many types
    if not _is_full(error):
      raise
    free = shutil.disk_usage(path.parent).free
    raise ConfigError(
      f"{path}: the disk is full, {need:,} bytes needed, {free:,} free: make room, and the same "
      "command resumes from the last checkpoint"
    ) from None


def _is_full(error: BaseException) -> bool:
  own = isinstance(error, OSError) and error.errno in FULL
  return own or any(os.strerror(code) in str(error) for code in FULL)


def sync(folder: pathlib.Path) -> None:
  """Returns when the folder, its files, and its name in the folder above are on the disk."""
  for place, _, names in os.walk(folder, topdown=False):
    for name in names:
      _sync(os.path.join(place, name))
    _sync(place)
  sync_name(folder)


def _sync(path: str | os.PathLike) -> None:
  file = os.open(path, os.O_RDONLY)
  try:
    os.fsync(file)
  finally:
    os.close(file)


def sync_name(path: pathlib.Path) -> None:
  """Returns when the name of `path`, say after a move, is on the disk."""
  _sync(path.parent)
