"""Random pixels in the numbers of ImageNet-R, for timing whole runs; nothing can be learned."""

import functools
import hashlib

import numpy as np
from jaxtyping import Int, UInt8

from fmlora_jax.config import TasksConfig
from fmlora_jax.tasks.sequence import DataSource

NUM_CLASSES, PER_CLASS = 200, 150  # 30,000 images: by default 21,000 + 3,000 + 6,000
POOL = 256  # different images; records take them in turn


def _decode(pool: UInt8[np.ndarray, "p h w 3"], rows: Int[np.ndarray, " k"]):
  return pool[rows % len(pool)], np.full((len(rows), 2), pool.shape[1], np.int32)


def make(config: TasksConfig, source_size: int) -> DataSource:
  """Returns square images of source_size pixels a side."""
  del config
  shape = (POOL, source_size, source_size, 3)
  pool = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  labels = np.repeat(np.arange(NUM_CLASSES, dtype=np.int32), PER_CLASS)
  return DataSource(
    name="random_images",
    labels=labels,
    class_names=tuple(f"class {label}" for label in range(NUM_CLASSES)),
    canvas=(source_size, source_size),
    decode=functools.partial(_decode, pool),
    digest=hashlib.sha256(pool.tobytes() + labels.astype("<i4").tobytes()).hexdigest(),
  )
