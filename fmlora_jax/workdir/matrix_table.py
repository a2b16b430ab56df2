"""The accuracy matrix as a table for the console."""

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from fmlora_jax.train import metrics


def matrix_table(accuracy: metrics.Accuracy, n_test: metrics.Counts, console: Console) -> Table:
  """Returns the matrix in percent as a table that fits the console.

  Where it is too wide, digits are dropped first, then columns in the middle.
  """
  tasks = len(accuracy)
  ends = [[*range(k), *range(tasks - k, tasks)] for k in range(min(8, tasks // 2), 0, -1)]
  choices = [(1, range(tasks)), (0, range(tasks)), *((0, shown) for shown in ends)]
  endless = console.options.update(width=10_000)  # measure() never returns more than the width
  for digits, shown in choices if tasks <= 24 else choices[2:]:
    table = _table(accuracy, metrics.pooled(accuracy, n_test), list(shown), digits)
    if console.measure(table, options=endless).maximum <= console.width:
      break
  return table


def _table(accuracy: metrics.Accuracy, total: np.ndarray, shown: list[int], digits: int) -> Table:
  """Returns the rows and columns `shown`, with an ellipsis where some are left out."""
  gaps = [i for i, task in enumerate(shown) if i and task != shown[i - 1] + 1]
  table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1), header_style="dim")

  def cells(values):
    values = list(values)
    for i in gaps:
      values.insert(i, "…")
    return values

  for name in ["after task", *cells(f"{task + 1}" for task in shown), "all"]:
    table.add_column(name, justify="right", no_wrap=True)
  for i, row in enumerate(shown):
    if i in gaps:
      table.add_row(*["…"] * len(table.columns))
    numbers = cells("" if row < j else f"{100 * accuracy[row, j]:.{digits}f}" for j in shown)
    is_last = row == len(accuracy) - 1
    table.add_row(f"{row + 1}", *numbers, f"{total[row]:.2f}", style="bold" if is_last else None)
  return table
