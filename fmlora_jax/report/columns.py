"""The columns of a table of runs, and numbers as a reader wants them."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np

from fmlora_jax import methods
from fmlora_jax.cli.text import duration
from fmlora_jax.report import paired
from fmlora_jax.report.runs import Group, Groups, mean, mean_std
from fmlora_jax.types import Reported


@dataclasses.dataclass(frozen=True)
class Column:
  """One column of a table; each row is a group of runs that differ in the seed only.

  Attributes:
    name: its head.
    text: the runs of a row -> the cell.
    ranked: field of a result by whose mean rows are compared, the largest is best; None compares
      nothing.
  """

  name: str
  text: Callable[[Group], str]
  ranked: str | None = None


def _score(name: str, field: str, ranked: bool = False) -> Column:
  """Returns a column of a score in percent, mean ± standard deviation over seeds."""
  return Column(name, lambda runs: mean_std([r[field] for r in runs]), field if ranked else None)


def _reported(fact: Reported) -> Column:
  """Returns the column of a fact that only some methods report."""
  name, form = cast(tuple[str, str], fact.column)
  return Column(name, lambda runs: FORMATS[form]([r.get(str(fact.field)) for r in runs]))


def columns(groups: Groups) -> list[Column]:
  """Returns the columns after the label of the row, with those that the methods of rows declare."""
  return [
    Column("seeds", lambda runs: str(len(runs))),
    _score("Acc", "acc", ranked=True),
    _score("AAA", "aaa", ranked=True),
    *_differences(groups),
    _score("forgetting", "forgetting"),
    _score("learning", "learning_accuracy"),
    Column("stored", lambda runs: count_text(mean([r["params"]["stored_total"] for r in runs]))),
    Column("trained", lambda runs: count_text(mean([r["params"]["trained"] for r in runs]))),
    Column("statistics", lambda runs: bytes_text(mean([r["statistics_bytes"] for r in runs]))),
    Column("passes", lambda runs: passes_text(runs[0]["passes"])),
    *(_reported(fact) for fact in declared(groups)),
    Column("wall time", lambda runs: duration(mean([r["wall_seconds"]["total"] for r in runs]))),
  ]


def _differences(groups: Groups) -> list[Column]:
  """Returns the columns of differences to one row, where other rows have runs of the same seeds."""
  label = paired.reference(groups)
  if label is None:
    return []
  others = groups[label]

  def column(name: str, field: str) -> Column:
    def text(runs: Group) -> str:
      return "-" if runs is others else paired.difference(runs, others, field)

    return Column(f"{name} - {label}", text)

  return [column("Acc", "acc"), column("AAA", "aaa")]


def declared(groups: Groups) -> list[Reported]:
  """Returns the facts with a column that the methods of some runs declare, one for each header."""
  names = dict.fromkeys(run["method"] for runs in groups.values() for run in runs)
  facts = [fact for name in names for fact in methods.reports(name)]
  return list({fact.column[0]: fact for fact in facts if fact.column}.values())


LEGEND = (
  "Acc, AAA: % of the test images (or as headed) of all tasks so far, at the end and on average.\n"
  "Acc - NAME: less the Acc of NAME's run of the same seed. learning: accuracy right after each\n"
  "task. ±: standard deviation over seeds (ddof 1).\n"
  "stored, trained: numbers of parameters. statistics: bytes stored that were computed from the\n"
  "data, such as means of features; no image is stored. passes: forward passes for an image in\n"
  "training/at test time, +n over a task's images between tasks. Further columns: the value of\n"
  "each task, the most frequent over seeds."
)


def count_text(number: float) -> str:
  """Returns 950, 12.0k, 1.23M or 85.8M."""
  for unit, size in (("M", 1e6), ("k", 1e3)):
    if number >= size:
      return f"{number / size:.3g}{unit}"
  return f"{number:.0f}"


def bytes_text(number: float) -> str:
  """Returns 0 B, 950 B, 12.0 kB or 1.23 MB."""
  for unit, size in (("MB", 1e6), ("kB", 1e3)):
    if number >= size:
      return f"{number / size:.3g} {unit}"
  return f"{number:.0f} B"


def passes_text(passes: Mapping[str, int]) -> str:
  """Returns "2/2", in training and at test time, or "1/1 +1" with one between tasks."""
  between = f" +{passes['between']}" if passes["between"] else ""
  return f"{passes['train']}/{passes['test']}{between}"


def modes_text(values: Sequence[Sequence[int | None] | None]) -> str:
  """Returns the most frequent value of each task over seeds, [seed][task]; "-" without a value.

  One number if all tasks agree, else a list, or of more than ten tasks the range and the mean.
  """
  known = [of_seed for of_seed in values if of_seed is not None]
  if not known:
    return "-"
  modes = [collections.Counter(column).most_common(1)[0][0] for column in zip(*known, strict=True)]
  shown = ["-" if mode is None else str(mode) for mode in modes]
  if len(set(modes)) == 1:
    return shown[0]
  if len(modes) <= 10:
    return " ".join(shown)
  numbers = [mode for mode in modes if mode is not None]
  return f"{min(numbers)}..{max(numbers)}, mean {np.mean(numbers):.1f}"


FORMATS = {"modes": modes_text}  # of facts that methods report: [seed] -> text
