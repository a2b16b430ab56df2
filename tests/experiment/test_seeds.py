"""Several seeds in one process: each is the run it would be alone, and little is done twice."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from fmlora_jax import config, methods, tasks
from fmlora_jax.cli import config_files
from fmlora_jax.experiment import seeds, setup
from fmlora_jax.experiment.run import run
from fmlora_jax.report import runs, tables
from fmlora_jax.train import loop
from fmlora_jax.train.step import TrainPrograms
from fmlora_jax.workdir import checkpoint

pytestmark = pytest.mark.usefixtures("tiny_vit")  # what runs load, whatever they name

SMALL = {
  "epochs": 1,
  "batch_size": 64,
  "compute_dtype": "float32",
  "tasks": {"num_tasks": 2},
  "weights": {"tag": "random"},
  "input": {"augmentation": "mild", "steps_per_dispatch": 3},
  "bases": {"max_rank": 4},
  "drs": {"strategy": "fixed", "rank": 2},
  "prompt": {"num_tokens": 2},
}
SAME = ("params_sha256", "accuracy", "ranks", "interference", "class_order", "config", "params")


def small(*chosen, method="fm_lora", **changes) -> config.Config:
  values = config_files.merged(SMALL, {"method": {"name": method}, "seeds": chosen} | changes)
  return methods.build_config(values)


def alone(settings, seed):
  return dataclasses.replace(settings, seeds=(), seed=seed)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
  """(config, workdir, results, the programs that were made, what was decoded) of two seeds."""
  made, decoded, init, make = [], [], TrainPrograms.__init__, tasks.make

  def recorded_init(self, *args):
    made.append(self)
    init(self, *args)

  def recorded_make(*args, source, **kwargs):
    sequence = make(*args, source=source, **kwargs)
    if source is not None:
      return sequence
    decode = sequence.source.decode

    def noted(rows):
      decoded.extend(rows.tolist())
      return decode(rows)

    return dataclasses.replace(sequence, source=dataclasses.replace(sequence.source, decode=noted))

  settings, workdir = small(3, 4), tmp_path_factory.mktemp("seeds") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(TrainPrograms, "__init__", recorded_init)
    patch.setattr(tasks, "make", recorded_make)
    results = seeds.run_each(settings, workdir)
  return settings, workdir, results, made, decoded


@pytest.mark.parametrize("index", [0, 1])
def test_each_seed_is_the_run_that_it_would_be_alone(together, tmp_path, index):
  settings, workdir, results, *_ = together
  seed = settings.seeds[index]
  expected = run(alone(settings, seed), tmp_path / "run")
  for name in SAME:
    assert results[index].get(name) == expected.get(name), name
  files = ("config.json", "task_file.json", "metrics.jsonl")
  for file in files:
    own = (workdir / str(seed) / file).read_text()
    assert own == (tmp_path / "run" / file).read_text(), file
  assert results[0]["params_sha256"] != results[1]["params_sha256"]


def test_the_second_seed_compiles_no_step_and_decodes_no_image_again(together):
  _, _, _, made, decoded = together
  assert [programs.num_compiled for programs in made] == [2]  # of task 1 and of task 2
  assert len(decoded) == len(set(decoded))


def test_a_single_run_goes_on_in_the_folder_of_its_seed(together, monkeypatch):
  settings, workdir, results, *_ = together
  monkeypatch.setattr(loop.Trainer, "train", None)
  assert run(alone(settings, 4), workdir / "4")["params_sha256"] == results[1]["params_sha256"]


def test_the_summary_has_every_seed_and_mean_and_std(together):
  settings, workdir, results, *_ = together
  summary = json.loads((workdir / "seeds.json").read_text())
  assert summary["seeds"] == list(settings.seeds)
  scores = [result["acc"] for result in results]
  assert summary["acc"]["by_seed"] == dict(zip(("3", "4"), scores, strict=True))
  assert summary["acc"]["mean"] == pytest.approx(np.mean(scores))
  assert summary["acc"]["std"] == pytest.approx(np.std(scores, ddof=1))
  assert summary["fwt"] == {"mean": None, "std": None, "by_seed": {"3": None, "4": None}}
  assert seeds.summary(results[:1])["acc"]["std"] is None


def test_reports_read_the_folder_as_one_row(together):
  _, workdir, *_ = together
  found, notes = runs.load([workdir])
  ((label, group),) = next(iter(runs.group(found).values())).items()
  assert (label, len(group), notes) == ("fm_lora", 2, [])
  assert "| fm_lora | 2 |" in tables.markdown(found)


def test_what_was_killed_in_the_second_seed_goes_on_there(tmp_path, monkeypatch, capsys):
  settings = small(3, 4, method="linear_probe")
  saved, save = [], checkpoint.CheckpointStore.save

  def save_and_die(self, *args, **kwargs):
    save(self, *args, **kwargs)
    saved.append(args[0])
    if len(saved) == 3:  # each seed saves at the end of each of two tasks
      raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(checkpoint.CheckpointStore, "save", save_and_die)
    seeds.run_each(settings, tmp_path)
  assert not (tmp_path / "seeds.json").exists()
  learned, train = [], loop.Trainer.train

  def recorded(self, state, variables, view):
    learned.append((self.config.seed, view.index))
    return train(self, state, variables, view)

  monkeypatch.setattr(loop.Trainer, "train", recorded)
  results = seeds.run_each(settings, tmp_path)
  assert learned == [(4, 1)]
  assert [result["seed"] for result in results] == [3, 4]
  shown = capsys.readouterr().out
  assert "seed 3, 1 of 2 (finished)" in shown and "resumed after task 1 of 2" in shown
  assert (tmp_path / "seeds.json").exists()


def test_the_folder_of_a_single_run_is_refused(tmp_path):
  (tmp_path / "config.json").touch()
  with pytest.raises(config.ConfigError, match=r"config.seeds is \(3, 4\): --workdir must be a fo"):
    seeds.run_each(small(3, 4), tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_cache_shares_what_the_config_allows():
  settings = alone(small(), 3)
  cache = setup.SetupCache()
  first, other_seed, other_method = (
    cache.setup(changed)
    for changed in (settings, alone(settings, 4), alone(small(method="linear_probe"), 3))
  )
  assert first.method is other_seed.method and first.programs is other_seed.programs
  assert first.method is not other_method.method
  for other in (other_seed, other_method):
    shared = zip(jax.tree.leaves(first.weights), jax.tree.leaves(other.weights), strict=True)
    assert all(one is same for one, same in shared)
  assert first.sequence.source is other_method.sequence.source
  assert first.sequence.class_order == other_method.sequence.class_order
  assert first.sequence.class_order != other_seed.sequence.class_order
  assert (first.config.seed, other_seed.config.seed) == (3, 4)
  assert (first.root != other_seed.root).all()
