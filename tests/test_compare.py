"""The comparison as a command: a whole one, and the commands that it refuses."""

import os
import pathlib
import subprocess
import sys

import pytest

from fmlora_jax import compare
from fmlora_jax.cli import errors, flags
from fmlora_jax.config import ConfigError
from fmlora_jax.report import runs

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = f"--config={ROOT}/configs/digits.py"


def call(*arguments, cwd):
  command = [sys.executable, "-m", "fmlora_jax.compare", *arguments]
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


SMALL = (
  f"{DIGITS}:tasks=2",
  "--config.epochs=1",
  "--config.batch_size=256",
  "--config.weights.tag=random",
  "--config.weights.architecture=micro",
  "--config.weights.depth=1",
  "--config.input.image_size=16",
  "--config.input.normalisation=half",
  "--seeds=1,2",
)


def test_a_comparison_goes_on_where_it_was_and_says_what_it_left_out(tmp_path):
  chosen = "--methods=linear_probe,lora:rank=97"
  first = call(*SMALL, chosen, cwd=tmp_path)
  assert first.returncode == 1
  assert first.stderr == "error: 2 of 4 runs are left out\n"
  (folder,) = (tmp_path / "runs").iterdir()
  assert folder.name.startswith("compare-digits-")
  assert first.stdout.startswith(f"compare    4 runs in {folder}: 0 finished, 0 begun\n")
  (groups,) = runs.group(runs.load([folder])[0]).values()
  assert [run["seed"] for run in groups["linear_probe"]] == [1, 2]
  table = (folder / "compare.md").read_text()
  assert "| linear_probe | 2 |" in table
  problem = "lora-rank=97, seed 1, 2: config.method.rank is 97: must be at most 96"
  assert f"> left out: {problem}" in table and f"left out: {problem}" in first.stdout
  assert (folder / "compare.png").stat().st_size > 1000

  again = call(*SMALL, "--methods=linear_probe", cwd=tmp_path)
  assert (again.returncode, again.stderr) == (0, "")
  assert "2 finished, 0 begun" in again.stdout and "training images" not in again.stdout
  row = next(line for line in again.stdout.splitlines() if line.startswith("linear_probe"))
  assert row in first.stdout.splitlines()

  changes = ("--config.batch_size=128", f"--workdir={folder}")
  other = call(*SMALL, "--methods=linear_probe", *changes, cwd=tmp_path)
  assert other.returncode == 2
  assert "config.batch_size: 256 there, 128 now" in other.stdout
  assert other.stderr == "error: 2 of 2 runs are left out\n"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--config=nope.py"], "--config is 'nope.py': no such file"),
    ([DIGITS, "--seeds=1,x"], "--seeds is ['1', 'x']: must be whole numbers"),
    ([DIGITS, "epochs=3"], "unexpected argument 'epochs=3'"),
    (["configs/digits.py"], "unexpected argument 'configs/digits.py'"),
    ([DIGITS, "--methds=lora"], "Unknown command line flag 'methds'. Did you mean: methods"),
    ([DIGITS, "--workdir=gs://x"], "--workdir is 'gs://x': must be a local or mounted folder"),
  ],
)
def test_a_wrong_command_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
  monkeypatch.chdir(tmp_path)
  values = compare.define_flags()
  flags.define_shared(values)
  with pytest.raises(ConfigError) as error:
    compare.main(flags.parse(values, ["compare", *arguments]))
  said = errors.explain(error.value)
  assert said.startswith(message) and "\n" not in said and not capsys.readouterr().out
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["compare.md", "compare.png"])
def test_a_table_or_plot_that_cannot_be_written_is_refused_before_the_runs(tmp_path, name):
  (tmp_path / "out" / name).mkdir(parents=True)
  done = call(*SMALL, "--methods=linear_probe", "--workdir=out", cwd=tmp_path)
  assert done.returncode == 2 and "training images" not in done.stdout
  said = f"error: {name} of --workdir is '{tmp_path}/out/{name}': must be a file or new, it is"
  assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
  assert os.listdir(tmp_path / "out") == [name]


def test_a_comparison_of_nothing_ends_with_code_2_before_work(tmp_path):
  done = call(DIGITS, "--methods=linear_probe,finetune", "--config.epochs=0", cwd=tmp_path)
  assert done.returncode == 2
  assert done.stderr.startswith("error: all 6 runs are left out: config.epochs is 0: must be >= 1")
  assert not list(tmp_path.iterdir())
