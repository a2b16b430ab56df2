"""Several processes that run one program: how they meet, agree, and learn that one has ended.

Every process runs the same code on the same mesh; the first one alone writes. A process that ends
early leaves the others waiting in an exchange for ever, so each watches a connection to the first
one (watch.py) and stops in seconds. In a program of one process nothing here does anything.
"""

import json
import multiprocessing.connection
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from fmlora_jax.config import ConfigError
from fmlora_jax.config.diff import differences
from fmlora_jax.distributed.watchdog import HEARTBEAT_S, Watchdog

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
CLUSTER = "FMLORA_JAX_CLUSTER"  # "auto": jax finds out, on a TPU pod say
TIMEOUT = "FMLORA_JAX_LAUNCH_TIMEOUT"  # seconds
GRACE_S = 5.0  # an exchange may fail before the connection to the process that ended does
ENDED = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed

_ending = threading.Lock()
_watch: Watchdog | None = None


def join_processes() -> None:
  """Joins the other processes where this one was launched as one of several.

  To be called before jax uses a device. Slurm, Open MPI and TPU pods on GKE are told by their
  environment and left to jax, as is whatever FMLORA_JAX_CLUSTER=auto says; elsewhere
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say who is who.

  Raises:
    ConfigError: if one of the three is missing or wrong, or jax finds no cluster.
  """
  found = _from_environment()
  if found is None:
    return
  import jax  # after the flags: --help and a typo answer at once

  # it would catch SIGTERM; stop.py does
  jax.config.update("jax_enable_preemption_service", False)
  limit = _launch_timeout()
  # jax gives up with a dump of its C++ stack, so it must not come to that
  giving_up = threading.Timer(limit, _end, [_not_met(found, limit), 2])
  giving_up.daemon = True
  giving_up.start()
  try:
    jax.distributed.initialize(
      **found,
      initialization_timeout=limit + 60,
      heartbeat_timeout_seconds=3 * HEARTBEAT_S,  # the watch is first: jax dumps its C++ stack
    )
    if is_multi_process():
      _connect()
  except (ValueError, RuntimeError, OSError, EOFError) as error:
    reason = " ".join(str(error).split())
    raise ConfigError(
      f"launched as one of several processes, which did not meet: {reason}"
    ) from None
  finally:
    giving_up.cancel()


def _from_environment() -> dict[str, Any] | None:
  """Returns the arguments of `jax.distributed.initialize`; None where this process is alone."""
  given = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if name in os.environ}
  if COUNT in given or INDEX in given:
    if missing := [name for name in (ADDRESS, COUNT, INDEX) if name not in given]:
      raise ConfigError(f"{' and '.join(missing)} is not set: must be, beside {', '.join(given)}")
    count = _number(COUNT, at_least=1)
    index = _number(INDEX, at_least=0)
    if index >= count:
      raise ConfigError(f"{INDEX} is {index}: must be below {COUNT}, {count}")
    if not given[ADDRESS].rpartition(":")[2].isdigit():
      raise ConfigError(f"{ADDRESS} is {given[ADDRESS]!r}: must be HOST:PORT of process 0")
    return {"coordinator_address": given[ADDRESS], "num_processes": count, "process_id": index}
  sizes = (os.environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
  pod = os.environ.get("TPU_WORKER_HOSTNAMES", "") + os.environ.get("TPU_PROCESS_ADDRESSES", "")
  if any(size != "1" for size in sizes) or "," in pod or os.environ.get(CLUSTER) == "auto":
    return {}
  return None


def _number(name: str, at_least: int) -> int:
  text = os.environ[name]
  if not text.isdigit() or int(text) < at_least:
    raise ConfigError(f"{name} is {text!r}: must be a whole number >= {at_least}")
  return int(text)


def _launch_timeout() -> int:
  return _number(TIMEOUT, at_least=1) if TIMEOUT in os.environ else 300


def _not_met(found: Mapping[str, Any], limit: int) -> str:
  place = f" at {ADDRESS}={found['coordinator_address']}" if found else ""
  count = f"{COUNT}={found['num_processes']}" if found else "the number that the cluster names"
  return (
    f"the processes did not meet{place} within {limit} s: as many as {count} must be started, each "
    f"with its own number, and reach process 0; {TIMEOUT} is the limit in seconds"
  )


def is_multi_process() -> bool:
  """Returns whether this process has joined others."""
  jax = sys.modules.get("jax")  # what never imported it joined nobody
  return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
  """Returns whether this process is the one that writes."""
  return not is_multi_process() or sys.modules["jax"].process_index() == 0


def assert_same_on_all(
  values: Mapping[str, Any],
  besides: Sequence[str] = (),
  mend: str = "start all with one command on the same data",
) -> None:
  """Compares a JSON-able record over all processes.

  Args:
    values: nested dicts.
    besides: fields of `config` that may differ.
    mend: what to do where they differ.

  Raises:
    ConfigError: on all of them, if it is not the same everywhere, with what differs.
  """
  first, *others = (json.loads(text) for text in gather(json.dumps(values)))
  for index, other in enumerate(others, 1):
    found = [
      f"{field}: {a!r} in process 0, {b!r} in {index}"
      for field, a, b in differences(first, other)
      if field.removeprefix("config.") not in besides
    ]
    if found:
      shown = "; ".join(found)
      raise ConfigError(f"processes differ ({shown}): {mend}")


def run_on_first(decide: Callable[[], Any]) -> Any:
  """Returns what `decide` returns in the first process, a JSON-able value; raises what it raises.

  Raises:
    ConfigError: in all processes, if it does in the first one.
  """
  answer: dict[str, Any] = {}
  if is_first():
    try:
      answer = {"value": decide()}
    except ConfigError as error:
      if not is_multi_process():
        raise
      answer = {"error": str(error)}
  if not is_multi_process():
    return answer["value"]
  answer = json.loads(gather(json.dumps(answer))[0])
  if "error" in answer:
    raise ConfigError(answer["error"])
  return answer["value"]


def gather(text: str) -> list[str]:
  """Returns the text that each process gave, in their order."""
  if not is_multi_process():
    return [text]
  from jax.experimental import multihost_utils

  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(data)))
  padded = np.zeros(max(sizes), np.uint8)
  padded[: len(data)] = data
  rows = multihost_utils.process_allgather(padded)
  return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def barrier() -> None:
  """Waits until all have done their work: from here on each may end."""
  if _watch:
    _watch.finish()
    gather("")


