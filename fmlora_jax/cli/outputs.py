"""Folders and files that a command is to write: refused before any work where they can't be."""

import os
import pathlib
import tempfile

from fmlora_jax.config import ConfigError

LONGEST_NAME, LONGEST_PATH = 255, 4096  # bytes, of Linux
BELOW = 256  # bytes of the longest path that is written below a folder
GLOBS = "*?[]\\"  # orbax takes a path with these for a pattern
SHOWN = 200  # characters of a path in a message


def require_folder(what: str, given: str | pathlib.Path) -> pathlib.Path:
  """Refuses a folder that can't be made or written into; makes nothing.

  Args:
    what: the folder in words, such as "--workdir".
    given: the folder; ~ is the user's.

  Returns:
    Its path.

  Raises:
    ConfigError: in one line.
  """
  path = _path(given)
  nearest = require_path(what, path)
  if reason := _write_error(nearest):
    raise _refusal(what, path, f"writable, {reason}; choose another or mend that")
  return path


def require_file(
  what: str, given: str | pathlib.Path, ending: str = "", mark: bytes = b""
) -> pathlib.Path:
  """Refuses a file that can't be written, in a folder that exists; touches nothing.

  Args:
    what: the file in words, such as "--plot".
    given: the file; ~ is the user's folder.
    ending: that its name must have.
    mark: in the first KiB of the files of this program; another one is not overwritten.

  Returns:
    Its path.

  Raises:
    ConfigError: in one line.
  """
  path = _path(given)
  _require_lengths(what, path, 0)
  if not path.name.endswith(ending):
    raise ConfigError(f"{what} is {_short(path)!r}: must end in {ending}")
  if not path.parent.is_dir():
    raise _refusal(what, path, f"in a folder that exists, {_short(path.parent)} does not")
  if path.exists() and not path.is_file():
    raise _refusal(what, path, "a file or new, it is a folder or device; choose another")
  if mark and path.exists() and not _has(path, mark):
    raise _refusal(what, path, "new or of this program, it is another file; name another")
  if reason := _write_error(path.parent):
    raise _refusal(what, path, f"writable, {reason}; choose another or mend that")
  return path


def _has(path: pathlib.Path, mark: bytes) -> bool:
  with open(path, "rb") as file:
    return mark in file.read(1024)


def require_new_file(what: str, given: str | pathlib.Path, ending: str) -> pathlib.Path:
  """Refuses a file that can't be written or exists; see `require_file`.

  Raises:
    ConfigError: in one line.
  """
  path = require_file(what, given, ending)
  if path.exists():
    raise _refusal(what, path, "a new file; name another")
  return path


def require_path(what: str, path: pathlib.Path) -> pathlib.Path:
  """Refuses a path at which there is no folder and can be none, or which orbax can't read.

  Returns:
    The folder, or the nearest above it that exists.

  Raises:
    ConfigError: in one line.
  """
  path = nearest = path.absolute()
  _require_lengths(what, path, BELOW)
  if set(GLOBS) & set(str(path)) or "gs:" in path.parts:
    allowed = f"a path without {' '.join(GLOBS)} and gs:, which checkpoints can't have"
    raise _refusal(what, path, f"{allowed}; choose another")
  while not os.path.lexists(nearest):
    nearest = nearest.parent
  if not os.path.isdir(nearest):
    where = "this" if nearest == path else _short(nearest)
    raise _refusal(what, path, f"a folder, {where} is none; choose another")
  return nearest


def is_writable(folder: pathlib.Path) -> bool:
  """Returns whether a file can be made in a folder that exists."""
  return not _write_error(folder)


def _path(given: str | pathlib.Path) -> pathlib.Path:
  return pathlib.Path(os.path.expanduser(given))


def _write_error(folder: pathlib.Path) -> str:
  """Returns why no file can be made in a folder; empty if one can."""
  try:  # where the system can, the file has no name: the folder does not change
    with tempfile.TemporaryFile(dir=folder):
      return ""
  except OSError as error:
    return f"{_short(folder)} can't be written ({error.strerror})"


def _refusal(what: str, path: pathlib.Path, allowed: str) -> ConfigError:
  return ConfigError(f"{what} is {_short(path)!r}: must be {allowed}")


def _require_lengths(what: str, path: pathlib.Path, below: int) -> None:
  if not str(path).isprintable():
    raise _refusal(what, path, "of printable characters")
  if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
    raise _refusal(what, path, f"a path of names of at most {LONGEST_NAME} bytes")
  if len(os.fsencode(path.absolute())) > LONGEST_PATH - below:
    raise _refusal(what, path, f"a path of at most {LONGEST_PATH - below} bytes")


def _short(path: pathlib.Path) -> str:
  text = str(path)
  return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}...{text[-SHOWN // 2 :]}"
