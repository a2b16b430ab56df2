"""The images of one task at a time: decoded whole, ahead of their task, or read as a stream."""

import concurrent.futures
import copy
import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from fmlora_jax.input import resident
from fmlora_jax.tasks import TaskSequence
from fmlora_jax.types import Examples

Read = Callable[..., Any]  # blocks of rows -> iterator of (examples, rows) of each


class Prefetcher:
  """Decodes in a background thread; leaving the context cancels what is pending."""

  def __init__(self):
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "prefetch")
    self._stop = threading.Event()

  def __enter__(self) -> "Prefetcher":
    return self

  def __exit__(self, *error) -> None:
    self._stop.set()
    self._thread.shutdown(cancel_futures=True)

  def submit(self, function: Callable, *arguments: Any) -> concurrent.futures.Future:
    """Calls function(*arguments, stop=event) after all earlier submissions.

    The event tells that the result is not needed any more: the function ends soon, in any way.
    """
    return self._thread.submit(function, *arguments, stop=self._stop)


class TaskLoader:
  """Loads the training and validation images of a task, and those that measure it.

  Resident arrays have one shape for all tasks, whole batches, so that a step compiles once.

  Args:
    sequence: the tasks.
    batch_size: images of a training step, with those that pad it.
    max_steps: steps of a chunk; a chunk of a stream has fewer where its images take much memory.
    shard: the part of each array that this process decodes.
    shard_batch: this process's part of host arrays -> the whole arrays, split over the devices.
    is_streaming: whether images are decoded when a batch needs them.
    workers: processes that decode a stream; 0 decodes in a thread.

  Attributes:
    chunk_steps: K, the training steps of a chunk at most.
  """

  def __init__(
    self,
    sequence: TaskSequence,
    *,
    batch_size: int,
    max_steps: int,
    shard: resident.ProcessShard,
    shard_batch: Callable[[Any], Any],
    is_streaming: bool = False,
    workers: int = 0,
  ):
    self.sequence, self.is_streaming, self.workers = sequence, is_streaming, workers
    self.shard, self.shard_batch, self._batch_size = shard, shard_batch, batch_size
    self.chunk_steps = max_steps
    if is_streaming:
      self.chunk_steps = resident.steps_per_block(sequence, batch_size, at_most=max_steps)
    self._capacity = {split: self._whole_batches(split) for split in ("train", "val")}
    self._pending: dict[int, concurrent.futures.Future] = {}

  def with_sequence(self, sequence: TaskSequence) -> "TaskLoader":
    """Returns the loader of another sequence, whose arrays are never smaller than this one's.

    Seeds, whose tasks differ a little in size, then share compiled programs.
    """
    other = copy.copy(self)
    other.sequence, other._pending = sequence, {}
    other._capacity = {
      split: max(least, other._whole_batches(split)) for split, least in self._capacity.items()
    }
    return other

  def _whole_batches(self, split: str) -> int:
    """Returns the images of the largest task, rounded up to whole batches."""
    return -(-resident.capacity(self.sequence, split) // self._batch_size) * self._batch_size

  def prefetch(self, index: int, prefetcher: Prefetcher) -> None:
    """Decodes the images of task `index` in the background, for a later `readers`."""
    if not self.is_streaming:
      self._pending = {index: prefetcher.submit(self._load, index)}

  def readers(self, index: int) -> dict[str, Read]:
    """Returns the reader of split "train" of task `index`, and of "val" if the task has some."""
    if self.is_streaming:
      splits = self._splits(index).items()
      return {split: self._stream(records).read for split, records in splits}
    pending = self._pending.pop(index, None)
    loaded = self.shard_batch(pending.result() if pending else self._load(index))
    return {
      split: functools.partial(resident.read_resident, images) for split, images in loaded.items()
    }

  def test_images(self, records: Int[np.ndarray, " n"]) -> "TestImages":
    """Returns the images that fill the accuracy matrix; each is decoded once unless streamed."""
    if self.is_streaming:
      return TestImages(records=records, read=self._stream(records).read)
    sequence = resident.cache_decoded(self.sequence, np.sort(records))
    blocks = {"sequence": sequence, "indices": records, "shard": self.shard}
    read = functools.partial(resident.read_blocks, put=self.shard_batch, **blocks)
    return TestImages(records=records, read=read, decode=sequence.source.decode.decode)

  def _load(self, index: int, stop: threading.Event | None = None) -> dict[str, Examples]:
    """Returns this process's part of the images of each split of task `index`, on the host."""
    loaded = {}
    for split, records in self._splits(index).items():
      rows = self.shard.rows(self._capacity[split])
      capacity = rows.stop - rows.start
      loaded[split] = resident.load_examples(self.sequence, records[rows], capacity, stop)
    return loaded

  def _splits(self, index: int) -> dict[str, Int[np.ndarray, " n"]]:
    task = self.sequence.tasks[index]
    return {split: getattr(task, split) for split in self._capacity if len(getattr(task, split))}

  def _stream(self, records: Int[np.ndarray, " n"]):
    from fmlora_jax.input import streaming  # grain takes a second to import

    return streaming.StreamingReader(
      sequence=self.sequence,
      indices=records,
      put=self.shard_batch,
      shard=self.shard,
      workers=self.workers,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TestImages:
  """The images that fill the accuracy matrix, in the order of their sets.

  Attributes:
    records: all of them.
    read: blocks of rows of `records` -> (the images of a block, its rows) of each.
    decode: decodes some records for later reads; None where images are streamed.
  """

  __test__ = False  # for pytest

  records: Int[np.ndarray, " n"]
  read: Read
  decode: Callable[..., None] | None = None

  def prefetch(self, count: int, prefetcher: Prefetcher) -> concurrent.futures.Future | None:
    """Decodes the first `count` images in the background; None where images are streamed."""
    return prefetcher.submit(self.decode, self.records[:count]) if self.decode else None
