"""One writer per folder: a lock that the kernel frees when its process ends in any way.

Readers need none.
"""

import contextlib
import datetime
import errno
import functools
import json
import logging
import os
import pathlib
import socket
from collections.abc import Callable, Iterator

import filelock

from fmlora_jax.config import ConfigError
from fmlora_jax.workdir.files import explain_failure, refuse_links

FILE = ".lock"
UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)
WAIT_S = 0.1  # for a holder that is just leaving

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def hold_lock(folder: pathlib.Path) -> Iterator[Callable[[], None]]:
  """Holds the lock of a folder; what it made is removed if nothing else was written there.

  On a file system without locks one line warns, and nothing is held.

  Yields:
    A function to be called before each write: it raises ConfigError if the folder has another lock
    file by now, or none, as another process may then write there.

  Raises:
    ConfigError: if another process holds it, with its host, number and start; or if the lock file
      is a link, a folder or can't be written.
  """
  is_new, path = not folder.exists(), folder / FILE
  before = set() if is_new else {each.name for each in folder.iterdir()}
  with explain_failure(path, 100):
    folder.mkdir(parents=True, exist_ok=True)
    lock = _acquire(folder, path)
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}))
  held = _file(path)
  try:
    yield functools.partial(_require_held, path, held)
  finally:
    after = {each.name for each in folder.iterdir()} if _file(path) == held else set()
    if after == {FILE} or (FILE not in before and after == {*before, FILE}):
      path.unlink()
      if is_new:
        folder.rmdir()
    lock.release()


def _acquire(folder: pathlib.Path, path: pathlib.Path) -> filelock.BaseFileLock:
  refuse_links(folder, [path])
  if path.exists() and not path.is_file():
    raise ConfigError(f"{path} is a folder or device: must be a file; choose another --workdir")
  lock = filelock.FileLock(path, timeout=WAIT_S, fallback_to_soft=False)
  try:
    lock.acquire()
  except filelock.Timeout:
    raise ConfigError(
      f"workdir {folder} is in use{_holder(path)}. Only one run may write to it: wait, stop that "
      "process, or pass another --workdir"
    ) from None
  except OSError as error:
    if error.errno not in UNSUPPORTED:
      raise
    _log.warning("workdir %s can't be locked (%s): start no second run in it", folder, error)
  return lock


def _require_held(path: pathlib.Path, held: tuple[int, int] | None) -> None:
  if _file(path) != held:
    raise ConfigError(
      f"workdir {path.parent} is not this run's any more, its {path.name} was removed or it was "
      "renamed: stopped before two runs write there; rerun the command with the folder's present "
      "name, and it resumes from the last checkpoint"
    )


def _file(path: pathlib.Path) -> tuple[int, int] | None:
  """Returns device and inode of a file; None if there is none."""
  with contextlib.suppress(FileNotFoundError, NotADirectoryError):
    status = path.stat(follow_symlinks=False)
    return status.st_dev, status.st_ino
  return None


def _holder(path: pathlib.Path) -> str:
  """Returns the holder of a lock in words; nothing while it has not written them yet."""
  try:
    return " by process {pid} on {host} (since {since})".format(**json.loads(path.read_text()))
  except (OSError, ValueError, KeyError):
    return ""
