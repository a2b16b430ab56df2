"""Several processes as one program: joining, agreeing, and ending together.

Every process runs the same code on the same mesh; only the first one writes. A process that exits
early leaves the others waiting in a collective for ever, so each has a connection to the first one
(watchdog.py) and exits within seconds. In a program of one process all functions here are trivial.
"""

import contextlib
import json
import multiprocessing.connection
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from fmlora_jax.config import ConfigError
from fmlora_jax.config.diff import differences
from fmlora_jax.distributed import backend
from fmlora_jax.distributed.watchdog import HEARTBEAT_S, Watchdog

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
CLUSTER = "FMLORA_JAX_CLUSTER"  # "auto": jax detects the cluster, such as a TPU pod
TIMEOUT = "FMLORA_JAX_LAUNCH_TIMEOUT"  # seconds
GRACE_S = 5.0  # a collective may fail before the connection to the process that exited does
PEER_LOST = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed

_ending = threading.Lock()
_watch: Watchdog | None = None


def join_processes() -> None:
  """Joins the other processes where this one was launched as one of several.

  To be called before jax uses a device. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID describe the processes. Without them jax detects Slurm, Open MPI and TPU pods on
  GKE from the environment, and any other cluster it knows with FMLORA_JAX_CLUSTER=auto.

  Raises:
    ConfigError: if one of the three is missing or wrong, jax detects no cluster, or JAX_PLATFORMS
      names a device that is not there.
  """
  cluster = _from_environment()
  if cluster is None:
    backend.require_backend()
    return
  import jax  # after the flags: --help and a typo answer at once

  # it would take SIGTERM from stop.py
  jax.config.update("jax_enable_preemption_service", False)
  limit, address = _launch_timeout(), cluster.get("coordinator_address", "")
  bound = {"coordinator_bind_address": address} if _is_loopback(address) else {}
  # earlier than jax, which gives up with a dump of its C++ stack
  giving_up = threading.Timer(limit, _end, [_timed_out(cluster, limit), 2])
  giving_up.daemon = True
  giving_up.start()
  try:
    jax.distributed.initialize(
      **cluster,
      **bound,
      initialization_timeout=limit + 60,
      heartbeat_timeout_seconds=3 * HEARTBEAT_S,  # later than the watchdog, for the same reason
    )
    _require_backend()
    if is_multi_process():
      _connect(address.rpartition(":")[0])
  except (ValueError, RuntimeError, OSError, EOFError) as error:
    reason = " ".join(str(error).split())
    raise ConfigError(
      f"launched as one of several processes, which did not connect: {reason}"
    ) from None
  finally:
    giving_up.cancel()


def _require_backend() -> None:
  """Exits one of several processes without its device: what asks how many there are needs it."""
  try:
    backend.require_backend()
  except ConfigError as error:
    _end(str(error), 2)


def _from_environment() -> dict[str, Any] | None:
  """Returns the arguments of `jax.distributed.initialize`; None where this process is alone."""
  given = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if name in os.environ}
  if COUNT in given or INDEX in given:
    if missing := [name for name in (ADDRESS, COUNT, INDEX) if name not in given]:
      raise ConfigError(f"{', '.join(given)} needs {' and '.join(missing)}: must be set too")
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


def _is_loopback(address: str) -> bool:
  """Returns whether HOST:PORT is of this machine alone, so that nobody else needs to reach it."""
  host = address.rpartition(":")[0].strip("[]")
  return host == "localhost" or host == "::1" or host.startswith("127.")


def _number(name: str, at_least: int) -> int:
  text = os.environ[name]
  if not text.isdigit() or int(text) < at_least:
    raise ConfigError(f"{name} is {text!r}: must be a whole number >= {at_least}")
  return int(text)


def _launch_timeout() -> int:
  return _number(TIMEOUT, at_least=1) if TIMEOUT in os.environ else 300


def _timed_out(cluster: Mapping[str, Any], limit: int) -> str:
  count, address = cluster.get("num_processes", "all"), cluster.get("coordinator_address", "")
  return (
    f"timed out after {limit} s waiting for {count} processes{address and f' at {address}'}: start "
    f"each with its own {INDEX} and check that it can reach process 0 ({TIMEOUT} changes the limit)"
  )


def is_multi_process() -> bool:
  """Returns whether this process has joined others."""
  jax = sys.modules.get("jax")
  distributed = getattr(jax, "distributed", None)  # None: jax is not imported yet, nothing joined
  joined = getattr(distributed, "is_initialized", None)
  return jax is not None and joined is not None and joined() and jax.process_count() > 1


def is_first() -> bool:
  """Returns whether this process is the one that writes."""
  return not is_multi_process() or sys.modules["jax"].process_index() == 0


def assert_same_on_all(
  values: Mapping[str, Any],
  besides: Sequence[str] = (),
  fix: str = "start all with one command on the same data",
) -> None:
  """Compares a JSON-able record over all processes.

  Args:
    values: nested dicts.
    besides: fields of `config` that may differ.
    fix: advice for the message.

  Raises:
    ConfigError: on all of them, if the record differs between two, with the fields that do.
  """
  first, *others = (json.loads(text) for text in gather(json.dumps(values)))
  for index, other in enumerate(others, 1):
    differing = [
      f"{field}: {a!r} in process 0, {b!r} in {index}"
      for field, a, b in differences(first, other)
      if field.removeprefix("config.") not in besides
    ]
    if differing:
      raise ConfigError(f"processes differ ({'; '.join(differing)}): {fix}")


