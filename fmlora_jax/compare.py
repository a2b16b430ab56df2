"""Runs methods with seeds, one run after the other, and reports them side by side.

Usage: fmlora_jax compare --config=FILE[:VARIANT] [--methods=all] [--seeds=1993,1994,1995]
         [--config.FIELD=VALUE ...] [--workdir=DIR] [--dry_run]

--methods takes names separated by commas; "all" is every method in every variant that its file
declares. A method's own settings follow it, each after a colon. A field with a dot is one of the
whole config, such as optim.learning_rate. The config file is read anew for each method, as
FILE:method=NAME; --config.FIELD=VALUE is for all methods.

Each run has the folder DIR/METHOD/SEED, which `main` and `report` take too. The same command again
continues: finished runs are read, the one that was interrupted resumes at its checkpoint. A run
that is refused or diverges is one line, the others go on, and the exit code is 1; it is 2 if none
is left. The table is written to DIR/compare.md and the accuracies over tasks to DIR/compare.png.

Examples:
  fmlora_jax compare --config=digits --methods=fm_lora,lora,linear_probe --seeds=1993,1994
  fmlora_jax compare --config=digits --methods=lora:mode=sequential,lora:mode=incremental:rank=8
  fmlora_jax compare --config=digits --methods=fm_lora,fm_lora:prompt.num_tokens=0 --dry_run
"""

from absl import flags

from fmlora_jax.cli import errors, methods_flag, outputs, program
from fmlora_jax.cli import flags as flags_lib
from fmlora_jax.cli.flags import Arguments
from fmlora_jax.config import ConfigError
from fmlora_jax.distributed import backend


def define_flags() -> flags.FlagValues:
  """Returns the program's flags."""
  values = flags.FlagValues()
  flags_lib.define_run(values)
  text = "NAME or NAME:FIELD=VALUE..., separated by commas."
  flags.DEFINE_string("methods", "all", text, flag_values=values)
  text = "Separated by commas."
  flags.DEFINE_list("seeds", ["1993", "1994", "1995"], text, flag_values=values)
  return values


def main(arguments: Arguments) -> None:
  """Compares methods as the command line says."""
  options, changes = arguments.options, arguments.changes
  arguments.refuse_words()
  if not all(seed.isdecimal() for seed in options.seeds) or not options.seeds:
    raise ConfigError(f"--seeds is {options.seeds}: must be whole numbers, such as 1993,1994")
  from fmlora_jax.experiment import comparison  # imports jax

  backend.require_backend()
  comparison.check_arguments(options.config, changes)
  folder = program.resolve_workdir(
    options.workdir, lambda: comparison.workdir_name(options.config, changes)
  )
  choices, seeds = methods_flag.parse_methods(options.methods), dict.fromkeys(options.seeds)
  planned = comparison.plan(options.config, changes, choices, [*map(int, seeds)], folder)
  program.write_lines(comparison.listing(planned, folder))
  if all(run.problem for run in planned):
    errors.fail(f"all {len(planned)} runs are left out: {planned[0].problem}")
  if any(run.state != "finished" for run in planned):
    outputs.require_folder("--workdir", folder)
  comparison.require_outputs(planned, folder)
  if options.dry_run:
    return
  program.enable_compilation_cache()
  if missing := comparison.compare(planned, folder, debug=options.debug):
    left_out = f"{missing} of {len(planned)} runs are left out"
    errors.fail(left_out, code=2 if missing == len(planned) else 1)


if __name__ == "__main__":
  with program.running(__doc__, define_flags()) as arguments:
    main(arguments)
