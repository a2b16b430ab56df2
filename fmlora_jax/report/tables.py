"""Tables of finished runs side by side, as mean ± std over seeds."""

import collections
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fmlora_jax import methods
from fmlora_jax.report.runs import Group, RunResult, group, mean, mean_std, repeated_seeds, weights
from fmlora_jax.workdir.log import duration

Cell = tuple[str, bool]  # text, and whether it is the best of its column

SCORES = {"Acc": "acc", "AAA": "aaa", "forgetting": "forgetting", "learning": "learning_accuracy"}
COSTS = ("stored", "trained", "statistics", "passes")
REPORTED = methods.columns()  # header -> field of result.json, name of its format in FORMATS
HEADER = ("run", "seeds", *SCORES, *COSTS, *REPORTED, "wall time")
LEGEND = (
  "Acc, AAA: % of the test images (or as headed) of all tasks so far, at the end and on average.\n"
  "learning: accuracy right after each task. ±: standard deviation over seeds (ddof 1).\n"
  "stored, trained: numbers of parameters. statistics: bytes of numbers computed from the data\n"
  "and kept, such as means of features; images never are. passes: forward passes for an image in\n"
  "training/at test time, +n over a task's images between tasks.\n"
  f"{', '.join(REPORTED)}: of each task, the most frequent over seeds."
)


def rows(groups: Mapping[str, Group]) -> list[list[Cell]]:
  """Returns the table's cells under HEADER; where there are rivals the best score is marked."""
  means = {
    name: [mean([run[field] for run in runs]) for runs in groups.values()]
    for name, field in SCORES.items()
  }
  best = {name: max(means[name]) for name in ("Acc", "AAA") if len(groups) > 1}
  table = []
  for i, (label, runs) in enumerate(groups.items()):
    cells = [(label, False), (str(len(runs)), False)]
    for name, field in SCORES.items():
      is_best = name in best and f"{means[name][i]:.2f}" == f"{best[name]:.2f}"
      cells.append((mean_std([run[field] for run in runs]), is_best))
    for name in ("stored_total", "trained"):
      cells.append((_count(mean([run["params"][name] for run in runs])), False))
    cells.append((_bytes(mean([run["rehearsal_bytes"] for run in runs])), False))
    cells.append((_passes(runs[0]["passes"]), False))
    for field, form in REPORTED.values():
      cells.append((FORMATS[form]([run.get(field) for run in runs]), False))
    cells.append((duration(mean([run["wall_seconds"]["total"] for run in runs])), False))
    table.append(cells)
  return table


def warnings(groups: Mapping[str, Group]) -> list[str]:
  """Returns what a reader must know of the rows of one table, one line each.

  What makes them unfit to be compared, and the caveats of their methods.
  """
  looks = {
    "weights": lambda run: " ".join(weights(run)),
    "split": lambda run: f"{run['split_id']} {str(run['manifest_sha256'])[:8]}",
    "epochs": lambda run: str(run["epochs"]),
    "normalisation": lambda run: str(run["normalisation"]),
    "augmentation": lambda run: str(run["augmentation"]),
    "heads": _head,
  }
  lines = []
  for name, look in looks.items():
    labels = collections.defaultdict(list)
    for label, runs in groups.items():
      for value in sorted({look(run) for run in runs}):
        labels[value].append(label)
    if len(labels) > 1:
      values = "; ".join(f"{value} ({', '.join(who)})" for value, who in labels.items())
      lines.append(f"{name} differ: {values}")
  for label, runs in groups.items():
    twice = ", ".join(map(str, repeated_seeds(runs)))
    if twice:
      lines.append(f"{label} has several runs of seed {twice}: ± is not over seeds alone")
    caveats = dict.fromkeys(caveat for run in runs for caveat in run["caveats"])
    lines += [f"{label}: {caveat}" for caveat in caveats]
  return lines


def _head(run: RunResult) -> str:
  """Returns the head in words; older results know less of it."""
  head, method = run["config"].get("head", {}), run["config"]["method"]
  aligned = any(group.get("alignment", {}).get("epochs") for group in (head, method))
  words = [head.get("kind", "linear"), f"from {head.get('start', 'zero')}"]
  return " ".join([*words, "and aligned"] if aligned else words)


def costs(run: RunResult) -> list[str]:
  """Returns what a run costs and keeps, in three lines."""
  params, passes = run["params"], run["passes"]
  added = " ".join(map(_count, params["stored_per_task"]))
  kept = "no image and no statistics of the data (rehearsal-free)"
  if run["rehearsal_bytes"]:
    kept = f"no image, but {_bytes(run['rehearsal_bytes'])} of statistics of the data"
  return [
    f"parameters {_count(params['trained'])} trained in the last task, "
    f"{_count(params['stored_total'])} stored beside the backbone; added by each task: {added}",
    f"keeps      {kept}; forward passes {_passes(passes)}",
    f"time       {_times(run['wall_seconds'])}",
  ]


def protocols(groups: Mapping[str, Group]) -> list[str]:
  """Returns one line for each row of a table: how its numbers came about; none of old results."""
  return [
    f"protocol {label}: {line}"
    for label, runs in groups.items()
    for line in sorted({_protocol(run) for run in runs if "protocol" in run})
  ]


