"""One mesh over all devices: batches are split over `data`, everything else is on each device."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fmlora_jax.config import ConfigError


def make() -> Mesh:
  """Returns the mesh of all devices of this host."""
  return Mesh(np.asarray(jax.devices()), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of state and data that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Returns the sharding of arrays whose axis `axis` is the batch."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def check_batch(size: int, field: str, mesh: Mesh) -> None:
  """Raises ConfigError if a batch does not divide over the devices."""
  if size % mesh.size:
    raise ConfigError(
      f"config.{field} is {size}: must be a multiple of the number of devices, {mesh.size}"
    )
