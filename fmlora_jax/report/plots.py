"""Pictures of results: accuracy matrix, accuracy over tasks, facts that the method reports.

Drawn from the fields of result.json with matplotlib's object API: no pyplot, no global state, no
display. Colours are safe for the colour-blind: Okabe and Ito's, viridis, PuOr for signed values.
"""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

# notebooks set it for the programs that they start too, and matplotlib refuses to be imported where
# the backend that it names is not installed
_backend = os.environ.pop("MPLBACKEND", None)
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

if _backend is not None:
  os.environ["MPLBACKEND"] = _backend

from fmlora_jax import methods
from fmlora_jax.cli.text import printable, shortened
from fmlora_jax.report.runs import Groups, RunResult
from fmlora_jax.train import metrics
from fmlora_jax.types import Reported
from fmlora_jax.workdir.files import write_atomically

Target = str | os.PathLike | IO[bytes] | io.BytesIO  # where a PNG goes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
NUMBERS_UP_TO = 20  # tasks; a larger matrix is drawn without numbers
NAMES_UP_TO = 12  # tasks whose names stand at the lower axis, beside their numbers
NAME_WIDTH = 32  # characters of a name
LABELS = 25  # at an axis, at most


def write_plots(result: RunResult, workdir: str | os.PathLike) -> list[Path]:
  """Draws the pictures that `result` has data for into workdir/plots; returns their paths."""
  folder = Path(workdir) / "plots"
  folder.mkdir(parents=True, exist_ok=True)
  paths = {name: folder / f"{name}.png" for name in ("accuracy_matrix", "accuracy_over_tasks")}
  plot_accuracy_matrix(result, paths["accuracy_matrix"])
  plot_accuracy_over_tasks({title(result): {"": [result]}}, paths["accuracy_over_tasks"])
  reports = {fact.field or "": fact for fact in methods.reports(result["method"])}
  facts = {field: fact for field, fact in reports.items() if result.get(field) is not None}
  facts = {field: fact for field, fact in facts.items() if fact.kind is not list or fact.label}
  by_task = {field: fact for field, fact in facts.items() if not fact.is_final}
  for field in [*by_task][:1]:
    paths[field] = folder / f"{field}.png"
    plot_by_task(result, by_task, paths[field])
  for field, fact in facts.items():
    if fact.is_final:
      paths[field] = folder / f"{field}.png"
      plot_pairs(result, field, fact, paths[field])
  return list(paths.values())


def plot_accuracy_matrix(result: RunResult, path: Target) -> None:
  """Draws the accuracy on every task (column) after every task (row), in percent."""
  values = 100 * np.array(result["accuracy"], float)
  figure, axes = _square(len(values))
  lowest = min(10 * np.floor(np.nanmin(values) / 10), 90.0)
  image = axes.imshow(values, cmap="viridis", vmin=lowest, vmax=100)
  _numbers(axes, image, values, "{:.1f}" if len(values) <= 12 else "{:.0f}")
  _name_tasks(axes, result, "tested on", "after task")
  _colour_bar(figure, image, "accuracy (%)")
  _save(figure, axes, title(result), path)


def plot_pairs(result: RunResult, field: str, fact: Reported, path: Target) -> None:
  """Draws a fact about each pair of tasks, in [-1, 1]."""
  values = np.array(result[field], float)
  figure, axes = _square(len(values))
  image = axes.imshow(values, cmap="PuOr", vmin=-1, vmax=1)
  _numbers(axes, image, values, "{:.2f}" if len(values) <= 12 else "{:.1f}")
  _name_tasks(axes, result, "task", "task")
  _colour_bar(figure, image, fact.label or fact.name)
  _save(figure, axes, title(result), path)


def plot_accuracy_over_tasks(panels: Mapping[str, Groups], path: Target) -> None:
  """Draws the accuracy on all tasks seen so far after each task; one panel per title.

  Args:
    panels: title -> {label: runs}. Several runs become their mean, with a band of one standard
      deviation (ddof 1). A single group without a label has no legend.
    path: of the PNG file, or an open binary file.

  Raises:
    ValueError: if there is no panel, or a group without a run.
  """
  if not panels:
    raise ValueError("panels is {}: must have a title with groups of runs")
  for heading, groups in panels.items():
    if empty := [label for label, runs in groups.items() if not runs]:
      raise ValueError(f"panels[{heading!r}][{empty[0]!r}] is []: must have a run")
  figure = Figure(figsize=(6.4 * len(panels), 4.4), dpi=150, layout="constrained")
  for axes, (heading, groups) in zip(
    figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
  ):
    _draw_groups(axes, groups)
    axes.set_title(heading, loc="left", fontsize=11)
  _write(figure, path)


def plot_by_task(result: RunResult, facts: Mapping[str, Reported], path: Target) -> None:
  """Draws facts about each task as bars, one panel below the other."""
  width = min(max(4.8, 0.5 * len(result["task_names"]) + 2), 14)
  figure = Figure(figsize=(width, 1.2 + 1.9 * len(facts)), dpi=150, layout="constrained")
  panels = figure.subplots(len(facts), 1, squeeze=False, sharex=True)[:, 0]
  for axes, (field, fact), colour in zip(panels, facts.items(), COLOURS, strict=False):
    values, form = np.array(result[field], float), "{:g}" if fact.kind is int else "{:.2f}"
    bars = axes.bar(np.arange(len(values)), np.nan_to_num(values), color=colour, width=0.7)
    if len(values) <= NUMBERS_UP_TO:
      labels = ["" if np.isnan(v) else form.format(v) for v in values]
      axes.bar_label(bars, labels, padding=2, fontsize=8)
    axes.set_ylabel(fact.label or fact.name)
    axes.margins(y=0.18)
    _clean(axes)
  _name_below(panels[-1], result)
  panels[-1].set_xlabel("task")
  panels[0].set_title(title(result), loc="left", fontsize=11)
  _write(figure, path)


