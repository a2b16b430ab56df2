"""What a training step costs early and late in a sequence, and must cost: FLOPs, time, memory.

python -m fmlora_jax.bench [--architecture=vit_b16] [--batch=8] [--dtype=float32] [--rank=16]
  [--prompts=10] [--tasks=20] [--repeats=5] [--json=FILE]
  [--peers [--variants=peft,peft_compiled,...] [--peers_python=FILE]]
python -m fmlora_jax.bench --methods=all|NAME,NAME:FIELD=VALUE,... [--batch=8] [--json=FILE]

The ViT and the images are random; method, step and optimiser are those of a run. The first command
measures FM-LoRA at task 2 and at the last one, beside what the step needs at least: the matrix
products that can't be left out, at the rate of a large one in the same run, and the activations
that the backward pass must find. With --peers PyTorch does the same work (torch_peers.py): Hugging
Face's and timm's ViT with PEFT's LoRA, and SD-LoRA's stack of one pair of products for each of 20
tasks; all take turns. With --methods, named as for fmlora_jax.compare, XLA counts the FLOPs of each
method's compiled step; no step is done.
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags
from rich.console import Console

from fmlora_jax.bench import peer, programs, speed
from fmlora_jax.bench.lab import BenchSettings
from fmlora_jax.cli import overrides, program


def main(argv: Sequence[str]) -> None:
  del argv
  values, console = flags.FLAGS, Console(width=None if sys.stdout.isatty() else 140)
  setting = BenchSettings(
    **{f.name: getattr(values, f.name) for f in dataclasses.fields(BenchSettings)}
  )
  if values.methods:
    result = programs.count_methods(setting, overrides.parse_methods(values.methods), console.print)
    shown = programs.methods_table(result)
  else:
    variants = values.variants if values.peers else ()
    result = speed.measure(setting, values.repeats, variants, values.peers_python)
    result |= {"programs_of_10_tasks": programs.count_programs()}
    shown = speed.table(result)
  console.print(shown)
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  program.drop_flags(*program.OF_RUNS)
  flags.adopt_module_key_flags(program)
  flags.DEFINE_string("architecture", BenchSettings.architecture, "A name in models/vit.py.")
  flags.DEFINE_integer("batch", BenchSettings.batch, "Images in a step.", lower_bound=1)
  flags.DEFINE_enum("dtype", BenchSettings.dtype, ("float32", "bfloat16"), "What is computed in.")
  flags.DEFINE_integer(
    "rank", BenchSettings.rank, "Rank of the tasks from the second on.", lower_bound=1
  )
  flags.DEFINE_integer("prompts", BenchSettings.prompts, "Prompt tokens.", lower_bound=0)
  flags.DEFINE_integer(
    "tasks", BenchSettings.tasks, "Task 2 and this one are measured.", lower_bound=2
  )
  flags.DEFINE_integer("repeats", 5, "Timed rounds; medians are shown.", lower_bound=1)
  flags.DEFINE_string("methods", None, "Count the FLOPs of these, as in fmlora_jax.compare.")
  flags.DEFINE_bool("peers", False, "Time PyTorch beside it; needs torch, transformers and peft.")
  flags.DEFINE_string("peers_python", sys.executable, "The Python that has them.")
  flags.DEFINE_list("variants", list(peer.DEFAULT), "What --peers times.")
  flags.register_validator(
    "variants",
    lambda names: set(names) <= set(peer.VARIANTS),
    message=f"must be some of {', '.join(peer.VARIANTS)}",
  )
  flags.DEFINE_string("json", None, "File for all numbers.")
  # beside PyTorch on one GPU: take memory as it is needed; read when JAX first uses the device
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  program.start(main, program.parse_flags)
