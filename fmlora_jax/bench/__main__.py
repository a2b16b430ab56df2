"""Measures a training step early and late in a sequence beside its floor: FLOPs, time, memory.

Usage: fmlora_jax bench [--architecture=vit_b16] [--batch=8] [--dtype=float32] [--rank=16]
         [--prompts=10] [--tasks=20] [--repeats=5] [--json=FILE]
         [--peers [--variants=peft,peft_compiled,...] [--peers_python=FILE]]
       fmlora_jax bench --methods=all|NAME,NAME:FIELD=VALUE,... [--batch=8] [--json=FILE]

The ViT and the images are random; method, step and optimizer are those of a run. The first form
measures FM-LoRA at task 2 and at the last one, beside its floor: the matrix products that it needs,
at the rate of a large one in the same run, and the activations of its backward pass. With --peers
PyTorch does the same work (torch_peers.py): Hugging Face's and timm's ViT with PEFT's LoRA, and
SD-LoRA's stack of one pair of products for each of 20 tasks; all take turns. With --methods, named
as for compare, XLA counts the FLOPs of each method's compiled step; no step runs.

Examples:
  fmlora_jax bench --architecture=micro --batch=32
  fmlora_jax bench --methods=fm_lora,lora:mode=sequential
"""

import dataclasses
import json
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
  """Returns the program's flags; those of `BenchSettings` have its defaults."""
  values = flags.FlagValues()
  flags.DEFINE_string("architecture", "vit_b16", "A name in models/vit.py.", flag_values=values)
  flags.DEFINE_integer("batch", 8, "Images in a step.", lower_bound=1, flag_values=values)
  types = ("float32", "bfloat16")
  flags.DEFINE_enum("dtype", "float32", types, "Type of the products.", flag_values=values)
  text = "Rank of the tasks from the second on."
  flags.DEFINE_integer("rank", 16, text, lower_bound=1, flag_values=values)
  flags.DEFINE_integer("prompts", 10, "Prompt tokens.", lower_bound=0, flag_values=values)
  text = "Task 2 and this one are measured."
  flags.DEFINE_integer("tasks", 20, text, lower_bound=2, flag_values=values)
  text = "Timed rounds; medians are shown."
  flags.DEFINE_integer("repeats", 5, text, lower_bound=1, flag_values=values)
  text = "Count the FLOPs of these methods, named as for compare."
  flags.DEFINE_string("methods", None, text, flag_values=values)
  text = "Time PyTorch too; needs torch, transformers and peft."
  flags.DEFINE_bool("peers", False, text, flag_values=values)
  text = "The Python that has them. Default: this one."
  flags.DEFINE_string("peers_python", None, text, flag_values=values)
  text = f"Models that --peers times: some of {', '.join(peer.VARIANTS)}."
  flags.DEFINE_list("variants", list(peer.DEFAULT), text, flag_values=values)
  flags.register_validator(
    "variants",
    lambda names: set(names) <= set(peer.VARIANTS),
    message=f"must be some of {', '.join(peer.VARIANTS)}",
    flag_values=values,
  )
  flags.DEFINE_string("json", None, "File for all numbers.", flag_values=values)
  return values


def _refuse_unused(arguments: Arguments) -> None:
  """Refuses a flag that is given and would change nothing.

  Raises:
    ConfigError: with what it needs.
  """
  options = arguments.options
  for name in ("rank", "prompts", "repeats", "peers"):
    if options.methods and name in arguments.given:
      raise ConfigError(
        f"--{name} is {getattr(options, name)}: is not used beside --methods; leave it out, a "
        "method's settings follow its name, as in --methods=lora:rank=8"
      )
  for name in ("variants", "peers_python"):
    if name in arguments.given and not options.peers:
      value = getattr(options, name)
      shown = ",".join(value) if name == "variants" else value
      raise ConfigError(f"--{name} is {shown!r}: needs --peers")


def main(arguments: Arguments) -> None:
  """Measures as the flags say and prints a table."""
  options = arguments.options
  arguments.refuse_words()
  python = options.peers_python or sys.executable
  if options.json is not None:
    outputs.require_file("--json", options.json, mark=b'"setting"')
  _refuse_unused(arguments)
  if options.peers:
    peer.check_python(python)
  # leaves GPU memory to PyTorch; JAX reads it when it first uses the device
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  from rich.console import Console

  from fmlora_jax.bench import counts, speed
  from fmlora_jax.bench.workload import BenchSettings, require_architecture
  from fmlora_jax.cli import methods_flag

  backend.require_backend()
  require_architecture(options.architecture)
  console = Console(width=None if sys.stdout.isatty() else 140)
  fields = [field.name for field in dataclasses.fields(BenchSettings)]
  setting = BenchSettings(**{name: getattr(options, name) for name in fields})
  if options.methods:
    choices = methods_flag.parse_methods(options.methods)
    result = counts.count_methods(setting, choices, console.print)
    table = counts.methods_table(result)
  else:
    variants = options.variants if options.peers else ()
    result = speed.measure(setting, options.repeats, variants, python)
    result |= {"programs_of_10_tasks": counts.count_programs()}
    table = speed.speed_table(result)
  console.print(table)
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
  if options.methods and not result["methods"]:
    raise ConfigError("all methods are left out")


if __name__ == "__main__":
  with program.running(__doc__, define_flags()) as arguments:
    main(arguments)
