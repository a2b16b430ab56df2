"""Checks of the files and folders that a command will write, made before its work."""

import contextlib
import os
import pathlib
import tempfile

from fmlora_jax.config import ConfigError


def require_file(flag: str, text: str, suffix: str = "") -> pathlib.Path:
  """Returns the path of a file to write, after trying to open it; leaves all as it was.

  Args:
    flag: that gives it, for the message.
    suffix: that the name must have.

  Raises:
    ConfigError: if it is a folder, has another suffix, or can't be written.
  """
  path = pathlib.Path(text).expanduser()
  if not text.isprintable() or not text or not text.endswith(suffix):
    raise _refusal(flag, text, f"must end in {suffix}" if suffix else "must be the name of a file")
  try:
    if path.is_dir() or text.endswith("/"):
      raise _refusal(flag, text, "is a folder, must be a file; name one in it")
    if not path.parent.is_dir():
      raise _refusal(flag, text, f"there is no folder {str(path.parent)!r}; make it first")
    is_new = not path.exists()
    if is_new or path.is_file():
      with open(path, "xb" if is_new else "ab"):
        pass
    if is_new:
      path.unlink()
  except OSError as error:
    raise _refusal(flag, text, f"can't be written ({error.strerror}); name another") from None
  return path


def require_folder(flag: str, text: str) -> pathlib.Path:
  """Returns the path of a folder to write into, or to make; makes nothing.

  Args:
    flag: that gives it, for the message.

  Raises:
    ConfigError: if it is no folder, or can't be written or made.
  """
  path = pathlib.Path(text).expanduser()
  if not text.isprintable() or not text:
    raise _refusal(flag, text, "must be the name of a folder")
  try:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
      os.lstat(path)
    there = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
      raise _refusal(flag, text, f"{str(there)!r} is no folder; name another")
    with tempfile.TemporaryFile(dir=there):
      pass
  except OSError as error:
    raise _refusal(flag, text, f"can't be written ({error.strerror}); name another") from None
  return path


def _refusal(flag: str, text: str, reason: str) -> ConfigError:
  return ConfigError(f"{flag} is {text!r}: {reason}")
