"""Errors as one line on the standard error, and the exit code that goes with each.

An invalid setting or file ends the program with code 2, SIGTERM with 143, Ctrl-C with 130, a closed
terminal with 129, a bug of fmlora_jax with 1 and the name of a file with its traceback. --debug
prints the traceback instead.
"""

import contextlib
import errno
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import NoReturn

from fmlora_jax.config import ConfigError, ConfigErrors
from fmlora_jax.distributed import hosts, stop

MOST_LINES = 20


@contextlib.contextmanager
def guard(*, debug: bool = False, workdir: str | None = None) -> Iterator[None]:
  """Ends the program at an error or a stop, with one line and its exit code.

  Args:
    debug: lets errors through.
    workdir: where the traceback of a bug is written, if a run is there.
  """
  try:
    yield
    hosts.barrier()
  except stop.Stopped as stopped:
    hosts.barrier()  # several processes stop together
    sys.stderr.write(f"{stopped}; the same command resumes\n")
    hosts.exit_process(stopped.code)
  except Exception as error:
    if not isinstance(error, ConfigError):
      hosts.wait_for_peer_failure()
    if debug:
      hosts.exit_with_trace()
      raise
    line = explain(error, workdir)
    fail(line or _bug(error, workdir), code=2 if line else 1)


def explain(error: Exception, workdir: str | None = None) -> str | None:
  """Returns an error that a user may be able to fix as one line, several as one each.

  None for a bug.
  """
  if isinstance(error, ConfigErrors):
    lines = [" ".join(problem.split()) for problem in error.problems]
    if len(lines) >= MOST_LINES:
      lines[MOST_LINES - 2 :] = [f"and {len(lines) - MOST_LINES + 2} more"]
    return "\n  ".join([f"{len(error.problems)} problems:", *lines])
  message = " ".join(str(error).split())
  if "invalid truth value" in message and "'JAX_" in message:  # at the import of jax
    return f"{message}: must be true or false; correct it or unset it"
  if isinstance(error, ConfigError):
    return message
  types = sys.modules.get("fmlora_jax.types")  # it imports jax, which may be what failed
  if types and isinstance(error, (types.FrozenError, types.NonFiniteError)):
    return message
  if os.strerror(errno.EMFILE) in message:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
      f"this process may have at most {most} files open (ulimit -n): raise that limit, and the "
      "same command goes on"
    )
  if isinstance(error, (ValueError, OSError)):
    return f"{message} ({_traceback_file(error, workdir)})"
  return None


def _bug(error: Exception, workdir: str | None) -> str:
  message = " ".join(str(error).split())[:300]
  where = _traceback_file(error, workdir)
  return f"internal error: {type(error).__name__}: {message} ({where})"


def _traceback_file(error: Exception, workdir: str | None) -> str:
  """Writes the traceback to a new file in the workdir of a run or a temporary one; says where."""
  of_run = workdir and os.path.isfile(os.path.join(workdir, "config.json"))
  for folder in (workdir, None) if of_run else (None,):
    with contextlib.suppress(OSError):  # a full or read-only disk
      with tempfile.NamedTemporaryFile(
        "w", prefix="error-", suffix=".txt", dir=folder, delete=False, errors="replace"
      ) as file:
        file.write("".join(traceback.format_exception(error)))
      return f"traceback in {file.name}; --debug prints it"
  return "--debug prints the traceback"


def _xla_out_of_memory(message: str) -> bool:
  """Whether an error's text is XLA's for memory that ran out, on a device or on the host."""
  of_files = "os_error_code" in message  # tensorstore's, of a full disk
  return not of_files and ("RESOURCE_EXHAUSTED" in message or "Out of memory" in message)


@contextlib.contextmanager
def out_of_memory_explained(batch_size: int) -> Iterator[None]:
  """Turns the error of a host or device without memory into one that names what to lower.

  Raises:
    ConfigError: instead of it.
  """
  try:
    yield
  except Exception as error:
    if not isinstance(error, MemoryError) and not _xla_out_of_memory(str(error)):
      raise
    from fmlora_jax.distributed import memory  # imports jax

    detail = str(error).partition("\n")[0]
    on_device = memory.device_memory()
    holder, size = ("device", on_device) if on_device else ("machine", memory.host_memory())
    raise ConfigError(
      f"config.batch_size is {batch_size}: out of memory, the {holder} has {size / 2**30:.1f} GiB; "
      "lower it, config.eval_batch_size or config.input.source_size, or set "
      f"config.input.mode=stream ({detail})"
    ) from error


def fail(message: str, code: int = 2) -> NoReturn:
  """Ends the program with one line on the standard error."""
  sys.stderr.write(f"error: {message}\n")
  hosts.exit_process(code)