def title(result: RunResult) -> str:
  """Returns "fm_lora on imagenet_r (cil), seed 1993"."""
  where = f"{result['benchmark']} ({result['scenario']})"
  return f"{result['method']} on {where}, seed {result['seed']}"


def accuracy_over_tasks(results: Sequence[RunResult]) -> np.ndarray:
  """Returns A_w(t) in percent of runs with equally many tasks, [runs, T]."""
  return np.stack(
    [metrics.pooled(np.array(r["accuracy"], float), np.array(r["n_test"])) for r in results]
  )


def _draw_groups(axes: Axes, groups: Groups) -> None:
  for i, (label, results) in enumerate(groups.items()):
    curves = accuracy_over_tasks(results)
    mean, seen = curves.mean(axis=0), np.arange(1, curves.shape[1] + 1)
    colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
    dashes = ("-", "--", ":", "-.")[i // len(COLOURS) % 4]
    name = f"{label} (n = {len(results)})" if len(results) > 1 else label
    line = axes.plot(seen, mean, dashes, label=name, color=colour, marker=marker)
    line[0].set(markersize=4.5, linewidth=1.6)
    if len(results) > 1:
      std = curves.std(axis=0, ddof=1)
      axes.fill_between(seen, mean - std, mean + std, color=colour, alpha=0.18, linewidth=0)
  axes.set_xlabel("tasks learned")
  axes.set_ylabel("accuracy on all tasks so far (%)")
  axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
  runs = [run for results in groups.values() for run in results]
  names = {tuple(run["task_names"]) for run in runs}
  if len(names) == 1 and len(*names) <= NAMES_UP_TO:  # not of seeds with other orders
    _name_below(axes, runs[0], first=1)
  axes.grid(axis="y", color="0.9")
  axes.set_axisbelow(True)
  _clean(axes)
  if any(groups):
    axes.legend(frameon=False, fontsize=8)


def _square(tasks: int) -> tuple[Figure, Axes]:
  side = min(max(3.6, 0.5 * tasks + 1.6), 10)
  figure = Figure(figsize=(side + 1.3, side), dpi=150, layout="constrained")
  return figure, figure.subplots()


def _numbers(axes: Axes, image: AxesImage, values: np.ndarray, form: str) -> None:
  """Writes the values into their cells, light on dark and dark on light."""
  if len(values) > NUMBERS_UP_TO:
    return
  cmap: Colormap = image.cmap
  for (row, column), value in np.ndenumerate(values):
    if not np.isnan(value):
      red, green, blue, _ = cmap(image.norm(value))
      is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5  # perceived brightness
      style = {"color": "white" if is_dark else "black", "fontsize": 8 if len(values) <= 12 else 6}
      axes.text(column, row, form.format(value), ha="center", va="center", **style)


def _name_tasks(axes: Axes, result: RunResult, xlabel: str, ylabel: str) -> None:
  _name_below(axes, result)
  axes.set_yticks(*_ticks(result), fontsize=8)
  axes.set_xlabel(xlabel)
  axes.set_ylabel(ylabel)
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)


def _name_below(axes: Axes, result: RunResult, first: int = 0) -> None:
  """Labels the lower axis with the tasks' numbers and, if they are few, their names.

  Args:
    first: where the first task is.
  """
  positions, labels = _ticks(result)
  style = {"rotation": 30, "ha": "right"}
  if len(result["task_names"]) > NAMES_UP_TO:
    labels, style = [label.partition(":")[0] for label in labels], {}
  axes.set_xticks([first + position for position in positions], labels, fontsize=8, **style)


def _ticks(result: RunResult) -> tuple[Sequence[int], list[str]]:
  """Returns the tasks that are labelled, and their labels such as "2: cat, dog"."""
  names = result["task_names"]
  shown = range(0, len(names), -(-len(names) // LABELS))
  return shown, [f"{task + 1}: {shortened(names[task], NAME_WIDTH)}" for task in shown]


def _colour_bar(figure: Figure, image: AxesImage, label: str) -> None:
  bar = figure.colorbar(image, label=label, shrink=0.9, pad=0.03)
  bar.outline.set_visible(False)


def _clean(axes: Axes) -> None:
  axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, axes: Axes, heading: str, path: Target) -> None:
  axes.set_title(heading, loc="left", fontsize=11)
  _write(figure, path)


def _write(figure: Figure, path: Target) -> None:
  for text in figure.findobj(Text):
    text.set(text=printable(text.get_text()), parse_math=False)  # "$" in a name is no formula
  canvas = FigureCanvasAgg(figure)
  if isinstance(path, (str, os.PathLike)):
    canvas.print_png(picture := io.BytesIO())
    write_atomically(Path(path), picture.getvalue())
  else:
    canvas.print_png(path)
