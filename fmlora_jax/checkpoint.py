"""What a run needs to go on where it was: arrays through orbax, the rest as JSON beside them.

A checkpoint holds everything but the backbone and the data, whose hashes it names. Its step is the
number of training steps of the whole run. Task ends are kept; within a task only the newest.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp

from fmlora_jax import lock, writer
from fmlora_jax.config import FREE_FIELDS, ConfigError, differences

IDENTITY = "config.json"  # what a workdir belongs to


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


class Store:
  """The checkpoints of one workdir; a context manager.

  Args:
    workdir: of the run.
    sharding: that restored arrays get.
  """

  def __init__(self, workdir: pathlib.Path, sharding: jax.sharding.Sharding):
    self._sharding = sharding
    self._checkpointer = ocp.training.Checkpointer((workdir / "checkpoints").absolute())
    self._kept: list[int] = []

  def __enter__(self) -> "Store":
    return self

  def __exit__(self, *error) -> None:
    self._checkpointer.close()

  def save(self, step: int, snapshot: Snapshot, *, keep: bool) -> None:
    """Writes a checkpoint and waits for it; drops all others but those that were kept."""
    arrays = {name: jnp.asarray(leaf) for name, leaf in snapshot.arrays.items()}
    kept = [*self._kept, step] if keep else self._kept
    record = snapshot.record | {"kept": kept}
    self._checkpointer.save(step, arrays, custom_metadata=record, overwrite=True)
    self._drop_others(step, kept)

  def latest(self) -> Snapshot | None:
    """Returns the newest checkpoint, None if there is none; drops what a kill left beside it."""
    newest = self._checkpointer.latest
    if newest is None:
      return None
    metadata = self._checkpointer.metadata(newest.step)
    template = {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._sharding)
      for name, leaf in metadata.metadata.items()
    }
    arrays = self._checkpointer.load(newest.step, template)
    record = metadata.custom_metadata
    self._drop_others(newest.step, record["kept"])
    return Snapshot(arrays=arrays, record=record)

  def _drop_others(self, newest: int, kept: list[int]) -> None:
    self._kept = kept
    found = {checkpoint.step for checkpoint in self._checkpointer.checkpoints}
    for step in sorted(found - {newest, *kept}):  # in one order: all processes delete together
      self._checkpointer.delete(step)


def check_folder(workdir: pathlib.Path) -> None:
  """Refuses a folder that holds files which no run wrote.

  Raises:
    ConfigError: with their names.
  """
  path = workdir / IDENTITY
  if path.exists() or not workdir.exists():
    return
  found = [p for p in workdir.iterdir() if p.name != lock.FILE and not writer.is_draft(p, of=path)]
  if found:
    names = ", ".join(sorted(p.name for p in found)[:3])
    raise ConfigError(
      f"workdir {workdir} holds {names} but no {path.name}: must be new, empty, or a run's own; "
      "choose another with --workdir"
    )


def claim(workdir: pathlib.Path, identity: dict[str, Any]) -> None:
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
    writer.replace(path, json.dumps(identity, indent=2, sort_keys=True) + "\n")
    return
  try:
    before = json.loads(path.read_text())
  except ValueError as error:
    raise ConfigError(f"{path} can't be read ({error}); choose another --workdir") from None
  now = json.loads(json.dumps(identity))
  changed = [
    f"{field}: {old!r} there, {new!r} now"
    for field, old, new in differences(before, now)
    if field.removeprefix("config.") not in FREE_FIELDS
  ]
  if changed:
    raise ConfigError(
      f"workdir {workdir} belongs to another run ({'; '.join(changed)}): undo the change to "
      "resume it, or choose another --workdir"
    )
