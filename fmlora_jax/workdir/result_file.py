"""`result.json`: its schema, and the only code that writes and reads it."""

import dataclasses
import json
import os
import reprlib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fmlora_jax import methods
from fmlora_jax.config import Config, ConfigError
from fmlora_jax.train import metrics
from fmlora_jax.workdir.files import jsonable, write_atomically
from fmlora_jax.workdir.kinds import AMOUNT, COUNT, fits

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
COPIES = ("val_of_train", "test_of_train", "test_of_val")
SCORES = (
  *("acc", "aaa", "acc_task_mean", "aaa_task_mean"),
  *("forgetting", "forgetting_clipped", "bwt", "learning_accuracy"),
)
_LEAF = (None, bool, int, float, str)
_SETTING = (*_LEAF, [_LEAF])
for _ in range(4):  # groups of settings in groups
  _SETTING = (*_LEAF, [_LEAF], {...: _SETTING})
KINDS = {  # of each field's value, as of `kinds.fits`
  **dict.fromkeys(("schema", "seed", "statistics_bytes", "epochs", "batch_size"), COUNT),
  **dict.fromkeys(("method", "benchmark", "scenario", "split_id", "manifest_sha256"), str),
  **dict.fromkeys(("normalisation", "augmentation", "params_sha256"), str),
  **{name: [COUNT] for name in ("class_order", "n_test")},
  **{name: [str] for name in ("task_names", "caveats", "devices")},
  **dict.fromkeys((*SCORES, "fwt"), (float, None)),
  "accuracy": [[(float, None)]],
  "class_names": (None, [str]),
  "class_ranges": (None, [[COUNT]]),
  "params": {"trained": COUNT, "stored_per_task": [COUNT], "stored_total": COUNT},
  "protocol": (
    None,
    {
      **dict.fromkeys(("old_image_bytes", "old_statistics_bytes", "validation_images"), COUNT),
      **dict.fromkeys(("task_identity_at_test", "validation_read_by_method"), bool),
      "measured_on": str,
      "copies": (None, {**dict.fromkeys(COPIES, COUNT), ...: _LEAF}),
    },
  ),
  "passes": {"train": COUNT, "test": COUNT, "between": COUNT},
  "weights": {"tag": str, "sha256": (str, None)},
  "input": (None, {"mode": str, "workers": COUNT}),
  # a change of the machine's clock can bring a kind of work, but not the total, below 0
  "wall_seconds": {"total": AMOUNT, ...: float},
  "versions": {...: str},
  "environment": (None, {...: _LEAF}),
  "git_commit": (str, None),
  "config": {"method": {"name": str}, ...: _SETTING},
  "finished": bool,
}


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
    ConfigError: if there is none, the run is not finished, or the file is damaged; one line.
  """
  path = Path(path)
  file = path / RESULT if os.path.isdir(path) else path
  try:
    result = json.loads(file.read_text(encoding="utf-8"))
  except (FileNotFoundError, NotADirectoryError):
    if not os.path.exists(path):
      raise ConfigError(f"{path}: no such file or folder") from None
    raise ConfigError(f"{path}: no {RESULT}; a run writes it at its very end") from None
  except PermissionError as error:
    raise ConfigError(f"{file}: can't be read ({error.strerror}); allow that") from None
  except (OSError, ValueError, RecursionError) as error:  # json and unicode errors are ValueErrors
    raise ConfigError(f"{file}: can't be read as a result ({error}); {_fix(file)}") from None
  if not isinstance(result, dict) or result.get("finished") is not True:
    raise ConfigError(f"{file}: not the result of a finished run; {_fix(file)}")
  version = result.get("schema", 1)
  if type(version) is not int or version not in range(1, SCHEMA + 1):
    shown = reprlib.repr(version)
    raise ConfigError(f"{file}: schema is {shown}: must be at most {SCHEMA}; update fmlora_jax")
  try:
    result = upgrade(result)
  except (AttributeError, TypeError, ValueError):
    raise ConfigError(f"{file}: its config is damaged; {_fix(file)}") from None
  try:
    _require_valid(result)
  except ValueError as error:
    raise ConfigError(f"{file}: {error}; {_fix(file)}") from None
  return result


def _fix(file: Path) -> str:
  """Returns what to do about a file that is no result."""
  if file.name != RESULT:
    return f"name the folder of a run, or its {RESULT}"
  if (file.parent / "checkpoints").is_dir():
    return "move it away, and the command of the run makes it again from the checkpoints"
  return "put back a copy of what the run wrote"


def _require_valid(result: Mapping[str, Any]) -> None:
  """Refuses a result whose fields are not of the schema, or contradict each other.

  Raises:
    ValueError: with the first such field.
  """
  if missing := [name for name in FIELDS if name not in result]:
    raise ValueError(f"lacks {', '.join(missing)}")
  for name, kind in KINDS.items():
    allowed = f"as runs write it, no count below 0 ({FIELDS[name]})"
    _require(fits(result[name], kind), result, name, allowed)
  config = result["config"]
  methods.build_config(_known(config))
  there = {"seed": config.get("seed"), "epochs": config.get("epochs"), **config["method"]}
  for name, key in (("seed", "seed"), ("epochs", "epochs"), ("method", "name")):
    same = there[key] in (None, result[name])
    _require(same, result, name, f"{there[key]}, as in its config")
  _require_scores(result)
  _require_facts(result)


def _require(ok: bool, result: Mapping[str, Any], name: str, allowed: str) -> None:
  if not ok:
    raise ValueError(f"{name} is {reprlib.repr(result.get(name))}: must be {allowed}")


def _known(values: Mapping[str, Any], kind: type = Config) -> dict[str, Any]:
  """Returns the settings that this version has."""
  hints = typing.get_type_hints(kind)
  if kind is Config and values["method"]["name"] in methods.names():
    hints["method"] = methods.config_class(values["method"]["name"])
  elif kind is Config:  # a method of another version
    del hints["method"]
  return {
    name: _known(value, hints[name])
    if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict)
    else value
    for name, value in values.items()
    if name in hints
  }


def _require_scores(result: Mapping[str, Any]) -> None:
  """Refuses scores that are not those of the result's own accuracy matrix."""
  tasks, rows = len(result["task_names"]), result["accuracy"]
  n_test = np.array(result["n_test"], int)
  fit = len(n_test) == tasks and [len(row) for row in rows] == [tasks] * tasks
  _require(fit and tasks > 0, result, "accuracy", f"of {tasks} tasks, as task_names and n_test")
  accuracy, lower = np.array(rows, float), np.tri(tasks, dtype=bool)
  fit = np.all((accuracy[lower] >= 0) & (accuracy[lower] <= 1)) and np.isnan(accuracy[~lower]).all()
  correct = np.where(lower & fit, accuracy, 0) * n_test
  whole = np.allclose(correct, np.rint(correct), rtol=0, atol=1e-4)
  allowed = "shares of whole images of n_test, null above the diagonal"
  _require(bool(fit and whole), result, "accuracy", allowed)
  expected = metrics.summarise(np.rint(correct).astype(int), n_test)
  for name in SCORES:
    there, right = (np.array(values[name], float) for values in (result, expected))
    same = np.allclose(there, right, rtol=0, atol=1e-6, equal_nan=True)
    _require(same, result, name, f"{expected[name]}, as its accuracy matrix says")


def _require_facts(result: Mapping[str, Any]) -> None:
  """Refuses values of the facts that the method declares which are not of their kinds."""
  numbers: Any = [(int, float, None)]
  for fact in methods.reports(result["method"]):
    kind = (numbers, [numbers], [[numbers]]) if fact.kind is list else (fact.kind, None)
    values = result.get(fact.field)
    if values is not None:
      ok = fits(values, kind if fact.is_final else [kind])
      ok = ok and (fact.is_final or len(values) == len(result["task_names"]))
      _require(ok, result, fact.field, f"{fact.name} of each task, as the method declares")


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
