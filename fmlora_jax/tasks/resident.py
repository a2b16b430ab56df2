"""Images decoded once: a task's on the device, those that measure it on the host."""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int

from fmlora_jax.config import ConfigError
from fmlora_jax.tasks.sequence import Source, TaskSequence
from fmlora_jax.types import Examples

CHUNK = 256  # images decoded at a time, so that memory holds one copy of the task


@dataclasses.dataclass(frozen=True)
class Share:
  """The part of each array of images that this process decodes: one of `count` equal parts."""

  index: int = 0
  count: int = 1

  def rows(self, total: int) -> slice:
    """Returns this process's rows of `total`, a multiple of `count`."""
    each = total // self.count
    return slice(self.index * each, (self.index + 1) * each)


WHOLE = Share()


def capacity(sequence: TaskSequence, split: str) -> int:
  """Returns the most images that any task has in "train", "val" or "test".

  Padded to it, all tasks have arrays of one shape, and a step compiles once.
  """
  return max(len(getattr(task, split)) for task in sequence.tasks)


def num_bytes(sequence: TaskSequence, capacity: int) -> int:
  """Returns the memory that what `load` returns takes."""
  height, width = sequence.source.canvas
  return capacity * (height * width * 3 + 2 * 4 + 4 + 1)


def choose_mode(sequence: TaskSequence, measured: str, mode: str, *, device: int, host: int) -> str:
  """Returns "resident" or "stream": what `mode` says, and of "auto" resident where it fits.

  Args:
    sequence: the tasks.
    measured: "test" or "val", the images that fill the accuracy matrix.
    mode: as of config.InputConfig.
    device: bytes that images may take there: training and validation images of one task.
    host: bytes that images may take there: the same, and all that is measured.

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


def _lacking(sequence: TaskSequence, measured: str, *, device: int, host: int) -> str | None:
  """Returns what does not fit where; None if all does."""
  largest = capacity(sequence, "train") + capacity(sequence, "val")
  tests = sum(len(getattr(task, measured)) for task in sequence.tasks)
  height, width = sequence.source.canvas
  for place, images, budget in (("device", largest, device), ("host", largest + tests, host)):
    needed = num_bytes(sequence, images)
    if needed > budget:
      return (
        f"{images} images of {sequence.source.name}, of {height} x {width} pixels, take "
        f"{needed / 2**30:.2f} GiB, the {place} has {budget / 2**30:.2f} GiB for them"
      )
  return None


def load(sequence: TaskSequence, indices: Int[np.ndarray, " k"], capacity: int) -> Examples:
  """Returns the records `indices` as numpy arrays of `capacity` rows; the rest is padding.

  Args:
    sequence: where the records are from.
    indices: at most `capacity` of them.
    capacity: rows of the result. Padding rows are black, of label 0, and not valid.
  """
  if len(indices) > capacity:
    raise ValueError(f"capacity is {capacity}: must be at least {len(indices)}, the images to load")
  source = sequence.source
  height, width = source.canvas
  images = np.zeros((capacity, height, width, 3), np.uint8)
  sizes = np.full((capacity, 2), source.canvas, np.int32)
  labels = np.zeros(capacity, np.int32)
  for lo in range(0, len(indices), CHUNK):
    rows = slice(lo, min(lo + CHUNK, len(indices)))
    images[rows], sizes[rows] = source.decode(indices[rows])
  labels[: len(indices)] = sequence.labels[indices]
  return Examples(
    images=images, sizes=sizes, labels=labels, valid=np.arange(capacity) < len(indices)
  )


def read(
  examples: Examples, blocks: Iterable[Int[np.ndarray, "*K B"]]
) -> Iterator[tuple[Examples, Int[np.ndarray, "*K B"]]]:
  """Yields (examples, rows) of each block of rows: what `stream.Stream.read` does, from memory."""
  for rows in blocks:
    yield examples, rows


class Kept:
  """A `Source.decode` that decodes each of some records once and keeps its pixels on the host.

  Args:
    source: decodes them.
    records: the only ones that may be asked for, ascending.
  """

  def __init__(self, source: Source, records: Int[np.ndarray, " n"]):
    self._decode, self._records = source.decode, records
    self._images = np.empty((len(records), *source.canvas, 3), np.uint8)
    self._sizes = np.zeros((len(records), 2), np.int32)  # 0: not decoded yet

  def __call__(self, rows: Int[np.ndarray, " k"]) -> tuple[np.ndarray, np.ndarray]:
    places = np.searchsorted(self._records, rows)
    new = self._sizes[places, 0] == 0
    if new.any():
      fresh = places[new]
      self._images[fresh], self._sizes[fresh] = self._decode(rows[new])
    return self._images[places], self._sizes[places]
