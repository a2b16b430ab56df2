"""Tables of finished runs side by side, as mean ± std over seeds: for a terminal or in Markdown."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fmlora_jax.report.columns import LEGEND, Column, columns
from fmlora_jax.report.notes import protocols, tasks, warnings
from fmlora_jax.report.runs import Groups, RunResult, group, mean

Cell = tuple[str, bool]  # text, and whether it is the best of its column


def header(groups: Groups) -> list[str]:
  """Returns the heads of the columns of `rows`."""
  return ["run", *(column.name for column in columns(groups))]


def rows(groups: Groups) -> list[list[Cell]]:
  """Returns the cells under `header`; where there are rivals the best score is marked."""
  by_column = [
    zip([column.text(runs) for runs in groups.values()], _is_best(column, groups), strict=True)
    for column in columns(groups)
  ]
  return [[(label, False), *cells] for label, *cells in zip(groups, *by_column, strict=True)]


def _is_best(column: Column, groups: Groups) -> list[bool]:
  """Returns for each row whether its score, as printed, is the best of several."""
  if not column.ranked or len(groups) < 2:
    return [False] * len(groups)
  means = [mean([run[column.ranked] for run in runs]) for runs in groups.values()]
  return [f"{score:.2f}" == f"{max(means):.2f}" for score in means]


def show(results: Iterable[RunResult], console: Console, notes: Iterable[str] = ()) -> None:
  """Prints one table for each heading, with its warnings, to a terminal or as plain text."""
  for heading, groups in group(results).items():
    line(console, f"\n{heading}", "bold")
    _print_rows(header(groups), rows(groups), console)
    for text in warnings(groups):
      line(console, f"warning: {text}", "yellow")
    for text in [*tasks(groups), *protocols(groups)]:
      line(console, text, "dim")
  line(console, f"\n{LEGEND}", "dim")
  for note in notes:
    line(console, note, "yellow")


def markdown(results: Iterable[RunResult], notes: Iterable[str] = ()) -> str:
  """Returns the tables, warnings and notes as Markdown."""
  parts = []
  for heading, groups in group(results).items():
    heads = header(groups)
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for cells in rows(groups):
      texts = [text.replace("|", r"\|") for text, _ in cells]
      marked = [f"**{t}**" if best else t for t, (_, best) in zip(texts, cells, strict=True)]
      lines.append("| " + " | ".join(marked) + " |")
    parts += [f"### {heading}", "\n".join(lines)]
    parts += [f"> warning: {line}" for line in warnings(groups)]
    parts += [f"> {line}" for line in [*tasks(groups), *protocols(groups)]]
  return "\n\n".join([*parts, LEGEND, *(f"> {line}" for line in notes)])


def line(console: Console, text: str, style: str = "") -> None:
  """Prints one line, which a terminal may wrap."""
  console.print(Text(text, style=style), soft_wrap=True)


def _print_rows(heads: Sequence[str], cells: Sequence[Sequence[Cell]], console: Console) -> None:
  """Prints one table, or on a narrow terminal several below each other; cuts no number."""
  endless = console.options.update(width=10_000)  # measure() never answers more than the width

  def width(part):
    return console.measure(_table(heads, cells, part), options=endless).maximum

  whole = range(len(heads))
  if not console.is_terminal:
    Console(file=console.file, width=width(whole)).print(_table(heads, cells, whole))
    return
  if width(whole) > console.width and width([0]) > console.width / 3:  # numbers for long names
    for i, row in enumerate(cells):
      line(console, f"{i + 1}  {row[0][0]}")
    cells = [[(str(i + 1), False), *row[1:]] for i, row in enumerate(cells)]
  parts = [[0]]
  for i in whole[1:]:
    if len(parts[-1]) > 1 and width([*parts[-1], i]) > console.width:
      parts.append([0])
    parts[-1].append(i)
  for i, part in enumerate(parts):
    if i:
      console.print()
    console.print(_table(heads, cells, part))


def _table(heads: Sequence[str], cells: Sequence[Sequence[Cell]], part: Sequence[int]) -> Table:
  """Returns the columns at the positions `part`."""
  table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
  for i in part:
    table.add_column(heads[i], justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
  for row in cells:
    table.add_row(*(Text(row[i][0], style="bold green" if row[i][1] else "") for i in part))
  return table
