"""Provenance of a run's numbers: devices, versions, source code, hash of the parameters."""

import functools
import hashlib
import importlib.metadata
import pathlib
import platform
import subprocess
from typing import Any

import jax
import numpy as np

from fmlora_jax.input import resident
from fmlora_jax.input.loader import TaskLoader
from fmlora_jax.types import Passes
from fmlora_jax.workdir import checkpoint


def devices(mesh: jax.sharding.Mesh) -> str:
  """Returns the devices of a run, in words."""
  words = [f"{mesh.size} x {jax.devices()[0].device_kind} ({jax.default_backend()})"]
  if jax.process_count() > 1:
    words.append(f"{jax.process_count()} processes")
  if mesh.shape["fsdp"] > 1:
    words.append(f"backbone split over {mesh.shape['fsdp']}")
  return ", ".join(words)


def passes(counted: Passes) -> str:
  """Returns the forward passes of the backbone for an image, in words."""
  between = f", {counted.between} over a task's images between tasks" if counted.between else ""
  return f"{counted.train} forward in a training step, {counted.test} at test time{between}"


def images(loader: TaskLoader) -> str:
  """Returns how images reach the devices, in words."""
  if loader.is_streaming:
    return f"stream, {loader.workers} workers" if loader.workers else "stream, threads"
  sequence = loader.sequence
  count = resident.capacity(sequence, "train") + resident.capacity(sequence, "val")
  memory = "the device" if jax.device_count() == 1 else "all devices together"
  return f"resident, {resident.num_bytes(sequence, count) / 2**30:.2f} GiB on {memory}"


def params_sha256(tree: Any) -> str:
  """Returns the hash of all leaves of a pytree: names, shapes, dtypes and bytes, sorted by name."""
  sha256 = hashlib.sha256()
  for name, leaf in sorted(checkpoint.flatten(tree).items()):
    array = np.asarray(leaf)
    sha256.update(f"{name}:{array.dtype}{array.shape}".encode())
    sha256.update(array.tobytes())
  return sha256.hexdigest()


def versions() -> dict[str, str]:
  """Returns the versions of the libraries that decide about a run's last bits."""
  names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
  return {name: importlib.metadata.version(name) for name in names} | {
    "python": platform.python_version()
  }


def code() -> str:
  """Returns the commit of the source and the versions of libraries, in words."""
  return f"{git_commit() or 'no git checkout'}, " + ", ".join(map(" ".join, versions().items()))


@functools.cache
def git_commit() -> str | None:
  """Returns the commit of the source at the first call; None where git does not track it.

  A package that is installed below another project's checkout is not part of that checkout.
  """
  git = ["git", "-C", str(pathlib.Path(__file__).parent)]
  described = [*git, "describe", "--always", "--dirty", "--abbrev=40"]
  try:
    subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
    done = subprocess.run(described, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return None
  return done.stdout.strip()
