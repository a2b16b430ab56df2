"""Finished runs: loaded from folders, grouped by their settings, averaged over seeds."""

import collections
import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmlora_jax.config import FREE_FIELDS, Config
from fmlora_jax.config.diff import leaves
from fmlora_jax.workdir.identity import require_own_result
from fmlora_jax.workdir.log import METRICS
from fmlora_jax.workdir.result_file import RESULT, read_result

RunResult = Mapping[str, Any]  # the contents of a result.json
Group = Sequence[RunResult]  # runs that differ in the seed only
Groups = Mapping[str, Group]  # label of a row -> its runs
Numbers = Sequence[int | float | None]

# settings that a row's name states wherever they are not empty, with the value that older runs have
_STATED = {"method.drs.ranks": []}


def load(paths: Iterable[str | os.PathLike]) -> tuple[list[RunResult], list[str]]:
  """Returns the results at or below `paths`, each once, and a line for every run left out.

  A run that was made twice, with the same parameters, counts once.

  Raises:
    ValueError: if a path does not exist or holds no result, or no result is readable.
  """
  results, notes, errors, seen = {}, [], [], set()
  for path in map(Path, paths):
    files, unreadable = _find(path, RESULT) if os.path.isdir(path) else ([path], [])
    notes += [f"left out: {problem}" for problem in unreadable]
    if not files and unreadable:
      raise ValueError(unreadable[0])
    if not files:
      raise ValueError(f"{path}: no {RESULT} in this folder or below; only finished runs have one")
    for file in (f for f in files if f.resolve() not in seen):
      seen.add(file.resolve())
      try:
        result = read_result(file)
        require_own_result(file, result)
        same = _fingerprint(result), result["seed"], result["params_sha256"]
        first, _ = results.setdefault(same, (file, result))
        if first is not file:
          notes.append(f"left out: {file.parent} repeats {first.parent}, with the same parameters")
      except ValueError as error:
        if not file.exists():
          raise
        errors.append(error)
        notes.append(f"left out: {error}")
    notes += _unfinished(path)
  if not results and len(errors) == 1:
    raise errors[0]
  if not results:
    raise ValueError(f"no readable {RESULT}: {'; '.join(notes)}")
  return [result for _, result in results.values()], notes


def _find(top: Path, name: str) -> tuple[list[Path], list[str]]:
  """Returns what has a name in a folder or below, and a line for each folder that is unreadable."""
  errors: list[OSError] = []
  tree = os.walk(top, onerror=errors.append)
  found = sorted(Path(folder, name) for folder, dirs, files in tree if name in {*dirs, *files})
  return found, [f"{e.filename} can't be read ({e.strerror})" for e in errors]


def _unfinished(path: Path) -> list[str]:
  """Returns a line for every unfinished run below `path`."""
  logs, _ = _find(path, METRICS)
  folders = [log.parent for log in logs if not (log.parent / RESULT).exists()]
  return [f"left out: {run} is not finished; the same command resumes it" for run in folders]


def group(results: Iterable[RunResult]) -> dict[str, Groups]:
  """Returns {heading: {label: runs that differ in the seed only}}, in order of appearance."""
  sections = collections.defaultdict(lambda: collections.defaultdict(list))
  for result in results:
    sections[_heading(result)][_fingerprint(result)].append(result)
  return {
    heading: dict(zip(_labels(list(groups.values())), groups.values(), strict=True))
    for heading, groups in sections.items()
  }


def differences(groups: Sequence[Group], always: Iterable[str] = ()) -> list[str]:
  """Returns for each group the settings in which groups of its method differ.

  Args:
    groups: with different settings, splits or weights.
    always: settings to state even where they are all the same, such as "drs.rank".

  Returns:
    Texts such as "drs.rank=4 prompt.num_tokens=0"; empty where nothing differs.
  """
  runs = [group[0] for group in groups]
  fields = [_settings(run) for run in runs]
  texts = _differences(runs, fields, always)
  if len({(run["method"], text) for run, text in zip(runs, texts, strict=True)}) < len(runs):
    for run, settings in zip(runs, fields, strict=True):  # only the split or the weights differ
      settings |= {"split_id": run["split_id"], "weights": ":".join(weights(run))}
    texts = _differences(runs, fields, always)
  return texts


