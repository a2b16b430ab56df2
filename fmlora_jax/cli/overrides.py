"""Settings as a command line gives them: config files with changes, and methods with theirs."""

import dataclasses
import re
from collections.abc import Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from fmlora_jax import methods
from fmlora_jax.config import Config, ConfigError, moved_field

PARSERS_ERRORS = (
  flags.Error,
  AttributeError,
  KeyError,
  TypeError,
  ValueError,
  OSError,
  ImportError,
)


@dataclasses.dataclass(frozen=True)
class Choice:
  """A method to run, with settings of its own.

  Attributes:
    settings: (field, value) as a command line has them; a field without a dot is the method's.
  """

  name: str
  settings: tuple[tuple[str, str], ...] = ()

  def __str__(self) -> str:
    return ":".join([self.name, *("=".join(setting) for setting in self.settings)])

  def flags(self) -> list[str]:
    """Returns the settings as --config.FIELD=VALUE."""
    return [
      f"--config.{field if '.' in field else f'method.{field}'}={value}"
      for field, value in self.settings
    ]


def parse_methods(text: str) -> list[Choice]:
  """Returns what --methods names: NAME or NAME:FIELD=VALUE:..., each once.

  They stand between commas or blanks, but for those within brackets; "all" is every method in every
  variant that its file declares.

  Raises:
    ConfigError: if a part is no method of ours or a setting no FIELD=VALUE.
  """
  known, chosen = methods.names(), []
  for part in filter(None, re.split(r"[,\s]+(?![^(]*\))", text)):
    name, *settings = part.split(":")
    if part == "all":
      for each in known:
        for variant in methods.variants(each):
          chosen.append(Choice(each, tuple((k, str(v)) for k, v in variant.items())))
      continue
    if name not in known:
      raise ConfigError(
        f"--methods has {part!r}: must be all, NAME or NAME:FIELD=VALUE, where NAME is one of "
        f"{', '.join(known)}"
      )
    pairs = [setting.partition("=") for setting in settings]
    if any(not (field and equals) for field, equals, _ in pairs):
      raise ConfigError(f"--methods has {part!r}: must be like lora:mode=sequential:rank=8")
    chosen.append(Choice(name, tuple((field, value) for field, _, value in pairs)))
  if not chosen:
    raise ConfigError("--methods names none: all, or such as fm_lora,lora:mode=sequential")
  return list(dict.fromkeys(chosen))


def read_config(
  arguments: Sequence[str], values: ml_collections.ConfigDict | None = None
) -> Config:
  """Returns what --config=FILE[:VARIANT] and any --config.FIELD=VALUE make.

  Args:
    values: what the fields are set in, in place of a file.

  Raises:
    ConfigError: if they can't be read or a setting can't be, in one line.
  """
  argv = ["", *map(moved_flag, arguments)]
  parsed = {"flag_values": flags.FlagValues(), "sys_argv": argv}
  if values is None:
    holder = config_flags.DEFINE_config_file("config", None, "", **parsed)
  else:
    holder = config_flags.DEFINE_config_dict("config", values, "", **parsed)
  try:
    parsed["flag_values"](argv)
  except PARSERS_ERRORS as error:
    raise ConfigError(explain(error, argv)) from None
  return methods.build_config(holder.value.to_dict())


def moved_flag(argument: str) -> str:
  """Returns --config.FIELD=VALUE with the field where it is now; any other argument as it is."""
  flag, equals, value = argument.partition("=")
  dashes, _, field = flag.partition("config.")
  if field and dashes in ("-", "--"):
    return f"{dashes}config.{moved_field(field)}{equals}{value}"
  return argument


def explain(error: Exception, argv: Sequence[str]) -> str:
  """Returns what the parsers of flags and config files say, as one line about our fields."""
  message = str(error)
  if "Traceback" in message:  # raised in the config file: the flag, then the last line says all
    flag, why = message.partition(" Error whilst")[0], message.strip().splitlines()[-1]
    return f"{flag} {why.partition(': ')[2]}"
  unknown = re.search(r"\.(\w+) does not exist", message) or re.search(r"'(\w+)\W", message)
  if unknown and isinstance(error, (AttributeError, KeyError)):
    near = re.search(r'Did you mean "(\w+)"', message)
    hint = f"; did you mean {near[1]!r}?" if near else ""
    flag = next((a for a in argv if re.match(rf"--?config\..*\b{unknown[1]}\b", a)), "--config")
    if not near and flag.lstrip("-").startswith("config.method."):
      hint = "; fields of another method need --config=FILE:method=NAME"
    return f"{flag.partition('=')[0]}: {unknown[1]!r} is not a field{hint}"
  return " ".join(message.split())
