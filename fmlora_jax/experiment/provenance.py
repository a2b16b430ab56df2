"""What a run says of where its numbers come from: devices, versions, source, learned bits."""

import dataclasses
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
from fmlora_jax.tasks.sequence import find_copies
from fmlora_jax.train.loop import Trainer
from fmlora_jax.types import Passes
from fmlora_jax.workdir import checkpoint


def devices(mesh: jax.sharding.Mesh) -> str:
  """Returns what a run computes on, in words."""
  parts = [f"{mesh.size} x {jax.devices()[0].device_kind} ({jax.default_backend()})"]
  if jax.process_count() > 1:
    parts.append(f"{jax.process_count()} processes")
  if mesh.shape["fsdp"] > 1:
    parts.append(f"backbone split over {mesh.shape['fsdp']}")
  return ", ".join(parts)


def passes(counted: Passes) -> str:
  """Returns how often an image goes through the backbone, in words."""
  between = f", {counted.between} over a task's images between tasks" if counted.between else ""
  return f"{counted.train} forward in a training step, {counted.test} at test time{between}"


def images(trainer: Trainer) -> str:
  """Returns how images reach the devices, in words."""
  sequence, workers = trainer.sequence, trainer.config.input.workers
  if trainer.streams:
    return f"stream, {workers} workers" if workers else "stream, threads"
  count = resident.capacity(sequence, "train") + resident.capacity(sequence, "val")
  place = "the device" if jax.device_count() == 1 else "all devices together"
  return f"resident, {resident.num_bytes(sequence, count) / 2**30:.2f} GiB on {place}"


def protocol(
  trainer: Trainer, *, kept: int, val_read: bool, code: list[str], alone: dict[str, int]
) -> dict[str, Any]:
  """Returns what a reader must know of how the numbers came about; JSON-able.

  Split, weights, pixels and devices have fields of their own in a result.

  Args:
    kept: bytes of statistics of the data.
    val_read: whether the method read validation images.
    code: of the sessions of the run.
    alone: right answers on some test images together and alone.
  """
  sequence, measured = trainer.sequence, trainer.config.tasks.evaluate_on
  copies = find_copies(sequence)
  return {
    "old_image_bytes": 0,  # no method has a way to a task's images once it is over: see TaskView
    "old_statistics_bytes": kept,
    "task_identity_at_test": sequence.scenario == "til",
    "measured_on": measured,
    "validation_images": sum(len(task.val) for task in sequence.tasks),
    "validation_read_by_method": val_read,
    "copies": None if copies is None else dataclasses.asdict(copies),
    "code": code,
    "checks": {
      "finite": "loss, gradient and parameters at each step, all that is saved",
      "frozen": "weights and frozen parameters at each task's end and each checkpoint",
      "batch_of_one": alone,
    },
  }


def params_sha256(tree: Any) -> str:
  """Returns the hash of all leaves of a pytree: names, shapes, dtypes and bytes, sorted by name."""
  digest = hashlib.sha256()
  for name, leaf in sorted(checkpoint.flatten(tree).items()):
    array = np.asarray(leaf)
    digest.update(f"{name}:{array.dtype}{array.shape}".encode())
    digest.update(array.tobytes())
  return digest.hexdigest()


def versions() -> dict[str, str]:
  """Returns the versions of what decides about a run's last bits."""
  names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
  found = {name: importlib.metadata.version(name) for name in names}
  return found | {"python": platform.python_version()}


def code() -> str:
  """Returns the commit of the source and the versions of libraries, in words."""
  return f"{git_commit() or 'no git checkout'}, " + ", ".join(map(" ".join, versions().items()))


@functools.cache
def git_commit() -> str | None:
  """Returns the commit of the source as it was at the first call; None where git does not hold it.

  A package that is installed below somebody else's checkout is not of that checkout.
  """
  git = ["git", "-C", str(pathlib.Path(__file__).parent)]
  described = [*git, "describe", "--always", "--dirty", "--abbrev=40"]
  try:
    subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
    done = subprocess.run(described, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return None
  return done.stdout.strip()
