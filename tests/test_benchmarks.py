"""The configs of the paper's benchmarks, end to end on small data that TFDS's builders wrote."""

import dataclasses
import importlib.util
import pathlib

import fakes
import pytest

from fmlora_jax import config
from fmlora_jax.run import run

ROOT = pathlib.Path(__file__).parents[1]
TINY = {
  "epochs": 1,
  "batch_size": 16,
  "eval_batch_size": 16,
  "compute_dtype": "float32",
  "weights": {"tag": "random", "architecture": "micro", "depth": 1},
  "input": {"image_size": 16, "source_size": 20},
  "bases": {"max_rank": 4},
  "drs": {"strategy": "fixed", "rank": 2},
  "prompt": {"num_tokens": 2},
}


def settings(name: str, variant: str | None, data_dir) -> config.Config:
  """Returns what configs/<name>.py says, on the data in `data_dir` and with a tiny ViT."""
  spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  values = module.get_config(variant)
  values.update(TINY)
  values.tasks.data_dir = str(data_dir)
  return config.build(config.Config, values.to_dict())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  root = tmp_path_factory.mktemp("tfds")
  for write in (fakes.imagenet_r, fakes.cifar100, fakes.caltech_birds2011, fakes.domainnet):
    write(root)
  return root


@pytest.mark.parametrize(
  ("name", "variant", "num_tasks", "split_id"),
  [
    ("imagenet_r", "tasks=5,split=slice80", 5, "imagenet_r/slice80"),
    ("imagenet_r", "method=linear_probe", 10, "imagenet_r/slice"),
    ("cifar100", "method=linear_probe", 10, "cifar100/official"),
    ("cub200", "method=linear_probe", 10, "cub200/paper"),
    ("domainnet", "method=linear_probe", 5, "domainnet/official"),
    ("domainnet_dil", "method=linear_probe", 6, "domainnet/official"),
  ],
)
def test_a_config_runs_end_to_end(prepared, tmp_path, name, variant, num_tasks, split_id):
  result = run(settings(name, variant, prepared), tmp_path)
  assert result["finished"]
  assert result["split_id"] == split_id
  assert len(result["accuracy"]) == num_tasks
  assert result["normalisation"] == "zero_one"
  assert result["n_test"] == [n for n in result["n_test"] if n > 0]
  if name == "domainnet_dil":
    assert result["scenario"] == "dil"
    assert result["task_names"][:2] == ["clipart", "infograph"]


def test_without_validation_images_no_rank_is_selected(prepared, tmp_path):
  chosen = settings("imagenet_r", "split=slice80", prepared)
  chosen = dataclasses.replace(chosen, drs=config.DrsConfig(candidate_ranks=(2, 4)))
  with pytest.raises(config.ConfigError, match=r"no validation images: .*drs.strategy=fixed"):
    run(chosen, tmp_path)
