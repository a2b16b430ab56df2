"""Several processes of one program on this machine, as launch/processes.sh starts them."""

import os
import pathlib
import socket
import subprocess
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[1]


def environment(count: int, **changes: str) -> list[dict[str, str]]:
  """Returns the environments of `count` processes that meet at a free port."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
  shared = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_COORDINATOR_ADDRESS": address}
  shared |= {"JAX_NUM_PROCESSES": str(count)} | changes
  return [os.environ | shared | {"JAX_PROCESS_ID": str(index)} for index in range(count)]


def start(arguments: Sequence, environments: Sequence[dict[str, str]]) -> list[subprocess.Popen]:
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return [subprocess.Popen(arguments, cwd=ROOT, env=env, **pipes) for env in environments]


def ended(processes: Sequence[subprocess.Popen]) -> list[tuple[int, str, str]]:
  """Returns (exit code, what was shown, errors) of each when all have ended."""
  try:
    shown = [process.communicate(timeout=300) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *text) for process, text in zip(processes, shown, strict=True)]


def with_devices(count: int) -> str:
  """Returns XLA_FLAGS that split a CPU into so many devices."""
  return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
