"""Provenance of a run's numbers: devices, versions, source code, hash of the parameters."""

import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
from typing import Any

import jax
import numpy as np

from fmlora_jax.input import resident
from fmlora_jax.input.loader import TaskLoader
from fmlora_jax.types import Passes
from fmlora_jax.workdir import checkpoint

# settings of jax, each also a variable of its name in capitals, that decide about numbers
JAX_SETTINGS = (
  *("jax_allow_f16_reductions", "jax_default_matmul_precision", "jax_default_prng_impl"),
  *("jax_disable_jit", "jax_disable_most_optimizations", "jax_enable_custom_prng"),
  *("jax_enable_x64", "jax_exec_time_optimization_effort", "jax_high_dynamic_range_gumbel"),
  *("jax_numpy_dtype_promotion", "jax_optimization_level", "jax_random_seed_offset"),
  *("jax_softmax_custom_jvp", "jax_threefry_partitionable", "jax_use_direct_linearize"),
)
# of XLA's flags those that do not; one that is unknown may
HARMLESS_FLAGS = re.compile(
  r"xla_force_host_platform_device_count|xla_hlo_profile|xla_detailed_logging|xla_.*("
  r"dump|print|debug|line_info|_dir|timeout|parallelism|threads|multi_thread|codegen_split|"
  r"scheduler|async|logging|log_level|embed_ir|metadata|verif|memory_limit|llvm_ir_file|ptx_file)"
)


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


def environment() -> dict[str, Any]:
  """Returns what variables and jax's settings say about numbers, by the names of the variables."""
  known = jax.config.values
  values = {k: getattr(jax.config, k, known[k]) for k in JAX_SETTINGS if k in known}
  return {name.upper(): _plain(value) for name, value in values.items()} | {
    "LIBTPU_INIT_ARGS": _flags(os.environ.get("LIBTPU_INIT_ARGS", "")),
    "NVIDIA_TF32_OVERRIDE": os.environ.get("NVIDIA_TF32_OVERRIDE", ""),
    "XLA_FLAGS": _flags(os.environ.get("XLA_FLAGS", "")),
  }


def _plain(value: Any) -> Any:
  return value if value is None or type(value) in (bool, int, float) else str(value)


def _flags(text: str) -> str:
  """Returns the flags that may decide about numbers, sorted; the last of a name counts."""
  if text and not text.lstrip().startswith("-"):  # XLA takes the name of a file with flags too
    path = pathlib.Path(text.strip())
    text = path.read_text() if path.is_file() else text
  pairs = (flag.lstrip("-").partition("=") for flag in text.split())
  values = {name: value or "true" for name, _, value in pairs}
  return " ".join(f"{k}={v}" for k, v in sorted(values.items()) if not HARMLESS_FLAGS.match(k))


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
