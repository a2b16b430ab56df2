"""`stream.json`: which images of which classes came when, so that another run sees the same.

Lists of record numbers are packed: differences as 32-bit little-endian integers, zlib, base64.
"""

import base64
import json
import pathlib
import zlib
from typing import Any

import numpy as np
from jaxtyping import Int

from fmlora_jax.config import ConfigError, TasksConfig
from fmlora_jax.tasks.sequence import DataSource, Task, TaskSequence

FILE = "task_file.json"
SPLIT_NAMES = ("train", "val", "test")


def dump_task_file(sequence: TaskSequence) -> str:
  """Returns the file's text, of which `read_task_file` makes the same sequence on the same data."""
  stream = {
    "benchmark": sequence.source.name,
    "source_sha256": sequence.source.digest,
    "num_records": len(sequence.labels),
    "scenario": sequence.scenario,
    "split_id": sequence.split_id,
    "manifest_sha256": sequence.manifest_sha256,
    "class_order": sequence.class_order,
    "class_names": list(sequence.class_names),
    "tasks": [
      {"name": task.name, "lo": task.lo, "hi": task.hi}
      | {f"num_{split}": len(getattr(task, split)) for split in SPLIT_NAMES}
      | {split: pack(getattr(task, split)) for split in SPLIT_NAMES}
      for task in sequence.tasks
    ],
  }
  return json.dumps(stream, indent=1) + "\n"


def _sequence(stream: dict[str, Any], source: DataSource) -> TaskSequence:
  """Returns what `stream` describes; a KeyError, TypeError or ValueError says that it is none."""
  order = [int(c) for c in stream["class_order"]]
  if sorted(order) != list(range(len(source.class_names))):
    raise ValueError(f"class_order must hold each of 0..{len(source.class_names) - 1} once")
  tasks = tuple(
    Task(
      index=index,
      name=str(task["name"]),
      lo=int(task["lo"]),
      hi=int(task["hi"]),
      **{split: unpack(task[split], len(source.labels)) for split in SPLIT_NAMES},
    )
    for index, task in enumerate(stream["tasks"])
  )
  return TaskSequence(
    source=source,
    tasks=tasks,
    scenario=str(stream["scenario"]),
    class_order=order,
    labels=np.argsort(order)[source.labels].astype(np.int32),
    split_id=str(stream["split_id"]),
    manifest_sha256=str(stream["manifest_sha256"]),
  )


def read_task_file(path: str, source: DataSource, config: TasksConfig) -> TaskSequence:
  """Returns the sequence that the file at `path` describes.

  Raises:
    ConfigError: if it can't be read, is of other data, or of another scenario or number of tasks
      than the config's.
  """

  def refusal(reason: str) -> ConfigError:
    return ConfigError(f"config.tasks.task_file is {path!r}: {reason}")

  try:
    stream = json.loads(pathlib.Path(path).expanduser().read_text())
    sequence = _sequence(stream, source)
  except OSError as error:
    raise refusal(f"can't be read ({error.strerror}); name the {FILE} of a run") from None
  except (KeyError, TypeError, ValueError, zlib.error) as error:
    raise refusal(f"is no whole {FILE} of a run on {source.name} ({error})") from None
  for name, there, here in (
    ("benchmark", stream.get("benchmark"), source.name),
    ("data (source_sha256)", stream.get("source_sha256"), source.digest),
    ("tasks.scenario", sequence.scenario, config.scenario),
    ("tasks.num_tasks", len(sequence.tasks), config.num_tasks),
  ):
    if there != here:
      raise refusal(f"its {name} is {there!r}, this run's {here!r}: must be the same")
  return sequence


def pack(rows: Int[np.ndarray, " k"]) -> str:
  """Returns ascending record numbers as text."""
  steps = np.diff(rows, prepend=0).astype("<i4")
  return base64.b64encode(zlib.compress(steps.tobytes(), 9)).decode()


def unpack(text: str, num_records: int) -> Int[np.ndarray, " k"]:
  """Inverse of `pack`.

  Raises:
    ValueError, zlib.error: if it is not one, or a number is not below `num_records`.
  """
  raw = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), 4 * num_records + 4)
  rows = np.cumsum(np.frombuffer(raw, "<i4"), dtype=np.int64)
  if len(rows) and not (rows[0] >= 0 and rows[-1] < num_records and np.all(np.diff(rows) > 0)):
    raise ValueError(f"record numbers must ascend from 0 to {num_records - 1} at most")
  return rows
