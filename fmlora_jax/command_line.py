"""What the programs that run experiments share: flags, and errors that are one line.

A wrong setting ends with exit code 2 and its message, Ctrl-C with 130; what only we can mend shows
its trace.
"""

import dataclasses
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from fmlora_jax import methods
from fmlora_jax.config import Config, ConfigError, build

CONFIG = config_flags.DEFINE_config_file("config", None, "What to run: a file in configs/.")
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder for what is run; the same again resumes it. Default: in runs/."
)
DEBUG = flags.DEFINE_bool("debug", False, "Show the trace of an error that has a message.")

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
    UsageError: if a part is no method of ours or a setting no FIELD=VALUE.
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
      raise app.UsageError(
        f"--methods has {part!r}: must be all, NAME or NAME:FIELD=VALUE, where NAME is one of "
        f"{', '.join(known)}"
      )
    pairs = [setting.partition("=") for setting in settings]
    if any(not (field and equals) for field, equals, _ in pairs):
      raise app.UsageError(f"--methods has {part!r}: must be like lora:mode=sequential:rank=8")
    chosen.append(Choice(name, tuple((field, value) for field, _, value in pairs)))
  if not chosen:
    raise app.UsageError("--methods names none: all, or such as fm_lora,lora:mode=sequential")
  return list(dict.fromkeys(chosen))


def start(main: Callable[[list[str]], None], parse: Callable[[list[str]], list[str]]) -> None:
  """Runs `main` as a program that shows what the package logs as plain lines."""
  absl_logging.set_verbosity(absl_logging.WARNING)
  log = logging.getLogger("fmlora_jax")
  log.setLevel(logging.INFO)
  log.addHandler(logging.StreamHandler(sys.stdout))
  log.propagate = False
  app.run(lambda argv: guarded(main, argv), flags_parser=parse)


def guarded(main: Callable[[list[str]], None], argv: list[str]) -> None:
  """Runs `main`; what a user can mend is one last line and exit code 2, a stop exit code 130."""
  try:
    main(argv)
  except KeyboardInterrupt:
    sys.stderr.write("stopped; the same command resumes\n")
    sys.exit(130)
  except Exception as error:
    line = reason(error, CONFIG.value and CONFIG.value.batch_size)
    if DEBUG.value or not line:
      raise
    fail(line)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; a wrong setting is one line, not a trace."""
  check_files(argv[1:])
  try:
    return flags.FLAGS(argv)
  except PARSERS_ERRORS as error:
    fail(_explain(error, argv))


def check_files(arguments: Sequence[str]) -> None:
  """Ends the program where --config names no file."""
  for argument in arguments:
    file = re.match(r"--?config=([^:]+)", argument)
    if file and not pathlib.Path(file[1]).is_file():
      fail(f"--config is {file[1]!r}: no such file; see configs/, such as configs/digits.py")


def read_config(arguments: Sequence[str]) -> Config:
  """Returns what --config=FILE[:VARIANT] and any --config.FIELD=VALUE make.

  Raises:
    ConfigError: if they can't be read or a setting can't be, in one line.
  """
  argv, values = ["", *arguments], flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
  try:
    values(argv)
  except PARSERS_ERRORS as error:
    raise ConfigError(_explain(error, argv)) from None
  return build(Config, values["config"].value.to_dict())


def check_workdir() -> None:
  """Refuses a bucket as --workdir."""
  if "://" in (WORKDIR.value or ""):
    raise app.UsageError(
      f"--workdir is {WORKDIR.value!r}: must be a local or mounted folder, buckets are not "
      "supported yet"
    )


def keep_programs() -> None:
  """Keeps what XLA compiles in the user's cache."""
  import jax  # after the flags: --help and a typo answer at once

  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(cache, "fmlora_jax", "xla")))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def reason(error: Exception, batch_size: int | None) -> str | None:
  """Returns in one line what a user may be able to mend; None where only we can."""
  from fmlora_jax.types import NonFiniteError  # which imports jax

  message = " ".join(str(error).split())
  if isinstance(error, (app.UsageError, ConfigError, NonFiniteError)):
    return message
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in message:
    detail = str(error).partition("\n")[0]
    return (
      f"config.batch_size is {batch_size}: out of memory; lower it, config.eval_batch_size or "
      f"config.input.source_size ({detail})"
    )
  if isinstance(error, (ValueError, OSError)):
    return f"{message} (--debug shows where)"
  return None


def _explain(error: Exception, argv: Sequence[str]) -> str:
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


def fail(message: str, code: int = 2):
  """Ends the program with one line on the standard error."""
  sys.stderr.write(f"error: {message}\n")
  sys.exit(code)
