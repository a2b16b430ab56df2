"""A signal while a module is imported stops the program after it, and leaves no half a module."""

import os
import pathlib
import subprocess
import sys
import types

import pytest

from fmlora_jax.distributed import hosts

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import sys, time
from fmlora_jax.cli import errors
from fmlora_jax.distributed import stop
with stop.caught(), errors.guard():
  import interrupted
  print(interrupted.whole, flush=True)
  time.sleep(20)
"""
MODULE = """
import os, signal, time
os.kill(os.getpid(), signal.{name})
time.sleep(0.1)
whole = "whole"
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_in_an_import_takes_effect_after_it(tmp_path, name, code):
  (tmp_path / "interrupted.py").write_text(MODULE.format(name=name))
  env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=15
  )
  assert done.stderr == f"stopped by {name}; the same command resumes\n"
  assert done.returncode == code and done.stdout in ("whole\n", "")


def test_a_jax_that_is_imported_in_part_has_joined_nothing(monkeypatch):
  jax = types.ModuleType("jax")
  monkeypatch.setitem(sys.modules, "jax", jax)
  assert not hosts.is_multi_process()
  jax.distributed = types.ModuleType("jax.distributed")
  assert not hosts.is_multi_process()
