"""Learns a sequence of tasks with one method and reports what was learned and forgotten.

Usage: fmlora_jax main --config=FILE[:VARIANT] [--config.FIELD=VALUE ...] [--workdir=DIR]
         [--dry_run | --estimate | --list]

The same command again resumes, or prints the result of a finished run. With
--config.seeds=1993,1994 it runs with each seed in turn, each in a folder named after the
seed.

Examples:
  fmlora_jax main --config=digits
  fmlora_jax main --config=digits:method=lora,tasks=2 --config.epochs=5 --config.method.rank=8
  fmlora_jax main --config=configs/digits.py --workdir=runs/mine
  fmlora_jax main --config=runs/mine/config.json --config.seed=1994
  fmlora_jax main --config=digits --estimate
"""

import dataclasses
import functools

from absl import flags

from fmlora_jax import BEGAN
from fmlora_jax.cli import config_flag, errors, program
from fmlora_jax.cli import flags as flags_lib
from fmlora_jax.cli.flags import Arguments


def define_flags() -> flags.FlagValues:
  """Returns the program's flags."""
  values = flags.FlagValues()
  flags_lib.define_run(values)
  text = "Compile the run and time some steps: memory, FLOPs, parameters, time. Nothing is trained."
  flags.DEFINE_bool("estimate", False, text, flag_values=values)
  text = "Print methods, benchmarks, config files, weights, and every setting."
  flags.DEFINE_bool("list", False, text, flag_values=values)
  return values


def main(arguments: Arguments) -> None:
  """Runs, resumes, describes or estimates an experiment as the command line says."""
  options = arguments.options
  arguments.refuse_words()
  if options.list:
    program.print_listing()
    return
  config_flag.config_path(options.config)  # a typo is refused before jax is imported
  from rich.console import Console

  from fmlora_jax.config import OWN_FIELDS
  from fmlora_jax.distributed import hosts
  from fmlora_jax.experiment import plan
  from fmlora_jax.experiment.run import run
  from fmlora_jax.report import tables

  program.join_hosts()
  config = config_flag.read_config(options.config, arguments.changes)
  workdir = program.resolve_workdir(
    options.workdir, functools.partial(config_flag.workdir_name, options.config, config)
  )
  if options.dry_run:
    program.write_lines(plan.describe(config, workdir))
    return
  program.enable_compilation_cache()
  # before anything is loaded: processes with different meshes would wait for each other for ever
  hosts.assert_same_on_all({"config": dataclasses.asdict(config)}, besides=OWN_FIELDS)
  with errors.out_of_memory_explained(config.batch_size):
    if options.estimate:
      from fmlora_jax.experiment import estimate

      costs = estimate.estimate(config)
      if hosts.is_first():
        estimate.show(costs, Console())
      return
    if config.seeds:
      from fmlora_jax.experiment import seeds

      results = seeds.run_each(config, workdir, began=BEGAN)
    else:
      results = [run(config, workdir, began=BEGAN)]
  if hosts.is_first():
    console = Console()
    tables.show(results, console)
    tables.line(console, f"\nin {workdir}")


if __name__ == "__main__":
  with program.running(__doc__, define_flags()) as arguments:
    main(arguments)
