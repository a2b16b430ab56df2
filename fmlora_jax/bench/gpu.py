"""Measures a GPU in one call of at most nine minutes: steps, PyTorch, kernels, a whole run.

Usage: fmlora_jax bench.gpu --out=DIR [--peers_python=FILE] [--seconds=520]
         [--batches=64,128,256,512] [--architecture=vit_b16] [--dtype=bfloat16] [--epochs=30]

In turn: FM-LoRA's step at batch 256, then beside PyTorch's, its kernels by their time, the step at
the other batches, and a whole run of ten tasks over 24,000 images of random pixels, 256 a side (an
eighth for validation), resident, rank 16. A part without time is left out. The whole run has as
many epochs as fit, and its time is extrapolated to all; the report gives both. DIR/gpu.json and
DIR/gpu.txt are written after each part.

Example:
  fmlora_jax bench.gpu --out=gpu --seconds=300
"""

import math
import os
import pathlib
import sys

from absl import flags

from fmlora_jax.bench import peer
from fmlora_jax.cli import outputs, program
from fmlora_jax.cli.flags import Arguments
from fmlora_jax.config import ConfigError
from fmlora_jax.distributed import backend


def define_flags() -> flags.FlagValues:
  """Returns the program's flags."""
  values = flags.FlagValues()
  text = "Folder for gpu.json, gpu.txt and the whole run."
  flags.DEFINE_string("out", None, text, flag_values=values)
  text = "The Python that has torch. Default: this one."
  flags.DEFINE_string("peers_python", None, text, flag_values=values)
  text = "Time for all parts."
  flags.DEFINE_float("seconds", 520.0, text, lower_bound=1.0, flag_values=values)
  text = "Images in a step."
  flags.DEFINE_list("batches", ["64", "128", "256", "512"], text, flag_values=values)
  flags.DEFINE_string("architecture", "vit_b16", "A name in models/vit.py.", flag_values=values)
  types = ("float32", "bfloat16")
  flags.DEFINE_enum("dtype", "bfloat16", types, "Type of the products.", flag_values=values)
  flags.DEFINE_integer("epochs", 30, "Of the whole run.", lower_bound=1, flag_values=values)
  return values


def main(arguments: Arguments) -> None:
  """Measures as the flags say and prints each part."""
  options = arguments.options
  arguments.refuse_words()
  if not options.out:
    raise ConfigError("--out is missing: name a folder for the results")
  outputs.require_folder("--out", options.out)
  if options.peers_python is not None:
    peer.check_python(options.peers_python)
  if not math.isfinite(options.seconds):
    raise ConfigError(f"--seconds is {options.seconds}: must be a number, such as 520")
  batches = [int(batch) if batch.isdecimal() else 0 for batch in options.batches]
  if not batches or not all(batches) or len(set(batches)) < len(batches):
    raise ConfigError(
      f"--batches is {options.batches}: must be whole numbers, each once, such as 64,128"
    )
  # leaves GPU memory to PyTorch; JAX reads it when it first uses the device
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  backend.require_backend()
  import jax

  from fmlora_jax.bench import gpu_report
  from fmlora_jax.bench.workload import require_architecture

  require_architecture(options.architecture)
  plan = gpu_report.Plan(
    out=pathlib.Path(options.out),
    batches=tuple(batches),
    peers_python=options.peers_python or sys.executable,
    seconds=options.seconds,
    architecture=options.architecture,
    dtype=options.dtype,
    epochs=options.epochs,
  )
  program.enable_compilation_cache()
  program.write_lines([f"{jax.devices()[0].device_kind} ({jax.default_backend()})"])
  gpu_report.measure(plan)


if __name__ == "__main__":
  with program.running(__doc__, define_flags()) as arguments:
    main(arguments)
