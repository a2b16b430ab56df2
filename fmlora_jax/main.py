"""Learns a sequence of tasks and reports what was kept and what was forgotten.

python -m fmlora_jax.main --config=configs/digits.py [--config.FIELD=VALUE ...] [--workdir=DIR]
"""

import logging
import os
import pathlib
import re
import sys

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "What to run: a file in configs/.")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; the same again resumes it. Default: runs/NAME."
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the trace of an error that has a message.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(
      f"unexpected argument {argv[1]!r}: settings are given as --config.FIELD=VALUE"
    )
  if _CONFIG.value is None:
    raise app.UsageError(
      "--config is missing: name a file in configs/, as in --config=configs/digits.py"
    )
  if "://" in (_WORKDIR.value or ""):
    raise app.UsageError(
      f"--workdir is {_WORKDIR.value!r}: must be a local or mounted folder, buckets are not "
      "supported yet"
    )
  import jax  # after the flags: --help and a typo answer at once
  from rich.console import Console

  from fmlora_jax import config as config_lib
  from fmlora_jax import report
  from fmlora_jax.run import run

  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(cache, "fmlora_jax", "xla")))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  config = config_lib.build(config_lib.Config, _CONFIG.value.to_dict())
  name = f"{config.tasks.benchmark}-{config.method.name}-{config.seed}"
  name = re.sub(r"[:/]", "-", name)
  workdir = pathlib.Path(_WORKDIR.value or pathlib.Path("runs", name)).expanduser()
  result = run(config, workdir)
  report.show([result], Console())


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; a wrong setting is one line, not a trace."""
  for argument in argv[1:]:
    file = re.match(r"--?config=([^:]+)", argument)
    if file and not pathlib.Path(file[1]).is_file():
      _fail(f"--config is {file[1]!r}: no such file; see configs/, such as configs/digits.py")
  try:
    return flags.FLAGS(argv)
  except (
    flags.Error,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    OSError,
    ImportError,
  ) as error:
    _fail(_explain(error, argv))


def _explain(error: Exception, argv: list[str]) -> str:
  """Returns what the parsers of flags and config files say, as one line about our fields."""
  message = str(error)
  if "Traceback" in message:  # raised in the config file: the flag, then the last line says all
    flag, reason = message.partition(" Error whilst")[0], message.strip().splitlines()[-1]
    return f"{flag} {reason.partition(': ')[2]}"
  unknown = re.search(r"\.(\w+) does not exist", message) or re.search(r"'(\w+)\W", message)
  if unknown and isinstance(error, (AttributeError, KeyError)):
    near = re.search(r'Did you mean "(\w+)"', message)
    hint = f"; did you mean {near[1]!r}?" if near else ""
    flag = next((a for a in argv if re.match(rf"--?config\..*\b{unknown[1]}\b", a)), "--config")
    if not near and flag.lstrip("-").startswith("config.method."):
      hint = "; fields of another method need --config=FILE:method=NAME"
    return f"{flag.partition('=')[0]}: {unknown[1]!r} is not a field{hint}"
  return " ".join(message.split())


def _fail(message: str):
  sys.stderr.write(f"error: {message}\n")
  sys.exit(2)


def guarded_main(argv: list[str]) -> None:
  """Runs `main`; what a user can mend is one last line and exit code 2, a stop exit code 130."""
  try:
    main(argv)
  except KeyboardInterrupt:
    sys.stderr.write("stopped; the same command resumes\n")
    sys.exit(130)
  except Exception as error:
    reason = _reason(error)
    if _DEBUG.value or not reason:
      raise
    _fail(reason)


def _reason(error: Exception) -> str | None:
  """Returns in one line what a user may be able to mend; None where only we can."""
  from fmlora_jax.config import ConfigError
  from fmlora_jax.types import NonFiniteError

  message = " ".join(str(error).split())
  if isinstance(error, (app.UsageError, ConfigError, NonFiniteError)):
    return message
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in message:
    detail = str(error).partition("\n")[0]
    return (
      f"config.batch_size is {_CONFIG.value.batch_size}: out of memory; lower it, "
      f"config.eval_batch_size or config.input.source_size ({detail})"
    )
  if isinstance(error, (ValueError, OSError)):
    return f"{message} (--debug shows where)"
  return None


def show_log() -> None:
  """Shows what the package logs as plain lines on the standard output."""
  absl_logging.set_verbosity(absl_logging.WARNING)
  log = logging.getLogger("fmlora_jax")
  log.setLevel(logging.INFO)
  log.addHandler(logging.StreamHandler(sys.stdout))
  log.propagate = False


if __name__ == "__main__":
  show_log()
  app.run(guarded_main, flags_parser=parse_flags)
