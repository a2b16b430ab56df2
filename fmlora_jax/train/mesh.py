"""One mesh over all devices of all processes, and the placement of arrays on it.

Batches and a task's images are split over all devices. The frozen backbone is split over the
devices of an `fsdp` group, each of which holds a part of every large array. Everything else is
replicated.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fmlora_jax.config import ConfigError
from fmlora_jax.input import augment
from fmlora_jax.types import Examples

AXES = ("data", "fsdp")
SMALL = 2**14  # smaller arrays are replicated: gathering costs more than it saves


def make_mesh(fsdp: int = 1) -> Mesh:
  """Returns the mesh of all devices; those of a process are neighbours.

  Args:
    fsdp: devices that share one copy of the frozen backbone: neighbours, of one process where it
      has so many.

  Raises:
    ConfigError: if `fsdp` does not divide the number of devices, or processes have more or fewer.
  """
  devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
  if len(devices) % fsdp:
    raise ConfigError(
      f"config.mesh.fsdp is {fsdp}: must divide the number of devices, {len(devices)}"
    )
  counts = np.bincount([device.process_index for device in devices])
  if len(set(counts)) > 1:
    raise ConfigError(f"processes have {counts.tolist()} devices: must have the same number each")
  return Mesh(np.asarray(devices).reshape(-1, fsdp), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose leading axis is split over all devices."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def fsdp_sharding(mesh: Mesh, tree: Any) -> Any:
  """Returns the shardings of a frozen backbone: large leaves by their longest axis that divides."""
  size = mesh.shape["fsdp"]

  def sharding(leaf):
    axes = [axis for axis, length in enumerate(leaf.shape) if length % size == 0]
    if size == 1 or leaf.size < SMALL or not axes:
      return replicated(mesh)
    longest = max(axes, key=lambda axis: leaf.shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

  return jax.tree.map(sharding, tree)


def place(tree: Any, shardings: Any) -> Any:
  """Places arrays on the mesh; those of the host or one device must be equal on all processes.

  Args:
    tree: arrays of JAX or NumPy, no PRNG keys.
    shardings: one, or a tree of them.
  """

  def place_leaf(leaf, sharding):
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
      return leaf
    if _is_global(leaf) or sharding.is_fully_addressable:
      return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)  # device_put would send it to all to compare
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

  if isinstance(shardings, NamedSharding):
    return jax.tree.map(lambda leaf: place_leaf(leaf, shardings), tree)
  return jax.tree.map(place_leaf, tree, shardings)


def _is_global(leaf: Any) -> bool:
  """Returns whether an array lies on devices of several processes."""
  return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def replicate_from_host0(tree: Any, mesh: Mesh) -> Any:
  """Replicates a hook's result on all devices; host arrays come from process 0.

  CPUs of different hosts round differently, and copies must not drift apart.
  """

  def leaf_of_first(leaf):
    if _is_global(leaf) or not mesh.is_multi_process:
      return leaf
    return multihost_utils.broadcast_one_to_all(np.asarray(leaf))

  return place(jax.tree.map(leaf_of_first, tree), replicated(mesh))


def shard_batch(tree: Any, mesh: Mesh) -> Any:
  """Returns arrays split over all devices; each process gives the rows of its devices."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), tree)


def gather_to_host(tree: Any) -> Any:
  """Returns the whole arrays as NumPy arrays, the same in all processes."""
  return multihost_utils.process_allgather(tree, tiled=True)


def make_gather_rows(mesh: Mesh) -> Callable[[Examples, Any], Examples]:
  """Returns `augment.gather_rows` for examples split over the devices; the result is split too.

  Each device picks the rows that it holds and zeros for the others; a reduce-scatter brings every
  row to its device. It moves as many bytes per device as the batch has.
  """
  if mesh.size == 1:
    return augment.gather_rows

  def exchange(leaf, held):
    picked = jnp.where(held.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0)
    picked = picked.astype(jnp.uint8) if leaf.dtype == bool else picked
    return jax.lax.psum_scatter(picked, AXES, tiled=True).astype(leaf.dtype)

  def take(examples, rows):
    count = len(examples.valid)
    local = jnp.maximum(rows, 0) - jax.lax.axis_index(AXES) * count  # padding: the first image
    held = (local >= 0) & (local < count)
    taken = augment.gather_rows(examples, jnp.where(held, local, 0))
    taken = taken.replace(valid=taken.valid & (rows >= 0))
    return jax.tree.map(lambda leaf: exchange(leaf, held), taken)

  whole, parts = PartitionSpec(), PartitionSpec(AXES)
  return jax.shard_map(take, mesh=mesh, in_specs=(parts, whole), out_specs=parts)


def padded_size(size: int, mesh: Mesh) -> int:
  """Returns the size of a batch rounded up to a multiple of the number of devices."""
  return -(-size // mesh.size) * mesh.size


def check_vote(size: int, field: str, mesh: Mesh) -> None:
  """Raises ConfigError if a batch that votes would be padded, as padding would vote too."""
  if size % mesh.size:
    raise ConfigError(
      f"config.{field} is {size}: must be a multiple of the number of devices, {mesh.size}, where "
      "config.method.batchwise is true"
    )
