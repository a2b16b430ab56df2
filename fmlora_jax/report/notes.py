"""Lines about runs that stand beside their numbers: costs, protocol, and reasons for doubt."""

import collections
from collections.abc import Mapping

from fmlora_jax.cli.text import duration, task_list
from fmlora_jax.report.columns import bytes_text, count_text, passes_text
from fmlora_jax.report.runs import Groups, RunResult, repeated_seeds, weights


def costs(run: RunResult) -> list[str]:
  """Returns what a run costs and stores, in three lines."""
  params, stored = run["params"], run["statistics_bytes"]
  added = " ".join(map(count_text, params["stored_per_task"]))
  statistics = "no statistics of the data (rehearsal-free)"
  if stored:
    statistics = f"{bytes_text(stored)} of statistics of the data"
  return [
    f"parameters {count_text(params['trained'])} trained in the last task, "
    f"{count_text(params['stored_total'])} stored beside the backbone; added by each task: {added}",
    f"stored     no image, {statistics}; forward passes {passes_text(run['passes'])}",
    f"time       {_times(run['wall_seconds'])}",
  ]


def warnings(groups: Groups) -> list[str]:
  """Returns why the rows of one table may not be comparable, and the notes of their methods."""
  lines = []
  for name, value in _COMPARED.items():
    labels = collections.defaultdict(list)
    for label, runs in groups.items():
      for text in sorted({value(run) for run in runs}):
        labels[text].append(label)
    if len(labels) > 1:
      values = "; ".join(f"{text} ({', '.join(who)})" for text, who in labels.items())
      lines.append(f"{name} differ: {values}")
  for label, runs in groups.items():
    twice = ", ".join(map(str, repeated_seeds(runs)))
    if twice:
      lines.append(f"{label} has several runs of seed {twice}: ± is not over seeds alone")
  caveats = collections.defaultdict(dict)  # an ordered set of the labels of each
  for label, runs in groups.items():
    for caveat in (caveat for run in runs for caveat in run["caveats"]):
      caveats[caveat][label] = None
  return lines + [f"{', '.join(labels)}: {caveat}" for caveat, labels in caveats.items()]


def tasks(groups: Groups) -> list[str]:
  """Returns one line for each order of tasks in a table: the seeds of its runs, and the tasks."""
  seeds = collections.defaultdict(set)
  for run in (run for runs in groups.values() for run in runs):
    seeds[tuple(run["task_names"])].add(run["seed"])
  return [
    f"tasks of seed {', '.join(map(str, sorted(of_order)))}: {task_list(names)}"
    for names, of_order in seeds.items()
  ]


def protocols(groups: Groups) -> list[str]:
  """Returns how the numbers of a table came about, and those of a row; none of old results."""
  cards = [
    (label, card)
    for label, runs in groups.items()
    for card in sorted({_protocol(run) for run in runs if run["protocol"]})
  ]
  of_all = set.intersection(*({*card} for _, card in cards)) if len(cards) > 1 else set()
  lines = [("of all rows", [part for part in cards[0][1] if part in of_all])] if cards else []
  lines += [(label, [part for part in card if part not in of_all]) for label, card in cards]
  return [f"protocol {label}: {'; '.join(parts)}" for label, parts in lines if parts]


def _protocol(run: RunResult) -> tuple[str, ...]:
  card, copies = run["protocol"], run["protocol"]["copies"]
  num_copies = "not counted"
  if copies is not None:
    num_copies = str(sum(n for name, n in copies.items() if name.endswith(("_train", "_val"))))
    if copies.get("in_two_classes"):
      num_copies += f", images in two classes {copies['in_two_classes']}"
  read = "read" if card["validation_read_by_method"] else "not read"
  return (
    f"stored of old tasks {bytes_text(card['old_image_bytes'])} of images, "
    f"{bytes_text(card['old_statistics_bytes'])} of statistics",
    f"task {'given' if card['task_identity_at_test'] else 'not given'} at test time",
    f"head {_head(run)}",
    f"measured on {card['measured_on']} images of {run['split_id']}, copies across its splits "
    f"{num_copies}",
    f"{card['validation_images']} validation images {read} by the method",
    f"weights {' '.join(weights(run))}, pixels {run['normalisation']}",
    f"on {'; then '.join(run['devices'])}",
  )


def _head(run: RunResult) -> str:
  """Returns the head in words; older results know less of it."""
  head, method = run["config"].get("head", {}), run["config"]["method"]
  aligned = any(group.get("alignment", {}).get("epochs") for group in (head, method))
  words = [head.get("kind", "linear"), f"from {head.get('start', 'zero')}"]
  words += ["and aligned"] * aligned
  if (drift := head.get("drift", "none")) != "none":
    words.append(f"with {drift} drift")
  if head.get("loss", "task") != "task":
    words.append(f"and loss over classes {head['loss']}")
  return " ".join(words)


def _environment(run: RunResult) -> str:
  """Returns the variables that decide about numbers; those that are not set are left out."""
  values = run["environment"] or {}
  return ", ".join(f"{k}={v}" for k, v in values.items() if v not in (None, "")) or "not recorded"


_COMPARED = {  # what must not differ between rows -> its text in a run
  "weights": lambda run: " ".join(weights(run)),
  "split": lambda run: f"{run['split_id']} {str(run['manifest_sha256'])[:8]}",
  "epochs": lambda run: str(run["epochs"]),
  "normalisation": lambda run: str(run["normalisation"]),
  "augmentation": lambda run: str(run["augmentation"]),
  "heads": _head,
  "environments": _environment,
}


def _times(seconds: Mapping[str, float]) -> str:
  """Returns "1:03 min: import 2.1 s, train 40.0 s ...": the total, then each kind."""
  kinds = (f"{kind} {duration(s)}" for kind, s in seconds.items() if kind != "total")
  return f"{duration(seconds['total'])}: {', '.join(kinds)}"
