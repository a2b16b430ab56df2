"""`task_file.json`: the records of each task, with which another run has the same tasks."""

import base64
import json
import pathlib
import zlib
from typing import Any

import numpy as np
from jaxtyping import Int

from fmlora_jax.config import ConfigError, TasksConfig
from fmlora_jax.tasks.sequence import SPLIT_CODES, DataSource, Task, TaskSequence

FILE = "task_file.json"


def dump_task_file(sequence: TaskSequence) -> str:
  """Returns the file's text; on the same data `read_task_file` returns the same sequence."""
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
      {"name": task.name, "lo": task.lo, "hi": task.hi}
      | {split: getattr(task, split).tolist() for split in SPLIT_CODES}
      for task in sequence.tasks
    ],
  }
  lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
  return "{\n" + ",\n".join(lines) + "\n}\n"


def read_task_file(path: str, source: DataSource, config: TasksConfig) -> TaskSequence:
  """Returns the sequence that the file at `path` describes.

  Raises:
    ConfigError: if it can't be read, is of other data, or of another scenario or number of tasks
      than the config's.
  """

  def refusal(reason: str) -> ConfigError:
    return ConfigError(f"config.tasks.task_file is {path!r}: {reason}")

  try:
    fields = json.loads(pathlib.Path(path).expanduser().read_text())
    sequence = _sequence(fields, source)
  except OSError as error:
    raise refusal(f"can't be read ({error.strerror}); name the {FILE} of a run") from None
  except (KeyError, TypeError, ValueError, OverflowError, zlib.error) as error:
    raise refusal(f"is not a valid {FILE} for {source.name} ({error})") from None
  for name, there, here in (
    ("benchmark", fields.get("benchmark"), source.name),
    ("data (source_sha256)", fields.get("source_sha256"), source.digest),
    ("tasks.scenario", sequence.scenario, config.scenario),
    ("tasks.num_tasks", len(sequence.tasks), config.num_tasks),
  ):
    if there != here:
      raise refusal(f"its {name} is {there!r}, this run's {here!r}: must be the same")
  return sequence


def _sequence(fields: dict[str, Any], source: DataSource) -> TaskSequence:
  """Returns the sequence of a file; raises KeyError, TypeError or ValueError if it is invalid."""
  order = [int(c) for c in fields["class_order"]]
  if sorted(order) != list(range(len(source.class_names))):
    raise ValueError(f"class_order must hold each of 0..{len(source.class_names) - 1} once")
  tasks = tuple(
    Task(
      index=index,
      name=str(task["name"]),
      lo=int(task["lo"]),
      hi=int(task["hi"]),
      **{split: _rows(task[split], len(source.labels)) for split in SPLIT_CODES},
    )
    for index, task in enumerate(fields["tasks"])
  )
  return TaskSequence(
    source=source,
    tasks=tasks,
    scenario=str(fields["scenario"]),
    class_order=order,
    labels=np.argsort(order)[source.labels].astype(np.int32),
    split_id=str(fields["split_id"]),
    manifest_sha256=str(fields["manifest_sha256"]),
  )


def _rows(numbers: Any, num_records: int) -> Int[np.ndarray, " k"]:
  """Returns ascending record numbers; raises ValueError if they are none of `num_records`."""
  if isinstance(numbers, str):  # packed by version 1: differences as int32, zlib, base64
    packed = base64.b64decode(numbers, validate=True)
    steps = zlib.decompressobj().decompress(packed, 4 * num_records + 4)  # no more: a bomb
    numbers = np.cumsum(np.frombuffer(steps, "<i4"), dtype=np.int64).tolist()
  if not all(type(number) is int for number in numbers):
    raise ValueError("record numbers must be integers")
  rows = np.asarray(numbers, np.int64)
  if len(rows) and not (rows[0] >= 0 and rows[-1] < num_records and np.all(np.diff(rows) > 0)):
    raise ValueError(f"record numbers must ascend from 0 to {num_records - 1} at most")
  return rows
