"""Start of a program: its flags, its log, its processes, its cache and its workdir."""

import contextlib
import inspect
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from absl import flags
from absl import logging as absl_logging

from fmlora_jax.cli import errors, output, outputs
from fmlora_jax.cli import flags as flags_lib
from fmlora_jax.cli.flags import Arguments
from fmlora_jax.config import ConfigError
from fmlora_jax.distributed import hosts, stop

HELP = {"-h", "-help", "--help", "-helpfull", "--helpfull", "-helpshort", "--helpshort"}


@contextlib.contextmanager
def running(
  doc: str | None, values: flags.FlagValues, argv: Sequence[str] | None = None
) -> Iterator[Arguments]:
  """The context in which a program runs, entered with its parsed command line.

  The log of the package is shown as plain lines, errors as one line. --help prints `doc` and the
  flags.

  Args:
    doc: usage and examples, the docstring of the program's module.
    values: the program's flags.
    argv: None takes that of the process.
  """
  output.protect()
  absl_logging.use_absl_handler()
  absl_logging.set_verbosity(absl_logging.WARNING)
  log = logging.getLogger("fmlora_jax")
  log.setLevel(logging.INFO)
  log.addHandler(logging.StreamHandler(sys.stdout))
  log.propagate = False
  flags_lib.define_shared(values)
  argv = sys.argv if argv is None else argv
  flags.FLAGS(argv[:1])  # of libraries, which may look at their flags
  if HELP & {*argv[1:]}:
    with answering():
      print_help(doc or "", values)
    sys.exit(0)
  try:
    arguments = flags_lib.parse(values, argv)
  except ConfigError as error:
    errors.fail(str(error))
  if not _has_folder():
    errors.fail("the current folder was removed: cd to one that exists")
  options = arguments.options
  workdir = getattr(options, "workdir", None)
  with stop.caught(), errors.guard(debug=options.debug, workdir=workdir):
    yield arguments
    asks = any(getattr(options, name, False) for name in ("dry_run", "estimate", "list"))
    _end_output(is_all=asks or not hasattr(options, "workdir"))


def _has_folder() -> bool:
  try:
    return bool(os.getcwd())
  except FileNotFoundError:
    return False


@contextlib.contextmanager
def answering() -> Iterator[None]:
  """The context of an answer on the standard output that needs no command line, such as --help."""
  output.protect()
  with stop.caught(), errors.guard():
    yield
    _end_output(is_all=True)


def _end_output(*, is_all: bool) -> None:
  """Says whether the standard output is incomplete; fails where it is all that a program makes."""
  sys.stdout.flush()
  if error := output.lost():
    line = f"the standard output can't be written ({error.strerror}): it is not complete"
    if is_all:
      errors.fail(line, code=1)
    sys.stderr.write(f"warning: {line}\n")


def require_docstrings() -> None:
  """Raises ConfigError where Python runs without docstrings, which --help and --list print."""
  if sys.flags.optimize > 1:
    raise ConfigError(
      f"Python's optimisation is {sys.flags.optimize}: must be 0 or 1 for --help and --list, which "
      "print docstrings; unset PYTHONOPTIMIZE and leave out -OO"
    )


def print_help(doc: str, values: flags.FlagValues) -> None:
  """Prints usage and examples, which are a module's docstring, and the flags."""
  require_docstrings()
  sys.stdout.write(f"{inspect.cleandoc(doc)}\n\nFlags:\n{flags_lib.describe(values)}\n")


def print_listing() -> None:
  """Prints what --list asks for."""
  require_docstrings()
  from fmlora_jax.cli import listing  # imports jax, as it reads every method's settings

  sys.stdout.write(listing.listing())


def write_lines(lines: Iterable[str]) -> None:
  """Prints lines, of several processes those of the first."""
  if hosts.is_first():
    sys.stdout.writelines(f"{line}\n" for line in lines)


def resolve_workdir(given: str | None, name: Callable[[], str]) -> pathlib.Path:
  """Returns the workdir that is given, else the folder in runs/ that `name` returns.

  The path is absolute: the program may change its folder. Of several processes the first decides.

  Raises:
    ConfigError: if it is given as a bucket, or there can be no such folder.
  """
  if given == "":
    raise ConfigError("--workdir is '': must be a folder, or be left out for one in runs/")
  if not (given or "").isprintable():
    raise ConfigError(f"--workdir is {given!r}: must be of printable characters")
  if "://" in (given or ""):
    raise ConfigError(
      f"--workdir is {given!r}: must be a local or mounted folder, buckets are not supported yet"
    )
  default = pathlib.Path("runs", hosts.run_on_first(name))
  path = pathlib.Path(os.path.expanduser(given or default)).absolute()
  outputs.require_path("--workdir", path)
  return path


def join_hosts() -> None:
  """Joins the other processes of this program, if there are any; all but the first are quiet."""
  if fake := re.search(
    r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")
  ):
    # a CPU that plays several devices waits for each in a thread, in up to 32 programs at a time:
    # with fewer threads, which XLA counts by this variable, programs block each other for ever
    os.environ.setdefault("NPROC", str(32 * int(fake[1])))
  hosts.join_processes()
  if not hosts.is_first():
    logging.getLogger("fmlora_jax").setLevel(logging.ERROR)


def enable_compilation_cache() -> None:
  """Has XLA store what it compiles in the user's cache folder; one line warns if it can't."""
  import jax  # takes a second, which --help does without

  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  if not jax.config.values["jax_compilation_cache_dir"]:
    folder = pathlib.Path(cache, "fmlora_jax", "xla")
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      logging.getLogger(__name__).warning(
        "warning    no programs are kept for later runs: %s can't be made (%s); set XDG_CACHE_HOME",
        folder,
        error.strerror,
      )
      return
    jax.config.update("jax_compilation_cache_dir", str(folder))
  # small programs too: between tasks a run has hundreds
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
