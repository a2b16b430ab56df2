"""Downloads a benchmark and builds it with TFDS, once, in the form that `main` reads.

Usage: fmlora_jax prepare NAME [--data_dir=DIR] [--archives=DIR] [--domains=A,B]
         [--with_weights] [--dry_run]

NAME is imagenet_r, cifar100, cub200, domainnet or tfds:NAME for any classification set of TFDS.
Building needs TensorFlow, reading does not. The same command again continues where it stopped:
built sets and downloaded files stay.

Examples:
  fmlora_jax prepare cifar100 --data_dir=data --dry_run
  fmlora_jax prepare domainnet --domains=real,sketch --archives=downloads
"""

import os
import pathlib

from absl import flags

from fmlora_jax.cli import config_flag, outputs, program
from fmlora_jax.cli import flags as flags_lib
from fmlora_jax.cli.flags import Arguments
from fmlora_jax.config import ConfigError, WeightsConfig


def define_flags() -> flags.FlagValues:
  """Returns the program's flags."""
  values = flags.FlagValues()
  text = "Folder to build in. Default: the one that main reads without tasks.data_dir."
  flags.DEFINE_string("data_dir", None, text, flag_values=values)
  text = "Folder with archives that you already have, under their published names."
  flags.DEFINE_string("archives", None, text, flag_values=values)
  text = "Accept files of --archives whose sha256 is not the published one."
  flags.DEFINE_bool("unverified", False, text, flag_values=values)
  flags.DEFINE_list("domains", [], "Of domainnet: only these.", flag_values=values)
  text = "Download the weights of the benchmark's config file too."
  flags.DEFINE_bool("with_weights", False, text, flag_values=values)
  flags_lib.define_dry_run(values)
  return values


def main(arguments: Arguments) -> None:
  """Builds the benchmark that the command line names."""
  options = arguments.options
  if len(arguments.words) != 1:
    raise ConfigError("name one benchmark, as in fmlora_jax prepare cifar100 (--help says more)")
  archives = pathlib.Path(options.archives).expanduser() if options.archives else None
  if archives and not os.path.isdir(archives):
    raise ConfigError(f"--archives is {options.archives!r}: no such folder")
  if options.data_dir is not None:
    outputs.require_folder("--data_dir", options.data_dir)
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  from fmlora_jax.tasks.tfds import build  # TFDS takes a second to import

  build.builder_names(arguments.words[0], options.domains)  # a typo is refused before a download
  problems = []
  if options.with_weights:
    problems = _weights(arguments.words[0], dry_run=options.dry_run)
  build.prepare(
    arguments.words[0],
    data_dir=options.data_dir,
    archives=archives,
    domains=options.domains,
    unverified=options.unverified,
    dry_run=options.dry_run,
    problems=problems,
  )


def _weights(benchmark: str, *, dry_run: bool) -> list[str]:
  """Downloads the weights that the benchmark's config file names; returns why that failed."""
  from fmlora_jax.models.weights import registry  # imports jax

  is_shipped = benchmark in config_flag.shipped()
  weights = config_flag.read_config(benchmark).weights if is_shipped else WeightsConfig()
  lacks = registry.missing(weights)
  state = "would be downloaded" if dry_run and lacks else "there already"
  try:
    if not dry_run and lacks:
      state = str(registry.fetch(weights.tag))
  except ConfigError as error:
    return [str(error)]
  program.write_lines([f"weights {weights.tag}: {state}"])
  return []


if __name__ == "__main__":
  with program.running(__doc__, define_flags()) as arguments:
    main(arguments)
