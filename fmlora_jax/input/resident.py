"""Images decoded once: a task's on the device, those that measure it on the host."""

import concurrent.futures
import dataclasses
import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from fmlora_jax.config import ConfigError
from fmlora_jax.tasks.sequence import DataSource, TaskSequence
from fmlora_jax.types import Examples

# images decoded at a time, so that memory holds one copy of the task and a stop comes through
CHUNK = 256


@dataclasses.dataclass(frozen=True)
class ProcessShard:
  """The part of each array of images that this process decodes: one of `count` equal parts."""

  index: int = 0
  count: int = 1

  def rows(self, total: int) -> slice:
    """Returns this process's rows of `total`, a multiple of `count`."""
    each = total // self.count
    return slice(self.index * each, (self.index + 1) * each)


WHOLE = ProcessShard()


def capacity(sequence: TaskSequence, split: str) -> int:
  """Returns the most images that any task has in "train", "val" or "test".

  Padded to it, all tasks have arrays of one shape, and a step compiles once.
  """
  return max(len(getattr(task, split)) for task in sequence.tasks)


def num_bytes(sequence: TaskSequence, capacity: int) -> int:
  """Returns the memory that what `load_examples` returns takes."""
  height, width = sequence.source.canvas
  return capacity * (height * width * 3 + 2 * 4 + 4 + 1)


def choose_mode(
  sequence: TaskSequence,
  measured: str,
  mode: str,
  *,
  device: int | None,
  host: int,
) -> str:
  """Returns "resident" or "stream": what `mode` says, and of "auto" resident where it fits.

  Args:
    sequence: the tasks.
    measured: "test" or "val", the images that fill the accuracy matrix.
    mode: as of config.InputConfig.
    device: bytes that images may take there: training and validation images of one task. None
      where the device's memory is the host's.
    host: bytes that images may take there: those of the next task, and all that is measured; where
      its memory is the device's, those of the current task too.

  Raises:
    ConfigError: if "resident" does not fit, with what is needed, what there is, and the mend.
  """
  lacking = None if mode == "stream" else _lacking(sequence, measured, device=device, host=host)
  if mode == "resident" and lacking:
    raise ConfigError(
      f"config.input.mode is 'resident': {lacking}; set it to auto or stream, lower "
      "config.input.source_size, or cut the data into more tasks with config.tasks.num_tasks"
    )
  return "stream" if lacking or mode == "stream" else "resident"


def _lacking(sequence: TaskSequence, measured: str, *, device: int | None, host: int) -> str | None:
  """Returns what does not fit where; None if all does."""
  largest = capacity(sequence, "train") + capacity(sequence, "val")
  tests = sum(len(getattr(task, measured)) for task in sequence.tasks)
  height, width = sequence.source.canvas
  if device is None:
    places = [("host", 2 * largest + tests, host)]
  else:
    places = [("device", largest, device), ("host", largest + tests, host)]
  for place, images, budget in places:
    needed = num_bytes(sequence, images)
    if needed > budget:
      return (
        f"{images} images of {sequence.source.name}, of {height} x {width} pixels, take "
        f"{needed / 2**30:.2f} GiB, the {place} has {budget / 2**30:.2f} GiB for them"
      )
  return None


def load_examples(
  sequence: TaskSequence,
  indices: Int[np.ndarray, " k"],
  capacity: int,
  stop: threading.Event | None = None,
) -> Examples:
  """Returns the records `indices` as numpy arrays of `capacity` rows; the rest is padding.

  Args:
    sequence: where the records are from.
    indices: at most `capacity` of them.
    capacity: rows of the result. Padding rows are black, of label 0, and not valid.
    stop: set by who wants the result no more.

  Raises:
    ConfigError: of `DataSource.decode`.
    CancelledError: soon after `stop` is set.
  """
  if len(indices) > capacity:
    raise ValueError(f"capacity is {capacity}: must be at least {len(indices)}, the images to load")
  source = sequence.source
  height, width = source.canvas
  images = np.zeros((capacity, height, width, 3), np.uint8)
  sizes = np.full((capacity, 2), source.canvas, np.int32)
  labels = np.zeros(capacity, np.int32)
  for rows in _chunks(len(indices), stop):
    images[rows], sizes[rows] = source.decode(indices[rows])
  labels[: len(indices)] = sequence.labels[indices]
  return Examples(
    images=images, sizes=sizes, labels=labels, valid=np.arange(capacity) < len(indices)
  )


def _chunks(count: int, stop: threading.Event | None) -> Iterator[slice]:
  """Yields the parts of 0..count-1 to decode at a time, until `stop` is set."""
  for lo in range(0, count, CHUNK):
    if stop is not None and stop.is_set():
      raise concurrent.futures.CancelledError
    yield slice(lo, min(lo + CHUNK, count))


def read_resident(
  examples: Examples, blocks: Iterable[Int[np.ndarray, "*K B"]]
) -> Iterator[tuple[Examples, Int[np.ndarray, "*K B"]]]:
  """Yields (examples, rows) of each block of rows: what `stream.Stream.read` does, from memory."""
  for rows in blocks:
    yield examples, rows


def cache_decoded(sequence: TaskSequence, records: Sequence[int]) -> TaskSequence:
  """Returns the sequence with a source that decodes each of `records` once, and no other.

  A source that already does so for other runs stays as it is.
  """
  if isinstance(sequence.source.decode, DecodedCache):
    return sequence
  kept = DecodedCache(sequence.source, np.asarray(records))
  return dataclasses.replace(sequence, source=dataclasses.replace(sequence.source, decode=kept))


class DecodedCache:
  """A `DataSource.decode` that decodes each of some records once and keeps its pixels on the host.

  Args:
    source: decodes them.
    records: the only ones that may be asked for, ascending.
  """

  def __init__(self, source: DataSource, records: Int[np.ndarray, " n"]):
    self._decode, self._records = source.decode, records
    self._images = np.empty((len(records), *source.canvas, 3), np.uint8)
    self._sizes = np.zeros((len(records), 2), np.int32)  # 0: not decoded yet

  def decode(self, rows: Int[np.ndarray, " k"], stop: threading.Event | None = None) -> None:
    """Decodes those of `rows` that are not kept yet; `stop` and errors as of `load_examples`."""
    places = np.searchsorted(self._records, rows)
    new = self._sizes[places, 0] == 0
    rows, places = rows[new], places[new]
    for part in _chunks(len(rows), stop):
      self._images[places[part]], self._sizes[places[part]] = self._decode(rows[part])

  def __call__(self, rows: Int[np.ndarray, " k"]) -> tuple[np.ndarray, np.ndarray]:
    self.decode(rows)
    places = np.searchsorted(self._records, rows)
    return self._images[places], self._sizes[places]
