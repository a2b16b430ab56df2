"""What a run needs to go on where it was: arrays through orbax, the rest as JSON beside them.

A checkpoint holds everything but the backbone and the data, whose hashes it names. Its step is the
number of training steps of the whole run. Task ends are kept; within a task only the newest.

Orbax writes a step in one piece, but hands out flipped bits, casts, and empty folders for steps.
So a record of our own lies in each step: whose it is, a digest of each array, and one of itself. A
step counts only if all of that is right.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp

from fmlora_jax import methods
from fmlora_jax.config import FREE_FIELDS, Config, ConfigError
from fmlora_jax.config.diff import differences, leaves
from fmlora_jax.distributed import hosts
from fmlora_jax.workdir import digest, disk, lock, log

IDENTITY = "config.json"  # what a workdir belongs to
TEMPORARY = ".orbax-checkpoint-tmp"  # how orbax ends the name of what it has not finished
AGAIN, BEFORE = ".again", ".before"  # of a step that is saved once more: its new and its old folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
  """One checkpoint: arrays by path, and a JSON-able record that says what they are."""

  arrays: Mapping[str, Array]
  record: dict[str, Any]


def flatten(tree: Any) -> dict[str, Array]:
  """Returns the leaves of a pytree by their paths."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(arrays: Mapping[str, Array], prefix: str) -> dict[str, Any]:
  """Returns the nested dicts whose leaves' paths start with `prefix`."""
  tree: dict[str, Any] = {}
  for path, leaf in arrays.items():
    head, *names = path.split("/")
    if head == prefix:
      place = tree
      for name in names[:-1]:
        place = place.setdefault(name, {})
      place[names[-1]] = leaf
  return tree


def fill(template: Any, arrays: Mapping[str, Array], prefix: str) -> Any:
  """Returns the pytree `template` with its leaves taken from `arrays`.

  Raises:
    ValueError: if a leaf is absent or of another shape or dtype.
  """

  def leaf(path, expected):
    name = f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}"
    got = arrays.get(name)
    if got is None or (got.shape, got.dtype) != (expected.shape, expected.dtype):
      found = "absent" if got is None else f"{got.dtype}{got.shape}"
      raise ValueError(f"checkpoint: {name} is {found}: must be {expected.dtype}{expected.shape}")
    return got

  return jax.tree.map_with_path(leaf, template)


class DamagedError(ConfigError):
  """A checkpoint that can't be used; the message says why."""


