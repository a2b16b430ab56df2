"""A folder that can't be written: a finished run shows its result, an unfinished one says why."""

import contextlib
import os
import shutil
import subprocess

import pytest
import stopping
from rich.console import Console

from fmlora_jax.cli import errors
from fmlora_jax.config import ConfigError
from fmlora_jax.experiment import seeds
from fmlora_jax.experiment.run import run

SETTINGS = stopping.settings(method={"name": "linear_probe"}, seeds=(1993,))
ONE = stopping.settings(method={"name": "linear_probe"}, seed=1993)


@contextlib.contextmanager
def read_only(folder):
  """Makes a folder with all in it read-only; for root the file system must know how."""
  if os.geteuid():
    change, back = ["chmod", "-R", "a-w"], ["chmod", "-R", "u+w"]
  else:
    change, back = ["chattr", "-R", "+i"], ["chattr", "-R", "-i"]
  try:
    if subprocess.run([*change, folder], capture_output=True, check=False).returncode:
      pytest.skip("root may write anywhere here")
    yield
  finally:
    subprocess.run([*back, folder], capture_output=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(folder of several seeds, result of the one)."""
  folder = tmp_path_factory.mktemp("finished") / "runs"
  (result,) = seeds.run_each(SETTINGS, folder, Console(quiet=True))
  return folder, result


def content(folder):
  return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_gives_its_result(finished, capsys):
  folder, expected = finished
  before = content(folder)
  with read_only(folder):
    assert run(ONE, folder / "1993")["params_sha256"] == expected["params_sha256"]
    assert seeds.run_each(SETTINGS, folder, Console(quiet=True))[0]["acc"] == expected["acc"]
  assert content(folder) == before and "finished before" in capsys.readouterr().out


def test_an_unfinished_run_is_refused_in_one_line(finished, tmp_path, capsys):
  folder = shutil.copytree(finished[0], tmp_path / "runs")
  (folder / "1993" / "result.json").unlink()
  before = content(folder)
  with read_only(folder):
    with pytest.raises(SystemExit, match="2"), errors.guard(workdir=str(folder / "1993")):
      run(ONE, folder / "1993")
    with pytest.raises(ConfigError, match="must be writable"):
      seeds.run_each(SETTINGS, folder, Console(quiet=True))
  line = capsys.readouterr().err
  assert line.startswith(f"error: workdir is '{folder / '1993'}': must be writable, ")
  assert line.count("\n") == 1 and content(folder) == before


def test_where_no_traceback_can_be_written_the_error_is_still_one_line(
  tmp_path, capsys, monkeypatch
):
  def refuse(*arguments, **options):
    raise OSError("read-only")

  monkeypatch.setattr(errors.tempfile, "NamedTemporaryFile", refuse)
  with pytest.raises(SystemExit, match="1"), errors.guard(workdir=str(tmp_path)):
    raise KeyError("x")
  line = "error: internal error: KeyError: 'x' (--debug prints the traceback)\n"
  assert capsys.readouterr().err == line
