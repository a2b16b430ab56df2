"""A standard output that is closed, full, gone or in ASCII ends no program and loses no result."""

import io
import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags

from fmlora_jax.cli import flags as flags_lib
from fmlora_jax.cli import output, program

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import logging, sys
from absl import flags
from fmlora_jax.cli import flags as flags_lib, program
values = flags.FlagValues()
if "--workdir=x" in sys.argv:
  flags_lib.define_run(values)
with program.running("", values):
  for i in range(1000):
    print("91.2 \\xb1 0.3", flush=True)
    logging.getLogger("fmlora_jax").info("step %d", i)
  sys.stderr.write("done\\n")
"""


def shell(redirected: str, flag: str = "", **environment: str) -> subprocess.CompletedProcess:
  """Runs the program above as bash does, its output redirected."""
  line = f"'{sys.executable}' -c '{PROGRAM}' {flag} {redirected}; exit ${{PIPESTATUS[0]}}"
  env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
  return subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
  ("redirected", "environment", "shown"),
  [
    ("| head -1", {}, "91.2 ± 0.3\n"),
    (">&-", {}, ""),
    ("<&- >&-", {}, ""),
    ("| head -1", {"PYTHONIOENCODING": "ascii"}, "91.2 ? 0.3\n"),
    (
      "| head -1",
      {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""},
      "91.2 ? 0.3\n",
    ),
  ],
)
def test_a_program_whose_output_is_not_read_ends_as_any_other(redirected, environment, shown):
  done = shell(redirected, **({"PYTHONIOENCODING": "utf-8"} | environment))
  assert (done.returncode, done.stdout, done.stderr) == (0, shown, "done\n")


@pytest.mark.parametrize(
  ("flag", "code", "kind"), [("", 1, "error"), ("--workdir=x", 0, "warning")]
)
def test_a_full_output_is_said_and_fails_a_command_without_other_results(flag, code, kind):
  done = shell("> /dev/full", flag)
  assert (done.returncode, done.stdout) == (code, "")
  assert done.stderr == (
    f"done\n{kind}: the standard output can't be written (No space left on device): it is not "
    "complete\n"
  )


@pytest.mark.parametrize(
  "command", ["--version", "--list", "main --help", "main --config=digits --dry_run"]
)
def test_a_command_whose_output_is_all_it_makes_fails_without_it(tmp_path, command):
  line = f"'{sys.executable}' -m fmlora_jax {command} > /dev/full"
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    ["bash", "-c", line], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
  )
  assert (done.returncode, done.stderr) == (
    1,
    "error: the standard output can't be written (No space left on device): it is not complete\n",
  )


@pytest.mark.parametrize("name", ["dry_run", "estimate", "list"])
def test_a_run_that_only_tells_fails_without_its_output(monkeypatch, name):
  monkeypatch.setattr(output, "lost", lambda: OSError(28, "full"))
  values = flags.FlagValues()
  flags_lib.define_run(values)
  for more in {"estimate", "list"}:
    flags.DEFINE_bool(more, False, "", flag_values=values)
  with (
    pytest.raises(SystemExit) as ended,
    program.running("", values, ["fmlora_jax main", "--config=digits", f"--{name}"]),
  ):
    pass
  assert ended.value.code == 1


def test_a_closed_standard_error_hides_no_exit_code():
  assert shell("--nonsense 2>&-").returncode == 2


def test_no_file_gets_the_number_of_a_closed_output(tmp_path):
  program = (
    "from fmlora_jax.cli import output; import os; output.protect(); "
    f"file = open({str(tmp_path / 'mine')!r}, 'w'); os.write(1, b'noise'); file.close()"
  )
  line = f'"{sys.executable}" -c "{program}" >&-'
  subprocess.run(["bash", "-c", line], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
  assert (tmp_path / "mine").read_text() == ""


def test_what_can_be_shown_is_and_lone_surrogates_are_not():
  stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
  shown = output.Unfailing(stream)
  shown.writelines(["a ± ", "b\udcff"])
  shown.flush()
  assert stream.buffer.getvalue().decode() == "a ± b?" and shown.lost is None
  assert shown.encoding == "utf-8"


def test_a_current_folder_that_was_removed_is_one_line(tmp_path):
  gone = tmp_path / "gone"
  gone.mkdir()
  line = f"cd '{gone}'; rmdir '{gone}'; exec '{sys.executable}' -m fmlora_jax report runs"
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, timeout=60)
  assert done.returncode != 0 and not done.stdout
  assert done.stderr == "error: the current folder was removed: cd to one that exists\n"
