"""`result.json`: its schema, and the only code that writes and reads it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmlora_jax import methods
from fmlora_jax.workdir.files import jsonable, write_atomically

RESULT = "result.json"
SCHEMA = 2  # version; results of version 1 lack the field
FIELDS = {  # every result has these, and those that its method declares
  "schema": "version of this table",
  "method": "its name",
  "benchmark": "its name, as in config.tasks.benchmark",
  "scenario": "cil, dil or til",
  "split_id": "name of the split into train, val and test",
  "manifest_sha256": "of the records and that split",
  "seed": "of the run",
  "class_order": "canonical class at each position",
  "class_names": "by position",
  "class_ranges": "first position of each task's classes, and the one after its last",
  "task_names": "in the order in which they were learned",
  "n_test": "images of each test set",
  "accuracy": "matrix [after task][test set] in [0, 1]; null above the diagonal",
  "acc": "final accuracy in percent, pooled over all test images",
  "aaa": "mean of the pooled accuracy after each task, percent",
  "acc_task_mean": "final accuracy as a mean over tasks, percent",
  "aaa_task_mean": "mean of that after each task, percent",
  "forgetting": "mean drop from the best earlier accuracy, percentage points; may be negative",
  "forgetting_clipped": "the same with each task's drop at least 0",
  "bwt": "backward transfer, percentage points",
  "fwt": "forward transfer, percentage points; dil only",
  "learning_accuracy": "mean accuracy on each task just after it was learned, percent",
  "params": "numbers of trained, stored and backbone parameters",
  "statistics_bytes": "bytes of statistics of the data that the method stores",
  "protocol": "facts about how the numbers came about",
  "passes": "forward passes of an image in a training step, at test time, between tasks",
  "caveats": "what a reader must know of the method or the tasks, one line each",
  "weights": "tag and sha256 of the pre-trained weights",
  "normalisation": "of pixels",
  "augmentation": "its name",
  "input": "mode and workers of the input",
  "epochs": "per task",
  "batch_size": "over all devices",
  "wall_seconds": "by kind of work, and their total",
  "params_sha256": "of all learned arrays",
  "devices": "of each session, in words",
  "versions": "of the libraries that decide about the last bits",
  "environment": "variables and settings of jax that decide about numbers; null in old results",
  "git_commit": "of the source; null outside of a checkout",
  "config": "all settings",
  "finished": "true",
}
ADDED = ("protocol", "input")  # early results of version 1 lack them
NAMES = ("class_names", "class_ranges")  # early results of version 2 lack them


def write_result(workdir: str | os.PathLike, result: Mapping[str, Any]) -> Path:
  """Writes result.json in one piece, with one field a line; returns its path.

  NumPy and JAX values become plain numbers and lists, NaN and infinity null.

  Raises:
    ValueError: if its fields are not those of the schema.
    TypeError: on a value that JSON can't hold, with its path.
  """
  declared = {fact.field for fact in methods.reports(result["method"]) if fact.field}
  if odd := sorted(FIELDS.keys() ^ (result.keys() - declared)):
    raise ValueError(f"result: fields {', '.join(odd)} are missing or not in the schema")
  path = Path(workdir) / RESULT
  fields = [f"  {json.dumps(k)}: {json.dumps(jsonable(v, k))}" for k, v in result.items()]
  write_atomically(path, "{\n" + ",\n".join(fields) + "\n}\n")
  return path


def read_result(path: str | os.PathLike) -> dict[str, Any]:
  """Returns the result of a finished run, in today's schema.

  Args:
    path: of the run's folder or of its result.json.

  Raises:
    ValueError: if there is none, the run is not finished, or the file is damaged; one line.
  """
  path = Path(path)
  file = path / RESULT if path.is_dir() else path
  fix = "delete the file and rerun the run's command to write it again"
  try:
    result = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    if not path.exists():
      raise ValueError(f"{path}: no such file or folder") from None
    raise ValueError(f"{path}: no {RESULT}; a run writes it at its very end") from None
  except (OSError, ValueError) as error:  # json and unicode errors are ValueErrors
    raise ValueError(f"{file}: can't be read as a result ({error}); {fix}") from None
  if not isinstance(result, dict) or not result.get("finished"):
    raise ValueError(f"{file}: not the result of a finished run; {fix}")
  if result.get("schema", 1) not in range(1, SCHEMA + 1):
    raise ValueError(
      f"{file}: schema is {result['schema']}: must be at most {SCHEMA}; update fmlora_jax"
    )
  try:
    result = upgrade(result)
  except (AttributeError, KeyError, TypeError, ValueError):
    raise ValueError(f"{file}: its config is damaged; {fix}") from None
  if missing := [name for name in FIELDS if name not in result]:
    raise ValueError(f"{file}: lacks {', '.join(missing)}; {fix}")
  return result


def upgrade(result: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a result of any version in today's schema."""
  upgraded = {
    "environment": None,
    **dict.fromkeys(NAMES),
    **result,
    "config": methods.upgrade_config(result.get("config", {})),
  }
  if "schema" not in result:
    upgraded = dict.fromkeys(ADDED) | upgraded | {"schema": SCHEMA}
    if "rehearsal_bytes" in upgraded:
      upgraded["statistics_bytes"] = upgraded.pop("rehearsal_bytes")
  return upgraded
