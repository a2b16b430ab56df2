"""Images that are needed next are decoded while the device is busy with those before them."""

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any


class Prefetcher:
  """A thread that decodes; a context manager, which gives up what is not done when it is left."""

  def __init__(self):
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "decode ahead")
    self._stop = threading.Event()

  def __enter__(self) -> "Prefetcher":
    return self

  def __exit__(self, *error) -> None:
    self._stop.set()
    self._thread.shutdown(cancel_futures=True)

  def submit(self, function: Callable, *arguments: Any) -> concurrent.futures.Future:
    """Calls function(*arguments, stop=event) after all that was submitted before.

    When the event is set nobody wants the result any more: the function ends soon, in any way.
    """
    return self._thread.submit(function, *arguments, stop=self._stop)
