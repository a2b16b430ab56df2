"""Heartbeat, exit and stop messages between the processes of one run.

Each process has a connection to the first one. When a process exits or falls silent, the others,
which would wait in a collective for ever, are told here and exit too. When a process is asked to
stop, all agree on one call of `Watchdog.stops`; as long as none is asked, a call sends nothing.

jax's reached_preemption_sync_point does not serve for that: it takes SIGTERM from Python, so that a
second one does nothing, and never sees SIGINT.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

HEARTBEAT_S = 20  # a process that is silent for so long counts as lost
BEAT_S = 2.0
FIX = "Rerun the same command on all hosts to resume"


class Watchdog:
  """The connections of this process, and the threads that listen to them.

  Args:
    connections: by number: from the first process to every other one, from the others to process 0.
    end: exits this process with a message; called when another one is lost.
  """

  def __init__(self, connections: Mapping[int, Connection], end: Callable[[str], None]):
    self._connections, self._end = connections, end
    self._is_first = 0 not in connections
    self._finished: set[int] = set()  # processes that may exit
    self._sending = threading.Lock()
    self._calls = threading.Condition()  # guards the fields below
    self._count = 0  # calls of `stops` so far
    self._held = False  # whether the next one waits for `_last`
    self._last: int | None = None  # the call at which all stop
    self._signum = 0  # the signal that asked for it
    self._counts: dict[int, int] = {}  # in the first process: the counts of all others

  def start(self) -> None:
    """Starts to listen and to send heartbeats."""
    for index in self._connections:
      threading.Thread(target=self._listen, args=(index,), daemon=True).start()
    threading.Thread(target=self._beat, daemon=True).start()

  def finish(self) -> None:
    """Tells the others that this process may exit; it still watches them."""
    self._tell({"finished": True})

  def ask(self, signum: int) -> None:
    """Asks all processes to stop at the next call of `stops` that none has passed."""
    if self._is_first:
      self._hold_all(signum)
    else:
      self._send(0, {"ask": signum})

  def stops(self) -> int:
    """Returns the signal that stops all processes at this call; 0 if they go on."""
    with self._calls:
      self._calls.wait_for(lambda: not self._held)
      self._count += 1
      return self._signum if self._last is not None and self._count >= self._last else 0

  def _listen(self, index: int) -> None:
    # counts its own running seconds: a process that was suspended itself has missed nothing
    connection, silent = self._connections[index], 0
    while silent < HEARTBEAT_S:
      try:
        if connection.poll(1):
          self._hear(index, json.loads(connection.recv_bytes()))
          silent = 0
        else:
          silent += 1
      except (EOFError, OSError):
        self._lose(f"exited early (see its log). {FIX}", index)
        return
    self._lose(f"was silent for {HEARTBEAT_S} s: suspended or unreachable. {FIX}", index)

  def _beat(self) -> None:
    while True:
      self._tell({})
      time.sleep(BEAT_S)

  def _hear(self, index: int, message: Mapping[str, Any]) -> None:
    match message:
      case {"finished": True}:
        self._finished.add(index)
      case {"lost": lost, "why": why}:
        self._lose(why, lost)
      case {"ask": signum}:
        self._hold_all(signum)
      case {"hold": signum}:
        self._send(0, {"count": self._hold(signum)})
      case {"count": count}:
        self._settle(index, count)
      case {"last": last}:
        self._go_on(last)

  def _lose(self, why: str, index: int) -> None:
    """Exits all processes, unless the lost one had finished; the first process tells the others."""
    if index not in self._finished:
      if self._is_first:
        self._tell({"lost": index, "why": why})
      self._end(f"process {index} {why}")

  def _hold_all(self, signum: int) -> None:
    """In the first process: makes all wait at their next call of `stops`."""
    with self._calls:
      if self._signum:
        return  # asked before
      self._hold(signum)
    self._tell({"hold": signum})

  def _settle(self, index: int, count: int) -> None:
    """In the first process: sets the first common call once all counts are here."""
    with self._calls:
      self._counts[index] = count
      if len(self._counts) < len(self._connections):
        return
      last = max(self._count, *self._counts.values()) + 1
    self._tell({"last": last})
    self._go_on(last)

  def _hold(self, signum: int) -> int:
    with self._calls:
      self._held, self._signum = True, signum
      return self._count

  def _go_on(self, last: int) -> None:
    with self._calls:
      self._held, self._last = False, last
      self._calls.notify_all()

  def _tell(self, message: Mapping[str, Any]) -> None:
    for index in self._connections:
      self._send(index, message)

  def _send(self, index: int, message: Mapping[str, Any]) -> None:
    # `_listen` notices when a peer has gone
    with contextlib.suppress(OSError), self._sending:
      self._connections[index].send_bytes(json.dumps(message).encode())
