"""A comparison: which runs it plans, and what it does with those that fail."""

import dataclasses
import pathlib

import pytest
from made_up import result

from fmlora_jax.cli.methods_flag import parse_methods
from fmlora_jax.config import ConfigError
from fmlora_jax.distributed import stop
from fmlora_jax.experiment import comparison
from fmlora_jax.report import plots
from fmlora_jax.types import NonFiniteError


def planned(methods_text, seeds=(1,), folder=pathlib.Path("runs"), file="digits", **changes):
  pairs = [(field.replace("__", "."), str(value)) for field, value in changes.items()]
  return comparison.plan(file, pairs, parse_methods(methods_text), seeds, folder)


def test_the_config_file_is_read_anew_for_each_method():
  """In configs/digits.py the learning rates depend on it."""
  runs = planned("fm_lora,c_lora,finetune")
  assert [run.config.method.name for run in runs] == ["fm_lora", "c_lora", "finetune"]
  assert [run.config.optim.learning_rate for run in runs] == [1e-3, 3e-4, 3e-5]


def test_settings_are_a_method_s_own_or_of_the_whole_config_and_win_over_those_for_all():
  text = "lora:rank=3:optim.learning_rate=0.5,lora:targets=('key','out'),fm_lora"
  runs = planned(text, epochs=7, optim__learning_rate=0.25)
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


def test_a_variant_of_the_config_file_stays():
  (run,) = planned("lora", file="digits:tasks=2", epochs=1)
  assert (run.config.tasks.num_tasks, run.config.method.name) == (2, "lora")


def test_settings_that_moved_to_fm_lora_are_taken_where_they_were_and_leave_other_methods_alone():
  fm_lora, lora, other = planned(
    "fm_lora,lora,fm_lora:drs.rank=3:prompt.num_tokens=0",
    drs__rank=4,
    bases__max_rank=16,
    prompt__lr_scale=0.5,
  )
  settings = fm_lora.config.method
  assert (settings.drs.rank, settings.bases.max_rank, settings.prompt.lr_scale) == (4, 16, 0.5)
  assert (other.config.method.drs.rank, other.config.method.prompt.num_tokens) == (3, 0)
  assert lora.config == planned("lora")[0].config


@pytest.mark.parametrize(
  ("file", "changes", "message"),
  [
    ("digits:method=lora", [], "--config names a method: they are given as --methods"),
    ("digits", [("method.name", "lora")], "--config names a method"),
    ("digits", [("seed", "3")], "--config.seed is given: the seeds are given as --seeds"),
    ("digits", [("seeds", "3,4")], "--config.seeds is given: the seeds are given as --seeds"),
    (None, [("epochs", "3")], "--config is missing"),
  ],
)
def test_methods_and_seeds_are_not_given_twice(file, changes, message):
  with pytest.raises(ConfigError, match=message):
    comparison.check_arguments(file, changes)


def test_the_default_folder_is_named_after_the_file_and_what_is_changed():
  name = comparison.workdir_name
  assert name("digits", []) == "compare-digits"
  assert name("configs/digits.py:tasks=2", [("epochs", "1")]) == "compare-digits-tasks=2-epochs=1"
  assert name("digits", [("input.workers", "4")]) == "compare-digits"
  long = [(f"optim.{field}", "0.5") for field in ("learning_rate", "weight_decay", "momentum")]
  assert name("digits", long) == name("digits", long[::-1]) != name("digits", long[:2])
  assert len(name("digits", long)) < 30


def test_an_invalid_config_leaves_the_others_as_they_are():
  wrong, right = planned("lora:rnk=3,lora")
  assert wrong.config is None
  assert wrong.problem.startswith("--config.method.rnk: 'rnk' is not a field")
  assert right.config.method.name == "lora" and not right.problem
  lines = comparison.listing([wrong, right], pathlib.Path("runs"))
  assert lines[0] == "compare    2 runs in runs: 0 finished, 0 begun"
  assert lines[1].startswith("  lora-rnk=3  left out: --config.method.rnk")
  assert lines[2] == "  lora        1"


