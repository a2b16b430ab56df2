"""Every key of the config does something: what a run is made of changes with it."""

import dataclasses
import hashlib
import sys
import typing
from typing import Any, Literal

import numpy as np
import pytest
from cases import ALL
from PIL import Image

from fmlora_jax import config, methods, tasks
from fmlora_jax.cli import config_files
from fmlora_jax.experiment import seeds
from fmlora_jax.experiment.provenance import params_sha256
from fmlora_jax.models.weights import registry
from fmlora_jax.tasks import task_file

pytestmark = pytest.mark.tier(2)

TWO = ((0, 2), (2, 4))
SGD, STEPS = {"name": "sgd"}, {"schedule": "steps", "milestones": (1,)}
GUMBEL = {"drs": {"strategy": "gumbel"}}
ALIGNED = {"head": {"alignment": {"epochs": 2}}}
LEARNED = {  # key that learning depends on -> (settings in which it does, another value)
  "seed": ({}, 7),
  "epochs": ({}, 3),
  "batch_size": ({}, 8),
  "compute_dtype": ({}, "bfloat16"),
  "method.name": ({}, "lora"),
  "input.augmentation": ({}, "none"),
  "optim.name": ({}, "adam"),
  "optim.momentum": ({"optim": SGD}, 0.5),
  "optim.learning_rate": ({}, 0.01),
  "optim.weight_decay": ({}, 0.1),
  "optim.head_learning_rate": ({}, 0.005),
  "optim.head_weight_decay": ({}, 0.3),
  "optim.schedule": ({}, "constant"),
  "optim.milestones": ({"epochs": 3, "optim": STEPS}, (2,)),
  "optim.decay": ({"optim": STEPS}, 0.5),
  "optim.final_learning_rate": ({"epochs": 3, "optim": {"schedule": "timm_cosine"}}, 0.005),
  "optim.later_lr_scale": ({}, 0.5),
  "optim.later_head_lr_scale": ({}, 0.5),
  "optim.clip_norm": ({}, 0.1),
  "bases.max_rank": ({}, 5),
  "bases.orthonormalise": ({}, "none"),
  "bases.targets": ({}, ("query",)),
  "bases.init": ({}, "gradient"),
  "bases.zero": ({}, "b"),
  "bases.lr_scale": ({}, 0.5),
  "bases.b_lr_scale": ({}, 3.0),
  "bases.columns": ({}, "free"),
  "method.core.first_lr_scale": ({}, 0.5),
  "method.core.lr_scale": ({}, 0.5),
  "method.core.alpha": ({}, 5.0),
  "drs.strategy": ({}, "gumbel"),
  "drs.candidate_ranks": (GUMBEL, (1, 3)),
  "drs.rank": ({}, 3),
  "drs.weight": (GUMBEL, 5000.0),
  "drs.reference": (GUMBEL, 50.0),
  "drs.deviations": (GUMBEL | {"drs": {"strategy": "gumbel", "weight": 0.0}}, 500.0),
  "drs.ranks": ({}, (4, 1)),
  "drs.tau": (GUMBEL, 30.0),
  "drs.tolerance": ({"drs": {"strategy": "validation", "tolerance": 0.0}}, 9.0),
  "drs.epochs": (GUMBEL, 3),
  "drs.selector_steps": (GUMBEL, 3),
  "drs.selector_learning_rate": (GUMBEL, 1e-4),
  "prompt.num_tokens": ({}, 2),
  "prompt.first_lr_scale": ({}, 0.1),
  "prompt.lr_scale": ({}, 0.1),
  "head.kind": ({}, "cosine"),
  "head.start": ({}, "class_mean"),
  "head.alignment.epochs": ({}, 2),
  "head.alignment.batch_size": (ALIGNED, 7),
  "head.alignment.learning_rate": (ALIGNED, 0.05),
  "head.alignment.momentum": (ALIGNED, 0.5),
  "head.num_centroids": (ALIGNED, 2),
  "head.loss": ({}, "seen"),
  "head.drift": (ALIGNED, "sdc"),
  "head.drift_bandwidth": (config_files.merged(ALIGNED, {"head": {"drift": "sdc"}}), 0.1),
  "head.drift_ridge": (config_files.merged(ALIGNED, {"head": {"drift": "linear"}}), 2.0),
}
OF_TASKS = {  # the same of keys that the sequence of tasks depends on
  "benchmark": ({}, "digits_dil"),
  "scenario": ({"benchmark": "digits_dil", "num_tasks": 2}, "dil"),
  "num_tasks": ({}, 2),
  "order_seed": ({}, 3),
  "order": ({}, "natural"),
  "data_dir": ({"benchmark": "image_folder", "data_dir": "FOLDER", "num_tasks": 2}, "OTHER"),
  "split": ({"benchmark": "cifar100", "data_dir": "PREPARED"}, "paper"),
  "domains": ({"benchmark": "domainnet", "data_dir": "PREPARED"}, ("real",)),
  "task_file": ({}, "TASK_FILE"),
  "val_fraction": ({}, 0.3),
  "test_fraction": ({}, 0.4),
  "test_from": ({"benchmark": "image_folder", "data_dir": "VAL", "num_tasks": 2}, "val"),
  "split_seed": ({}, 1),
  "broken_files": ({"benchmark": "image_folder", "data_dir": "BROKEN", "num_tasks": 2}, "skip"),
  "copies": ({"benchmark": "image_folder", "data_dir": "COPIES", "num_tasks": 2}, "refuse"),
  "max_pixels": ({"benchmark": "image_folder", "data_dir": "FOLDER", "num_tasks": 2}, 10),
}
OF_WEIGHTS = {
  "tag": ({}, "random"),
  "path": ({}, "/no/such/file"),
  "depth": ({}, 2),
  "architecture": ({"tag": "random", "architecture": "micro", "depth": 1}, "vit_ti16"),
  "gelu": ({}, "tanh"),
  "epsilon": ({}, 1e-3),
}
OF_PROGRAMS = (  # of how a run goes on, not of its numbers: they are read outside of config.py
  "eval_batch_size",
  "seeds",
  "checkpoint.every_steps",
  "checkpoint.on_damage",
  "input.image_size",
  "input.mode",
  "input.normalisation",
  "input.source_size",
  "input.steps_per_dispatch",
  "input.workers",
  "mesh.fsdp",
  "tasks.evaluate_on",
)
OF_METHODS = {  # settings in which a key of a method shows, and other values, where not the usual
  "adapter.dropout": ({"kind": "adaptformer"}, 0.7),
  "adapter.train_norms": ({"kind": "houlsby"}, True),
  "coda_prompt.length": ({}, 6),
  "coda_prompt.pool_size": ({}, 12),  # a multiple of the two tasks
  "dualprompt.pull": ({}, 0.0),  # Adam does not see the size of a gradient
  "dualprompt.general_layers": ({}, (2,)),
  "dualprompt.expert_layers": ({}, (2,)),
  "inflora.threshold": ({}, 0.5),
  "inflora.final_threshold": ({"threshold": 0.5, "final_threshold": 0.5}, 1.0),
  "inflora.retain": ({"threshold": 0.999999}, False),  # more than half is spanned
}


