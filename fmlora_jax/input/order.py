"""The order of a task's images: a function of seed, task and step alone.

A checkpoint holds the position in the data as the number of the step.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int


def epoch_indices(
  num: int, batch_size: int, seed: int, task: int, epoch: int
) -> Int[np.ndarray, "steps B"]:
  """Returns each of 0..num-1 once, in an order of (seed, task, epoch); -1 fills the last batch."""
  generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, task, epoch])))
  return _batches(generator.permutation(num), batch_size)


def natural(num: int, batch_size: int) -> Int[np.ndarray, "steps B"]:
  """Returns 0..num-1 in batches; -1 fills the last one."""
  return _batches(np.arange(num), batch_size)


def _batches(values, batch_size):
  rows = np.full(-(-len(values) // batch_size) * batch_size, -1, np.int32)
  rows[: len(values)] = values
  return rows.reshape(-1, batch_size)


def padded(rows: Int[np.ndarray, "steps B"], width: int) -> Int[np.ndarray, "steps W"]:
  """Returns the batches with rows of -1 behind, `width` rows each, for devices to share evenly."""
  return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=-1)


_epoch = functools.lru_cache(maxsize=2)(epoch_indices)  # a chunk may span two epochs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunks:
  """The rows of a task's training steps, several steps at a time: a sequence, can be pickled.

  Attributes:
    num, batch_size, seed, task: as of `epoch_indices`; epochs follow each other.
    width: W, rows of a batch with its padding.
    bounds: the first step of each chunk, and the end of the last one.
    size: K, the most steps of a chunk.
  """

  num: int
  batch_size: int
  width: int
  seed: int
  task: int
  bounds: tuple[int, ...]
  size: int

  def __len__(self) -> int:
    return len(self.bounds) - 1

  def __iter__(self) -> Iterator[Int[np.ndarray, "K W"]]:
    return (self[index] for index in range(len(self)))

  def __getitem__(self, index: int) -> Int[np.ndarray, "K W"]:
    """Returns the rows of the steps of chunk `index`; those of missing steps are -1."""
    if not 0 <= index < len(self):
      raise IndexError(index)
    steps = range(*self.bounds[index : index + 2])
    rows = np.full((self.size, self.batch_size), -1, np.int32)
    epoch_steps = -(-self.num // self.batch_size)
    for i, step in enumerate(steps):
      epoch, batch = divmod(step, epoch_steps)
      rows[i] = _epoch(self.num, self.batch_size, self.seed, self.task, epoch)[batch]
    return padded(rows, self.width)


def bounds(start: int, end: int, size: int, every: int) -> tuple[int, ...]:
  """Returns the bounds of chunks of start..end, of at most `size`, ending at multiples of `every`.

  Args:
    every: 0 for none.
  """
  ends = [start]
  while ends[-1] < end:
    step = ends[-1]
    ends.append(min(step + size, end, step + every - step % every if every else end))
  return tuple(ends)
