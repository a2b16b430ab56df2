"""The wall time of a run by kind: kinds exclude each other and sum up to the total."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping

import jax

# "import" is all before the run itself; "data" is the wait for images, except streamed ones, which
# count where they are used; "compile" includes tracing and lowering
KINDS = ("import", "weights", "data", "compile", "train", "eval", "checkpoint", "other")
COMPILE_EVENTS = (
  "/jax/core/compile/jaxpr_trace_duration",
  "/jax/core/compile/jaxpr_to_mlir_module_duration",
  "/jax/core/compile/backend_compile_duration",
)


class Clock:
  """Counts the seconds of a session by kind, one at a time, in the thread that made it.

  A context manager: compilation within it counts as "compile", whatever kind it is for.

  Args:
    began: when the session began, by time.monotonic(); the time until now is "import".
  """

  def __init__(self, began: float):
    self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    self._kind, self._since = "import", began
    self._switch("other")
    self._thread = threading.get_ident()
    self._spans: list[tuple[float, float]] = []  # of compilations, not nested

  def __enter__(self) -> "Clock":
    jax.monitoring.register_event_time_span_listener(self._compiled)
    return self

  def __exit__(self, *error) -> None:
    jax.monitoring.unregister_event_time_span_listener(self._compiled)

  def add(self, before: Mapping[str, float]) -> None:
    """Adds the seconds of earlier sessions, as of `seconds`."""
    for kind in KINDS:
      self._seconds[kind] += before.get(kind, 0.0)

  def seconds(self) -> dict[str, float]:
    """Returns the seconds of each kind so far, and "total", their sum."""
    self._switch(self._kind)
    return self._seconds | {"total": sum(self._seconds.values())}

  @contextlib.contextmanager
  def kind(self, kind: str) -> Iterator[None]:
    """Counts the time in the block as `kind`, except that of blocks within it."""
    outer = self._kind
    self._switch(kind)
    try:
      yield
    finally:
      self._switch(outer)

  def _switch(self, kind: str) -> None:
    now = time.monotonic()
    self._seconds[self._kind] += now - self._since
    self._kind, self._since = kind, now

  def _compiled(self, event: str, start_time: float, end_time: float, **kwargs: str | int) -> None:
    del kwargs
    if event not in COMPILE_EVENTS or threading.get_ident() != self._thread:
      return
    seconds = end_time - start_time
    while (
      self._spans and self._spans[-1][0] >= start_time
    ):  # tracing nests, and inner spans end first
      inner_start, inner_end = self._spans.pop()
      seconds -= inner_end - inner_start
    self._spans.append((start_time, end_time))
    self._seconds["compile"] += seconds
    self._seconds[self._kind] -= seconds
