"""Learns a sequence of tasks and reports what was kept and what was forgotten.

python -m fmlora_jax.main --config=configs/digits.py [--config.FIELD=VALUE ...] [--workdir=DIR]
  [--dry_run]

With --config.seeds=1993,1994 the experiment runs with each seed in turn, in a folder of its own.
"""

import dataclasses
import re

from absl import app, flags

from fmlora_jax import BEGAN, methods
from fmlora_jax import config as config_lib
from fmlora_jax.cli import program

flags.adopt_module_key_flags(program)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(
      f"unexpected argument {argv[1]!r}: settings are given as --config.FIELD=VALUE"
    )
  if program.CONFIG.value is None:
    raise app.UsageError(
      "--config is missing: name a file in configs/, as in --config=configs/digits.py"
    )
  program.check_workdir()
  from rich.console import Console  # after the flags: --help and a typo answer at once

  from fmlora_jax.distributed import hosts
  from fmlora_jax.experiment.run import run
  from fmlora_jax.report import tables

  program.join_hosts()
  program.keep_programs()
  config = methods.build_config(program.CONFIG.value.to_dict())
  # before anything is loaded: on other meshes, say, exchanges would never end
  hosts.assert_same_on_all({"config": dataclasses.asdict(config)}, besides=config_lib.OWN_FIELDS)
  if flags.FLAGS.dry_run:
    from fmlora_jax.experiment import estimate

    found = estimate.estimate(config)
    if hosts.is_first():
      estimate.show(found, Console())
    return
  name = f"{config.tasks.benchmark}-{config.method.name}"
  name = re.sub(r"[:/]", "-", name if config.seeds else f"{name}-{config.seed}")
  workdir = program.workdir(name)
  if config.seeds:
    from fmlora_jax.experiment import seeds

    results = seeds.run_each(config, workdir, began=BEGAN)
  else:
    results = [run(config, workdir, began=BEGAN)]
  if hosts.is_first():
    tables.show(results, Console())


if __name__ == "__main__":
  flags.DEFINE_bool("dry_run", False, "Say what the run would cost, and run nothing.")
  program.start(main, program.parse_flags)
