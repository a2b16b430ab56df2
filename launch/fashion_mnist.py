"""Writes Fashion-MNIST's IDX files as a folder of images for configs/fashion_mnist.py.

python launch/fashion_mnist.py FOLDER_OF_IDX_GZ OUT [TRAIN_PER_CLASS] [TEST_PER_CLASS]
"""

import gzip
import pathlib
import sys
import zlib

import numpy as np
from PIL import Image

ADVICE = "get it with `apt-get install dataset-fashion-mnist`"
NAMES = (
  "tshirt",
  "trouser",
  "pullover",
  "dress",
  "coat",
  "sandal",
  "shirt",
  "sneaker",
  "bag",
  "ankle_boot",
)


def read(path: pathlib.Path, header: int) -> np.ndarray:
  """Returns a gzipped IDX file after its header of `header` bytes, uint8."""
  if not path.is_file():
    sys.exit(f"error: {path}: no such file; {ADVICE}")
  try:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)
  except (OSError, EOFError, ValueError, zlib.error):
    sys.exit(f"error: {path}: no whole IDX file in gzip; {ADVICE}")


def main(source: str, out: str, num_train: int = 2000, num_test: int = 1000) -> None:
  """Writes the first images of each class as OUT/{train,test}/CLASS/RECORD.png."""
  if pathlib.Path(out).exists():
    sys.exit(f"error: {out}: must be a new folder; name another")
  for split, prefix, count in (("train", "train", num_train), ("test", "t10k", num_test)):
    images = read(pathlib.Path(source, f"{prefix}-images-idx3-ubyte.gz"), 16)
    labels = read(pathlib.Path(source, f"{prefix}-labels-idx1-ubyte.gz"), 8)
    if images.size != labels.size * 28 * 28:
      sys.exit(f"error: {source}: {labels.size} labels and {images.size} pixels; {ADVICE}")
    images = images.reshape(-1, 28, 28)
    for label, name in enumerate(NAMES):
      folder = pathlib.Path(out, split, name)
      folder.mkdir(parents=True)
      for record in np.flatnonzero(labels == label)[:count]:
        Image.fromarray(images[record]).save(folder / f"{record:05d}.png")


if __name__ == "__main__":
  if len(sys.argv) not in (3, 4, 5):
    sys.exit(__doc__)
  if not all(count.isdecimal() for count in sys.argv[3:]):
    sys.exit(f"error: the counts are {sys.argv[3:]}: must be whole numbers, such as 500 200")
  main(*sys.argv[1:3], *map(int, sys.argv[3:]))