def mean_std(values: Numbers) -> str:
  """Returns "77.88 ± 0.21" (ddof 1), "77.88 ±    -" for one value, "-" if one is missing."""
  average = mean(values)
  if np.isnan(average):
    return "-"
  return f"{average:.2f} ± " + (
    f"{np.std(np.asarray(values, float), ddof=1):.2f}" if len(values) > 1 else "   -"
  )


def mean(values: Numbers) -> float:
  """Returns the mean, NaN if a value is missing."""
  return float(np.mean(np.array(values, float)))  # None becomes NaN


def weights(run: RunResult) -> tuple[str, str]:
  """Returns the tag of the pre-trained weights and the start of their sha256."""
  return run["weights"]["tag"], str(run["weights"]["sha256"])[:8]


def repeated_seeds(group: Group) -> list[int]:
  """Returns the seeds of which the group has several runs: ± is not over seeds alone."""
  seeds = collections.Counter(run["seed"] for run in group)
  return [seed for seed, count in seeds.items() if count > 1]


def _heading(run: RunResult) -> str:
  tasks, measured = len(run["n_test"]), _settings(run).get("tasks.evaluate_on", "test")
  images = ", validation images" if measured == "val" else ""
  return f"{run['benchmark']} ({run['scenario']}), {tasks} task{'s' if tasks > 1 else ''}{images}"


def _fingerprint(run: RunResult) -> str:
  tag_and_hash = [run["weights"]["tag"], run["weights"]["sha256"]]
  return json.dumps([run["method"], run["split_id"], tag_and_hash, _settings(run)], sort_keys=True)


def _settings(run: RunResult) -> dict[str, Any]:
  """Returns the config as {"group.field": value}, without the seed and what changes no number.

  A field that is newer than the run has its default, which leaves the numbers as they were.
  """
  settings = _defaults() | _STATED | dict(leaves(run["config"]))
  return {name: settings[name] for name in settings if name not in ("seed", *FREE_FIELDS)}


@functools.cache
def _defaults() -> dict[str, Any]:
  """Returns the defaults of the settings that all methods share, as `leaves` of JSON values."""
  shared = {name: v for name, v in dataclasses.asdict(Config()).items() if name != "method"}
  return dict(leaves(json.loads(json.dumps(shared))))


def _labels(groups: Sequence[Group]) -> list[str]:
  """Returns the method of each group, with the settings in which groups of that method differ."""
  texts = differences(groups)
  return [f"{g[0]['method']} {text}".strip() for g, text in zip(groups, texts, strict=True)]


def _differences(
  runs: Sequence[RunResult], fields: Sequence[Mapping[str, Any]], always: Iterable[str]
) -> list[str]:
  texts = []
  for run, settings in zip(runs, fields, strict=True):
    rivals = [f for r, f in zip(runs, fields, strict=True) if r["method"] == run["method"]]
    names = {name for f in rivals for name in f}
    differ = {name for name in names if any(f.get(name) != settings.get(name) for f in rivals)}
    stated = {name for name in _STATED if settings[name]}
    shown = sorted(differ | stated | (names & set(always)))
    texts.append(" ".join(f"{_short(name)}={_value(settings.get(name))}" for name in shown))
  return texts


def _short(name: str) -> str:
  """Returns the name of a setting beside its method's name: "method.rank" is "rank"."""
  return name.removeprefix("method.")


def _value(value: Any) -> str:
  if isinstance(value, (list, tuple)):
    return f"({','.join(map(_value, value))})"
  return f"{value:g}" if isinstance(value, float) else str(value)
