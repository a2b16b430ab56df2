"""Saves and restores a run: arrays with Orbax, everything else as JSON next to them.

A checkpoint holds everything but the backbone and the data, and their hashes. It is numbered by the
training steps of the whole run. Checkpoints at task ends stay; within a task only the newest does.

Orbax writes a step in one piece, but restores flipped bits, other dtypes and empty folders without
an error. So each step has a record of ours: the run's identity, a digest of each array, and one of
the record itself. Only a step that passes all three is used.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp

from fmlora_jax.config import ConfigError
from fmlora_jax.distributed import hosts
from fmlora_jax.workdir import digest, files
from fmlora_jax.workdir.identity import changes
from fmlora_jax.workdir.step_folders import StepFolders


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
  """Contents of one checkpoint: arrays by path, and a JSON-able record about them."""

  arrays: Mapping[str, Array]
  record: dict[str, Any]


def flatten(tree: Any) -> dict[str, Array]:
  """Returns the leaves of a pytree by their paths."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(arrays: Mapping[str, Array], prefix: str) -> dict[str, Any]:
  """Returns the nested dicts of all leaves whose paths start with `prefix`."""
  tree: dict[str, Any] = {}
  for path, leaf in arrays.items():
    head, *names = path.split("/")
    if head == prefix:
      group = tree
      for name in names[:-1]:
        group = group.setdefault(name, {})
      group[names[-1]] = leaf
  return tree


def fill(template: Any, arrays: Mapping[str, Array], prefix: str) -> Any:
  """Returns the pytree `template` with its leaves taken from `arrays`.

  Raises:
    ValueError: if a leaf is absent or of another shape or dtype.
  """

  def leaf(path, expected):
    name = f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}"
    array = arrays.get(name)
    if array is None or (array.shape, array.dtype) != (expected.shape, expected.dtype):
      actual = "absent" if array is None else f"{array.dtype}{array.shape}"
      raise ValueError(f"checkpoint: {name} is {actual}: must be {expected.dtype}{expected.shape}")
    return array

  return jax.tree.map_with_path(leaf, template)


