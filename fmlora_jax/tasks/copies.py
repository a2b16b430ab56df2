"""Images that stand twice: in two splits, which makes accuracies too good, or in two classes."""

import dataclasses
import logging

import numpy as np
from jaxtyping import Int

from fmlora_jax.config import ConfigError, TasksConfig
from fmlora_jax.tasks.sequence import SPLIT_CODES, TaskSequence

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copies:
  """Images of one split that are also in another, and images of two classes.

  Attributes:
    val_of_train, test_of_train, test_of_val: numbers of the former.
    example: the first copy and its original, in words; None where there is none.
    in_two_classes: images of which copies are in more than one class.
    example_of_two: the same of these.
  """

  val_of_train: int
  test_of_train: int
  test_of_val: int
  example: str | None
  in_two_classes: int
  example_of_two: str | None

  def __str__(self) -> str:
    return (
      f"{self.val_of_train} validation and {self.test_of_train} test images are copies of training "
      f"images, {self.test_of_val} test images of validation images"
    )


def find_copies(sequence: TaskSequence) -> Copies | None:
  """Returns the images that stand twice; None where the source does not tell copies."""
  group = sequence.source.group
  if group is None:
    return None
  rows = {
    split: np.concatenate([getattr(task, split) for task in sequence.tasks])
    for split in SPLIT_CODES
  }
  counts, example = {}, None
  for split, of in (("val", "train"), ("test", "train"), ("test", "val")):
    copies = rows[split][np.isin(group[rows[split]], group[rows[of]])]
    counts[f"{split}_of_{of}"] = len(copies)
    if example is None and len(copies):
      first = copies[0]
      (same, *_) = rows[of][group[rows[of]] == group[first]].tolist()
      example = f"{sequence.source.shown(int(first))} is {sequence.source.shown(same)}"
  two = _in_two_classes(group, sequence.labels, np.concatenate([*rows.values()]))
  shown = sequence.source.shown
  return Copies(
    **counts,
    example=example,
    in_two_classes=len(two),
    example_of_two=f"{shown(two[0][1])} is {shown(two[0][0])}" if two else None,
  )


def _in_two_classes(
  group: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], rows: Int[np.ndarray, " k"]
) -> list[tuple[int, int]]:
  """Returns two records of different classes of each group that has some, among `rows`."""
  rows = rows[np.lexsort((rows, labels[rows], group[rows]))]
  differ = (np.diff(group[rows]) == 0) & (np.diff(labels[rows]) != 0)
  firsts, seconds = rows[:-1][differ], rows[1:][differ]
  _, first_of_group = np.unique(group[firsts], return_index=True)
  return [(int(firsts[i]), int(seconds[i])) for i in first_of_group]


def report_copies(sequence: TaskSequence, config: TasksConfig, *, warn: bool) -> None:
  """Logs images that stand twice, if `warn`, or refuses them, as config.copies says."""
  copies, found = find_copies(sequence), {}  # what is found -> what it does
  if copies is not None and copies.example:
    found[f"{copies}, such as {copies.example}"] = "the accuracies are too good"
  if copies is not None and copies.example_of_two:
    text = f"{copies.in_two_classes} images are in two classes, such as {copies.example_of_two}"
    found[text] = "no answer is right for both"
  if found and config.copies == "refuse":
    raise ConfigError(
      f"config.tasks.copies is 'refuse': {sequence.split_id}: {'; '.join(found)}; move them out "
      "of one side, or set it to report"
    )
  for text, harm in found.items() if warn else ():
    _log.warning("%s: %s: move them out of one side, or %s", sequence.split_id, text, harm)
