"""The paper's Tables 1 to 3 with our runs beside them, as data.

paper_tables.json holds the paper's numbers, their known errors (flags), the rule that assigns our
runs to cells, and the protocol of each table. A flag is a short key in the table, explained below.
The baseline rows have a split without validation images, the rows of FM-LoRA one with them.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmlora_jax.report import runs
from fmlora_jax.report.runs import Group, RunResult

SCORES = ("acc", "aaa")
HEADER = (
  *("method", "Acc paper", "Acc ours", "Acc diff", "AAA paper", "AAA ours", "AAA diff"),
  *("flags", "seeds", "weights", "split"),
)
NONE = "-"
_ABSENT = object()  # a setting that the version of the run did not have yet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
  """One line of a table: a cell of the paper beside one group of our runs.

  Attributes:
    method: the paper's name of the row.
    settings: in which our groups in this cell differ, such as "drs.rank=4"; may be empty.
    paper: mean and std of Acc, then of AAA; None where the paper has no such cell.
    runs: ours, which differ in the seed only; may be empty.
    possible: whether any run of ours fits this cell.
    flags: keys of `Comparison.flags`.
  """

  method: str
  settings: str
  paper: Sequence[float] | None
  runs: Group
  possible: bool
  flags: tuple[str, ...]

  @property
  def name(self) -> str:
    """Method and settings: the label of the line in pictures."""
    return f"{self.method} {self.settings}".strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
  """One column of one of the paper's tables, such as "Table 1: ImageNet-R, N = 5"."""

  title: str
  lines: list[Line]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """The paper's tables with our runs in their cells.

  Attributes:
    sections: in the paper's order.
    others: names of the runs that fit no cell.
    flags: meanings of the flags in use.
    notes: remarks on all tables.
  """

  sections: list[Section]
  others: list[str]
  flags: dict[str, str]
  notes: list[str]

  @property
  def summary(self) -> str:
    """A sentence that says how many of the paper's cells have been run."""
    cells = {(s.title, line.method) for s in self.sections for line in s.lines if line.paper}
    ours = {(s.title, line.method) for s in self.sections for line in s.lines if line.runs}
    return f"Of the paper's {len(cells)} cells {len(cells & ours)} have runs of ours."


@functools.cache
def tables() -> Mapping[str, Any]:
  """Returns paper_tables.json. Source: FM-LoRA Tables 1-3."""
  return json.loads(Path(__file__).with_name("paper_tables.json").read_text(encoding="utf-8"))


def compare(results: Iterable[RunResult]) -> Comparison:
  """Puts each run beside its cell of the paper; those that fit none are named."""
  grouped = runs.group(results)
  groups = [group for section in grouped.values() for group in section.values()]
  sections = [
    Section(
      title=f"{table['name']}: {tables()['columns'][column]['name']}",
      lines=[
        line
        for row, cells in table["cells"].items()
        for line in _lines(row, column, cells[i], groups)
      ],
    )
    for table in tables()["tables"]
    for i, column in enumerate(table["columns"])
  ]
  lines = [line for section in sections for line in section.lines]
  placed = {id(run) for line in lines for run in line.runs}
  others = [
    f"{heading}: {label}, {_seeds(group)}"
    for heading, section in grouped.items()
    for label, group in section.items()
    if id(group[0]) not in placed
  ]
  used = {flag for line in lines for flag in line.flags}
  flags = {flag: text for flag, text in _meanings().items() if flag in used}
  return Comparison(sections=sections, others=others, flags=flags, notes=tables()["notes"])


def cells(line: Line) -> list[str]:
  """Returns the texts of a line under HEADER."""
  texts, missing = [line.name], "not run" if line.possible else NONE
  for i, score in enumerate(SCORES):
    paper = line.paper and line.paper[2 * i : 2 * i + 2]
    ours = [run[score] for run in line.runs]
    difference = runs.mean(ours) - paper[0] if paper and ours else np.nan
    texts.append(f"{paper[0]:.2f} ± {paper[1]:.2f}" if paper else NONE)
    texts.append(" ".join(runs.mean_std(ours).split()) if ours else missing)
    texts.append(NONE if np.isnan(difference) else f"{difference:+.2f}")
  texts.append(" ".join(line.flags) or NONE)
  if not line.runs:
    return [*texts, NONE, NONE, NONE]
  first = line.runs[0]
  return [*texts, str(len(line.runs)), " ".join(runs.weights(first)), first["split_id"]]


def _lines(
  row: str, column: str, paper: Sequence[float] | None, groups: Iterable[Group]
) -> list[Line]:
  """Returns one line for each group of ours in a cell, or a single line without runs."""
  rule = tables()["rows"].get(row)
  ours = [group for group in groups if rule and _fits(group[0], rule, column)]
  settings = runs.differences(ours, rule.get("shown", ())) if ours else [""]
  return [
    Line(
      method=row,
      settings=text,
      paper=paper,
      runs=group,
      possible=rule is not None,
      flags=(*_paper_flags(row, column), *_our_flags(group, rule, column)),
    )
    for group, text in zip(ours or [[]], settings, strict=True)
  ]


def _fits(run: RunResult, rule: Mapping[str, Any], column: str) -> bool:
  """Returns whether a run is the paper's row on the paper's tasks, measured on test images."""
  paper = tables()["columns"][column]
  return (
    (run["benchmark"], run["scenario"], len(run["n_test"]))
    == (paper["benchmark"], "cil", paper["tasks"])
    and _field(run, "config.tasks.evaluate_on") != "val"
    and all(_field(run, path) in values for path, values in rule["is"].items())
    and not any(_field(run, path) in values for path, values in rule.get("is_not", {}).items())
    and rule.get("fixed_rank", False) == _has_fixed_rank(run)
  )


def _has_fixed_rank(run: RunResult) -> bool:
  """Returns whether all tasks had one rank by the settings; given ranks replace the strategy."""
  ranks = _field(run, "config.method.drs.ranks")
  is_fixed = _field(run, "config.method.drs.strategy") == "fixed"
  return is_fixed and (ranks is _ABSENT or not ranks)


def _paper_flags(row: str, column: str) -> list[str]:
  return [
    key
    for key, flag in tables()["flags"].items()
    if row in flag.get("rows", [row]) and column in flag.get("columns", [column])
  ]


def _our_flags(group: Group, rule: Mapping[str, Any] | None, column: str) -> list[str]:
  """Returns the differences between our protocol and the table's; absent settings don't count."""
  if not group or rule is None:
    return []
  flags = [
    key
    for key, rule in tables()["protocol"].items()
    if any(_field(group[0], path) not in [*values, _ABSENT] for path, values in rule["is"].items())
  ]
  splits = tables()["columns"][column]["splits"][rule.get("splits", "without_val")]
  others = {
    "split": group[0]["split_id"] not in splits,
    "twice": bool(runs.repeated_seeds(group)),
  }
  return flags + [key for key, holds in others.items() if holds]


def _field(run: RunResult, path: str) -> Any:
  value = run
  for name in path.split("."):
    if not isinstance(value, Mapping) or name not in value:
      return _ABSENT
    value = value[name]
  return value


def _meanings() -> dict[str, str]:
  flags = {**tables()["flags"], **tables()["protocol"]}
  return {key: flag["text"] for key, flag in flags.items()} | tables()["own"]


def _seeds(group: Group) -> str:
  seeds = [str(run["seed"]) for run in group]
  return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"
