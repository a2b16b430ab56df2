"""`task_file.json`: the records of each task, with which another run has the same tasks."""

import base64
import dataclasses
import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int8

from fmlora_jax.config import ConfigError, TasksConfig
from fmlora_jax.tasks.sequence import (
  SPLIT_CODES,
  DataSource,
  Task,
  TaskSequence,
  make_manifest,
  make_split,
  make_split_id,
  refuse_empty_classes,
  task_name,
)

FILE = "task_file.json"
NUMBER = r"[0-9]+(\.[0-9]+)?(e[+-][0-9]+)?"
DRAWN = re.compile(  # the last part of a split_id of which something was drawn
  rf"val(own|(?P<val_fraction>{NUMBER}))-test(own|(?P<test_from>val)|(?P<test_fraction>{NUMBER}))"
  r"(-seed(?P<split_seed>[0-9]{1,20}))?"
)


def dump_task_file(sequence: TaskSequence) -> str:
  """Returns the file's text; on the same data `to_sequence` makes the same sequence of it."""
  is_dil = sequence.scenario == "dil"
  fields = {
    "benchmark": sequence.source.name,
    "source_sha256": sequence.source.digest,
    "num_records": len(sequence.labels),
    "scenario": sequence.scenario,
    "split_id": sequence.split_id,
    "manifest_sha256": sequence.manifest_sha256,
    "class_order": sequence.class_order,
    "class_names": sequence.class_names,
    "tasks": [
      {"name": task.name if is_dil else _positions(task.lo, task.hi), "lo": task.lo, "hi": task.hi}
      | {split: getattr(task, split).tolist() for split in SPLIT_CODES}
      for task in sequence.tasks
    ],
  }
  lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
  return "{\n" + ",\n".join(lines) + "\n}\n"


def _positions(lo: int, hi: int) -> str:
  """Returns "classes 0-4": the file names a task of new classes by positions in class_order."""
  return f"class {lo}" if hi - lo == 1 else f"classes {lo}-{hi - 1}"


def load(config: TasksConfig) -> dict[str, Any]:
  """Returns the fields of the file that `config.task_file` names; most are unchecked.

  Raises:
    ConfigError: if it can't be read, or is of another benchmark, scenario or number of tasks.
  """
  try:
    fields = json.loads(pathlib.Path(str(config.task_file)).expanduser().read_text())
    if not isinstance(fields, dict) or not _are(dict, fields.get("tasks")):
      raise ValueError("must be an object with a list of tasks")
  except OSError as error:
    reason = f"can't be read ({error.strerror}); name the {FILE} of a run"
    raise _refusal(config, reason) from None
  except (ValueError, RecursionError) as error:
    raise _invalid(config, error) from None
  for name, there, here in (
    ("benchmark", fields.get("benchmark"), config.benchmark),
    ("tasks.scenario", fields.get("scenario"), config.scenario),
    ("tasks.num_tasks", len(fields["tasks"]), config.num_tasks),
  ):
    if there != here:
      raise _refusal(config, _differs(name, there, here))
  return fields


def with_division(
  config: TasksConfig, fields: Mapping[str, Any], split_names: Collection[str]
) -> TasksConfig:
  """Returns the config with the settings of the split that the file's split_id names.

  Args:
    fields: of the file.
    split_names: values of config.split that the benchmark knows.

  Raises:
    ConfigError: if they are out of range.
  """
  division = str(fields.get("split_id")).rpartition("/")[2]
  changes: dict[str, Any] = {"test_from": "train"}
  if division in split_names:
    changes["split"] = division
  elif match := DRAWN.fullmatch(division):
    for name in ("val_fraction", "test_fraction"):  # an id has six digits of them
      if match[name] not in (None, f"{getattr(config, name):g}"):
        changes[name] = float(match[name])
    if match["test_from"]:
      changes["test_from"] = "val"
    if match["split_seed"]:
      changes["split_seed"] = int(match["split_seed"])
  try:
    return dataclasses.replace(config, **changes)
  except ConfigError as error:
    raise _refusal(config, f"its split_id is {fields['split_id']!r}: {error}") from None


def to_sequence(fields: Mapping[str, Any], source: DataSource, config: TasksConfig) -> TaskSequence:
  """Returns the sequence that a file describes; all that the file says is compared with the data.

  Args:
    fields: of the file, as `load` returns them.
    config: as `with_division` returns it.

  Raises:
    ConfigError: if the file is of other data, or contradicts itself or the data.
  """
  digest = fields.get("source_sha256")
  if digest != source.digest:
    raise _refusal(config, _differs("data (source_sha256)", digest, source.digest))
  try:
    return _sequence(fields, source, config)
  except (KeyError, TypeError, ValueError, OverflowError, zlib.error) as error:
    raise _invalid(config, error) from None


def _refusal(config: TasksConfig, reason: str) -> ConfigError:
  return ConfigError(f"config.tasks.task_file is {config.task_file!r}: {reason}")


def _differs(name: str, there: Any, here: Any) -> str:
  return f"its {name} is {_short(there)}, this run's {_short(here)}: must be the same"


def _invalid(config: TasksConfig, error: Exception) -> ConfigError:
  reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
  return _refusal(
    config,
    f"is not a valid {FILE} for {config.benchmark} ({reason}); take the file as its run wrote it",
  )


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."


