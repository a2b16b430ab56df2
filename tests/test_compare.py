"""The comparison: which runs it plans, what it does with those that fail, and a whole one."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest
from absl import app
from made_up import result

from fmlora_jax import compare, methods
from fmlora_jax.cli import program
from fmlora_jax.cli.overrides import Choice, parse_methods
from fmlora_jax.config import ConfigError
from fmlora_jax.distributed import stop
from fmlora_jax.report import runs
from fmlora_jax.types import NonFiniteError

# how ml_collections loads config files
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = f"--config={ROOT}/configs/digits.py"


def test_methods_stand_between_commas_and_their_settings_after_colons():
  text = "fm_lora,lora:mode=sequential:rank=8 lora:targets=('query', 'key'),fm_lora"
  assert parse_methods(text) == [
    Choice("fm_lora"),
    Choice("lora", (("mode", "sequential"), ("rank", "8"))),
    Choice("lora", (("targets", "('query', 'key')"),)),
  ]


def test_all_is_every_method_in_every_variant_that_it_declares(monkeypatch):
  chosen = parse_methods("all,fm_lora:prompt.num_tokens=0,lora:mode=sequential")
  assert {choice.name for choice in chosen} == set(methods.names())
  lora = [choice.settings for choice in chosen if choice.name == "lora"]
  assert lora == [(("mode", "incremental"),), (("mode", "sequential"),)]
  assert chosen[-1] == Choice("fm_lora", (("prompt.num_tokens", "0"),))
  assert len(chosen) == len(set(chosen))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (
      "lora,lorra",
      "--methods has 'lorra': must be all, NAME or NAME:FIELD=VALUE, where NAME is on",
    ),
    ("lora,rank=8", "--methods has 'rank=8': must be all, NAME or"),
    ("lora:rank", "--methods has 'lora:rank': must be like lora:mode=sequential:rank=8"),
    ("lora:=8", "--methods has 'lora:=8': must be like"),
    (" ,", "--methods names none"),
  ],
)
def test_methods_that_can_not_be_are_refused(text, message):
  with pytest.raises(ConfigError) as error:
    parse_methods(text)
  assert str(error.value).startswith(message)


def planned(methods_text, *config_flags, seeds=(1,), folder=pathlib.Path("runs")):
  return compare.plan([DIGITS, *config_flags], parse_methods(methods_text), seeds, folder)


def test_the_config_file_is_read_anew_for_each_method():
  """In configs/digits.py the learning rates depend on it."""
  fm_lora, lora, finetune = planned("fm_lora,lora,finetune")
  assert [run.config.method.name for run in (fm_lora, lora, finetune)] == [
    "fm_lora",
    "lora",
    "finetune",
  ]
  rates = [run.config.optim.learning_rate for run in (fm_lora, lora, finetune)]
  assert rates == [1e-3, 3e-4, 3e-5]


def test_settings_are_a_method_s_own_or_of_the_whole_config_and_win_over_those_for_all():
  text = "lora:rank=3:optim.learning_rate=0.5,lora:targets=('key','out'),fm_lora"
  runs = planned(text, "--config.epochs=7", "--config.optim.learning_rate=0.25")
  assert [run.config.epochs for run in runs] == [7] * 3
  assert [run.config.optim.learning_rate for run in runs] == [0.5, 0.25, 0.25]
  assert (runs[0].config.method.rank, runs[1].config.method.rank) == (3, 16)
  assert runs[1].config.method.targets == ("key", "out")


def test_runs_come_seed_after_seed_each_in_a_folder_of_its_own():
  runs = planned("lora:mode=sequential,lora:targets=('key','out')", seeds=(5, 6))
  assert [(run.label, run.seed, run.config.seed) for run in runs] == [
    ("lora-mode=sequential", 5, 5),
    ("lora-targets=-key-out", 5, 5),
    ("lora-mode=sequential", 6, 6),
    ("lora-targets=-key-out", 6, 6),
  ]
  assert runs[0].workdir == pathlib.Path("runs/lora-mode=sequential/5")


def test_a_variant_of_the_config_file_is_kept():
  flags = [f"{DIGITS}:tasks=2", "--config.epochs=1"]
  (run,) = compare.plan(flags, [Choice("lora")], [1], pathlib.Path("runs"))
  assert (run.config.tasks.num_tasks, run.config.method.name) == (2, "lora")


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([f"{DIGITS}:method=lora"], "--config names a method: they are given as --methods"),
    ([DIGITS, "--config.method.name=lora"], "--config names a method"),
    ([DIGITS, "--config.seed=3"], "--config.seed is given: the seeds are given as --seeds"),
    ([DIGITS, "--config.seeds=3,4"], "--config.seeds is given: the seeds are given as --seeds"),
    (["--config.epochs=3"], "--config is missing"),
  ],
)
def test_methods_and_seeds_are_not_given_twice(flags, message):
  with pytest.raises(app.UsageError, match=message):
    compare.plan(flags, [Choice("lora")], [1], pathlib.Path("runs"))


def test_a_config_that_can_not_be_leaves_the_others_as_they_are():
  wrong, right = planned("lora:rnk=3,lora")
  assert wrong.config is None
  assert wrong.problem.startswith("--config.method.rnk: 'rnk' is not a field")
  assert right.config.method.name == "lora" and not right.problem
  lines = compare.listing([wrong, right], pathlib.Path("runs"))
  assert lines[0] == "compare    2 runs in runs: 0 finished, 0 begun"
  assert lines[1].startswith("  lora-rnk=3  left out: --config.method.rnk")
  assert lines[2] == "  lora        1"


def test_the_listing_says_what_an_earlier_session_left(tmp_path):
  runs = planned("lora,fm_lora", seeds=(1, 2), folder=tmp_path)
  for run, name in ((runs[0], "result.json"), (runs[2], "config.json")):
    run.workdir.mkdir(parents=True)
    (run.workdir / name).touch()
  assert compare.listing(runs, tmp_path) == [
    f"compare    4 runs in {tmp_path}: 1 finished, 1 begun",
    "  lora     1 finished, 2 begun",
    "  fm_lora  1, 2",
  ]


@pytest.fixture
def debug(monkeypatch):
  """Sets --debug, which is off here: no flags are parsed."""

  def turn(on):
    monkeypatch.setattr(program, "DEBUG", type("Flag", (), {"value": on}))

  turn(False)
  return turn


def answers(**by_label):
  """Returns a stand-in for a run: what a label has is raised or returned."""

  def run(one):
    if one.config is None:
      raise AssertionError("never started")
    if isinstance(by_label[one.label], BaseException):
      raise by_label[one.label]
    return by_label[one.label] | {"seed": one.seed}

  return run


def test_a_run_that_fails_is_one_line_and_the_others_go_on(debug):
  plan = planned("finetune,lora,lora:rnk=1,fm_lora", seeds=(1, 2))
  notes = []
  run = answers(
    finetune=NonFiniteError("loss is nan"), lora=ConfigError("no\nroom"), fm_lora=result()
  )
  results, problems = compare.run_all(plan, run, notes.append)
  assert [found["seed"] for found in results] == [1, 2]
  assert problems[:2] == [
    "left out: finetune, seed 1, 2: loss is nan",
    "left out: lora, seed 1, 2: no room",
  ]
  assert problems[2].startswith("left out: lora-rnk=1, seed 1, 2: --config.method.rnk")
  assert notes[:2] == ["\nrun 1 of 8: finetune, seed 1", "left out: loss is nan"]


@pytest.mark.parametrize("error", [KeyError("a bug"), stop.Stopped(15)])
def test_a_bug_and_a_stop_end_the_comparison(debug, error):
  with pytest.raises(type(error)):
    compare.run_all(planned("lora,fm_lora"), answers(lora=error), print)


def test_the_trace_of_a_failing_run_can_be_seen(debug):
  debug(True)
  with pytest.raises(NonFiniteError):
    compare.run_all(planned("lora"), answers(lora=NonFiniteError("loss is nan")), print)


def test_the_time_left_is_that_of_the_method_s_other_seeds_or_of_all(tmp_path):
  plan = planned("lora,fm_lora", seeds=(1, 2), folder=tmp_path)
  took = {("lora", 1): {"wall_seconds": {"total": 10}}}
  assert compare.duration_left(plan, {}) == ""
  assert compare.duration_left(plan[1:], took) == ", about 30.0 s left"
  took["fm_lora", 1] = {"wall_seconds": {"total": 20}}
  assert compare.duration_left(plan[2:], took) == ", about 30.0 s left"
  plan[3].workdir.mkdir(parents=True)
  (plan[3].workdir / "result.json").touch()
  assert compare.duration_left(plan[2:], took) == ", about 10.0 s left"
  assert compare.duration_left(plan[3:], took) == ""
  hopeless = dataclasses.replace(plan[2], config=None)
  assert compare.duration_left([hopeless], took) == ""


def test_flags_of_the_config_are_left_to_the_methods(monkeypatch):
  monkeypatch.setattr(program, "parse_flags", lambda argv: argv)
  argv = ["compare", "--config", DIGITS.partition("=")[2], "--seeds=1", "--config.epochs", "3", "x"]
  assert compare.parse_flags(argv) == ["compare", DIGITS, "--config.epochs=3", "--seeds=1", "x"]


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
  folder = tmp_path / "runs" / "compare-digits-tasks=2"
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

  other = call(*SMALL, "--methods=linear_probe", "--config.batch_size=128", cwd=tmp_path)
  assert other.returncode == 1
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
def test_a_wrong_command_is_one_line(tmp_path, arguments, message):
  done = call(*arguments, cwd=tmp_path)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
  assert not list(tmp_path.iterdir())
