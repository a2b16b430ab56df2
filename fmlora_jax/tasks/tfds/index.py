"""Index of a prepared split: label, image size and content hash of each record."""

import dataclasses
import hashlib
import io
import logging
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt16, UInt64

from fmlora_jax.config import ConfigError
from fmlora_jax.tasks import images

CHUNK = 1024  # records read at a time
LINE_EVERY_S = 10.0  # between lines that show the progress
MAX_LISTED = 10  # records in one message
DTYPES = {"labels": "<u2", "sizes": "<u2", "contents": "<u8"}  # of the arrays of RecordIndex

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitFiles:
  """The files of one prepared split.

  Attributes:
    split: such as "domainnet/real train".
    paths: in reading order.
    lengths: records in each, as TFDS recorded them.
  """

  split: str
  paths: tuple[pathlib.Path, ...]
  lengths: tuple[int, ...]

  def shown(self, position: int) -> str:
    """Returns "record 17 of cifar100 train (cifar100-train.array_record-00000-of-00001)"."""
    ends = np.cumsum(self.lengths)
    file = min(int(np.searchsorted(ends, position, side="right")), len(self.paths) - 1)
    return f"record {position} of {self.split} ({self.paths[file].name})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordIndex:
  """Facts about all records of a split.

  Attributes:
    labels: of each record, in TFDS's numbering of classes.
    sizes: (width, height) in pixels of each image.
    contents: the first 8 bytes of the sha256 of each image's file.
  """

  labels: UInt16[np.ndarray, " n"]
  sizes: UInt16[np.ndarray, "n 2"]
  contents: UInt64[np.ndarray, " n"]

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns the arrays by name, little-endian on every machine."""
    return {name: np.ascontiguousarray(getattr(self, name), DTYPES[name]) for name in DTYPES}

  def digests(self) -> dict[str, str]:
    """Returns the sha256 hex of each array."""
    return {name: hashlib.sha256(array.data).hexdigest() for name, array in self.arrays().items()}


def to_npz(index: RecordIndex) -> bytes:
  """Returns the contents of an .npz file."""
  file = io.BytesIO()
  np.savez_compressed(file, allow_pickle=False, **index.arrays())
  return file.getvalue()


def from_npz(path: pathlib.Path) -> RecordIndex | None:
  """Returns the index in an .npz file; None if the file is absent or damaged."""
  try:
    with np.load(path) as arrays:
      return RecordIndex(**{name: arrays[name].astype(DTYPES[name]) for name in DTYPES})
  except Exception:  # damage raises errors of many types within NumPy, zipfile and zlib
    return None


def content_hash(content: bytes) -> int:
  """Returns the first 8 bytes of the sha256."""
  return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def read(get: Callable, position: Any) -> Any:
  """Returns get(position), a read from files; BrokenImage gives the reason of a failure."""
  try:
    return get(position)
  except Exception as error:  # array_record raises errors of its C++ code
    reason = " ".join(str(error).split()) or type(error).__name__
    raise images.BrokenImage(f"its file can't be read ({reason})") from error


def image_bytes(record: Mapping[str, Any], image: str) -> bytes:
  """Returns the image's file; TFDS gives None for a record that a truncated file lacks."""
  content = record[image]
  if not isinstance(content, bytes):
    raise images.BrokenImage("the record is empty: its file is truncated or damaged")
  return content


def index_records(
  files: SplitFiles, data: Any, keys: tuple[str, str], max_pixels: int
) -> RecordIndex:
  """Returns the index of a split, from the bytes and the header of each image's file.

  Args:
    data: sequence of records; reading an item reads its file.
    keys: of the image and of the label in a record.

  Raises:
    ConfigError: naming the first records that are no image, too large or without a label.
  """
  num, line_due = len(data), time.monotonic() + LINE_EVERY_S
  _log.info("indexing the %d records of %s, once", num, files.split)
  labels, sizes = np.zeros(num, np.uint16), np.zeros((num, 2), np.uint16)
  contents, faults = np.zeros(num, np.uint64), []
  with images.pillow_limited(max_pixels):
    for rows in blocks(num):
      for row, record in zip(rows, _records(data, rows), strict=True):
        try:
          if isinstance(record, images.BrokenImage):
            raise record
          image, label = image_bytes(record, keys[0]), record[keys[1]]
          sizes[row] = images.image_size(io.BytesIO(image))
          labels[row], contents[row] = _at_least_0(label), content_hash(image)
        except images.BrokenImage as error:
          faults.append(f"{files.shown(row)}: {error}")
      if time.monotonic() >= line_due:
        line_due += LINE_EVERY_S
        _log.info("  %d of %d records", rows.stop, num)
  if faults:
    more = f"; and {len(faults) - MAX_LISTED} more" if len(faults) > MAX_LISTED else ""
    raise ConfigError(
      f"{len(faults)} of {num} records of {files.split} can't be used; prepare it again: "
      f"{'; '.join(faults[:MAX_LISTED])}{more}"
    )
  return RecordIndex(labels=labels, sizes=sizes, contents=contents)


def blocks(num: int) -> Iterator[range]:
  """Yields 0..num-1 in ranges of records to read at a time."""
  for lo in range(0, num, CHUNK):
    yield range(lo, min(lo + CHUNK, num))


def _records(data, rows: range) -> list[Mapping[str, Any] | images.BrokenImage]:
  """Returns the records; one by one where a joint read fails, to find the broken ones."""
  try:
    return read(data.__getitems__, rows)
  except images.BrokenImage:
    return [_record(data, row) for row in rows]


def _record(data, row: int) -> Mapping[str, Any] | images.BrokenImage:
  try:
    return read(data.__getitem__, row)
  except images.BrokenImage as error:
    return error


def first_change(files: SplitFiles, before: RecordIndex | None, now: RecordIndex) -> str:
  """Returns "first record 17 of ...", or the number of records where `before` can't tell."""
  if before is None or len(before.labels) != len(now.labels):
    return f"{len(now.labels)} records now"
  changed = (before.labels != now.labels) | (before.contents != now.contents)
  changed |= np.any(before.sizes != now.sizes, axis=1)
  return f"first {files.shown(int(np.argmax(changed)))}"


def _at_least_0(label: int | None) -> int:
  if label is None or label < 0:
    raise images.BrokenImage(f"its label is {label}, so it has none")
  return label
