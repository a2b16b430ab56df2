"""One writer per folder: a lock that the kernel frees when its process ends in any way.

Readers need none.
"""

import contextlib
import datetime
import errno
import json
import logging
import os
import pathlib
import socket
from collections.abc import Iterator

import filelock

from fmlora_jax.config import ConfigError
from fmlora_jax.workdir.files import refuse_links

FILE = ".lock"
UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)
WAIT_S = 0.1  # for a holder that is just leaving

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def hold_lock(folder: pathlib.Path) -> Iterator[None]:
  """Holds the lock of a folder; makes the folder, and removes it if nothing was written into it.

  On a file system without locks one line warns, and nothing is held.

  Raises:
    ConfigError: if another process holds it, with its host, number and start; or if the lock file
      is a link.
  """
  is_new, path = not folder.exists(), folder / FILE
  folder.mkdir(parents=True, exist_ok=True)
  refuse_links(folder, [path])
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
  now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
  path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}))
  try:
    yield
  finally:
    if [each.name for each in folder.iterdir()] == [FILE]:
      path.unlink()
      if is_new:
        folder.rmdir()
    lock.release()


def _holder(path: pathlib.Path) -> str:
  """Returns the holder of a lock in words; nothing while it has not written them yet."""
  try:
    return " by process {pid} on {host} (since {since})".format(**json.loads(path.read_text()))
  except (OSError, ValueError, KeyError):
    return ""