def leaves(cls: type, path: str = "") -> dict[str, Any]:
  """Returns the type of each key below a config class, by path; a method's own are not there."""
  found = {}
  for name, hint in typing.get_type_hints(cls).items():
    if dataclasses.is_dataclass(hint) and hint is not config.MethodConfig:
      found |= leaves(hint, f"{path}{name}.")
    else:
      found[f"{path}{name}" + (".name" if hint is config.MethodConfig else "")] = hint
  return found


@pytest.mark.tier(1)
def test_every_key_is_in_one_table():
  named = {*map(config.moved_field, LEARNED), *OF_PROGRAMS}
  named |= {f"tasks.{key}" for key in OF_TASKS} | {f"weights.{key}" for key in OF_WEIGHTS}
  ours = {f"method.{key}" for key in leaves(methods.config_class("fm_lora"))}
  assert named == leaves(config.Config).keys() | ours


def nested(path: str, value: Any) -> dict:
  for name in reversed(path.split(".")):
    value = {name: value}
  return value


@pytest.fixture(scope="module")
def learned(make_lab):
  """Returns the hash of all that two tasks leave behind under some settings, made once for each."""
  known = {}

  def hash_of(changes):
    key = repr(sorted(changes.items()))
    if key not in known:
      made = make_lab("cil", TWO, **changes)
      made.learn()
      facts = repr([stage.facts for stage in made.stages])
      images = np.concatenate([made.images(12, "test", task) for task in range(len(TWO))])
      logits = np.asarray(made.predictions(made.variables, images))
      known[key] = params_sha256(made.variables), facts, logits.tobytes()
    return known[key]

  return hash_of


def dead_of(learned, table: dict[str, tuple[dict, dict]]) -> list[str]:
  """Returns the keys of {key: (settings, other settings)} whose change changes nothing."""
  return [key for key, (base, other) in table.items() if learned(base) == learned(other)]


def test_no_key_that_learning_depends_on_is_dead(learned):
  table = {
    key: (base, config_files.merged(base, nested(key, value)))
    for key, (base, value) in LEARNED.items()
  }
  dead = dead_of(learned, table)
  print(f"{len(dead)} dead of {len(table)} keys that all methods share {dead}")
  assert not dead


def other_value(value: Any, hint: Any) -> Any:
  """Returns another value of the type that is likely to be allowed."""
  options = typing.get_args(hint)
  if typing.get_origin(hint) is Literal:
    return next(option for option in options if option != value)
  if isinstance(value, bool):
    return not value
  if isinstance(value, int):
    return value + 1
  if isinstance(value, float):
    return value / 2 or 0.05
  if isinstance(value, tuple):
    return value[:-1] if len(value) > 1 else (*value, 1 - value[0])
  raise TypeError(f"no other value than {value!r} is known for {hint}")


