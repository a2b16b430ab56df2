"""Whole runs on a few digits: resumed equals uninterrupted, and what a workdir refuses."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from fmlora_jax import checkpoint, config, writer
from fmlora_jax.run import run
from fmlora_jax.train.loop import NonFiniteError, Trainer

SMALL = {
  "epochs": 1,
  "batch_size": 32,
  "compute_dtype": "float32",
  "weights": {"tag": "random", "architecture": "micro"},
  "input": {
    "image_size": 16,
    "normalisation": "half",
    "augmentation": "mild",
    "steps_per_dispatch": 4,
  },
  "bases": {"max_rank": 4},
  "drs": {"strategy": "fixed", "rank": 2},
  "prompt": {"num_tokens": 2},
  "checkpoint": {"every_steps": 3},
}


def small(method="fm_lora", **changes) -> config.Config:
  return config.build(config.Config, SMALL | {"method": {"name": method}} | changes)


def lines(workdir: pathlib.Path) -> list[str]:
  return (workdir / "metrics.jsonl").read_text().splitlines()


@pytest.fixture(scope="module", params=["fm_lora", "lora"])
def finished(request, tmp_path_factory):
  """(config, workdir, result) of a run that nothing stopped."""
  settings = small(request.param)
  workdir = tmp_path_factory.mktemp(request.param) / "run"
  return settings, workdir, run(settings, workdir)


@pytest.mark.parametrize("saves", [1, 3, 5, 8])
def test_a_run_that_is_stopped_and_resumed_ends_bit_equal(finished, tmp_path, monkeypatch, saves):
  settings, whole, expected = finished
  workdir = tmp_path / "run"
  left = [saves]

  class Killed(BaseException):
    pass

  save = checkpoint.Store.save

  def save_then_die(self, *args, **kwargs):
    save(self, *args, **kwargs)
    left[0] -= 1
    if not left[0]:
      raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Store, "save", save_then_die)
    with pytest.raises(Killed):
      run(settings, workdir)
  result = run(settings, workdir)
  for name in ("params_sha256", "accuracy", "acc", "aaa", "ranks", "interference"):
    assert result[name] == expected[name], name
  assert lines(workdir) == lines(whole)


def test_a_finished_run_gives_its_result_again_and_trains_nothing(finished, monkeypatch):
  settings, workdir, expected = finished

  def refuse(*args):
    raise AssertionError("trained again")

  monkeypatch.setattr(Trainer, "train", refuse)
  assert run(settings, workdir)["params_sha256"] == expected["params_sha256"]


def test_another_config_is_refused_with_the_difference(finished):
  settings, workdir, _ = finished
  before = sorted(p.name for p in workdir.iterdir())
  with pytest.raises(config.ConfigError, match=r"config\.epochs: 1 there, 2 now"):
    run(dataclasses.replace(settings, epochs=2), workdir)
  assert sorted(p.name for p in workdir.iterdir()) == before


def test_settings_that_change_no_number_may_change(finished):
  settings, workdir, expected = finished
  free = dataclasses.replace(settings, eval_batch_size=64)
  assert run(free, workdir)["acc"] == expected["acc"]


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
  (tmp_path / "thesis.txt").write_text("precious")
  with pytest.raises(config.ConfigError, match=r"holds thesis\.txt but no config\.json"):
    run(small(), tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_result_has_every_field_and_is_the_one_on_disk(finished):
  _, workdir, result = finished
  assert set(writer.FIELDS) <= set(result)
  on_disk = json.loads((workdir / "result.json").read_text())
  assert on_disk["acc"] == result["acc"] and on_disk["finished"] is True
  assert on_disk["weights"] == {"tag": "random", "sha256": None}
  assert (workdir / "plots" / "accuracy_matrix.png").stat().st_size > 1000


def test_a_loss_that_is_not_finite_stops_with_task_and_step(tmp_path):
  settings = small(optim={"learning_rate": 1e30})
  with pytest.raises(NonFiniteError, match=r"task 1 of 5, step \d+: must be finite"):
    run(settings, tmp_path / "run")


def test_domains_come_one_by_one_and_transfer_forward_is_measured(tmp_path):
  tasks = {"benchmark": "digits_dil", "scenario": "dil", "num_tasks": 2}
  result = run(small("linear_probe", tasks=tasks), tmp_path / "run")
  assert result["fwt"] is not None and result["n_test"][0] == result["n_test"][1]


def test_the_task_is_known_at_test_time_in_til_only(tmp_path):
  cil = run(small("linear_probe"), tmp_path / "cil")
  til = run(small("linear_probe", tasks={"scenario": "til"}), tmp_path / "til")
  assert til["params_sha256"] == cil["params_sha256"]
  assert til["acc"] > cil["acc"]


def test_eight_devices_give_the_accuracies_of_one(finished, tmp_path):
  settings, _, expected = finished
  script = (
    "import sys, json, pathlib; from fmlora_jax import config; from fmlora_jax.run import run;"
    "settings = config.build(config.Config, json.loads(sys.argv[1]));"
    "result = run(settings, pathlib.Path(sys.argv[2]));"
    "assert result['devices'][0].startswith('8 x'), result['devices']"
  )
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
  values = json.dumps(SMALL | {"method": {"name": settings.method.name}})
  done = subprocess.run(
    [sys.executable, "-c", script, values, str(tmp_path / "run")],
    env=os.environ | {"XLA_FLAGS": flags},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  assert result["accuracy"] == expected["accuracy"]