def request_stop(signum: int) -> None:
  """Asks all processes to stop at a common call of `requested_stop`; safe from any thread."""
  if _watch:
    _watch.ask(signum)


def requested_stop(asked: int) -> int:
  """Returns the signal by which this program stops here; 0 if it goes on.

  Args:
    asked: the signal that this process got, or 0. Alone it decides; several processes, all of which
      must call this equally often, stop at the same call once one of them was asked.
  """
  if not _watch:
    return asked
  if asked:
    _watch.ask(asked)  # it may have come before the watch was there; once is enough
  return _watch.stops()


def wait_for_peer_failure() -> None:
  """Gives the watch time to say that an error here is another process's end."""
  if is_multi_process():
    time.sleep(GRACE_S)


def exit_with_trace() -> None:
  """Ends one of several processes by an error that is being handled; alone it does nothing."""
  if is_multi_process():
    sys.stderr.write(traceback.format_exc())
    exit_process(1)


def exit_process(code: int) -> NoReturn:
  """Ends the program; of several processes at once, without waiting for the others."""
  if is_multi_process():
    _ending.acquire()  # never released: what the watch has to say now would be a second message
    _exit(code)
  sys.exit(code)


def _connect() -> None:
  """Starts to watch the other processes; all of them must call it."""
  global _watch
  import jax
  from jax._src import distributed  # no public name tells where the first process is

  host = distributed.global_state.coordinator_address.rpartition(":")[0]
  if jax.process_index():
    port, key = gather("")[0].split()
    connection = multiprocessing.connection.Client((host, int(port)), authkey=bytes.fromhex(key))
    connection.send_bytes(str(jax.process_index()).encode())
    connections = {0: connection}
  else:
    place, key, count = ("", 0), os.urandom(16), jax.process_count() - 1
    with multiprocessing.connection.Listener(place, backlog=count, authkey=key) as listener:
      gather(f"{listener.address[1]} {key.hex()}")
      accepted = [listener.accept() for _ in range(count)]
    connections = {int(connection.recv_bytes()): connection for connection in accepted}
  _watch = Watchdog(connections, lambda message: _end(message, ENDED))
  _watch.start()


def _end(message: str, code: int) -> None:
  """Ends this process with one line, from any thread."""
  if _ending.acquire(blocking=False):
    sys.stderr.write(f"error: {message}\n")
    _exit(code)


def _exit(code: int) -> NoReturn:
  """Skips what jax does at exit: it would wait for processes that have ended."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
