"""scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels that ship with it.

Source: E. Alpaydin and C. Kaynak (1998), UCI Optical Recognition of Handwritten Digits (test part).
"""

import functools
import hashlib
import importlib.util
import pathlib

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from fmlora_jax.config import TasksConfig
from fmlora_jax.tasks.sequence import DataSource

CLASS_NAMES = tuple("0123456789")
NUM_CLASSES = len(CLASS_NAMES)


def load() -> tuple[UInt8[np.ndarray, "n 8 8"], Int[np.ndarray, " n"]]:
  """Returns grey images, 0 is paper and 255 is ink, and their digits.

  From the file that sklearn.datasets.load_digits reads: scikit-learn and SciPy take longer to
  import than the rest of a run's start.
  """
  spec = importlib.util.find_spec("sklearn")
  assert spec is not None and spec.origin is not None
  package = pathlib.Path(spec.origin).parent
  table = np.loadtxt(pathlib.Path(package, "datasets/data/digits.csv.gz"), delimiter=",")
  images, labels = table[:, :-1], table[:, -1]
  return np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), labels.astype(np.int32)


def enlarge(image: UInt8[np.ndarray, "8 8"], size: int) -> Image.Image:
  """Returns the grey image at size x size pixels, bicubic."""
  return Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)


def pack(images: list[Image.Image], size: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns images with three equal channels, and their sizes, as `DataSource.decode`."""
  grey = np.stack([np.asarray(image) for image in images]) if images else np.zeros((0, size, size))
  rgb = np.repeat(grey[..., None].astype(np.uint8), 3, axis=-1)
  return rgb, np.full((len(images), 2), size, np.int32)


def _decode(images: UInt8[np.ndarray, "n 8 8"], size: int, rows: Int[np.ndarray, " k"]):
  return pack([enlarge(images[row], size) for row in rows], size)


def digest(name: str, images: np.ndarray, labels: np.ndarray) -> str:
  """Returns the `DataSource.digest` of a benchmark made of the digits."""
  return hashlib.sha256(
    name.encode() + images.tobytes() + labels.astype("<i4").tobytes()
  ).hexdigest()


def make(config: TasksConfig, source_size: int) -> DataSource:
  """Returns the digits, each enlarged to source_size."""
  del config
  images, labels = load()
  return DataSource(
    name="digits",
    labels=labels,
    class_names=CLASS_NAMES,
    canvas=(source_size, source_size),
    decode=functools.partial(_decode, images, source_size),
    digest=digest("digits", images, labels),
    group=np.arange(len(labels)),  # no two are equal
  )
