"""Pre-trains the micro ViT on rendered letters and writes the file that the library ships.

python -m fmlora_jax.pretrain --config=configs/pretrain_letters.py --output=FILE.safetensors
"""

import logging
import pathlib

from absl import flags
from ml_collections import config_flags

from fmlora_jax import config as config_lib
from fmlora_jax.cli import program
from fmlora_jax.models import vit
from fmlora_jax.pretrain import training

_log = logging.getLogger("fmlora_jax.pretrain")  # __name__ is __main__ here


def main(argv: list[str]) -> None:
  """Trains by --config and writes --output.

  Raises:
    ConfigError: if a field or the output folder is invalid.
  """
  del argv
  output = pathlib.Path(flags.FLAGS.output)
  try:
    recipe = config_lib.build(training.Recipe, flags.FLAGS.config.to_dict())
    backbone = vit.make_vit(vit.architecture(recipe.architecture))
  except (TypeError, ValueError) as error:  # TypeError: the config lacks a field
    raise config_lib.ConfigError(str(error)) from error
  if not output.parent.is_dir():
    raise config_lib.ConfigError(f"--output is {output}: create its folder first")
  params, accuracy = training.train(recipe, backbone)
  training.save(params, output, recipe, accuracy)
  _log.info("wrote %s, letters in held-out faces %.4f", output, accuracy)


if __name__ == "__main__":
  program.drop_flags(*program.OF_RUNS)
  flags.adopt_module_key_flags(program)
  config_flags.DEFINE_config_file("config", "configs/pretrain_letters.py", "The recipe.")
  flags.DEFINE_string("output", None, "File to write, .safetensors.", required=True)
  program.start(main, program.parse_flags)
