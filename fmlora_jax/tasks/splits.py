"""Named cuts of published data into train, val and test, from the reading order or from lists.

None depends on a seed: TFDS reads the examples of a split sorted by a hash of their keys, so the
first 70 % of them are the same 70 % everywhere, and the last tenth of a class the same tenth.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import yaml
from jaxtyping import Int, Int8

from fmlora_jax.config import ConfigError
from fmlora_jax.tasks.sequence import TEST, TRAIN, VAL

Codes = Int8[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records:
  """Records of several published splits, one split after the other, each in its reading order.

  Attributes:
    part: which of the splits each record is from.
    official: TRAIN, VAL or TEST of each record, as published.
    stratum: class of each record, or domain and class; >= 0.
    names: reads the file name of each record, "class/file"; None where they have none.
    root: the data folder.
  """

  part: Int[np.ndarray, " n"]
  official: Codes
  stratum: Int[np.ndarray, " n"]
  names: Callable[[], Sequence[str]] | None = None
  root: pathlib.Path = pathlib.Path()


SplitRule = Callable[[Records], Codes]


def sliced(val_from: int, test_from: int) -> SplitRule:
  """Returns the cut of each published split at two percentages, rounded as TFDS slices are."""

  def cut(pool: Records) -> Codes:
    rank, size = _ranks(pool.part)
    val, test = (np.rint(percent * size / 100) for percent in (val_from, test_from))
    return _codes(val=rank >= val, test=rank >= test)

  return cut


def stratified(pool: Records) -> Codes:
  """Returns 70/10/20 of each class, in integers: its last fifth is test, a tenth before it val."""
  rank, size = _ranks(pool.stratum)
  test = (2 * size + 5) // 10
  val = (size + 5) // 10
  return _codes(val=rank >= size - test - val, test=rank >= size - test)


def published(pool: Records) -> Codes:
  """Returns the published cut; without val if that has none."""
  return pool.official


def official(one_in: int) -> SplitRule:
  """Returns the published cut, with val the last 1/one_in of each class's training images."""

  def cut(pool: Records) -> Codes:
    rank, size = _ranks_of_part(pool)
    val = (pool.official == TRAIN) & (rank >= size - size // one_in)
    return _codes(val=val, test=pool.official == TEST)

  return cut


def val_from_test(one_in: int) -> SplitRule:
  """Returns the published cut, with val the first 1/one_in of each class's test images."""

  def cut(pool: Records) -> Codes:
    rank, size = _ranks_of_part(pool)
    held = pool.official == TEST
    return _codes(val=held, test=held & (rank >= size // one_in))

  return cut


def listed(*, train: str, test: str, source: str) -> SplitRule:
  """Returns the cut that two lists of file names make; without val.

  Args:
    train, test: YAML files in the data folder, {"data": [path, ...], ...}; the last two parts of a
      path are class and file.
    source: where the user finds them, for messages.
  """

  def cut(pool: Records) -> Codes:
    rows = {name: row for row, name in enumerate(pool.names())}
    codes = np.full(len(rows), -1, np.int8)
    for code, file in ((TRAIN, train), (TEST, test)):
      paths = _read_list(pool.root / file, source)
      names = ["/".join(path.split("/")[-2:]) for path in paths]
      if unknown := [name for name in names if name not in rows]:
        raise ConfigError(
          f"{pool.root / file}: {len(unknown)} of {len(names)} images are not in the prepared "
          f"data, such as {unknown[0]!r}: take the lists of {source}"
        )
      codes[[rows[name] for name in names]] = code
    if left := int(np.sum(codes < 0)):
      raise ConfigError(
        f"{train} and {test} in {str(pool.root)!r} leave out {left} of {len(codes)} images: take "
        f"the lists of {source}"
      )
    return codes

  return cut


def _read_list(path: pathlib.Path, source: str) -> list[str]:
  try:
    paths = yaml.load(path.read_text(), yaml.CSafeLoader)["data"]
    if all(isinstance(each, str) for each in paths):
      return paths
    reason = "not all of its data are paths"
  except FileNotFoundError:
    reason = "no such file"
  except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
    reason = " ".join(str(error).split())
  raise ConfigError(f"{path} can't be read ({reason}): put the list of {source} there")


def _ranks_of_part(pool: Records):
  return _ranks(pool.stratum * 3 + pool.official)


def _ranks(group: Int[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
  """Returns each record's place among those of its group, from 0, and how many these are."""
  order = np.argsort(group, kind="stable")
  size = np.bincount(group)
  first = np.cumsum(size) - size
  rank = np.empty(len(group), np.int64)
  rank[order] = np.arange(len(group)) - first[group[order]]
  return rank, size[group]


def _codes(*, val: np.ndarray, test: np.ndarray) -> Codes:
  return np.where(test, TEST, np.where(val, VAL, TRAIN)).astype(np.int8)
