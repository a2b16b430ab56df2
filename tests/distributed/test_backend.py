"""What jax can't use is refused in one line, whatever the command is."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from fmlora_jax.config import ConfigError
from fmlora_jax.distributed import backend

ROOT = pathlib.Path(__file__).parents[2]


def ended(command: str, folder: pathlib.Path, **environment: str) -> tuple[int, str, str]:
  """Returns exit code, output and errors of a command in a folder."""
  env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
  line = [sys.executable, "-m", "fmlora_jax", *command.split()]
  done = subprocess.run(line, env=env, cwd=folder, capture_output=True, text=True, timeout=120)
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
  "command",
  [
    "main --config=digits --dry_run",
    "compare --config=digits --methods=lora --dry_run",
    "bench --architecture=micro",
    "pretrain --output=x.safetensors",
  ],
)
def test_a_platform_that_is_not_there_is_one_line(tmp_path, command):
  code, shown, errors = ended(command, tmp_path, JAX_PLATFORMS="nonsense")
  assert (code, shown) == (2, "")
  assert errors.startswith("error: JAX_PLATFORMS is 'nonsense': no such device here; unset it, ")
  assert "not in the list of known backends" in errors and errors.count("\n") == 1


def test_one_of_several_processes_without_its_device_ends_in_one_line(tmp_path):
  with socket.create_server(("localhost", 0)) as server:
    address = f"localhost:{server.getsockname()[1]}"
  cluster = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "1"}
  joined = cluster | {"JAX_PROCESS_ID": "0", "JAX_PLATFORMS": "nonsense"}
  code, _, errors = ended("main --config=digits --dry_run", tmp_path, **joined)
  lines = [line for line in errors.splitlines() if line.startswith("error: ")]
  assert code == 2 and len(lines) == 1 and "JAX_PLATFORMS is 'nonsense'" in lines[0]


@pytest.mark.parametrize(
  ("wanted", "fix"),
  [
    ("cuda", "unset it, or install jax for it: pip install 'fmlora_jax[cuda]'"),
    ("tpu,cpu", "unset it, or install jax for it: pip install 'fmlora_jax[tpu]'"),
    ("nonsense", "unset it, or set it to cpu, cuda or tpu"),
  ],
)
def test_the_fix_is_of_the_platform(monkeypatch, wanted, fix):
  def devices():
    raise AssertionError  # as jax does without an NVIDIA device

  monkeypatch.setenv("JAX_PLATFORMS", wanted)
  monkeypatch.setattr("jax.devices", devices)
  with pytest.raises(ConfigError) as refused:
    backend.require_backend()
  assert str(refused.value) == f"JAX_PLATFORMS is {wanted!r}: no such device here; {fix}"


@pytest.mark.parametrize("count", ["0", "-1", "two", "", "00"])
def test_a_number_of_devices_that_ends_xla_is_refused(monkeypatch, count):
  flags = f"--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count={count}"
  monkeypatch.setenv("XLA_FLAGS", flags)
  with pytest.raises(ConfigError) as refused:
    backend.require_backend()
  assert str(refused.value) == (
    f"XLA_FLAGS is {flags!r}: xla_force_host_platform_device_count must be a whole number >= 1; "
    "correct it or leave it out"
  )


def test_a_number_of_devices_is_taken(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=10")
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  backend.require_backend()


def test_no_device_is_one_line_of_the_program(tmp_path):
  flags = "--xla_force_host_platform_device_count=0"
  code, shown, errors = ended("main --config=digits --dry_run", tmp_path, XLA_FLAGS=flags)
  assert (code, shown) == (2, "") and errors.startswith(f"error: XLA_FLAGS is {flags!r}: ")
  assert errors.count("\n") == 1


@pytest.mark.parametrize("command", ["main --config=digits --dry_run", "bench", "report runs"])
def test_a_switch_that_jax_refuses_at_its_import_is_one_line(tmp_path, command):
  (tmp_path / "runs").mkdir()
  assert ended(command, tmp_path, JAX_ENABLE_X64="maybe") == (
    2,
    "",
    "error: invalid truth value 'maybe' for environment 'JAX_ENABLE_X64': must be true or false; "
    "correct it or unset it\n",
  )
