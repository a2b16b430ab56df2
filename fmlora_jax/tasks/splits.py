"""Split rules: named divisions of published data into train, val and test.

None depends on a seed: TFDS reads the examples of a split sorted by a hash of their keys, so the
first 70 % of them are the same 70 % everywhere, and the last tenth of a class the same tenth.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import yaml
from jaxtyping import Int, Int8

from fmlora_jax.config import ConfigError
from fmlora_jax.tasks.sequence import TEST, TRAIN, VAL

SplitCodes = Int8[np.ndarray, " n"]  # TRAIN, VAL or TEST of each record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records:
  """Records of several published splits, one split after the other, each in its reading order.

  Attributes:
    origin: number of the published split that each record is from.
    official: published split of each record, as TRAIN, VAL or TEST.
    stratum: class of each record, or domain and class; >= 0.
    names: reads the file name of each record, "class/file"; None where they have none.
    root: the data folder.
  """

  origin: Int[np.ndarray, " n"]
  official: SplitCodes
  stratum: Int[np.ndarray, " n"]
  names: Callable[[], Sequence[str]] | None = None
  root: pathlib.Path = pathlib.Path()


@dataclasses.dataclass(frozen=True)
class SplitRule:
  """A rule that puts each record into a split.

  Attributes:
    divide: the records -> their splits.
    has_val: whether there are validation images among them.
  """

  divide: Callable[[Records], SplitCodes]
  has_val: bool

  def __call__(self, records: Records) -> SplitCodes:
    return self.divide(records)


def with_val(rules: Mapping[str, SplitRule]) -> tuple[str, ...]:
  """Returns the names of the rules that leave validation images."""
  return tuple(name for name, rule in rules.items() if rule.has_val)


def sliced(val_from: int, test_from: int) -> SplitRule:
  """Divides each published split at two percentages, rounded as TFDS slices are."""

  def rule(records: Records) -> SplitCodes:
    rank, size = _ranks(records.origin)
    val, test = (np.rint(percent * size / 100) for percent in (val_from, test_from))
    return _codes(val=rank >= val, test=rank >= test)

  return SplitRule(rule, has_val=val_from < test_from)


@functools.partial(SplitRule, has_val=True)
def stratified(records: Records) -> SplitCodes:
  """Divides each class 70/10/20, in integers: its last fifth is test, the tenth before it val."""
  rank, size = _ranks(records.stratum)
  test = (2 * size + 5) // 10
  val = (size + 5) // 10
  return _codes(val=rank >= size - test - val, test=rank >= size - test)


@functools.partial(SplitRule, has_val=False)
def published(records: Records) -> SplitCodes:
  """Takes the published splits, of data that have training and test images alone."""
  return records.official


def official(one_in: int) -> SplitRule:
  """Takes the published splits, with val the last 1/one_in of each class's training images."""

  def rule(records: Records) -> SplitCodes:
    rank, size = _ranks_in_split(records)
    val = (records.official == TRAIN) & (rank >= size - size // one_in)
    return _codes(val=val, test=records.official == TEST)

  return SplitRule(rule, has_val=True)


def val_from_test(one_in: int) -> SplitRule:
  """Takes the published splits, with val the first 1/one_in of each class's test images."""

  def rule(records: Records) -> SplitCodes:
    rank, size = _ranks_in_split(records)
    held_out = records.official == TEST
    return _codes(val=held_out, test=held_out & (rank >= size // one_in))

  return SplitRule(rule, has_val=True)


def listed(*, train: str, test: str, source: str) -> SplitRule:
  """Takes train and test from two lists of file names; no val.

  Args:
    train, test: YAML files in the data folder, {"data": [path, ...], ...}; a path ends in class
      and file.
    source: where the user gets them, for messages.
  """

  def rule(records: Records) -> SplitCodes:
    assert records.names is not None
    rows = {name: row for row, name in enumerate(records.names())}
    codes = np.full(len(rows), -1, np.int8)
    for code, file in ((TRAIN, train), (TEST, test)):
      paths = _read_list(records.root / file, source)
      names = ["/".join(path.split("/")[-2:]) for path in paths]
      if unknown := [name for name in names if name not in rows]:
        raise ConfigError(
          f"{records.root / file}: {len(unknown)} of {len(names)} images are not in the prepared "
          f"data, such as {unknown[0]!r}: take the lists of {source}"
        )
      codes[[rows[name] for name in names]] = code
    if missing := int(np.sum(codes < 0)):
      raise ConfigError(
        f"{train} and {test} in {str(records.root)!r} leave out {missing} of {len(codes)} images: "
        f"take the lists of {source}"
      )
    return codes

  return SplitRule(rule, has_val=False)


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


def _ranks_in_split(records: Records) -> tuple[np.ndarray, np.ndarray]:
  return _ranks(records.stratum * 3 + records.official)


def _ranks(group: Int[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the rank of each record in its group, from 0, and the size of that group."""
  order = np.argsort(group, kind="stable")
  size = np.bincount(group)
  first = np.cumsum(size) - size
  rank = np.empty(len(group), np.int64)
  rank[order] = np.arange(len(group)) - first[group[order]]
  return rank, size[group]


def _codes(*, val: np.ndarray, test: np.ndarray) -> SplitCodes:
  return np.where(test, TEST, np.where(val, VAL, TRAIN)).astype(np.int8)
