"""Continual learning on one frozen ViT: FM-LoRA and the methods it is compared with, in JAX.

Usage: fmlora_jax COMMAND [--FLAG=VALUE ...]
       fmlora_jax COMMAND --help
       fmlora_jax --list
       fmlora_jax --version

`fmlora_jax COMMAND` is the same as `python -m fmlora_jax.COMMAND`. --list prints methods,
benchmarks, config files, weights, and every setting.

Examples:
  fmlora_jax main --config=digits --config.epochs=5
  fmlora_jax compare --config=digits --methods=fm_lora,lora --seeds=1993,1994
  fmlora_jax report runs
"""

import importlib
import inspect
import sys

import fmlora_jax
from fmlora_jax.cli import errors, output, program

COMMANDS = {
  "main": "fmlora_jax.main",
  "compare": "fmlora_jax.compare",
  "report": "fmlora_jax.report.__main__",
  "prepare": "fmlora_jax.prepare",
  "pretrain": "fmlora_jax.pretrain.__main__",
  "bench": "fmlora_jax.bench.__main__",
  "bench.gpu": "fmlora_jax.bench.gpu",
}


def main() -> None:
  """Runs the command that the first argument names."""
  output.protect()
  command, *arguments = sys.argv[1:] or ["--help"]
  if command in COMMANDS:
    module = importlib.import_module(COMMANDS[command])
    argv = [f"fmlora_jax {command}", *arguments]
    with program.running(module.__doc__, module.define_flags(), argv) as parsed:
      module.main(parsed)
  elif command in ("--version", "-version", "--list", "-list", *program.HELP):
    with program.answering():
      if "list" in command:
        program.print_listing()
      else:
        sys.stdout.write(help_text() if command in program.HELP else version_text())
  else:
    errors.fail(
      f"unknown command {command!r}: must be one of {', '.join(COMMANDS)}; fmlora_jax --help says "
      "more"
    )


def version_text() -> str:
  """Returns the name and the version."""
  return f"fmlora_jax {fmlora_jax.__version__}\n"


def help_text() -> str:
  """Returns the docstring above, and the commands with a line for each."""
  program.require_docstrings()
  lines = [inspect.cleandoc(str(__doc__)), "", "Commands:"]
  for name, module in COMMANDS.items():
    summary = str(importlib.import_module(module).__doc__).splitlines()[0]
    lines.append(f"  {name:10} {summary}")
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  main()
