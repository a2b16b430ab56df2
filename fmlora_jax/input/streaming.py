"""Streaming input: blocks of images that grain decodes ahead of the device.

A block is a function of its rows alone. It has no state to save: on resume the caller asks for the
remaining blocks. A decoded block looks like a small resident task.
"""

import concurrent.futures
import contextlib
import dataclasses
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Protocol, runtime_checkable

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Int

from fmlora_jax.config import ConfigError
from fmlora_jax.input import resident
from fmlora_jax.input.resident import Rows
from fmlora_jax.tasks.sequence import TaskSequence
from fmlora_jax.types import Examples


@runtime_checkable
class Blocks(Protocol):
  """A sequence of blocks of one shape: rows to visit, -1 is padding. Can be pickled."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Rows: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingReader:
  """Reads some records of a task sequence, such as those of a task's split.

  Attributes:
    sequence: source of the records.
    indices: the records; rows count in it.
    put: Examples of NumPy arrays, this process's part of a block -> the block on the devices.
      Called in a thread: it must not wait for other processes.
    shard: the part of each block that this process decodes.
    workers: processes that decode; 0 decodes in a thread of this one.
  """

  sequence: TaskSequence
  indices: Int[np.ndarray, " n"]
  put: Callable[[Examples], Examples]
  shard: resident.ProcessShard = resident.WHOLE
  workers: int = 0

  def read(self, blocks: Blocks) -> Iterator[tuple[Examples, Rows]]:
    """Yields, for each block, its images alone on the devices, and its rows counted in them.

    All have as many rows as a block has, valid ones first. While the caller has one block, the next
    is put on the devices and those after it are decoded. Close the iterator to stop early.

    Raises:
      ConfigError: of `DataSource.decode`, or if a process that decodes dies.
    """
    items = self._items(blocks)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
      try:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
          coming = thread.submit(next, items, None)
          yield item
          # queued behind the caller's work on the block: a third block on the device must wait
          jax.block_until_ready(jnp.any(item[0].valid))
      finally:
        thread.submit(items.close)

  def _items(self, blocks: Blocks) -> Generator[tuple[Examples, Rows], None, None]:
    """Yields the items of `read`; runs in a thread."""
    data = grain.MapDataset.source(_Decoded(self.sequence, self.indices, blocks, self.shard))
    made = _in_processes(data, self.workers) if self.workers else _in_a_thread(data)
    with contextlib.closing(made) as items:
      for examples, rows in items:
        yield self.put(examples), rows


@dataclasses.dataclass(frozen=True)
class _Decoded:
  """grain's data source: item i is `resident.load_block` of block i."""

  sequence: TaskSequence
  indices: Int[np.ndarray, " n"]
  blocks: Blocks
  shard: resident.ProcessShard

  def __len__(self) -> int:
    return len(self.blocks)

  def __getitem__(self, index: int) -> tuple[Examples, Rows]:
    return resident.load_block(self.sequence, self.indices, self.blocks[index], self.shard)


def _in_a_thread(data: grain.MapDataset) -> Generator:
  """Yields the items of `data`; the next one is decoded while the caller has one."""
  ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
  with contextlib.closing(iter(data.to_iter_dataset(ahead))) as items:
    yield from items


def _in_processes(data: grain.MapDataset, workers: int) -> Generator:
  """Yields the items of `data`, decoded by processes, each several items ahead; blocks Ctrl-C.

  Raises:
    ConfigError: if a process dies.
  """
  if not flags.FLAGS.is_parsed():  # grain reads its own to start a process
    flags.FLAGS.mark_as_parsed()
  processes = grain.MultiprocessingOptions(num_workers=min(workers, len(data)))
  in_order = data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  ahead = in_order.mp_prefetch(processes, _end_with_parent)
  try:
    with contextlib.closing(iter(ahead)) as items:
      items.get_state()  # makes the iterators of all processes, so that all are closed
      # the processes inherit the mask: Ctrl-C ends this process, which ends them
      signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
      items.start_prefetch()
      for item in items:
        yield jax.tree.map(np.array, item)  # a copy: the item stays in /dev/shm while it is in use
  except RuntimeError as error:
    if "process was terminated" not in str(error):
      raise
    raise ConfigError(
      f"config.input.workers is {workers}: a process that decodes images died ({error}), perhaps "
      "for lack of memory or a small /dev/shm: lower it; 0 decodes in a thread"
    ) from error
  finally:
    gc.collect()  # grain leaves the last items in reference cycles, and so in /dev/shm


def _end_with_parent(index: int, count: int) -> None:
  """Ends this process when its parent ends, even by a kill, and not before.

  A batch system may signal all processes of a group: the parent decides what the signal means.
  """
  del index, count
  os.setpgrp()
  parent = multiprocessing.parent_process()

  def wait():
    if parent is not None:
      parent.join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()
