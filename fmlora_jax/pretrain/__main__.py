"""Pre-trains the micro ViT on rendered letters and writes the file that the library ships.

Usage: fmlora_jax pretrain --output=FILE.safetensors [--config=FILE] [--config.FIELD=VALUE ...]
         [--dry_run]

Examples:
  fmlora_jax pretrain --output=micro_letters.safetensors
  fmlora_jax pretrain --output=quick.safetensors --config.steps=100 --config.pool=2000
"""

import logging

from absl import flags

from fmlora_jax import config as config_lib
from fmlora_jax.cli import config_flag, outputs, program
from fmlora_jax.cli import flags as flags_lib
from fmlora_jax.cli.flags import Arguments
from fmlora_jax.distributed import backend

_log = logging.getLogger("fmlora_jax.pretrain")  # __name__ is __main__ here


def define_flags() -> flags.FlagValues:
  """Returns the program's flags."""
  values = flags.FlagValues()
  flags.DEFINE_string("config", "pretrain_letters", "The recipe.", flag_values=values)
  flags.DEFINE_string("output", None, "File to write, .safetensors.", flag_values=values)
  flags_lib.define_dry_run(values)
  return values


def main(arguments: Arguments) -> None:
  """Trains by --config and writes --output.

  Raises:
    ConfigError: if a field or the output is invalid.
  """
  options = arguments.options
  arguments.refuse_words()
  if not options.output:
    raise config_lib.ConfigError(
      "--output is missing: name a file to write, such as my.safetensors"
    )
  output = outputs.require_new_file("--output", options.output, ".safetensors")
  values = config_flag.load_values(options.config)
  from fmlora_jax.models import vit  # imports jax
  from fmlora_jax.pretrain import training

  backend.require_backend()
  try:
    config_flag.set_fields(values, arguments.changes)
    recipe = config_lib.build(training.Recipe, values.to_dict())
    backbone = vit.make_vit(vit.architecture(recipe.architecture))
  except (TypeError, ValueError) as error:  # TypeError: the config lacks a field
    raise config_lib.ConfigError(str(error)) from error
  if options.dry_run:
    program.write_lines(
      [f"would train {recipe.architecture} for {recipe.steps} steps, write {output}"]
    )
    return
  params, accuracy = training.train(recipe, backbone)
  training.save(params, output, recipe, accuracy)
  _log.info("wrote %s, letters in held-out faces %.4f", output, accuracy)


if __name__ == "__main__":
  with program.running(__doc__, define_flags()) as arguments:
    main(arguments)