class CheckpointStore:
  """The checkpoints of one workdir.

  Args:
    workdir: of the run.
    sharding: that restored arrays get.
    identity: of the run, as `claim_workdir` takes it; checkpoints of others are none.
    on_damage: as CheckpointConfig has it.
    note: shows a line.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    sharding: jax.sharding.Sharding,
    *,
    identity: Mapping[str, Any],
    on_damage: Literal["fall_back", "refuse"] = "fall_back",
    note: Callable[[str], None] = print,
  ):
    self.folder = (workdir / "checkpoints").absolute()
    self.folder.mkdir(parents=True, exist_ok=True)
    self._sharding, self._identity = sharding, identity
    self._on_damage, self._note = on_damage, note
    self._kept: list[int] = []

  def save(self, step: int, snapshot: Snapshot, *, keep: bool) -> None:
    """Writes a checkpoint and reads it again; then drops all others but those that were kept.

    Raises:
      ConfigError: if the disk is full, or what it gives back is not what was written; all
        checkpoints, one of the same step too, are then still there.
    """
    path = target = self._path(step)
    if path.exists():
      target = path.with_name(f"{step}{AGAIN}")
    arrays = {name: jnp.asarray(leaf) for name, leaf in snapshot.arrays.items()}
    kept = [*self._kept, step] if keep else self._kept
    own = {"step": step, "kept": kept, "identity": self._identity}
    record = snapshot.record | own | {"digests": digest.tree_digests(arrays)}
    with disk.writing(target, num_bytes(arrays)), _quiet():
      metadata = record | {"sha256": _sha256(record)}
      ocp.save(target, arrays, overwrite=True, custom_metadata=metadata)
      if hosts.is_first():
        disk.sync(target)
    try:
      self._load(step, target)
    except DamagedError as error:
      mend = "the disk may fail; the same command goes on from the one before"
      raise DamagedError(f"{error}; {mend}") from None
    if target != path and hosts.is_first():
      path.rename(path.with_name(f"{step}{BEFORE}"))
      self._finish_exchange(step)
    self._drop_others(step, kept)

  def latest(self) -> Snapshot | None:
    """Returns the newest good checkpoint, None if there is none; drops what a kill left beside it.

    Each newer one, which can't be used, is named and set aside.

    Raises:
      DamagedError: if the newest can't be used and `on_damage` is "refuse".
    """
    self._drop_unfinished()
    steps = self._steps()
    for step in reversed(steps):
      try:
        snapshot = self._load(step)
      except DamagedError as error:
        if self._on_damage == "refuse":
          mend = "config.checkpoint.on_damage=fall_back takes the newest that can"
          raise DamagedError(f"{error}; {mend}") from None
        self._set_aside(step, str(error))
      else:
        self._drop_others(step, snapshot.record["kept"])
        return snapshot
    if steps:
      self._note("no checkpoint can be used: the run begins again")
    return None

  def _path(self, step: int) -> pathlib.Path:
    return self.folder / str(step)

  def _steps(self) -> list[int]:
    """Returns what lies there under the name of a step, ascending."""
    return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

  def _load(self, step: int, path: pathlib.Path | None = None) -> Snapshot:
    """Returns a checkpoint that is as it was saved, and this run's.

    Raises:
      DamagedError: on all processes, if it is not to one of them.
    """
    path, reason, snapshot = path or self._path(step), "", None
    try:
      with _quiet():
        snapshot = self._verified(step, path)
    except DamagedError as error:
      reason = str(error)
    except (MemoryError, PermissionError):  # no damage: they pass, or someone can mend them
      raise
    except Exception as error:  # damage makes orbax raise whatever its parts do
      message = " ".join(str(error).split())
      if any(code in message for code in ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")):
        raise
      reason = f"it can't be read ({type(error).__name__}: {message[:300]})"
    if reason := next(filter(None, hosts.gather(reason)), ""):
      raise DamagedError(f"checkpoint {path} can't be used: {reason}")
    return snapshot

  def _verified(self, step: int, path: pathlib.Path) -> Snapshot:
    metadata = ocp.metadata(path).custom_metadata or {}
    record = {name: value for name, value in metadata.items() if name != "sha256"}
    if "digests" not in record or "sha256" not in metadata:
      raise DamagedError("it has no digests, so nobody can tell whether it is whole")
    if _sha256(record) != metadata["sha256"]:
      raise DamagedError("its record, in _CHECKPOINT_METADATA, is not what was saved")
    if changed := changes(record["identity"], self._identity):
      raise DamagedError(f"it is another run's ({'; '.join(changed)})")
    if record["step"] != step:
      raise DamagedError(f"it is that of step {record['step']}")
    digests = record["digests"]
    template = {name: digest.abstract_array(text, self._sharding) for name, text in digests.items()}
    arrays = ocp.load(path, template)
    found = digest.tree_digests(arrays)
    if wrong := sorted(name for name in digests if found[name] != digests[name]):
      more = f" and {len(wrong) - 3} others" if len(wrong) > 3 else ""
      raise DamagedError(f"{', '.join(wrong[:3])}{more} in it: not what was saved")
    return Snapshot(arrays=arrays, record=record)

  def _set_aside(self, step: int, reason: str) -> None:
    targets = (self.folder / f"{step}.unusable{'-' * i}" for i in itertools.count())
    target = next(path for path in targets if not path.exists())
    hosts.gather("")  # all have found the same name
    if hosts.is_first():
      self._path(step).rename(target)
    self._note(f"{reason}; set aside as {target.name}")
    hosts.gather("")

  def _finish_exchange(self, step: int) -> None:
    """Gives a step its new folder, and drops the old one; for the first process."""
    path = self._path(step)
    path.with_name(f"{step}{AGAIN}").rename(path)
    disk.sync_name(path)
    self._drop(path.with_name(f"{step}{BEFORE}"))

  def _drop_unfinished(self) -> None:
    """Drops what a kill left half done, and ends an exchange of folders that it cut short."""
    hosts.gather("")
    if hosts.is_first():
      for before in sorted(self.folder.glob(f"*{BEFORE}")):
        step = int(before.name.removesuffix(BEFORE))
        if self._path(step).exists():
          self._drop(before)
        else:
          self._finish_exchange(step)
    for again in sorted(self.folder.glob(f"*{AGAIN}")):
      self._note(f"checkpoint {again.name} was not verified: dropped")
      self._drop(again)
    for path in sorted(self.folder.glob(f"*{TEMPORARY}")):
      self._note(f"checkpoint {path.name.removesuffix(TEMPORARY)} was not finished: dropped")
      self._drop(path)
    hosts.gather("")

  def _drop_others(self, newest: int, kept: list[int]) -> None:
    self._kept = kept
    for step in set(self._steps()) - {newest, *kept}:
      self._drop(self._path(step))
    hosts.gather("")

  def _drop(self, path: pathlib.Path) -> None:
    if hosts.is_first():
      shutil.rmtree(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps from being logged what orbax says at length and an error of ours says in one line."""
  logging.disable()
  try:
    yield
  finally:
    logging.disable(logging.NOTSET)


