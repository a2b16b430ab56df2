"""Named cuts of published data into train, val and test: pure functions of the reading order.

None depends on a seed: TFDS reads the examples of a split sorted by a hash of their keys, so the
first 70 % of them are the same 70 % everywhere, and the last tenth of a class the same tenth.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Int, Int8

from fmlora_jax.tasks.sequence import TEST, TRAIN, VAL

Codes = Int8[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
  """Records of several published splits, one split after the other, each in its reading order.

  Attributes:
    part: which of the splits each record is from.
    official: TRAIN, VAL or TEST of each record, as published.
    stratum: class of each record, or domain and class; >= 0.
  """

  part: Int[np.ndarray, " n"]
  official: Codes
  stratum: Int[np.ndarray, " n"]


Cut = Callable[[Pool], Codes]


def sliced(val_from: int, test_from: int) -> Cut:
  """Returns the cut of each published split at two percentages, rounded as TFDS slices are."""

  def cut(pool: Pool) -> Codes:
    rank, size = _ranks(pool.part)
    val, test = (np.rint(percent * size / 100) for percent in (val_from, test_from))
    return _codes(val=rank >= val, test=rank >= test)

  return cut


def stratified(pool: Pool) -> Codes:
  """Returns 70/10/20 of each class, in integers: its last fifth is test, a tenth before it val."""
  rank, size = _ranks(pool.stratum)
  test = (2 * size + 5) // 10
  val = (size + 5) // 10
  return _codes(val=rank >= size - test - val, test=rank >= size - test)


def published(pool: Pool) -> Codes:
  """Returns the published cut; without val if that has none."""
  return pool.official


def official(one_in: int) -> Cut:
  """Returns the published cut, with val the last 1/one_in of each class's training images."""

  def cut(pool: Pool) -> Codes:
    rank, size = _ranks_of_part(pool)
    val = (pool.official == TRAIN) & (rank >= size - size // one_in)
    return _codes(val=val, test=pool.official == TEST)

  return cut


def val_from_test(one_in: int) -> Cut:
  """Returns the published cut, with val the first 1/one_in of each class's test images."""

  def cut(pool: Pool) -> Codes:
    rank, size = _ranks_of_part(pool)
    held = pool.official == TEST
    return _codes(val=held, test=held & (rank >= size // one_in))

  return cut


def _ranks_of_part(pool: Pool):
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
