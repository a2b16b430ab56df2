"""On SIGTERM, SIGINT, SIGHUP or SIGUSR1 a run stops where it can be saved, to be resumed.

A batch system sends SIGTERM before it takes the machine back, or SIGUSR1 where `sbatch --signal`
says so; Ctrl-C is SIGINT, a terminal that is closed SIGHUP, which nohup has ignored. Within
`awaited` a signal takes effect at the next call of `check`; outside of training `Stopped` is raised
immediately, but not while a module is imported: C code loses it or turns it into an ImportError,
and half a module stays. A second signal exits without saving.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import types
from collections.abc import Iterator
from typing import Any

from fmlora_jax.distributed import hosts

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
IMPORT_S = 0.02  # a signal during an import is looked at again after this time

_log = logging.getLogger(__name__)
_asked = 0  # the signal that this process got
_awaited = False  # whether a signal waits for `check`


class Stopped(BaseException):
  """A request to stop the program; no error, so `except Exception` does not catch it.

  Attributes:
    code: the exit code, 128 and the signal's number.
  """

  def __init__(self, signum: int):
    self.code = 128 + signum
    super().__init__(f"stopped by {signal.Signals(signum).name}")


@contextlib.contextmanager
def caught() -> Iterator[None]:
  """Handles the signals within the context; for the main thread."""
  global _asked
  ours, theirs = socket.socketpair()
  theirs.setblocking(False)
  # Python calls a handler when the main thread returns from a compilation or a collective, which
  # may be never; a thread hears of the signal at once
  before = {signum: signal.getsignal(signum) for signum in SIGNALS}
  if before[signal.SIGHUP] == signal.SIG_IGN:
    del before[signal.SIGHUP]
  waking = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
  threading.Thread(target=_listen, args=(ours,), daemon=True).start()
  handle = _Handler()
  for signum in before:
    signal.signal(signum, handle)
  before[signal.SIGALRM] = signal.signal(signal.SIGALRM, handle.again)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    for signum, handler in before.items():
      signal.signal(signum, handler)
    signal.set_wakeup_fd(waking)
    theirs.close()
    _asked = 0


@contextlib.contextmanager
def awaited() -> Iterator[None]:
  """Defers signals to the calls of `check` within the context; the last is at its end."""
  global _awaited
  _awaited = True
  try:
    yield
    check()
  finally:
    _awaited = False


def check() -> None:
  """Raises `Stopped` if the program is to stop; all of several processes must call it."""
  if signum := hosts.requested_stop(_asked):
    signal.setitimer(signal.ITIMER_REAL, 0)  # once is enough
    raise Stopped(signum)


class _Handler:
  """Handler of each signal in the main thread."""

  def __init__(self):
    self._calls = 0

  def __call__(self, signum: int, frame: Any) -> None:
    global _asked
    self._calls += 1
    if self._calls > 1:
      _end_at_once(signum)
    _asked = signum
    self.again(signum, frame)

  def again(self, _: int, frame: Any) -> None:
    """Raises `Stopped` where that is due: now, or after the import in which a signal came."""
    if _awaited or not _asked:
      return
    if _is_importing(frame):
      signal.setitimer(signal.ITIMER_REAL, IMPORT_S)
    elif not hosts.is_multi_process():
      raise Stopped(_asked)


def _is_importing(frame: types.FrameType | None) -> bool:
  """Returns whether a module is being imported in a frame or above it."""
  while frame and not frame.f_code.co_filename.startswith("<frozen importlib._bootstrap"):
    frame = frame.f_back
  return frame is not None


def _listen(signals: socket.socket) -> None:
  """Handles each signal at once, whatever the main thread does; tells the other processes."""
  heard = 0
  with signals:
    while got := signals.recv(1):
      signum = got[0]
      if signum not in SIGNALS:
        continue
      heard += 1
      if heard > 1:
        _end_at_once(signum)
      hosts.request_stop(signum)
      if _awaited:
        name = signal.Signals(signum).name
        _log.info(
          "%s received: saving at the next step; send it again to exit without saving", name
        )


def _end_at_once(signum: int) -> None:
  name = signal.Signals(signum).name
  os.write(2, f"stopped at once by a second {name}; the same command resumes\n".encode())
  os._exit(128 + signum)
