"""Images of a task decoded once into memory, and the order in which an epoch visits them."""

import numpy as np
from jaxtyping import Int

from fmlora_jax.config import ConfigError
from fmlora_jax.tasks.sequence import TaskSequence
from fmlora_jax.types import Examples

CHUNK = 256  # images decoded at a time, so that memory holds one copy of the task


def capacity(sequence: TaskSequence, split: str) -> int:
  """Returns the most images that any task has in "train", "val" or "test".

  Padded to it, all tasks have arrays of one shape, and a step compiles once.
  """
  return max(len(getattr(task, split)) for task in sequence.tasks)


def num_bytes(sequence: TaskSequence, capacity: int) -> int:
  """Returns the memory that what `load` returns takes."""
  height, width = sequence.source.canvas
  return capacity * (height * width * 3 + 2 * 4 + 4 + 1)


def check_memory(sequence: TaskSequence, measured: str, *, device: int, host: int) -> None:
  """Refuses tasks whose images don't fit: a task on the device, all tests and a task on the host.

  Args:
    sequence: the tasks.
    measured: "test" or "val", the images that fill the accuracy matrix.
    device: bytes that images may take there.
    host: bytes that images may take there.

  Raises:
    ConfigError: with what is needed, what there is, and the mend.
  """
  largest = capacity(sequence, "train") + capacity(sequence, "val")
  tests = sum(len(getattr(task, measured)) for task in sequence.tasks)
  height, width = sequence.source.canvas
  for place, images, budget in (("device", largest, device), ("host", largest + tests, host)):
    needed = num_bytes(sequence, images)
    if needed > budget:
      raise ConfigError(
        f"{sequence.source.name}: {images} images of {height} x {width} pixels take "
        f"{needed / 2**30:.2f} GiB, the {place} has {budget / 2**30:.2f} GiB for them: lower "
        "config.input.source_size, or cut the data into more tasks with config.tasks.num_tasks"
      )


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


def epoch_indices(
  num: int, batch_size: int, seed: int, task: int, epoch: int
) -> Int[np.ndarray, "steps B"]:
  """Returns each of 0..num-1 once, in an order of (seed, task, epoch); -1 fills the last batch."""
  generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, task, epoch])))
  rows = np.full(-(-num // batch_size) * batch_size, -1, np.int32)
  rows[:num] = generator.permutation(num)
  return rows.reshape(-1, batch_size)