def test_the_listing_says_what_an_earlier_session_left(tmp_path):
  runs = planned("lora,fm_lora", seeds=(1, 2), folder=tmp_path)
  for run, name in ((runs[0], "result.json"), (runs[2], "config.json")):
    run.workdir.mkdir(parents=True)
    (run.workdir / name).touch()
  assert comparison.listing(runs, tmp_path) == [
    f"compare    4 runs in {tmp_path}: 1 finished, 1 begun",
    "  lora     1 finished, 2 begun",
    "  fm_lora  1, 2",
  ]


def test_the_listing_says_what_is_missing_once_for_all_runs(tmp_path):
  runs = planned(
    "lora,fm_lora",
    file="image_folder",
    tasks__data_dir=tmp_path / "no",
    weights__tag="micro_letters",
  )
  *_, line = lines = comparison.listing(runs, tmp_path)
  assert len(lines) == 4 and line.startswith(f"missing    config.tasks.data_dir is '{tmp_path}/no'")


def answers(**by_label):
  """Returns a stand-in for a run: what a label has is raised or returned."""

  def run(one):
    if one.config is None:
      raise AssertionError("never started")
    if isinstance(by_label[one.label], BaseException):
      raise by_label[one.label]
    return by_label[one.label] | {"seed": one.seed}

  return run


def test_a_run_that_fails_is_one_line_and_the_others_go_on():
  plan = planned("finetune,lora,lora:rnk=1,fm_lora", seeds=(1, 2))
  notes = []
  run = answers(
    finetune=NonFiniteError("loss is nan"), lora=ConfigError("no\nroom"), fm_lora=result()
  )
  results, problems = comparison.run_all(plan, run, notes.append)
  assert [found["seed"] for found in results] == [1, 2]
  assert problems[:2] == [
    "left out: finetune, seed 1, 2: loss is nan",
    "left out: lora, seed 1, 2: no room",
  ]
  assert problems[2].startswith("left out: lora-rnk=1, seed 1, 2: --config.method.rnk")
  assert notes[:2] == ["\nrun 1 of 8: finetune, seed 1", "left out: loss is nan"]


@pytest.mark.parametrize("error", [KeyError("a bug"), stop.Stopped(15)])
def test_a_bug_and_a_stop_end_the_comparison(error):
  with pytest.raises(type(error)):
    comparison.run_all(planned("lora,fm_lora"), answers(lora=error), print)


def test_the_traceback_of_a_failing_run_can_be_seen():
  failing = answers(lora=NonFiniteError("loss is nan"))
  with pytest.raises(NonFiniteError):
    comparison.run_all(planned("lora"), failing, print, debug=True)


def test_the_time_left_is_that_of_the_method_s_other_seeds_or_of_all(tmp_path):
  plan = planned("lora,fm_lora", seeds=(1, 2), folder=tmp_path)
  took = {("lora", 1): {"wall_seconds": {"total": 10}}}
  assert comparison.duration_left(plan, {}) == ""
  assert comparison.duration_left(plan[1:], took) == ", about 30.0 s left"
  took["fm_lora", 1] = {"wall_seconds": {"total": 20}}
  assert comparison.duration_left(plan[2:], took) == ", about 30.0 s left"
  plan[3].workdir.mkdir(parents=True)
  (plan[3].workdir / "result.json").touch()
  assert comparison.duration_left(plan[2:], took) == ", about 10.0 s left"
  assert comparison.duration_left(plan[3:], took) == ""
  hopeless = dataclasses.replace(plan[2], config=None)
  assert comparison.duration_left([hopeless], took) == ""


def test_a_plot_that_fails_costs_no_table(monkeypatch, tmp_path):
  def fail(*_):
    raise RuntimeError("no font")

  monkeypatch.setattr(plots, "plot_accuracy_over_tasks", fail)
  said = comparison._plotted([result()], tmp_path / "compare.png")
  assert said == "; warning: no plot: RuntimeError: no font"
