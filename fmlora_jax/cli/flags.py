"""Flags of the programs: definition, parsing and help."""

import dataclasses
import itertools
import textwrap
import types
from collections.abc import Sequence

from absl import flags

from fmlora_jax.config import Config, ConfigError
from fmlora_jax.config.diff import leaves, paths_to

WIDTH = 100  # columns of the help


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
  """A parsed command line.

  Attributes:
    options: the value of each flag, under its name.
    words: arguments that are not flags.
    changes: (FIELD, VALUE) of each --config.FIELD=VALUE, in their order.
    given: names of the flags that the command line has.
  """

  options: types.SimpleNamespace
  words: tuple[str, ...] = ()
  changes: tuple[tuple[str, str], ...] = ()
  given: frozenset[str] = frozenset()

  def refuse_words(self) -> None:
    """Raises ConfigError if there is an argument that is not a flag."""
    if self.words:
      raise ConfigError(
        f"unexpected argument {self.words[0]!r}: settings are given as --config.FIELD=VALUE"
      )


def define_shared(values: flags.FlagValues) -> None:
  """Defines the flags of all programs."""
  flags.DEFINE_bool("debug", False, "Print the traceback of an error.", flag_values=values)
  flags.DEFINE_bool("help", False, "Print this text.", flag_values=values)


def define_run(values: flags.FlagValues) -> None:
  """Defines the flags of programs that run experiments."""
  flags.DEFINE_string(
    "config",
    None,
    "FILE[:VARIANT]. FILE is a config file, the name of a shipped one (--list shows them), or "
    "config.json of a run. VARIANT is for the file, such as method=lora,tasks=10.",
    flag_values=values,
  )
  flags.DEFINE_string(
    "workdir",
    None,
    "Folder for what is run; the same command resumes it. Default: a folder in runs/, named after "
    "the settings.",
    flag_values=values,
  )
  define_dry_run(values)


def define_dry_run(values: flags.FlagValues) -> None:
  """Defines --dry_run, which means the same in every program."""
  flags.DEFINE_bool("dry_run", False, "Say what would be done, and do nothing.", flag_values=values)


def describe(values: flags.FlagValues) -> str:
  """Returns the flags with their help and defaults, one paragraph each."""
  paragraphs = []
  for name in values:
    flag = values[name]
    has_default = flag.default not in (None, False, [])
    default = f" Default: {str(flag.default_as_str).strip(chr(39))}." if has_default else ""
    shown = f"--{name}" if flag.boolean else f"--{name}=VALUE"
    paragraphs.append((shown, f"{flag.help}{default}"))
    if name == "config":
      paragraphs.append(
        ("--config.FIELD=VALUE", "Change a setting (--list shows all); the last value counts.")
      )
  indent = " " * 26
  return "\n".join(
    textwrap.fill(
      text,
      WIDTH,
      initial_indent=f"  {shown:22}  ",
      subsequent_indent=indent,
      break_on_hyphens=False,
    )
    for shown, text in paragraphs
  )


def parse(values: flags.FlagValues, argv: Sequence[str]) -> Arguments:
  """Returns the parsed command line; argv[0] is the program.

  Raises:
    ConfigError: if a flag is unknown or its value invalid.
  """
  others, changes = [*argv[1:]], ()
  if "config" in values:
    others, changes = _split_changes(others)
  _require_values(values, others)
  try:
    _, *words = values([argv[0], *others])
  except flags.Error as error:
    hint = ""
    if isinstance(error, flags.UnrecognizedFlagError) and "workdir" in values:
      hint = _setting_hint(error.flagname)
    raise ConfigError(" ".join(str(error).split()) + hint) from None
  for name in values:
    if values[name].present > 1 and not values[name].boolean:
      raise ConfigError(f"--{name} is given {values[name].present} times: must be given once")
  options = types.SimpleNamespace(**values.flag_values_dict())
  given = frozenset(name for name in values if values[name].present)
  return Arguments(options=options, words=tuple(words), changes=tuple(changes), given=given)


def _require_values(values: flags.FlagValues, arguments: Sequence[str]) -> None:
  """Refuses a flag that would take the next one for its value."""
  for argument, after in itertools.pairwise(arguments):
    name = argument.lstrip("-")
    takes_it = argument.startswith("-") and name in values and not values[name].boolean
    if takes_it and after.startswith("--"):
      raise ConfigError(f"--{name} has no value: write --{name}=VALUE, before {after}")


def _setting_hint(name: str) -> str:
  """Returns how a setting is given that was given as a flag; nothing if there is none."""
  if name in ("method", "tasks"):
    return f"; in the config files that ship it is a variant, as in --config=FILE:{name}=VALUE"
  from fmlora_jax import methods  # imports jax

  settings = [Config(method=methods.config_class(method)()) for method in methods.names()]
  paths = dict.fromkeys(path for one in settings for path, _ in leaves(dataclasses.asdict(one)))
  named = paths_to(name, (path for path in paths if path != "method.name"))
  return f"; a setting is given as --config.{' or --config.'.join(named)}" if named else ""


def _split_changes(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
  """Returns the other arguments, and (FIELD, VALUE) of each --config.FIELD=VALUE.

  As of other flags, the value may be the next argument, and a bool be set by --config.FIELD or
  --noconfig.FIELD alone.
  """
  others, changes, left = [], [], [*arguments]
  while left:
    argument = left.pop(0)
    if argument == "--":
      return [*others, argument, *left], changes
    name, equals, value = argument.partition("=")
    prefix, _, field = name.partition("config.")
    if not field or prefix not in ("-", "--", "-no", "--no"):
      others.append(argument)
    elif prefix.endswith("no"):
      changes.append((field, "false"))
    elif equals:
      changes.append((field, value))
    else:
      has_value = left and not left[0].startswith("--")
      changes.append((field, left.pop(0) if has_value else "true"))
  return others, changes
