"""Memory of this machine and of its devices."""

import os

import jax


def host_memory() -> int:
  """Returns the bytes of memory of this machine."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_memory() -> int | None:
  """Returns the bytes of one device that JAX may use; None for a CPU, which uses the machine's."""
  return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
