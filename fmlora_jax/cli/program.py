"""What our programs share: flags, and errors that are one line.

A wrong setting ends with exit code 2 and its message, SIGTERM with 143, Ctrl-C with 130, a bug of
ours with 1 and the name of a file with its trace. --debug shows the trace of any error.
"""

import logging
import os
import pathlib
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from fmlora_jax.cli import overrides
from fmlora_jax.config import ConfigError
from fmlora_jax.distributed import hosts, stop

CONFIG = config_flags.DEFINE_config_file("config", None, "What to run: a file in configs/.")
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder for what is run; the same again resumes it. Default: in runs/."
)
DEBUG = flags.DEFINE_bool("debug", False, "Show the trace of an error.")
OF_RUNS = ("config", "workdir")  # flags that programs which run nothing do without


def start(main: Callable[[list[str]], None], parse: Callable[[list[str]], list[str]]) -> None:
  """Runs `main` as a program that shows what the package logs as plain lines."""
  absl_logging.set_verbosity(absl_logging.WARNING)
  log = logging.getLogger("fmlora_jax")
  log.setLevel(logging.INFO)
  log.addHandler(logging.StreamHandler(sys.stdout))
  log.propagate = False
  with stop.caught():
    app.run(lambda argv: guarded(main, argv), flags_parser=parse)


def guarded(main: Callable[[list[str]], None], argv: list[str]) -> None:
  """Runs `main`; what a user can mend is one last line and exit code 2, a stop one with its own."""
  try:
    main(argv)
    hosts.barrier()
  except stop.Stopped as stopped:
    hosts.barrier()  # several processes stop together
    sys.stderr.write(f"{stopped}; the same command resumes\n")
    hosts.exit_process(stopped.code)
  except Exception as error:
    if not isinstance(error, (ConfigError, app.UsageError)):
      hosts.wait_for_peer_failure()
    if DEBUG.value:
      hosts.exit_with_trace()
      raise
    line = reason(error, _batch_size())
    fail(line or bug(error), code=2 if line else 1)


def bug(error: Exception) -> str:
  """Returns the line for an error that only we can mend."""
  message = " ".join(str(error).split())
  return f"{type(error).__name__}: {message[:300]} (a bug of fmlora_jax: {traced(error)})"


def traced(error: Exception) -> str:
  """Writes an error's trace to a file, and returns where it is.

  The file is a new one: in --workdir where a run is there already, else among the temporary ones.
  """
  folder = WORKDIR.value if "workdir" in flags.FLAGS else None
  of_run = folder and pathlib.Path(folder, "config.json").exists()
  with tempfile.NamedTemporaryFile(
    "w", prefix="error-", suffix=".txt", dir=folder if of_run else None, delete=False
  ) as file:
    file.write("".join(traceback.format_exception(error)))
  return f"its trace is in {file.name}, --debug shows it here"


def _batch_size() -> int | None:
  return getattr(CONFIG.value, "batch_size", None) if "config" in flags.FLAGS else None


def drop_flags(*names: str) -> None:
  """Makes flags of this module unknown to a program; call it before the flags are parsed."""
  for name in names:
    delattr(flags.FLAGS, name)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; a wrong setting is one line, not a trace."""
  check_files(argv[1:])
  argv = [*map(overrides.moved_flag, argv)]
  try:
    return flags.FLAGS(argv)
  except overrides.PARSERS_ERRORS as error:
    fail(overrides.explain(error, argv))


def check_files(arguments: Sequence[str]) -> None:
  """Ends the program where --config names no file."""
  for argument in arguments:
    file = re.match(r"--?config=([^:]+)", argument)
    if file and not pathlib.Path(file[1]).is_file():
      fail(f"--config is {file[1]!r}: no such file; see configs/, such as configs/digits.py")


def check_workdir() -> None:
  """Refuses a bucket, and what no folder can be called, as --workdir."""
  if not (WORKDIR.value or "").isprintable():
    raise app.UsageError(f"--workdir is {WORKDIR.value!r}: must be of printable characters")
  if "://" in (WORKDIR.value or ""):
    raise app.UsageError(
      f"--workdir is {WORKDIR.value!r}: must be a local or mounted folder, buckets are not "
      "supported yet"
    )


def workdir(name: str) -> pathlib.Path:
  """Returns --workdir, or the folder `name` in runs/; where the program was started, for good."""
  return pathlib.Path(WORKDIR.value or pathlib.Path("runs", name)).expanduser().absolute()


def join_hosts() -> None:
  """Joins the other processes of this program, if there are some; all but the first are quiet."""
  if fake := re.search(
    r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")
  ):
    # a CPU that plays several devices waits for each in a thread, in up to 32 programs at a time:
    # with fewer threads, which XLA counts by this variable, programs block each other for ever
    os.environ.setdefault("NPROC", str(32 * int(fake[1])))
  hosts.join_processes()
  if not hosts.is_first():
    logging.getLogger("fmlora_jax").setLevel(logging.ERROR)


def keep_programs() -> None:
  """Keeps what XLA compiles in the user's cache."""
  import jax  # after the flags: --help and a typo answer at once

  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(cache, "fmlora_jax", "xla")))
  # small ones too: between tasks a run has hundreds
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def reason(error: Exception, batch_size: int | None) -> str | None:
  """Returns in one line what a user may be able to mend; None where only we can."""
  from fmlora_jax.types import FrozenError, NonFiniteError  # which imports jax

  message = " ".join(str(error).split())
  if isinstance(error, (app.UsageError, ConfigError, FrozenError, NonFiniteError)):
    return message
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in message:
    from fmlora_jax.distributed import memory  # which imports jax

    detail = str(error).partition("\n")[0]
    own = memory.device_memory()
    place, size = ("machine", memory.host_memory()) if own is None else ("device", own)
    return (
      f"config.batch_size is {batch_size}: out of memory, the {place} has {size / 2**30:.1f} GiB; "
      "lower it, config.eval_batch_size or config.input.source_size, or set "
      f"config.input.mode=stream ({detail})"
    )
  if isinstance(error, (ValueError, OSError)):
    return f"{message} ({traced(error)})"
  return None


def fail(message: str, code: int = 2):
  """Ends the program with one line on the standard error."""
  sys.stderr.write(f"error: {message}\n")
  hosts.exit_process(code)