def _protocol(run: RunResult) -> str:
  card, tag_and_hash = run["protocol"], " ".join(weights(run))
  copies, alone = card["copies"], card["checks"]["batch_of_one"]
  num_copies = "not looked for"
  if copies is not None:
    num_copies = str(sum(n for n in copies.values() if isinstance(n, int)))
  read = "read" if card["validation_read_by_method"] else "not read"
  parts = [
    f"kept of old tasks {_bytes(card['old_image_bytes'])} of images, "
    f"{_bytes(card['old_statistics_bytes'])} of statistics",
    f"task {'given' if card['task_identity_at_test'] else 'not given'} at test time",
    f"measured on {card['measured_on']} images of {run['split_id']}, copies across its parts "
    f"{num_copies}",
    f"{card['validation_images']} validation images {read} by the method",
    f"weights {tag_and_hash}, pixels {run['normalisation']}",
    f"on {'; then '.join(run['devices'])}",
    f"right alone {alone['right_alone']}, in a batch {alone['right_together']} of "
    f"{alone['images']} images",
  ]
  return "; ".join(parts)


def show(results: Iterable[RunResult], console: Console, notes: Iterable[str] = ()) -> None:
  """Prints one table for each heading, with its warnings, to a terminal or as plain text."""
  for heading, groups in group(results).items():
    line(console, f"\n{heading}", "bold")
    _print_rows(rows(groups), console)
    for text in warnings(groups):
      line(console, f"warning: {text}", "yellow")
    for text in protocols(groups):
      line(console, text, "dim")
  line(console, f"\n{LEGEND}", "dim")
  for note in notes:
    line(console, note, "yellow")


def _print_rows(cells: Sequence[Sequence[Cell]], console: Console) -> None:
  """Prints one table, or on a narrow terminal several below each other; cuts no number."""
  endless = console.options.update(width=10_000)  # measure() never answers more than the width

  def width(columns):
    return console.measure(_table(cells, columns), options=endless).maximum

  whole = range(len(HEADER))
  if not console.is_terminal:
    Console(file=console.file, width=width(whole)).print(_table(cells, whole))
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
  for i, columns in enumerate(parts):
    if i:
      console.print()
    console.print(_table(cells, columns))


def markdown(results: Iterable[RunResult], notes: Iterable[str] = ()) -> str:
  """Returns the tables, warnings and notes as Markdown."""
  parts = []
  for heading, groups in group(results).items():
    lines = ["| " + " | ".join(HEADER) + " |", "|---|" + "---:|" * (len(HEADER) - 1)]
    for cells in rows(groups):
      texts = [text.replace("|", r"\|") for text, _ in cells]
      marked = [f"**{t}**" if best else t for t, (_, best) in zip(texts, cells, strict=True)]
      lines.append("| " + " | ".join(marked) + " |")
    parts += [f"### {heading}", "\n".join(lines)]
    parts += [f"> warning: {line}" for line in warnings(groups)]
    parts += [f"> {line}" for line in protocols(groups)]
  return "\n\n".join([*parts, LEGEND, *(f"> {line}" for line in notes)])


def _count(number: float) -> str:
  """Returns 950, 12.0k, 1.23M or 85.8M."""
  for unit, size in (("M", 1e6), ("k", 1e3)):
    if number >= size:
      return f"{number / size:.3g}{unit}"
  return f"{number:.0f}"


def _bytes(number: float) -> str:
  """Returns 0 B, 950 B, 12.0 kB or 1.23 MB."""
  for unit, size in (("MB", 1e6), ("kB", 1e3)):
    if number >= size:
      return f"{number / size:.3g} {unit}"
  return f"{number:.0f} B"


def _passes(passes: Mapping[str, int]) -> str:
  """Returns "2/2", in training and at test time, or "1/1 +1" with one between tasks."""
  between = f" +{passes['between']}" if passes["between"] else ""
  return f"{passes['train']}/{passes['test']}{between}"


def _times(seconds: Mapping[str, float]) -> str:
  """Returns "1:03 min: import 2.1 s, train 40.0 s ...", the total and the kinds that it has."""
  kinds = (f"{kind} {duration(s)}" for kind, s in seconds.items() if kind != "total")
  return f"{duration(seconds['total'])}: {', '.join(kinds)}"


def _modes(values: Sequence[Sequence[int] | None]) -> str:
  """Returns the most frequent value of each task: "8" if all agree, else the list or its range."""
  known = [run for run in values if run is not None]
  if not known:
    return "-"
  modes = [collections.Counter(column).most_common(1)[0][0] for column in zip(*known, strict=True)]
  if len(set(modes)) == 1:
    return str(modes[0])
  if len(modes) <= 10:
    return " ".join(map(str, modes))
  return f"{min(modes)}..{max(modes)}, mean {np.mean(modes):.1f}"


FORMATS = {"modes": _modes}  # of columns that methods declare: values of each run -> cell


def _table(cells: Sequence[Sequence[Cell]], columns: Iterable[int]) -> Table:
  columns = list(columns)
  table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
  for i in columns:
    table.add_column(HEADER[i], justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
  for row in cells:
    table.add_row(*(Text(row[i][0], style="bold green" if row[i][1] else "") for i in columns))
  return table


def line(console: Console, text: str, style: str = "") -> None:
  """Prints one line, which a terminal may wrap."""
  console.print(Text(text, style=style), soft_wrap=True)
