"""Images decoded when their turn comes, by grain and ahead of the device, a block at a time.

What is read is a function of the block's rows alone, so it has no position of its own to save:
whoever resumes asks for the blocks that are left. A block that came is a small resident task.
"""

import concurrent.futures
import contextlib
import dataclasses
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Int

from fmlora_jax.config import ConfigError
from fmlora_jax.input import resident
from fmlora_jax.tasks.sequence import TaskSequence
from fmlora_jax.types import Examples

# Of the images of one block, or one batch where that takes more. The device holds two blocks, the
# host two, and four more for each process that decodes.
BLOCK_BYTES = 2**26

Rows = Int[np.ndarray, "*K B"]


class Blocks(Protocol):
  """A sequence of blocks of one shape: rows to visit, -1 is padding. It can be pickled."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Rows: ...


def steps_per_block(sequence: TaskSequence, batch_size: int, at_most: int) -> int:
  """Returns how many batches make a block of BLOCK_BYTES; at least one."""
  fitting = BLOCK_BYTES // resident.num_bytes(sequence, batch_size)
  return max(1, min(at_most, fitting))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingReader:
  """Reads some records of a task sequence, those of a task's split, say.

  Attributes:
    sequence: where the records are from.
    indices: the records; rows count in it.
    put: Examples of numpy arrays, this process's share of a block -> the block on the devices.
      A thread of its own calls it: it must not wait for other processes.
    share: which part of each block this process decodes.
    workers: processes that decode; 0 is threads of this one.
  """

  sequence: TaskSequence
  indices: Int[np.ndarray, " n"]
  put: Callable[[Examples], Examples]
  share: resident.ProcessShard = resident.WHOLE
  workers: int = 0

  def read(self, blocks: Blocks) -> Iterator[tuple[Examples, Rows]]:
    """Yields, for each block, its images alone on the devices, and its rows counted in these.

    All have as many rows as a block has, valid ones first. While the caller has one block, the next
    is put on the devices and those after it are decoded. Close the iterator to stop early.

    Raises:
      ConfigError: of `Source.decode`, or if a process that decodes dies.
    """
    items = self._items(blocks)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
      try:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
          coming = thread.submit(next, items, None)
          yield item
          # queued behind what the caller does with the block: a third one on the device must wait
          jax.block_until_ready(jnp.any(item[0].valid))
      finally:
        thread.submit(items.close)

  def _items(self, blocks: Blocks) -> Iterator[tuple[Examples, Rows]]:
    """Yields what `read` does; to be run in a thread of its own."""
    data = grain.MapDataset.source(_Decoded(self.sequence, self.indices, blocks, self.share))
    made = _in_processes(data, self.workers) if self.workers else _in_a_thread(data)
    with contextlib.closing(made) as items:
      for examples, rows in items:
        yield self.put(examples), rows


class _Decoded:
  """What grain reads: item i is (a share of the images of block i, its rows counted in all)."""

  def __init__(
    self,
    sequence: TaskSequence,
    indices: Int[np.ndarray, " n"],
    blocks: Blocks,
    share: resident.ProcessShard,
  ):
    self._sequence, self._indices, self._blocks, self._share = sequence, indices, blocks, share

  def __len__(self) -> int:
    return len(self._blocks)

  def __getitem__(self, index: int) -> tuple[Examples, Rows]:
    rows = self._blocks[index]
    used = rows >= 0
    part = self._share.rows(rows.size)
    wanted = self._indices[rows[used]][part]
    examples = resident.load_examples(self._sequence, wanted, part.stop - part.start)
    own = np.full_like(rows, -1)
    own[used] = np.arange(np.sum(used))
    return examples, own


def _in_a_thread(data: grain.MapDataset) -> Iterator:
  """Yields the items of `data`; one is made while the caller has the one before."""
  ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
  with contextlib.closing(iter(data.to_iter_dataset(ahead))) as items:
    yield from items


def _in_processes(data: grain.MapDataset, workers: int) -> Iterator:
  """Yields the same, made by processes, each several items ahead; keeps Ctrl-C from this thread.

  Raises:
    ConfigError: if a process dies.
  """
  if not flags.FLAGS.is_parsed():  # grain reads its own to start a process
    flags.FLAGS.mark_as_parsed()
  processes = grain.MultiprocessingOptions(num_workers=min(workers, len(data)))
  data = data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  data = data.mp_prefetch(processes, _end_with_parent)
  try:
    with contextlib.closing(iter(data)) as items:
      items.get_state()  # makes the iterators of all processes, so that all are closed
      # they inherit that Ctrl-C is not for them: it ends this process, and this one ends them
      signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
      items.start_prefetch()
      for item in items:
        yield jax.tree.map(np.array, item)  # a copy: the item stays in /dev/shm while it is in use
  except RuntimeError as error:
    if "process was terminated" not in str(error):
      raise
    raise ConfigError(
      f"config.input.workers is {workers}: a process that decodes images died ({error}), perhaps "
      "of too little memory or too small a /dev/shm: lower it; 0 needs no process"
    ) from error
  finally:
    gc.collect()  # grain leaves the last items in cycles of references, and so in /dev/shm


def _end_with_parent(index: int, count: int) -> None:
  """Ends this process when its parent ends, even if that one was killed, and not before.

  Slurm, say, sends a signal to all processes of a group: the parent decides what it means.
  """
  del index, count
  os.setpgrp()
  parent = multiprocessing.parent_process()

  def wait():
    parent.join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()
