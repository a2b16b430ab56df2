"""Random pixels in the numbers of ImageNet-R, for timing whole runs; nothing can be learned."""

import functools
import hashlib

import numpy as np
from jaxtyping import Int, UInt8

from fmlora_jax.config import TasksConfig
from fmlora_jax.tasks.sequence import DataSource

NUM_CLASSES, PER_CLASS = 200, 150  # 30,000 images: by default 21,000 + 3,000 + 6,000
POOL = 256  # different images; records take them in turn


def make(config: TasksConfig, source_size: int) -> DataSource:
  """Returns square images of source_size pixels a side."""
  del config
  return make_source(source_size, NUM_CLASSES, PER_CLASS)


def make_source(size: int, num_classes: int, per_class: int, pool: int = POOL) -> DataSource:
  """Returns square images of `size` pixels a side, of which `pool` are different."""
  images = np.random.default_rng(0).integers(0, 256, (pool, size, size, 3), np.uint8)
  labels = np.repeat(np.arange(num_classes, dtype=np.int32), per_class)
  return DataSource(
    name="random_images",
    labels=labels,
    class_names=tuple(f"class {label}" for label in range(num_classes)),
    canvas=(size, size),
    decode=functools.partial(decode, images),
    digest=hashlib.sha256(images.tobytes() + labels.astype("<i4").tobytes()).hexdigest(),
  )


def decode(pool: UInt8[np.ndarray, "p h w 3"], rows: Int[np.ndarray, " k"]):
  """A `DataSource.decode` that takes the images of a pool in turn."""
  return pool[rows % len(pool)], np.full((len(rows), 2), pool.shape[1:3], np.int32)
