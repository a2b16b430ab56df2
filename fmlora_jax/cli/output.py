"""Standard output and error that fail no program: a terminal that is gone loses no work."""

import contextlib
import errno
import os
import sys
from typing import Any

LOST_QUIETLY = (errno.EPIPE, errno.EIO)  # nobody reads any more: `| head -1`, a closed terminal


class Unfailing:
  """A text stream that drops what can't be written, and shows other characters as "?".

  Attributes:
    lost: the error after which nothing is written any more; None while all is well.
  """

  def __init__(self, stream: Any):
    self._stream = stream
    self.lost: OSError | None = None

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    """Writes text where that is possible; returns its length."""
    encoding = self._stream.encoding or "utf-8"
    self._try(self._stream.write, text.encode(encoding, "replace").decode(encoding))
    return len(text)

  def writelines(self, lines: Any) -> None:
    """Writes each text."""
    for line in lines:
      self.write(line)

  def flush(self) -> None:
    """Flushes where that is possible."""
    self._try(self._stream.flush)

  def _try(self, do: Any, *arguments: str) -> None:
    if self.lost is None:
      try:
        do(*arguments)
      except OSError as error:
        self.lost = error
        # what is buffered goes there at the end, and what C++ code writes
        with contextlib.suppress(OSError, ValueError):
          _to_nowhere(self._stream.fileno())


def protect() -> None:
  """Makes standard output and error of this program unfailing; those that are closed go nowhere."""
  for number, name in enumerate(("stdin", "stdout", "stderr")):
    try:
      os.fstat(number)
    except OSError:  # else the next file that is opened gets the number, and what libraries print
      _to_nowhere(number)
    if getattr(sys, name) is None:
      setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
  for name in ("stdout", "stderr"):
    if getattr(sys, name) is getattr(sys, f"__{name}__") or getattr(sys, f"__{name}__") is None:
      setattr(sys, name, Unfailing(getattr(sys, name)))


def lost() -> OSError | None:
  """Returns why the standard output is incomplete; None if nobody wanted the rest."""
  error = getattr(sys.stdout, "lost", None)
  return None if error is None or error.errno in LOST_QUIETLY else error


def _to_nowhere(number: int) -> None:
  """Makes a file number that of the null device."""
  null = os.open(os.devnull, os.O_RDWR)
  if null != number:
    os.dup2(null, number)
    os.close(null)
