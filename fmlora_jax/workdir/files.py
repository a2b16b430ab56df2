"""Writes files so that a crash, a power cut or a full disk leaves the old file or the new one."""

import contextlib
import errno
import math
import os
import pathlib
import resource
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from fmlora_jax.config import ConfigError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def require_free_space(folder: pathlib.Path, num_bytes: int, purpose: str) -> None:
  """Raises ConfigError if fewer than `num_bytes` are free on the disk of `folder`."""
  free = shutil.disk_usage(folder).free
  if free < num_bytes:
    raise ConfigError(
      f"{folder}: {purpose} need {num_bytes:,} bytes, {free:,} are free: make room, or choose "
      "another --workdir"
    )


@contextlib.contextmanager
def explain_failure(path: pathlib.Path, num_bytes: int) -> Iterator[None]:
  """Turns the error of a disk that takes no more, while `path` is written, into a ConfigError."""
  try:
    yield
  except ConfigError:
    raise
  except Exception as error:  # orbax hands on TensorStore's error as one of many types
    if code := _code(error, REFUSED):
      raise ConfigError(
        f"{path} can't be written ({os.strerror(code)}): mend that, and the same command "
        "resumes from the last checkpoint"
      ) from None
    if not (code := _code(error, FULL)):
      raise
    free, fix = shutil.disk_usage(path.parent).free, "make room"
    reason = f"the disk is full, {num_bytes:,} bytes needed, {free:,} free"
    if code == errno.EDQUOT:
      reason = f"your quota of this disk is used up, {num_bytes:,} bytes needed"
    elif code == errno.EFBIG:
      most, fix = resource.getrlimit(resource.RLIMIT_FSIZE)[0], "raise that limit"
      reason = f"a file of this process may have at most {most:,} bytes (ulimit -f)"
    elif (disk := os.statvfs(path.parent)).f_files and not disk.f_favail:
      reason = f"the disk takes no more files, though {free:,} bytes are free"
    raise ConfigError(
      f"{path}: {reason}: {fix}, and the same command resumes from the last checkpoint"
    ) from None


def _code(error: BaseException, codes: tuple[int, ...]) -> int | None:
  """Returns the one of these error codes that is the reason of an error."""
  if isinstance(error, OSError) and error.errno in codes:
    return error.errno
  return next((code for code in codes if os.strerror(code) in str(error)), None)


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
  """Writes `path`; a crash leaves the old content or the new one, never a mixture.

  Where `path` is a link it is replaced, and what it leads to stays.

  Raises:
    ConfigError: if the disk is full or read-only, or `path` no file; what was there stays.
  """
  if path.exists() and not path.is_file():
    raise ConfigError(f"{path} is a folder or device: must be a file or new")
  draft = path.with_name(f"{_draft_start(path)}{os.getpid()}")
  data = content.encode() if isinstance(content, str) else content
  with explain_failure(path, len(data)):
    with open(draft, "wb") as file:
      file.write(data)
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
  """Refuses symbolic links below a workdir: a run would write outside of it.

  Raises:
    ConfigError: naming the first link.
  """
  if links := sorted(str(path.relative_to(folder)) for path in paths if path.is_symlink()):
    raise ConfigError(
      f"workdir {folder} holds the link {links[0]!r}: must hold plain files and folders; move it "
      "away, or choose another --workdir"
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
