"""Writes files so that a crash, a power cut or a full disk leaves the old file or the new one."""

import contextlib
import errno
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from fmlora_jax.config import ConfigError

FULL = (errno.ENOSPC, errno.EDQUOT)


def require_free_space(folder: pathlib.Path, num_bytes: int, purpose: str) -> None:
  """Raises ConfigError if fewer than `num_bytes` are free on the disk of `folder`."""
  free = shutil.disk_usage(folder).free
  if free < num_bytes:
    raise ConfigError(
      f"{folder}: {purpose} need {num_bytes:,} bytes, {free:,} are free: make room, or choose "
      "another --workdir"
    )


@contextlib.contextmanager
def explain_full_disk(path: pathlib.Path, num_bytes: int) -> Iterator[None]:
  """Turns the error of a full disk or quota, while `path` is written, into a ConfigError."""
  try:
    yield
  except Exception as error:  # orbax hands on TensorStore's error as one of many types
    if not _is_full(error):
      raise
    free = shutil.disk_usage(path.parent).free
    raise ConfigError(
      f"{path}: the disk is full, {num_bytes:,} bytes needed, {free:,} free: make room, and the "
      "same command resumes from the last checkpoint"
    ) from None


def _is_full(error: BaseException) -> bool:
  has_code = isinstance(error, OSError) and error.errno in FULL
  return has_code or any(os.strerror(code) in str(error) for code in FULL)


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes `path`; a crash leaves the old text or the new one, never a mixture.

  Raises:
    ConfigError: if the disk is full; the old text stays.
  """
  draft = path.with_name(f"{_draft_start(path)}{os.getpid()}")
  with explain_full_disk(path, len(text)):
    with open(draft, "w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(draft, path)
    fsync_parent(path)


def is_draft(path: pathlib.Path, of: pathlib.Path) -> bool:
  """Returns whether `path` is the unfinished file of a `write_atomically` of `of`."""
  return path.name.startswith(_draft_start(of))


def _draft_start(path: pathlib.Path) -> str:
  return f".{path.name}."


def fsync_tree(folder: pathlib.Path) -> None:
  """Returns when a folder, all files in it and its own name are on the disk."""
  for parent, _, names in os.walk(folder, topdown=False):
    for name in names:
      _fsync(os.path.join(parent, name))
    _fsync(parent)
  fsync_parent(folder)


def fsync_parent(path: pathlib.Path) -> None:
  """Returns when the name of `path`, such as after a rename, is on the disk."""
  _fsync(path.parent)


def _fsync(path: str | os.PathLike) -> None:
  file = os.open(path, os.O_RDONLY)
  try:
    os.fsync(file)
  finally:
    os.close(file)


def refuse_links(folder: pathlib.Path, paths: Iterable[pathlib.Path]) -> None:
  """Refuses symbolic links in a workdir: a run would write outside of it.

  Raises:
    ConfigError: naming the first link.
  """
  if links := sorted(path.name for path in paths if path.is_symlink()):
    raise ConfigError(
      f"workdir {folder} holds the link {links[0]!r}: must hold plain files and folders; remove "
      "it, or choose another --workdir"
    )


def jsonable(value: Any, path: str) -> Any:
  """Returns `value` as JSON holds it, NaN and infinity as None.

  Args:
    path: of the value, for the error.

  Raises:
    TypeError: on a value of another type, with its path.
  """
  if isinstance(value, Mapping):
    return {str(k): jsonable(v, f"{path}.{k}") for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [jsonable(v, f"{path}[{i}]") for i, v in enumerate(value)]
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if hasattr(value, "__array__"):  # NumPy and JAX arrays and scalars
    return jsonable(np.asarray(value).tolist(), path)
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if value is None or isinstance(value, (bool, int, str)):
    return value
  raise TypeError(f"{path} is of type {type(value).__name__}: must be something JSON can hold")
