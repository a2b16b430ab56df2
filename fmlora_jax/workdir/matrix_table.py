"""The accuracy matrix as a table for the console."""

from collections.abc import Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fmlora_jax.cli.text import shortened
from fmlora_jax.train import metrics

NAME_WIDTHS = (32, 12)  # characters of a task's name at its row, the most that fit


def matrix_table(
  accuracy: metrics.Accuracy, n_test: metrics.Counts, console: Console, names: Sequence[str] = ()
) -> Table:
  """Returns the matrix in percent as a table that fits the console.

  Where it is too wide, digits are dropped first, then names, then columns in the middle.

  Args:
    names: of the tasks, at the rows; none shows none.
  """
  tasks = len(accuracy)
  ends = [[*range(k), *range(tasks - k, tasks)] for k in range(min(8, tasks // 2), 0, -1)]
  widths = (*NAME_WIDTHS, 0) if names else (0,)
  choices = [(digits, range(tasks), width) for width in widths for digits in (1, 0)]
  choices += [(0, shown, 0) for shown in ends]
  endless = console.options.update(width=10_000)  # measure() never returns more than the width
  for digits, shown, width in choices if tasks <= 24 else choices[-len(ends) :]:
    labels = [shortened(name, width) for name in names] if width else []
    table = _table(accuracy, metrics.pooled(accuracy, n_test), list(shown), digits, labels)
    if console.measure(table, options=endless).maximum <= console.width:
      break
  return table


def _table(
  accuracy: metrics.Accuracy,
  total: np.ndarray,
  shown: list[int],
  digits: int,
  labels: Sequence[str],
) -> Table:
  """Returns the rows and columns `shown`, with an ellipsis where some are left out."""
  gaps = [i for i, task in enumerate(shown) if i and task != shown[i - 1] + 1]
  table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1), header_style="dim")

  def cells(values):
    values = list(values)
    for i in gaps:
      values.insert(i, "…")
    return values

  table.add_column("after task", justify="right", no_wrap=True)
  if labels:
    table.add_column(no_wrap=True)
  for name in [*cells(f"{task + 1}" for task in shown), "all"]:
    table.add_column(name, justify="right", no_wrap=True)
  for i, row in enumerate(shown):
    if i in gaps:
      table.add_row(*["…"] * len(table.columns))
    numbers = cells("" if row < j else f"{100 * accuracy[row, j]:.{digits}f}" for j in shown)
    is_last = row == len(accuracy) - 1
    label = [Text(labels[row])] if labels else []
    texts = [f"{row + 1}", *label, *numbers, f"{total[row]:.2f}"]
    table.add_row(*texts, style="bold" if is_last else None)
  return table