def num_bytes(arrays: Any) -> int:
  """Returns the bytes of all arrays of a pytree, uncompressed."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


class DamagedError(ConfigError):
  """An unusable checkpoint; the message gives the reason."""


class CheckpointStore:
  """The checkpoints of one workdir.

  Args:
    workdir: of the run.
    sharding: of restored arrays.
    identity: of the run, as in `identity.claim_workdir`; other runs' checkpoints are refused.
    on_damage: see CheckpointConfig.
    note: shows a line.
    require_held: raises ConfigError where the workdir is no longer this run's; as `hold_lock`
      yields it.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    sharding: jax.sharding.Sharding,
    *,
    identity: Mapping[str, Any],
    on_damage: Literal["fall_back", "refuse"] = "fall_back",
    note: Callable[[str], None] = print,
    require_held: Callable[[], None] | None = None,
  ):
    self.folder = (workdir / "checkpoints").absolute()
    self._folders = StepFolders(self.folder, note)
    self._sharding, self._identity = sharding, identity
    self._on_damage, self._note = on_damage, note
    self._require_held = require_held or (lambda: None)
    self._permanent: list[int] = []  # steps at task ends

  def save(self, step: int, snapshot: Snapshot, *, keep: bool) -> None:
    """Writes a checkpoint, reads it back, and drops all others but the permanent ones.

    Args:
      keep: makes it permanent.

    Raises:
      ConfigError: if the disk is full or returns other bits than were written; all earlier
        checkpoints, also one of the same step, are then still there. Also if the workdir is no
        longer this run's.
    """
    hosts.run_on_first(self._require_held)
    try:
      self._save(step, snapshot, keep)
    except Exception:
      self._require_held()  # if it is not, that is the reason
      raise

  def _save(self, step: int, snapshot: Snapshot, keep: bool) -> None:
    target = self._folders.new_path(step)
    arrays = {name: jnp.asarray(leaf) for name, leaf in snapshot.arrays.items()}
    permanent = [*self._permanent, step] if keep else self._permanent
    record = snapshot.record | {"step": step, "kept": permanent, "identity": self._identity}
    record |= {"digests": digest.tree_digests(arrays)}
    with files.explain_failure(target, num_bytes(arrays)), _quiet():
      metadata = record | {"sha256": _sha256(record)}
      with tempfile.TemporaryFile(dir=self.folder):  # where it fails, orbax's threads would wait
        pass
      ocp.save(str(target), arrays, overwrite=True, custom_metadata=metadata)
      if hosts.is_first():
        files.fsync_tree(target)
    try:
      self._load(step, target)
    except DamagedError as error:
      hint = "the disk may fail; rerun the command to resume from the checkpoint before"
      raise DamagedError(f"{error}; {hint}") from None
    self._folders.replace(step, target)
    self._drop_others(step, permanent)

  def latest(self) -> Snapshot | None:
    """Returns the newest usable checkpoint, None if there is none; removes unfinished ones.

    Each newer one, which is unusable, is named and set aside.

    Raises:
      DamagedError: if the newest is unusable and `on_damage` is "refuse".
    """
    self._folders.clean_up()
    steps = self._folders.steps()
    for step in reversed(steps):
      try:
        snapshot = self._load(step)
      except DamagedError as error:
        if self._on_damage == "refuse":
          hint = "config.checkpoint.on_damage=fall_back takes the newest usable one"
          raise DamagedError(f"{error}; {hint}") from None
        self._folders.set_aside(step, str(error))
      else:
        self._drop_others(step, snapshot.record["kept"])
        return snapshot
    if steps:
      self._note("no usable checkpoint: starting from the beginning")
    return None

  def _drop_others(self, newest: int, permanent: list[int]) -> None:
    self._permanent = permanent
    self._folders.drop_all_but({newest, *permanent})

  def _load(self, step: int, path: pathlib.Path | None = None) -> Snapshot:
    """Returns a checkpoint of this run that is as it was saved.

    Raises:
      DamagedError: on all processes, if one of them finds it damaged.
    """
    path, reason, snapshot = path or self._folders.path(step), "", None
    try:
      with _quiet():
        snapshot = self._verified(step, path)
    except DamagedError as error:
      reason = str(error)
    except (MemoryError, PermissionError):  # no damage: they pass, or someone can fix them
      raise
    except Exception as error:  # damage raises errors of many types within orbax
      message = " ".join(str(error).split())
      if any(code in message for code in ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")):
        raise
      reason = f"it can't be read ({type(error).__name__}: {message[:300]})"
    if reason := next(filter(None, hosts.gather(reason)), ""):
      raise DamagedError(f"checkpoint {path} is unusable: {reason}")
    assert snapshot is not None
    return snapshot

  def _verified(self, step: int, path: pathlib.Path) -> Snapshot:
    metadata: Any = ocp.metadata(str(path)).custom_metadata or {}
    record = {name: value for name, value in metadata.items() if name != "sha256"}
    if "digests" not in record or "sha256" not in metadata:
      raise DamagedError("it has no digests, so it can't be verified")
    if _sha256(record) != metadata["sha256"]:
      raise DamagedError("its record, in _CHECKPOINT_METADATA, differs from what was saved")
    if changed := changes(record["identity"], self._identity):
      raise DamagedError(f"it is another run's ({'; '.join(changed)})")
    if record["step"] != step:
      raise DamagedError(f"it is that of step {record['step']}")
    digests = record["digests"]
    template = {name: digest.abstract_array(text, self._sharding) for name, text in digests.items()}
    arrays = ocp.load(str(path), template)
    actual = digest.tree_digests(arrays)
    if wrong := sorted(name for name in digests if actual[name] != digests[name]):
      more = f" and {len(wrong) - 3} others" if len(wrong) > 3 else ""
      raise DamagedError(f"its arrays {', '.join(wrong[:3])}{more} differ from what was saved")
    return Snapshot(arrays=arrays, record=record)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences Orbax's log; our own error says the same in one line."""
  logging.disable()
  try:
    yield
  finally:
    logging.disable(logging.NOTSET)


def _sha256(record: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