def _sequence(fields: Mapping[str, Any], source: DataSource, config: TasksConfig) -> TaskSequence:
  """Returns the sequence of a file; raises KeyError, TypeError or ValueError if it is invalid."""
  order, count, listed = fields["class_order"], len(source.class_names), fields["tasks"]
  if not _are(int, order) or sorted(order) != list(range(count)):
    raise ValueError(f"class_order must hold each of 0..{count - 1} once")
  ranges = [(task["lo"], task["hi"]) for task in listed]
  _check_ranges(ranges, count, config.scenario)
  names = [task["name"] for task in listed]
  _check_names(names, ranges, source if config.scenario == "dil" else None)
  if config.scenario != "dil":
    names = [task_name([source.class_names[c] for c in order[lo:hi]]) for lo, hi in ranges]
  labels = np.argsort(order)[source.labels].astype(np.int32)
  codes = make_split(source, config)
  sequence = TaskSequence(
    source=source,
    tasks=tuple(_tasks(names, ranges, listed, len(labels))),
    scenario=config.scenario,
    class_order=order,
    labels=labels,
    split_id=make_split_id(source, config),
    manifest_sha256=make_manifest(source, codes),
  )
  for name, of_records in (
    ("num_records", len(labels)),
    ("class_names", [*sequence.class_names]),
    ("split_id", sequence.split_id),
    ("manifest_sha256", sequence.manifest_sha256),
  ):
    if fields[name] != of_records:
      raise ValueError(f"{name} is {_short(fields[name])}: the data have {_short(of_records)}")
  _check_records(sequence, codes)
  refuse_empty_classes(sequence)
  return sequence


def _are(kind: type, values: Any) -> bool:
  """Returns whether the values are a list, or a tuple, of this type; True and False are no int."""
  return isinstance(values, list | tuple) and all(type(value) is kind for value in values)


def _check_ranges(ranges: Sequence[tuple[Any, Any]], count: int, scenario: str) -> None:
  """Raises ValueError unless the ranges part 0..count in order, or in dil are all of it."""
  ends = [0, *(hi for _, hi in ranges)]
  wanted = [(0, count)] * len(ranges) if scenario == "dil" else [*itertools.pairwise(ends)]
  ascend = all(_are(int, span) and span[0] < span[1] for span in ranges)
  if not ascend or ranges != wanted or ends[-1] != count:
    rule = "each be" if scenario == "dil" else "follow each other and be together"
    raise ValueError(f"lo and hi of the tasks are {_short(ranges)}: must {rule} 0, {count}")


def _check_names(
  names: Sequence[Any], ranges: Sequence[tuple[int, int]], source: DataSource | None
) -> None:
  """Raises ValueError unless the names are those of the ranges or, in dil, domains of a source."""
  wanted, rule = [_positions(*span) for span in ranges], ""
  if source is not None:
    wanted = [name for name in dict.fromkeys(names) if name in source.domain_names]
    rule = f"distinct domains, of {_short([*source.domain_names])}"
  if names != wanted:
    raise ValueError(f"names of the tasks are {_short(names)}: must be {rule or _short(wanted)}")


def _tasks(
  names: Sequence[str],
  ranges: Sequence[tuple[int, int]],
  listed: Sequence[Mapping[str, Any]],
  num_records: int,
) -> Iterator[Task]:
  for index, (name, (lo, hi), fields) in enumerate(zip(names, ranges, listed, strict=True)):
    rows = {split: _rows(fields[split], num_records) for split in SPLIT_CODES}
    yield Task(index=index, name=name, lo=lo, hi=hi, **rows)


def _check_records(sequence: TaskSequence, codes: Int8[np.ndarray, " n"]) -> None:
  """Raises ValueError unless each task has all records of its classes or domain, and no others.

  Args:
    codes: TRAIN, VAL or TEST of each record.
  """
  source = sequence.source
  for task in sequence.tasks:
    mask = (sequence.labels >= task.lo) & (sequence.labels < task.hi)
    if sequence.scenario == "dil" and source.domains is not None:
      mask = source.domains == source.domain_names.index(task.name)
    for split, code in SPLIT_CODES.items():
      rows, expected = getattr(task, split), np.flatnonzero(mask & (codes == code))
      if not np.array_equal(rows, expected):
        odd = int(np.setxor1d(rows, expected)[0])
        verb = "has" if odd in rows else "lacks"
        raise ValueError(
          f"{split} of task {task.index + 1} {verb} {source.shown(odd)}: of class "
          f"{source.class_names[source.labels[odd]]!r}{_domain(source, odd)}, for "
          f"{[*SPLIT_CODES][codes[odd]]} by split_id"
        )


def _domain(source: DataSource, record: int) -> str:
  """Returns ", domain 'sketch'"; nothing without domains."""
  if source.domains is None:
    return ""
  return f", domain {source.domain_names[source.domains[record]]!r}"


def _rows(numbers: Any, num_records: int) -> Int[np.ndarray, " k"]:
  """Returns ascending record numbers; raises ValueError if they are none of `num_records`."""
  if isinstance(numbers, str):  # packed by version 1: differences as int32, zlib, base64
    packed = base64.b64decode(numbers, validate=True)
    steps = zlib.decompressobj().decompress(packed, 4 * num_records + 4)  # no more: a bomb
    numbers = np.cumsum(np.frombuffer(steps, "<i4"), dtype=np.int64).tolist()
  if not _are(int, numbers):
    raise ValueError("record numbers must be integers")
  rows = np.asarray(numbers, np.int64)
  if len(rows) and not (rows[0] >= 0 and rows[-1] < num_records and np.all(np.diff(rows) > 0)):
    raise ValueError(f"record numbers must ascend from 0 to {num_records - 1} at most")
  return rows
