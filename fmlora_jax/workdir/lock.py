"""One writer: a lock on a folder, held as long as its process lives and freed by the kernel.

Readers need none.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import pathlib
import socket
from collections.abc import Iterable, Iterator
from typing import TextIO

from fmlora_jax.config import ConfigError
from fmlora_jax.distributed import hosts

FILE = ".lock"
UNKNOWN = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def lock_on_first(folder: pathlib.Path) -> Iterator[None]:
  """Has the first process hold the lock of a folder for all.

  Raises:
    ConfigError: in all processes, where `hold_lock` raises it in the first.
  """
  with contextlib.ExitStack() as stack:
    hosts.run_on_first(lambda: stack.enter_context(hold_lock(folder)))
    yield


@contextlib.contextmanager
def hold_lock(folder: pathlib.Path) -> Iterator[None]:
  """Holds the lock of a folder, which is made if need be; leaves nothing where nothing was written.

  On a file system that has no locks one line warns, and nothing is held.

  Raises:
    ConfigError: if another process holds it, with its host, number and start; or if the lock
      is a link.
  """
  is_new = not folder.exists()
  folder.mkdir(parents=True, exist_ok=True)
  with _locked(folder) as file:
    file.truncate(0)
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": now}, file)
    file.flush()
    try:
      yield
    finally:
      if [path.name for path in folder.iterdir()] == [FILE]:
        (folder / FILE).unlink()
        if is_new:
          folder.rmdir()


def _locked(folder: pathlib.Path) -> TextIO:
  """Returns the open file whose lock this process has."""
  path = folder / FILE
  while True:
    refuse_links(folder, [path])
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  the caller closes it
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      holder = _described(file.read())
      file.close()
      raise ConfigError(
        f"workdir {folder} is in use{holder}: must be one run's at a time; wait, stop that one, or "
        "choose another with --workdir"
      ) from None
    except OSError as error:
      if error.errno not in UNKNOWN:
        raise
      _log.warning("workdir %s can't be locked (%s): start no second run in it", folder, error)
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file.fileno()), path.stat()):
        return file
    file.close()  # another run deleted it between the two calls above


def refuse_links(folder: pathlib.Path, paths: Iterable[pathlib.Path]) -> None:
  """Refuses paths in a workdir that lead out of it.

  Raises:
    ConfigError: naming the first that is a link.
  """
  if links := sorted(path.name for path in paths if path.is_symlink()):
    raise ConfigError(
      f"workdir {folder} holds the link {links[0]!r}: must hold files and folders of its own, or a "
      "run would write elsewhere; choose another with --workdir"
    )


def _described(holder: str) -> str:
  """Returns who holds a lock, in words; nothing while it has not said so yet."""
  try:
    return " by process {pid} on {host} since {since}".format(**json.loads(holder))
  except (ValueError, KeyError):
    return ""
