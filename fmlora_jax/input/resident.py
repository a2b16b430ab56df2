"""Images decoded once: a task's on the device, test images on the host."""

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from fmlora_jax.config import ConfigError
from fmlora_jax.tasks.sequence import DataSource, TaskSequence
from fmlora_jax.types import Examples

# images decoded at a time: memory holds one copy of a task, and a stop is noticed in between
CHUNK = 256
# Bytes of the images of one block of a stream, or one batch where that takes more. The device holds
# two blocks, the host two, and four more for each process that decodes.
BLOCK_BYTES = 2**26

Rows = Int[np.ndarray, "*K B"]


@dataclasses.dataclass(frozen=True)
class ProcessShard:
  """This process's part of each array of images: one of `count` equal parts."""

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
  """Returns the bytes of `Examples` of so many images."""
  height, width = sequence.source.canvas
  return capacity * (height * width * 3 + 2 * 4 + 4 + 1)


def steps_per_block(sequence: TaskSequence, batch_size: int, at_most: int) -> int:
  """Returns the batches of a streamed block of BLOCK_BYTES; at least one."""
  fitting = BLOCK_BYTES // num_bytes(sequence, batch_size)
  return max(1, min(at_most, fitting))


def choose_mode(
  sequence: TaskSequence,
  measured: str,
  mode: str,
  *,
  device: int | None,
  host: int,
) -> str:
  """Returns "resident" or "stream": `mode`, or for "auto" resident where the images fit.

  Args:
    sequence: the tasks.
    measured: "test" or "val", the split that fills the accuracy matrix.
    mode: `config.InputConfig.mode`.
    device: bytes for images on the device, the training and validation images of one task; None
      where the device's memory is the host's.
    host: bytes for images on the host, those of the next task and all of `measured`; where its
      memory is the device's, the current task's too.

  Raises:
    ConfigError: if mode is "resident" and the images do not fit.
  """
  lacking = None if mode == "stream" else _lacking(sequence, measured, device=device, host=host)
  if mode == "resident" and lacking:
    raise ConfigError(
      f"config.input.mode is 'resident': {lacking}; set it to auto or stream, lower "
      "config.input.source_size, or cut the data into more tasks with config.tasks.num_tasks"
    )
  return "stream" if lacking or mode == "stream" else "resident"


def _lacking(sequence: TaskSequence, measured: str, *, device: int | None, host: int) -> str | None:
  """Returns which images do not fit where, in words; None if all fit."""
  largest = capacity(sequence, "train") + capacity(sequence, "val")
  tests = sum(len(getattr(task, measured)) for task in sequence.tasks)
  height, width = sequence.source.canvas
  if device is None:
    needs = [("host", 2 * largest + tests, host)]
  else:
    needs = [("device", largest, device), ("host", largest + tests, host)]
  for memory, images, budget in needs:
    needed = num_bytes(sequence, images)
    if needed > budget:
      return (
        f"{images} images of {sequence.source.name}, of {height} x {width} pixels, take "
        f"{needed / 2**30:.2f} GiB, the {memory} has {budget / 2**30:.2f} GiB for them"
      )
  return None


def load_examples(
  sequence: TaskSequence,
  indices: Int[np.ndarray, " k"],
  capacity: int,
  stop: threading.Event | None = None,
) -> Examples:
  """Returns the records `indices` as NumPy arrays of `capacity` rows; the rest is padding.

  Args:
    sequence: source of the records.
    indices: at most `capacity` of them.
    capacity: rows of the result. Padding rows are black, of label 0, and not valid.
    stop: set when the result is not needed any more.

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


def read_resident(examples: Examples, blocks: Iterable[Rows]) -> Iterator[tuple[Examples, Rows]]:
  """Yields (examples, rows) of each block of rows: the whole task each time."""
  for rows in blocks:
    yield examples, rows


def load_block(
  sequence: TaskSequence, indices: Int[np.ndarray, " n"], rows: Rows, shard: ProcessShard
) -> tuple[Examples, Rows]:
  """Returns this process's part of the images of a block, and the block's rows counted in it all.

  Args:
    sequence: source of the records.
    indices: the records that rows count in.
    rows: of the block; -1 is padding.
    shard: the part.
  """
  used = rows >= 0
  part = shard.rows(rows.size)
  examples = load_examples(sequence, indices[rows[used]][part], part.stop - part.start)
  own = np.full_like(rows, -1)
  own[used] = np.arange(np.sum(used))
  return examples, own


def read_blocks(
  blocks: Iterable[Rows],
  *,
  sequence: TaskSequence,
  indices: Int[np.ndarray, " n"],
  shard: ProcessShard,
  put: Callable[[Examples], Examples],
) -> Iterator[tuple[Examples, Rows]]:
  """Yields, for each block, its images alone on the devices, and its rows counted in them.

  Args:
    blocks: rows of each; -1 is padding.
    sequence, indices, shard: as of `load_block`.
    put: this process's part of a block -> the block on the devices.
  """
  for block in blocks:
    examples, rows = load_block(sequence, indices, block, shard)
    yield put(examples), rows


def cache_decoded(
  sequence: TaskSequence, records: Sequence[int] | Int[np.ndarray, " n"]
) -> TaskSequence:
  """Returns the sequence with a source that decodes each of `records` once, and no other record.

  A source with such a cache, which several runs share, stays as it is.
  """
  if isinstance(sequence.source.decode, DecodedCache):
    return sequence
  cache = DecodedCache(sequence.source, np.asarray(records))
  return dataclasses.replace(sequence, source=dataclasses.replace(sequence.source, decode=cache))


class DecodedCache:
  """A `DataSource.decode` with a cache of pixels on the host.

  Args:
    source: decodes each record once.
    records: the only ones that may be asked for, ascending.
  """

  def __init__(self, source: DataSource, records: Int[np.ndarray, " n"]):
    self._decode, self._records = source.decode, records
    self._images = np.empty((len(records), *source.canvas, 3), np.uint8)
    self._sizes = np.zeros((len(records), 2), np.int32)  # 0: not decoded yet

  def decode(self, rows: Int[np.ndarray, " k"], stop: threading.Event | None = None) -> None:
    """Decodes those of `rows` that are not cached yet; `stop` and errors as of `load_examples`."""
    slots = np.searchsorted(self._records, rows)
    new = self._sizes[slots, 0] == 0
    rows, slots = rows[new], slots[new]
    for part in _chunks(len(rows), stop):
      self._images[slots[part]], self._sizes[slots[part]] = self._decode(rows[part])

  def __call__(self, rows: Int[np.ndarray, " k"]) -> tuple[np.ndarray, np.ndarray]:
    self.decode(rows)
    slots = np.searchsorted(self._records, rows)
    return self._images[slots], self._sizes[slots]
