"""Identity of a run: settings, weights and data that a workdir and its checkpoints belong to."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from fmlora_jax import methods
from fmlora_jax.config import FREE_FIELDS, Config, ConfigError
from fmlora_jax.config.diff import differences, leaves
from fmlora_jax.workdir import lock
from fmlora_jax.workdir.files import is_draft, refuse_links, write_atomically

IDENTITY, ENVIRONMENT = "config.json", "environment"


def check_folder(workdir: pathlib.Path) -> None:
  """Refuses a folder with files that no run wrote.

  Raises:
    ConfigError: with their names.
  """
  path = workdir / IDENTITY
  if path.exists() or not workdir.exists():
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
  refuse_links(workdir, workdir.glob("*"))
  check_folder(workdir)
  if not path.exists():
    workdir.mkdir(parents=True, exist_ok=True)
    _write(path, identity)
    return
  try:
    before = json.loads(path.read_text())
  except ValueError as error:
    raise ConfigError(f"{path} can't be read ({error}); choose another --workdir") from None
  if changed := changes(before, identity):
    raise ConfigError(
      f"workdir {workdir} belongs to another run ({'; '.join(changed)}): undo the change to "
      "resume it, or choose another --workdir"
    )
  if ENVIRONMENT in identity and ENVIRONMENT not in before:
    _write(path, {**before, ENVIRONMENT: identity[ENVIRONMENT]})


def _write(path: pathlib.Path, identity: Mapping[str, Any]) -> None:
  write_atomically(path, json.dumps(identity, indent=2, sort_keys=True) + "\n")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """Returns the differences that make `now` another run than `before`, one text a field.

  Free fields may differ. A field that is newer than `before` may have its default, which leaves
  the numbers as they were.
  """
  now = json.loads(json.dumps(now))
  before = upgrade(before, now)
  there, defaults = dict(leaves(before)), dict(leaves(_defaults(now)))
  return [
    f"{field}: {old!r} there, {new!r} now"
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
