"""Identity of a run: settings, weights and data that a workdir and its checkpoints belong to."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from fmlora_jax import methods
from fmlora_jax.cli import outputs
from fmlora_jax.config import FREE_FIELDS, Config, ConfigError
from fmlora_jax.config.diff import differences, leaves
from fmlora_jax.tasks import task_file
from fmlora_jax.workdir import lock
from fmlora_jax.workdir.files import is_draft, refuse_links, write_atomically
from fmlora_jax.workdir.log import EVENTS, METRICS
from fmlora_jax.workdir.result_file import RESULT

IDENTITY, ENVIRONMENT = "config.json", "environment"
FILES = (IDENTITY, RESULT, METRICS, task_file.FILE)
HASHED = {
  "weights_sha256": " (of the weights)",
  "manifest_sha256": " (of the images)",
  "task_file_sha256": " (of the tasks)",
}
FOLDERS = ("checkpoints", EVENTS, "plots")


def check_folder(workdir: pathlib.Path) -> bool:
  """Refuses what can't be the folder of a run; makes nothing.

  Returns:
    Whether a run has finished there; such a folder is only read.

  Raises:
    ConfigError: if the folder can't be made or written, or holds links or files that no run wrote.
  """
  path = workdir / IDENTITY
  outputs.require_path("workdir", workdir)
  for parent in workdir.absolute().parents:
    if os.path.isfile(parent / IDENTITY) and os.path.isdir(parent / "checkpoints"):
      raise ConfigError(f"workdir {workdir} is in the folder of a run, {parent}: choose another")
  is_finished = os.path.isfile(path) and os.path.isfile(workdir / RESULT)
  if not is_finished:
    outputs.require_folder("workdir", workdir)
  if workdir.exists():
    refuse_links(workdir, workdir.rglob("*"))
    _refuse_others(workdir, path)
  return is_finished


def _refuse_others(workdir: pathlib.Path, path: pathlib.Path) -> None:
  """Refuses files that no run wrote, and folders in the place of files."""
  for name in (*FILES, *FOLDERS):
    entry, kind = workdir / name, "folder" if name in FOLDERS else "file"
    if entry.exists() and not (entry.is_dir() if kind == "folder" else entry.is_file()):
      raise ConfigError(
        f"{entry} is no {kind}: must be one; move it away, or choose another --workdir"
      )
  if path.exists():
    return
  others = [p for p in workdir.iterdir() if p.name != lock.FILE and not is_draft(p, of=path)]
  if others:
    names = ", ".join(sorted(p.name for p in others)[:3])
    raise ConfigError(
      f"workdir {workdir} holds {names} but no {path.name}: must be new, empty or the folder of a "
      "run; choose another with --workdir"
    )


def claim_workdir(workdir: pathlib.Path, identity: dict[str, Any]) -> None:
  """Writes `identity` into a new workdir, or checks that the workdir belongs to it.

  Args:
    identity: config, hash of the weights, hash of the data's manifest, hash of the task file, and
      the environment that decides about numbers. A workdir from before it was recorded gets it.

  Raises:
    ConfigError: if the workdir belongs to another run, with the fields that differ; or if it holds
      links or files that no run wrote.
  """
  path = workdir / IDENTITY
  check_folder(workdir)
  if not path.exists():
    workdir.mkdir(parents=True, exist_ok=True)
    _write(path, identity)
    return
  if changed := changes(read_identity(workdir, identity), identity):
    raise ConfigError(
      f"workdir {workdir} belongs to another run ({'; '.join(changed)}): undo the change to "
      "resume it, or choose another --workdir"
    )
  before = json.loads(path.read_text(encoding="utf-8"))
  if ENVIRONMENT in identity and ENVIRONMENT not in before and not (workdir / RESULT).exists():
    _write(path, {**before, ENVIRONMENT: identity[ENVIRONMENT]})


def _write(path: pathlib.Path, identity: Mapping[str, Any]) -> None:
  write_atomically(path, json.dumps(identity, indent=2, sort_keys=True) + "\n")


def read_identity(workdir: pathlib.Path, now: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the identity of the run in a workdir, as this version writes it.

  Args:
    now: an identity, of which it has all fields.

  Raises:
    ConfigError: if its config.json is not as a run wrote it.
  """
  path, reason = workdir / IDENTITY, "not the identity of a run"
  with contextlib.suppress(TypeError, AttributeError, RecursionError):
    try:
      before = upgrade(json.loads(path.read_text(encoding="utf-8")), now)
      changes(before, now)  # raises where a group is none
      if not (lost := [name for name in now if name not in before]):
        return before
      reason = f"it lacks {', '.join(lost)}"
    except (OSError, ValueError) as error:
      reason = str(error)
  raise ConfigError(
    f"{path} can't be read ({reason}): must be as the run wrote it; put back a copy, or choose "
    "another --workdir"
  )


def require_result(path: pathlib.Path, result: Mapping[str, Any], now: Mapping[str, Any]) -> None:
  """Refuses a result that is not that of the run that it is found with.

  Args:
    path: of the result.
    now: what it must have: hash of the weights, and fields of a result.

  Raises:
    ConfigError: with the fields that differ.
  """
  there = {**result, "weights_sha256": result["weights"]["sha256"]}
  if changed := changes({name: there[name] for name in now}, now):
    raise ConfigError(
      f"{path} is the result of another run ({'; '.join(changed)}): must be this run's; move it "
      "away, and the same command makes it again"
    )


def require_own_result(path: pathlib.Path, result: Mapping[str, Any]) -> None:
  """Refuses a result that is not that of the config.json beside it, if one can be read there.

  Raises:
    ConfigError: with the fields that differ.
  """
  try:
    there = json.loads((path.parent / IDENTITY).read_text(encoding="utf-8"))
    there["config"] = methods.upgrade_config(there["config"])
    now = {name: there[name] for name in ("config", "weights_sha256", "manifest_sha256")}
  except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
    return
  require_result(path, result, now)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """Returns the differences that make `now` another run than `before`, one text a field.

  Free fields may differ. A field that is newer than `before` may have its default, which leaves
  the numbers as they were.
  """
  now = json.loads(json.dumps(now))
  before = upgrade(before, now)
  there, defaults = dict(leaves(before)), dict(leaves(_defaults(now)))
  return [
    f"{field}{HASHED.get(field, '')}: {old!r} there, {new!r} now"
    for field, old, new in differences(before, now)
    if field.removeprefix("config.") not in FREE_FIELDS
    and (field in there or field not in defaults or defaults[field] != new)
  ]


def _defaults(identity: Mapping[str, Any]) -> dict[str, Any]:
  """Returns an identity with the default of every setting of the same method."""
  name = identity.get("config", {}).get("method", {}).get("name", Config().method.name)
  config = dataclasses.asdict(Config(method=methods.config_class(name)()))
  return {"config": json.loads(json.dumps(config))}


def upgrade(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
  """Returns an identity of any version as this version writes it.

  Older versions did not record the environment, and hashed another format of the task file. Where
  neither run reads one, the settings decide about the tasks, so the hash of `now` holds for both.
  """
  upgraded = {**before, "config": methods.upgrade_config(before.get("config", {}))}
  if ENVIRONMENT in now:
    upgraded.setdefault(ENVIRONMENT, now[ENVIRONMENT])
  if "stream_sha256" in before:
    upgraded["task_file_sha256"] = upgraded.pop("stream_sha256")
    files = [each.get("config", {}).get("tasks", {}).get("task_file") for each in (upgraded, now)]
    if files == [None, None]:
      upgraded["task_file_sha256"] = now.get("task_file_sha256")
  return upgraded