def num_bytes(arrays: Any) -> int:
  """Returns the bytes of all arrays of a pytree, as a checkpoint holds them uncompressed."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def _sha256(record: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def check_folder(workdir: pathlib.Path) -> None:
  """Refuses a folder that holds files which no run wrote.

  Raises:
    ConfigError: with their names.
  """
  path = workdir / IDENTITY
  if path.exists() or not workdir.exists():
    return
  found = [p for p in workdir.iterdir() if p.name != lock.FILE and not log.is_draft(p, of=path)]
  if found:
    names = ", ".join(sorted(p.name for p in found)[:3])
    raise ConfigError(
      f"workdir {workdir} holds {names} but no {path.name}: must be new, empty, or a run's own; "
      "choose another with --workdir"
    )


def claim_workdir(workdir: pathlib.Path, identity: dict[str, Any]) -> None:
  """Writes `identity` into a new workdir, or checks that the workdir belongs to it.

  Args:
    identity: what makes two runs the same: config, hash of weights, hash of the data's manifest.

  Raises:
    ConfigError: if the workdir holds another run, with the fields that differ; or if it holds files
      that no run wrote.
  """
  path = workdir / IDENTITY
  check_folder(workdir)
  if not path.exists():
    workdir.mkdir(parents=True, exist_ok=True)
    log.replace(path, json.dumps(identity, indent=2, sort_keys=True) + "\n")
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


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """Returns what makes an identity another run's, one text a field; none for the same run.

  Free fields may differ. A field that came to be after `before` was written may have its default,
  which leaves the numbers as they were.
  """
  now = json.loads(json.dumps(now))
  if "config" in before:
    before = {**before, "config": methods.upgrade_config(before["config"])}
  there, defaults = dict(leaves(before)), dict(leaves(_defaults(now)))
  return [
    f"{field}: {old!r} there, {new!r} now"
    for field, old, new in differences(before, now)
    if field.removeprefix("config.") not in FREE_FIELDS
    and (field in there or field not in defaults or defaults[field] != new)
  ]


def _defaults(identity: Mapping[str, Any]) -> dict[str, Any]:
  """Returns an identity that differs in nothing from the defaults of the same method."""
  name = identity.get("config", {}).get("method", {}).get("name", Config().method.name)
  config = dataclasses.asdict(Config(method=methods.config_class(name)()))
  return {"config": json.loads(json.dumps(config))}