@pytest.mark.parametrize("name", sorted({*methods.names()} - {"fm_lora"}))  # it is in LEARNED
def test_no_key_of_a_method_is_dead(learned, name):
  settings = next(case.changes for case in ALL if case.name == name)
  cls, table = methods.config_class(name), {}
  base = {"method": {"name": name} | settings, "weights": {"depth": 3}}
  for key, hint in leaves(cls).items():
    if key == "name":
      continue
    extra, value = OF_METHODS.get(f"{name}.{key}", ({}, None))
    settled = config_files.merged(base, {"method": extra})
    if value is None:
      now = config.build(cls, settled["method"])
      for part in key.split("."):
        now = getattr(now, part)
      value = other_value(now, hint)
    table[key] = settled, config_files.merged(settled, {"method": nested(key, value)})
  dead = dead_of(learned, table)
  print(f"{len(dead)} dead of {len(table)} keys of {name} {dead}")
  assert not dead


@pytest.fixture
def places(tmp_path, prepared):
  """What paths in the tables stand for."""
  for folder, seed in (("FOLDER", 0), ("OTHER", 1), ("BROKEN", 2), ("COPIES", 3), ("VAL", 4)):
    rng = np.random.default_rng(seed)
    for split in ("train", "val" if folder == "VAL" else "test"):
      for label in ("ant", "bee"):
        place = tmp_path / folder / split / label
        place.mkdir(parents=True)
        for i in range(4):
          pixels = rng.integers(0, 256, (12, 12, 3), np.uint8)
          Image.fromarray(pixels).save(place / f"{i}.png")
  (tmp_path / "BROKEN" / "train" / "ant" / "0.png").write_bytes(b"no image")
  copy = tmp_path / "COPIES" / "test" / "ant" / "0.png"
  copy.write_bytes((tmp_path / "COPIES" / "train" / "ant" / "0.png").read_bytes())
  tasks_of_another = tmp_path / "task_file.json"
  other = tasks.make(config.TasksConfig(), seed=9, source_size=8)
  tasks_of_another.write_text(task_file.dump_task_file(other))
  return {"PREPARED": str(prepared), "TASK_FILE": str(tasks_of_another)} | {
    folder: str(tmp_path / folder) for folder in ("FOLDER", "OTHER", "BROKEN", "COPIES", "VAL")
  }


def hash_or_refusal(make) -> str:
  try:
    return make()
  except config.ConfigError as error:
    return str(error)


def test_no_key_of_tasks_is_dead(places):
  def made(values):
    values = {key: places.get(v, v) if isinstance(v, str) else v for key, v in values.items()}
    sequence = tasks.make(config.TasksConfig(**values), seed=0, source_size=8)
    return hashlib.sha256(task_file.dump_task_file(sequence).encode()).hexdigest()

  dead = [
    key
    for key, (base, value) in OF_TASKS.items()
    if hash_or_refusal(lambda: made(base)) == hash_or_refusal(lambda: made(base | {key: value}))  # noqa: B023
  ]
  print(f"{len(dead)} dead of {len(OF_TASKS)} keys of tasks {dead}")
  assert not dead


def test_no_key_of_weights_is_dead():
  def made(values):
    settings = config.WeightsConfig(**{"tag": "micro_letters"} | values)
    params, sizes, _ = registry.load(settings)
    return params_sha256(params) + repr(sizes)

  dead = [
    key
    for key, (base, value) in OF_WEIGHTS.items()
    if hash_or_refusal(lambda: made(base)) == hash_or_refusal(lambda: made(base | {key: value}))  # noqa: B023
  ]
  print(f"{len(dead)} dead of {len(OF_WEIGHTS)} keys of weights {dead}")
  assert not dead


def test_keys_of_the_program_are_read(tiny_vit, monkeypatch, tmp_path):
  read = set()

  def record(cls, path):
    names = {field.name for field in dataclasses.fields(cls)}

    def get(self, name):
      caller = sys._getframe(1).f_code.co_filename
      if name in names and "fmlora_jax" in caller and not caller.endswith("/config.py"):
        read.add(f"{path}{name}")
      return object.__getattribute__(self, name)

    monkeypatch.setattr(cls, "__getattribute__", get)

  values = {
    "epochs": 1,
    "batch_size": 256,
    "seeds": (3,),
    "method": {"name": "linear_probe"},
    "tasks": {"num_tasks": 2},
    "weights": {"tag": "random"},
    "input": {"mode": "stream"},
  }
  settings = methods.build_config(values)
  record(config.Config, "")
  for field in dataclasses.fields(config.Config):
    if dataclasses.is_dataclass(group := type(getattr(settings, field.name))):
      record(group, f"{field.name}.")
  seeds.run_each(settings, tmp_path / "run")
  dead = [key for key in OF_PROGRAMS if key not in read]
  print(f"{len(dead)} of {len(OF_PROGRAMS)} keys of the program are never read {dead}")
  assert not dead
