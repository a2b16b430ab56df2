"""Runs as one ZIP file that says nothing of the machine: no host name, no folder outside of runs.

Lock and event files hold the host's name, checkpoints and tracebacks absolute paths: they stay.
"""

import json
import pathlib
import zipfile
from collections.abc import Iterable
from typing import Any

from fmlora_jax.workdir.identity import IDENTITY
from fmlora_jax.workdir.log import METRICS
from fmlora_jax.workdir.result_file import RESULT

SHARED = (RESULT, IDENTITY, METRICS, "task_file.json", "stream.json", "plots/*.png")


def pack(paths: Iterable[str], target: pathlib.Path) -> list[pathlib.Path]:
  """Writes the finished runs at or below `paths` into a ZIP file; returns their folders.

  Paths in their JSON files become the last of their names.
  """
  files = [p for path in map(pathlib.Path, paths) for p in _results(path)]
  runs = list(dict.fromkeys(file.absolute().parent for file in files))
  top = _common(runs)
  with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
    for run in runs:
      for file in (f for name in SHARED for f in sorted(run.glob(name)) if f.is_file()):
        text = file.read_bytes()
        if file.suffix == ".json":
          text = json.dumps(_without_paths(json.loads(text)), indent=1) + "\n"
        archive.writestr(str(file.relative_to(top)), text)
  return runs


def _results(path: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path.rglob(RESULT)) if path.is_dir() else [path]


def _common(runs: list[pathlib.Path]) -> pathlib.Path:
  """Returns the folder above all runs."""
  above = [{run.parent, *run.parent.parents} for run in runs]
  return max(set.intersection(*above), key=lambda folder: len(folder.parts))


def _without_paths(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _without_paths(each) for name, each in value.items()}
  if isinstance(value, list):
    return [_without_paths(each) for each in value]
  is_path = isinstance(value, str) and value.startswith(("/", "~", "./", "../"))
  return pathlib.PurePath(value).name if is_path else value