def run_on_first(decide: Callable[[], Any]) -> Any:
  """Returns the result of `decide` in the first process, a JSON-able value, on all.

  Raises:
    ConfigError: in all processes, if `decide` raises it in the first one.
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


@contextlib.contextmanager
def entered_on_first(context: contextlib.AbstractContextManager) -> Iterator[Any]:
  """Holds a context in the first process, for all; yields there what it yields, elsewhere None.

  Raises:
    ConfigError: in all processes, if entering the context raises it in the first one.
  """
  entered = []
  with contextlib.ExitStack() as stack:
    run_on_first(lambda: entered.append(stack.enter_context(context)))
    yield entered[0] if entered else None


def gather(text: str) -> list[str]:
  """Returns the texts of all processes, in their order."""
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
  """Waits for all processes; from here on each may exit."""
  if _watch:
    _watch.finish()
    gather("")


def request_stop(signum: int) -> None:
  """Asks all processes to stop at a common call of `requested_stop`; safe from any thread."""
  if _watch:
    _watch.ask(signum)


def requested_stop(asked: int) -> int:
  """Returns the signal that stops this program at this call; 0 if it goes on.

  Several processes, all of which must call this equally often, stop at the same call once one of
  them got a signal.

  Args:
    asked: the signal that this process got, or 0.
  """
  if not _watch:
    return asked
  if asked:
    _watch.ask(asked)  # it may be older than the watchdog; asking twice does no harm
  return _watch.stops()


def wait_for_peer_failure() -> None:
  """Waits briefly, so that a peer's exit is reported before the error it causes here."""
  if is_multi_process():
    time.sleep(GRACE_S)


def exit_with_trace() -> None:
  """Exits one of several processes with the error that is being handled; does nothing alone."""
  if is_multi_process():
    sys.stderr.write(traceback.format_exc())
    exit_process(1)


def exit_process(code: int) -> NoReturn:
  """Exits the program; one of several processes exits without waiting for the others."""
  if is_multi_process():
    _ending.acquire()  # never released: the watchdog would add a second message
    _exit(code)
  sys.exit(code)


def _connect(host: str) -> None:
  """Starts the watchdog of this process; all processes must call it.

  Args:
    host: of process 0; "" where jax detected the cluster, then process 0 sends its addresses.
  """
  global _watch
  import jax

  if jax.process_index():
    port, key, *addresses = gather("")[0].split()
    connection = _reach([host] if host else addresses, int(port), bytes.fromhex(key))
    connection.send_bytes(str(jax.process_index()).encode())
    connections: dict[int, Any] = {0: connection}
  else:
    key, count = os.urandom(16), jax.process_count() - 1
    address = (host if _is_loopback(f"{host}:0") and ":" not in host else "", 0)
    with socket.create_server(address, backlog=64) as server:
      gather(" ".join([str(server.getsockname()[1]), key.hex(), *_own_addresses()]))
      connections = _accept(server, key, count)
  _watch = Watchdog(connections, lambda message: _end(message, PEER_LOST))
  _watch.start()


def _accept(server: socket.socket, key: bytes, count: int) -> dict[int, Any]:
  """Returns the connections of `count` processes that know the key, by their numbers.

  Strangers, who may say nothing, keep nobody waiting: each has a thread of its own.
  """
  known: dict[int, Any] = {}

  def meet(connection):
    with contextlib.suppress(OSError, EOFError, ValueError, multiprocessing.AuthenticationError):
      multiprocessing.connection.deliver_challenge(connection, key)
      multiprocessing.connection.answer_challenge(connection, key)
      known[int(connection.recv_bytes())] = connection

  server.settimeout(0.1)
  while len(known) < count:
    with contextlib.suppress(TimeoutError):
      joined, _ = server.accept()
      joined.setblocking(True)
      connection = multiprocessing.connection.Connection(joined.detach())
      threading.Thread(target=meet, args=(connection,), daemon=True).start()
  return known


def _own_addresses() -> list[str]:
  """Returns the name and the IP address by which other hosts may reach this one."""
  addresses = [socket.gethostname()]
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route, contextlib.suppress(OSError):
    route.connect(("192.0.2.1", 1))  # sends nothing; chooses the interface of the default route
    addresses.append(route.getsockname()[0])
  return addresses


def _reach(addresses: Sequence[str], port: int, key: bytes) -> Any:
  """Returns a connection to the first of the addresses that can be reached."""
  *others, last = addresses
  for address in others:
    with contextlib.suppress(OSError, multiprocessing.AuthenticationError):
      return multiprocessing.connection.Client((address, port), authkey=key)
  return multiprocessing.connection.Client((last, port), authkey=key)


def _end(message: str, code: int) -> None:
  """Exits this process with one line, from any thread."""
  if _ending.acquire(blocking=False):
    sys.stderr.write(f"error: {message}\n")
    _exit(code)


def _exit(code: int) -> NoReturn:
  """Exits without jax's handlers, which would wait for processes that are gone."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
