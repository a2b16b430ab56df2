"""TensorBoard's view of a run's numbers."""

import contextlib
import pathlib
import time

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Events:
  """A new file of events, written as they come: no thread could fail or lag behind.

  It is a view only. After a write that the disk refuses nothing more is written, and nothing said:
  what the run depends on meets the same disk.

  Args:
    folder: of all files of the run; made if need be.
    first_step: TensorBoard hides what older files hold from this step on; None hides nothing.
  """

  def __init__(self, folder: pathlib.Path, first_step: int | None = None):
    # the name has whole seconds: a quick restart would overwrite
    suffix = f".{time.time_ns()}"
    self._writer = None
    try:
      folder.mkdir(parents=True, exist_ok=True)
      self._writer = EventsWriter(str(folder / "events"), suffix)
    except OSError:
      return
    if first_step is not None:
      start = SessionLog(status=SessionLog.START)
      self._write(Event(wall_time=time.time(), step=first_step, session_log=start))

  def add(self, name: str, value: float, step: int) -> None:
    """Writes one number."""
    self._write(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))

  def close(self) -> None:
    """Closes the file; safe to call twice."""
    writer, self._writer = self._writer, None
    if writer:
      with contextlib.suppress(OSError):
        writer.close()

  def _write(self, event: Event) -> None:
    if self._writer:
      try:
        self._writer.write_event(event)
        self._writer.flush()
      except OSError:
        self.close()
