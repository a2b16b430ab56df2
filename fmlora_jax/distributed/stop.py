"""SIGTERM and SIGINT: a run stops where it can be saved, and the same command resumes it.

A batch system sends SIGTERM before it takes the machine, Ctrl-C is SIGINT. Within `awaited`
a signal waits for the next call of `check`; elsewhere, where there is nothing to save, it raises
`Stopped` at once. A second signal ends the program as it stands.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

from fmlora_jax.distributed import hosts

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = logging.getLogger(__name__)
_asked = 0  # the signal that this process got
_awaited = False  # whether it waits for `check`


class Stopped(BaseException):
  """The program was asked to stop; no error that anything may handle and go on.

  Attributes:
    code: the exit code, 128 and the signal's number.
  """

  def __init__(self, signum: int):
    self.code = 128 + signum
    super().__init__(f"stopped by {signal.Signals(signum).name}")


@contextlib.contextmanager
def caught() -> Iterator[None]:
  """Catches the signals; for the main thread."""
  global _asked
  ours, theirs = socket.socketpair()
  theirs.setblocking(False)
  # Python calls a handler when the main thread comes back from what it does, a compilation say or
  # an exchange, which may be never; a thread hears of the signal at once
  before = [signal.getsignal(signum) for signum in SIGNALS]
  waking = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
  threading.Thread(target=_listen, args=(ours,), daemon=True).start()
  handle = _Handler()
  for signum in SIGNALS:
    signal.signal(signum, handle)
  try:
    yield
  finally:
    for signum, handler in zip(SIGNALS, before, strict=True):
      signal.signal(signum, handler)
    signal.set_wakeup_fd(waking)
    theirs.close()
    _asked = 0


@contextlib.contextmanager
def awaited() -> Iterator[None]:
  """Has signals wait for a call of `check`, the last of which is at the end."""
  global _awaited
  _awaited = True
  try:
    yield
    check()
  finally:
    _awaited = False


def check() -> None:
  """Raises `Stopped` if the program is to stop; of several processes all must call it."""
  if signum := hosts.requested_stop(_asked):
    raise Stopped(signum)


class _Handler:
  """What Python calls in the main thread for each signal."""

  def __init__(self):
    self._calls = 0

  def __call__(self, signum: int, frame: Any) -> None:
    global _asked
    self._calls += 1
    if self._calls > 1:
      _end_at_once(signum)
    _asked = signum
    if not _awaited and not hosts.is_multi_process():
      raise Stopped(signum)


def _listen(signals: socket.socket) -> None:
  """Hears of each signal at once, whatever the main thread does; tells the other processes."""
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
        _log.info("%s: stops at the next step and saves; a second one stops at once", name)


def _end_at_once(signum: int) -> None:
  name = signal.Signals(signum).name
  os.write(2, f"stopped at once by a second {name}; the same command resumes\n".encode())
  os._exit(128 + signum)
