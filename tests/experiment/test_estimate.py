"""The estimate of a run: its numbers are those of the run, and nothing is trained for it."""

import dataclasses

import jax
import pytest
from rich.console import Console

from fmlora_jax import config, methods, tasks
from fmlora_jax.cli import config_files
from fmlora_jax.distributed import memory
from fmlora_jax.experiment import costs, setup
from fmlora_jax.experiment import estimate as dry_run
from fmlora_jax.experiment.run import run
from fmlora_jax.train import loop

pytestmark = pytest.mark.usefixtures("tiny_vit")  # what runs load, whatever they name

SMALL = {
  "epochs": 1,
  "batch_size": 64,
  "eval_batch_size": 128,
  "compute_dtype": "float32",
  "tasks": {"num_tasks": 5},
  "weights": {"tag": "random"},
  "input": {"augmentation": "mild", "steps_per_dispatch": 2},
  "bases": {"max_rank": 4},
  "drs": {"candidate_ranks": (1, 2)},
  "prompt": {"num_tokens": 2},
}


def small(method="fm_lora", **changes) -> config.Config:
  values = config_files.merged(SMALL, {"method": {"name": method}} | changes)
  return methods.build_config(values)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  """The estimate for fm_lora; no image is decoded, no step is trained on one, no file written."""
  make = tasks.make

  def blind(*args, **kwargs):
    sequence = make(*args, **kwargs)
    return dataclasses.replace(
      sequence, source=dataclasses.replace(sequence.source, decode=lambda rows: 1 / 0)
    )

  workdir = tmp_path_factory.mktemp("empty")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tasks, "make", blind)
    patch.setattr(loop.Trainer, "train", None)
    patch.chdir(workdir)
    estimate = dry_run.estimate(small())
  assert not list(workdir.iterdir())
  return estimate


def test_tasks_that_run_one_program_are_one_stage(found):
  assert [(stage.first, stage.last) for stage in found.stages] == [(0, 0), (1, 4)]
  for cost in (*(stage.step for stage in found.stages), found.test):
    assert cost.seconds > 0 and min(cost.bytes.values()) > 0
  first, later = (stage.step for stage in found.stages)
  assert first.bytes["state"] > later.bytes["state"]  # bases with moments of AdamW
  assert first.flops_as_written > later.flops_as_written > found.test.flops_as_written
  assert found.test.flops_as_written > found.forward_flops  # two prompt tokens


def test_parameters_are_those_of_a_run_with_the_largest_rank(found, tmp_path):
  settled = dry_run.settle(small())
  assert (settled.method.drs.strategy, settled.method.drs.rank) == ("fixed", 2)
  result = run(settled, tmp_path / "run")
  assert found.stages[-1].trained == result["params"]["trained"]
  assert found.stored["per_task"] == result["params"]["stored_per_task"]
  assert len(found.stored["per_task"]) == 5


def test_the_time_is_that_of_all_steps_tests_and_passes_between(found):
  made = setup.SetupCache().setup(dry_run.settle(small())).trainer
  steps = [made.steps_per_epoch(i) for i in range(5)]
  first, later = (stage.step.seconds for stage in found.stages)
  assert found.seconds["train"] == pytest.approx(steps[0] * first + sum(steps[1:]) * later)
  batches = found.seconds["eval"] / found.test.seconds  # of about 72 images a task: 1 2 2 3 3
  assert batches == pytest.approx(11)
  assert found.seconds["between tasks"] == 0


def test_the_estimate_is_shown_with_what_it_leaves_open(found, capsys):
  dry_run.show(found, Console())
  shown = capsys.readouterr().out
  assert "\ntask 1 " in shown and "\ntask 2 to 5 " in shown and "\ntest " in shown
  trained = f"{found.stages[-1].trained:,}"
  assert trained in shown
  assert f"batch      {found.largest_task} fits, the whole of a task; config.batch_size" in shown
  assert "caveat     ranks are selected task by task: all have 2 here" in shown
  several = dataclasses.replace(found, config=dataclasses.replace(found.config, seeds=(1, 2, 3)))
  assert "for 3 seeds; each (train" in dry_run.lines(several)[3]


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_the_program_of_the_estimate_is_the_run_s(mode):
  settings = small("linear_probe", input={"mode": mode})
  made = setup.SetupCache().setup(settings)
  variables = made.method.init(made.root, made.weights)
  view = made.views.view(0)
  variables, _ = made.method.begin_task(variables, view)
  cost = costs.measure_train_step(made, variables, 0, limit=2**40)
  assert cost.compile_seconds > 0 and cost.seconds > 0
  lowered = []
  multi_step = made.programs.multi_step(made.method.rules(0))

  def recorded(*arguments):
    lowered.append(multi_step.lower(*arguments))
    return multi_step(*arguments)

  made.programs.multi_step = lambda rules: recorded
  for _ in made.trainer.train(made.trainer.init(variables, 0), variables, view):
    pass
  temp = lowered[0].compile().memory_analysis().temp_size_in_bytes
  assert temp == cost.bytes["temp"]
  state = made.trainer.init(variables, 0)
  held = sum(leaf.nbytes for leaf in jax.tree.leaves((state, variables)))
  assert cost.bytes["state"] == held


def test_what_does_not_fit_is_not_run_and_no_batch_is_promised(monkeypatch):
  monkeypatch.setattr(memory, "device_memory", lambda: 1000)
  found = dry_run.estimate(small("linear_probe", tasks={"num_tasks": 1}))
  assert found.seconds is None and found.largest_batch is None
  assert [stage.step.seconds for stage in found.stages] == [None]
  batch, time = dry_run.lines(found)[1], dry_run.lines(found)[3]
  assert batch == "batch      none was found that fits; config.batch_size is 64"
  assert time == "time       unknown: what does not fit was not run"


@pytest.mark.parametrize(
  ("known", "limit", "most", "multiple", "expected"),
  [
    (32, 1000 + 10 * 100, 10_000, 1, 100),  # on the line
    (32, 1000 + 10 * 107, 10_000, 8, 104),
    (256, 1000 + 10 * 100, 10_000, 4, 100),  # the run's own does not fit
    (32, 10**9, 250, 8, 256),  # a whole task
    (250, 10**9, 250, 1, 250),
    (32, 1005, 10_000, 8, None),
  ],
)
def test_the_largest_batch_is_found_with_few_programs(known, limit, most, multiple, expected):
  asked = []

  def needed(size):
    asked.append(size)
    return 1000 + 10 * size

  found = dry_run.largest_batch(
    needed, (known, 1000 + 10 * known), limit=limit, most=most, multiple=multiple
  )
  assert found == expected
  assert len(asked) <= dry_run.TRIES


def test_a_largest_batch_fits_where_memory_is_no_line():
  def needed(size):
    return 1000 + 10 * size + size**2 // 200

  found = dry_run.largest_batch(needed, (32, needed(32)), limit=20_000, most=10_000, multiple=8)
  assert needed(found) <= 20_000 < needed(round(1.25 * found))
