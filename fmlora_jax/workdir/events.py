"""TensorBoard events of a run's numbers."""

import contextlib
import pathlib
import time
from collections.abc import Mapping

from tensorboardX.event_file_writer import EventsWriter

# protobuf makes the classes of these modules when they are imported
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.summary import scalar


class Events:
  """A new event file, written without a thread.

  The thread of tensorboardX.SummaryWriter dies on a full disk, and the next values wait for it for
  ever. Here the first error ends the file silently: metrics.jsonl, on the same disk, reports it.

  Args:
    folder: of all event files of the run; made if need be.
    first_step: TensorBoard hides what older files hold from this step on; None hides nothing.
  """

  def __init__(self, folder: pathlib.Path, first_step: int | None = None):
    self._writer = None
    with contextlib.suppress(OSError):
      folder.mkdir(parents=True, exist_ok=True)
      # with nanoseconds: the names that tensorboardX gives have whole seconds
      self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
    if first_step is not None:
      self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

  def add(self, values: Mapping[str, float], step: int) -> None:
    """Writes the numbers of one step."""
    scalars = [one for name, value in values.items() for one in scalar(name, value).value]
    self._write(Event(step=step, summary=Summary(value=scalars)))

  def close(self) -> None:
    """Closes the file; may be called twice."""
    writer, self._writer = self._writer, None
    if writer:
      with contextlib.suppress(OSError):
        writer.close()

  def _write(self, event: Event) -> None:
    if self._writer:
      event.wall_time = time.time()
      try:
        self._writer.write_event(event)
        self._writer.flush()
      except OSError:
        self.close()
