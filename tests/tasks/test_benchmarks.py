"""The configs of the paper's benchmarks, end to end on small data that TFDS's builders wrote."""

import dataclasses
import importlib.util
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import pytest
from made_up import comparable

from fmlora_jax import config, methods, tasks
from fmlora_jax.experiment.run import run
from fmlora_jax.input import augment
from fmlora_jax.models import vit
from fmlora_jax.models.weights import registry
from fmlora_jax.report import paper

ROOT = pathlib.Path(__file__).parents[2]
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
SMALL = {  # the same sizes, with the paper's schedule
  key: TINY[key] for key in ("compute_dtype", "weights", "input", "bases")
}


def settings(name: str, variant: str | None, data_dir, changes=TINY) -> config.Config:
  """Returns what configs/<name>.py says, on the data in `data_dir` and with a tiny ViT."""
  spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  values = module.get_config(variant)
  values.update(changes)
  values.tasks.data_dir = str(data_dir)
  return methods.build_config(values.to_dict())


@pytest.mark.parametrize(
  ("name", "variant", "num_tasks", "split_id"),
  [
    ("imagenet_r", "tasks=5,split=slice80", 5, "imagenet_r/slice80"),
    pytest.param(
      *("cifar100", "method=linear_probe", 10, "cifar100/official"),
      marks=pytest.mark.tier(2),  # imagenet_r has classes by task too
    ),
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


@pytest.mark.parametrize(
  ("name", "variant", "num_tasks", "split_id"),
  [
    ("imagenet_r", "method=linear_probe", 10, "imagenet_r/slice"),
    ("imagenet_r", "method=inflora,tasks=5,recipe=official", 5, "imagenet_r/slice80"),
    ("cifar100", "method=sd_lora,recipe=official", 10, "cifar100/full"),
    ("cub200", "method=linear_probe", 10, "cub200/paper"),
    ("domainnet", "method=linear_probe", 5, "domainnet/official"),
  ],
)
def test_a_config_makes_its_tasks_and_its_method(prepared, name, variant, num_tasks, split_id):
  chosen = settings(name, variant, prepared)
  made = tasks.make(chosen.tasks, seed=chosen.seed, source_size=chosen.input.source_size)
  assert made.split_id == split_id and len(made.tasks) == num_tasks
  pixels, _ = made.source.decode(made.tasks[0].train[:2])
  assert pixels.any()
  augment.check(chosen.input.augmentation, chosen.input.normalisation)
  sizes = registry.check(chosen.weights, chosen.input.image_size)
  backbone = vit.make_vit(sizes, jnp.dtype(chosen.compute_dtype))
  method = methods.make_method(chosen, backbone, made.spec)
  variables = jax.eval_shape(method.init, jax.random.key(0), backbone.init(jax.random.key(1)))
  assert jax.tree.leaves(variables)


def test_without_validation_images_no_rank_is_selected(prepared, tmp_path):
  chosen = settings("imagenet_r", "split=slice80", prepared)
  drs = dataclasses.replace(chosen.method.drs, strategy="gumbel", candidate_ranks=(2, 4))
  chosen = dataclasses.replace(chosen, method=dataclasses.replace(chosen.method, drs=drs))
  with pytest.raises(config.ConfigError, match="images: set config.tasks.split=slice or c"):
    run(chosen, tmp_path)
  drs = dataclasses.replace(drs, ranks=(4, 2, 1, 4, 2, 1, 4, 2, 1, 4))
  chosen = dataclasses.replace(chosen, method=dataclasses.replace(chosen.method, drs=drs))
  made = tasks.make(chosen.tasks, seed=1993, source_size=20)
  backbone = vit.make_vit(registry.check(chosen.weights, 16), jnp.float32)
  assert methods.make_method(chosen, backbone, made.spec).settings.drs.ranks == drs.ranks


@pytest.mark.parametrize("table", ["imagenet_r", "cifar100", "cub200", "domainnet"])
def test_the_config_of_a_paper_benchmark_fills_the_cell_of_fm_lora(prepared, table):
  """The split, the order, the pixels and the schedule are the cell's; the weights are named."""
  chosen = settings(table, None, prepared, changes={"drs": {"candidate_ranks": (2, 4)}} | SMALL)
  made = tasks.make(chosen.tasks, seed=chosen.seed, source_size=chosen.input.source_size)
  backbone = vit.make_vit(registry.check(chosen.weights, chosen.input.image_size), jnp.float32)
  methods.make_method(chosen, backbone, made.spec)  # it has the images to select ranks with
  found = comparable(
    tasks=len(made.tasks),
    benchmark=table,
    split_id=made.split_id,
    epochs=chosen.epochs,
    batch_size=chosen.batch_size,
    augmentation=chosen.input.augmentation,
    normalisation=chosen.input.normalisation,
    weights={"tag": config.WeightsConfig().tag, "sha256": "5f3c" * 16},
  )
  found["config"] = json.loads(json.dumps(dataclasses.asdict(chosen)))
  found["config"]["weights"]["depth"] = found["config"]["input"]["image_size"] = None
  lines = [line for s in paper.compare([found]).sections for line in s.lines if line.runs]
  ours = {flag for line in lines for flag in line.flags} - paper.tables()["flags"].keys()
  assert lines and not ours


REAL = os.environ.get("FMLORA_DATA_DIR")  # prepared from the published archives
SIZES = {  # imagenet_r/slice, class order of seed 1993
  5: {
    "train": [4727, 4072, 4222, 4302, 3677],
    "val": [642, 585, 603, 642, 528],
    "test": [1318, 1156, 1162, 1294, 1070],
  },
  10: {
    "train": [2477, 2250, 2065, 2007, 1884, 2338, 1861, 2441, 1707, 1970],
    "val": [354, 288, 289, 296, 257, 346, 280, 362, 241, 287],
    "test": [662, 656, 595, 561, 521, 641, 552, 742, 478, 592],
  },
  20: {
    "test": [
      *(306, 356, 339, 317, 272, 323, 285, 276, 331, 190),
      *(310, 331, 254, 298, 371, 371, 237, 241, 322, 270),
    ]
  },
}


@pytest.mark.skipif(REAL is None, reason="FMLORA_DATA_DIR names no folder with the published data")
@pytest.mark.parametrize("num_tasks", SIZES)
def test_the_published_imagenet_r_has_the_splits_it_always_had(num_tasks):
  chosen = config.TasksConfig(benchmark="imagenet_r", num_tasks=num_tasks, data_dir=REAL)
  made = tasks.make(chosen, seed=1993, source_size=1)
  for split, sizes in SIZES[num_tasks].items():
    assert [len(getattr(task, split)) for task in made.tasks] == sizes
