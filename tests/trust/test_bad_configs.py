"""Invalid configs are refused at once, before any file or device is touched."""

import errno
import os
import re
import time

import pytest

from fmlora_jax import config, methods, tasks
from fmlora_jax.cli import config_flag, errors
from fmlora_jax.config import ConfigError
from fmlora_jax.experiment import plan, preflight, setup
from fmlora_jax.models.weights import registry
from fmlora_jax.train import mesh
from fmlora_jax.workdir import identity

B16 = {"weights": {"tag": "augreg2_in21k_ft_in1k"}}
HUGE = 10**30
BAD = [  # (values, the key that the message begins with, what is allowed)
  ({"optim": {"learning_rat": 1.0}}, "config.optim.learning_rat", "did you mean 'learning_rate'"),
  ({"nonsense": 1}, "config.nonsense", "fields are seed"),
  ({"tasks": {"benchmrk": "digits"}}, "config.tasks.benchmrk", "did you mean 'benchmark'"),
  ({"method": {"name": "lora", "rnk": 4}}, "config.method.rnk", "did you mean 'rank'"),
  ({"method": {"name": "../lora"}}, "config.method.name", "must be one of adapter"),
  ({"method": {"name": "lora", "rank": True}}, "config.method.rank", "must be of type int"),
  ({"epochs": True}, "config.epochs", "must be of type int"),
  ({"epochs": 1.5}, "config.epochs", "must be of type int"),
  ({"epochs": "3"}, "config.epochs", "must be of type int"),
  ({"batch_size": None}, "config.batch_size", "must be of type int"),
  ({"optim": {"learning_rate": "fast"}}, "config.optim.learning_rate", "must be of type float"),
  ({"optim": {"learning_rate": True}}, "config.optim.learning_rate", "must be of type float"),
  ({"optim": {"learning_rate": float("nan")}}, "config.optim.learning_rate", "must be finite"),
  ({"optim": {"learning_rate": -1.0}}, "config.optim.learning_rate", "must be > 0"),
  ({"optim": {"weight_decay": float("inf")}}, "config.optim.weight_decay", "must be finite"),
  ({"optim": {"name": "adamax"}}, "config.optim.name", "must be one of adamw, adam, sgd"),
  ({"compute_dtype": "float64"}, "config.compute_dtype", "must be one of float32, bfloat16"),
  ({"head": {"kind": True}}, "config.head.kind", "must be one of linear"),
  ({"optim": 3}, "config.optim", "must be a group of fields"),
  ({"seed": -1}, "config.seed", "must be in [0, 2**32)"),
  ({"seeds": (1, 1)}, "config.seeds", "must be distinct"),
  ({"tasks": {"order_seed": -1}}, "config.tasks.order_seed", ">= 0 and <= 4294967295"),
  ({"epochs": 0}, "config.epochs", ">= 1 and <= 1000000"),
  ({"epochs": HUGE}, "config.epochs", "must be below 2**32"),
  ({"batch_size": 10**12}, "config.batch_size", "must be below 2**32"),
  ({"batch_size": 10**9}, "config.batch_size", ">= 1 and <= 1048576"),
  ({"eval_batch_size": 10**9}, "config.eval_batch_size", ">= 1 and <= 1048576"),
  ({"bases": {"max_rank": 10**9}}, "config.method.bases.max_rank", ">= 1 and <= 16384"),
  ({"input": {"image_size": 10**6}}, "config.input.image_size", ">= 1 and <= 16384"),
  ({"input": {"steps_per_dispatch": HUGE}}, "config.input.steps_per_dispatch", "below 2**32"),
  ({"checkpoint": {"every_steps": HUGE}}, "config.checkpoint.every_steps", "below 2**32"),
  ({"prompt": {"num_tokens": 10**6}}, "config.method.prompt.num_tokens", ">= 0 and <= 16384"),
  ({"mesh": {"fsdp": 0}}, "config.mesh.fsdp", ">= 1"),
  (
    B16 | {"method": {"name": "l2p", "pool_size": 2**31}},
    "config.method.pool_size",
    "would take",
  ),
  (B16 | {"bases": {"max_rank": 1000}}, "config.method.bases.max_rank", "must be at most 768"),
  (B16 | {"method": {"name": "lora", "rank": 1000}}, "config.method.rank", "must be at most 768"),
  (
    B16 | {"method": {"name": "coda_prompt", "layers": (11, 12)}},
    "config.method.layers",
    "ascending numbers of blocks in 0..11",
  ),
  ({"drs": {"candidate_ranks": (8, 4)}}, "config.method.drs.candidate_ranks", "must be ascending"),
  (
    B16 | {"drs": {"candidate_ranks": (4, 64)}},
    "config.method.drs.candidate_ranks",
    "must be at most",
  ),
  (B16 | {"input": {"image_size": 225}}, "config.input.image_size", "multiple of the patch size"),
  (B16 | {"weights": {"tag": "vit"}}, "config.weights.tag", "must be one of"),
  (B16 | {"weights": {"tag": "../x"}}, "config.weights.tag", "must be one of"),
  ({"weights": {"tag": "dino", "depth": 13}}, "config.weights.depth", "must be in 1..12"),
  ({"weights": {"path": "a\0b"}}, "config.weights.path", "printable characters"),
  ({"input": {"augmentation": "none!"}}, "config.input.augmentation", "must be one of"),
  ({"tasks": {"num_tasks": 3}}, "config.tasks.num_tasks", "so be one of 1, 2, 5, 10"),
  ({"tasks": {"num_tasks": 0}}, "config.tasks.num_tasks", ">= 1"),
  ({"tasks": {"benchmark": "digit"}}, "config.tasks.benchmark", "did you mean 'digits'"),
  ({"tasks": {"benchmark": "tfds:../../x"}}, "config.tasks.benchmark", "letters, digits"),
  ({"tasks": {"benchmark": "x" * 300}}, "config.tasks.benchmark", "letters, digits"),
  ({"tasks": {"benchmark": "tfds:\u202ex"}}, "config.tasks.benchmark", "letters, digits"),
  ({"tasks": {"benchmark": "cifar100", "split": "../a"}}, "config.tasks.split", "one of official"),
  ({"tasks": {"benchmark": "domainnet", "domains": ("..",)}}, "config.tasks.domains", "one of cl"),
  ({"tasks": {"data_dir": "a\nb"}}, "config.tasks.data_dir", "printable characters"),
  ({"tasks": {"task_file": "a\0b"}}, "config.tasks.task_file", "printable characters"),
  ({"tasks": {"data_dir": "y" * 300}}, "config.tasks.data_dir", "names of at most 255"),
  ({"weights": {"path": "y/" * 2500}}, "config.weights.path", "at most 4096 bytes"),
]


def test_bad_configs_are_refused_at_once_with_key_and_range(monkeypatch):
  def touched(*arguments, **options):
    raise AssertionError("data, weights or devices were touched")

  for owner, name in ((tasks, "make"), (registry, "load"), (mesh, "make_mesh")):
    monkeypatch.setattr(owner, name, touched)
  refused, took = 0, []
  for values, key, allowed in BAD:
    began = time.process_time()  # others may use the machine
    with pytest.raises(config.ConfigError) as error:
      setup.SetupCache().setup(methods.build_config(values))
    message = str(error.value)
    assert message.startswith(key) and allowed in message, message
    assert "\n" not in message
    took.append(time.process_time() - began)
    refused += 1
  seconds = f"{sum(took):.2f} s, the slowest in {max(took):.2f} s"
  print(f"{refused}/{len(BAD)} bad configs refused in {seconds}")
  assert len(BAD) >= 40 and max(took) < 2


@pytest.mark.parametrize("name", ["checkpoints", "result.json", "task_file.json"])
def test_a_workdir_with_a_link_out_of_it_is_refused_and_nothing_is_written(tmp_path, name):
  (tmp_path / "elsewhere").mkdir()
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
  with pytest.raises(config.ConfigError, match=f"holds the link '{name}'"):
    identity.claim_workdir(tmp_path / "run", {})
  assert not list((tmp_path / "elsewhere").iterdir())
  assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


@pytest.mark.parametrize(
  ("method", "field"), [("fm_lora", r"tasks\.num_tasks is 5"), ("lora", r"method\.rank is ")]
)
def test_what_does_not_fit_in_memory_is_refused_by_a_field_that_can_be_less(method, field):
  settings = methods.build_config(B16 | {"method": {"name": method}})
  with pytest.raises(ConfigError, match=f"config.{field}.*would take .* this machine has"):
    preflight.check(settings, 1000)


def test_statistics_that_do_not_fit_in_memory_are_refused_by_their_number():
  head = {"alignment": {"epochs": 1}, "num_centroids": 10_000}
  settings = methods.build_config(B16 | {"head": head})
  with pytest.raises(ConfigError, match=r"config\.head\.num_centroids is 10000.*would take "):
    preflight.check(settings, 1000)


def test_all_that_is_wrong_is_said_at_once_in_at_most_twenty_lines():
  wrong = {
    "epochs": 0,
    "batch_size": 0,
    "optim": {"learning_rate": -1.0, "name": "x"},
    "nonsense": 1,
  }
  with pytest.raises(ConfigError) as error:
    methods.build_config(wrong)
  first, *lines = errors.explain(error.value).splitlines()
  assert first == "5 problems:"
  for start in (
    "config.epochs is 0: must be",
    "config.batch_size is 0: must be",
    "config.optim.name is 'x': must be one of",
    "config.optim.learning_rate is -1.0: must be > 0",
    "config.nonsense is not a field",
  ):
    assert sum(line.startswith(f"  {start}") for line in lines) == 1, lines
  limit = errors.explain(OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x"))
  assert re.fullmatch(r"this process may have at most \d+ files open \(ulimit -n\): .*", limit)
  many = errors.explain(config.ConfigErrors([f"problem {i}" for i in range(30)])).splitlines()
  assert len(many) == 20 and many[-1] == "  and 12 more"


def test_all_data_and_weights_that_are_missing_are_said_at_once(tmp_path):
  domainnet = config_flag.read_config("domainnet", [("tasks.data_dir", str(tmp_path / "none"))])
  with pytest.raises(config.ConfigErrors) as error:
    preflight.check_files(domainnet)
  *data, weights = error.value.problems
  assert "domainnet/clipart, domainnet/infograph, " in data[0]
  assert data[0].endswith(f"fmlora_jax.prepare domainnet --data_dir={tmp_path / 'none'}")
  assert "run `hf download timm/vit_base" in weights and "--with_weights" in weights
  folder = config_flag.read_config(
    "image_folder", [("tasks.data_dir", "/no"), ("weights.path", "/no.npz")]
  )
  with pytest.raises(config.ConfigErrors) as error:
    preflight.check_files(folder)
  assert [problem.partition(" is ")[0] for problem in error.value.problems] == [
    "config.tasks.data_dir",
    "config.weights.path",
  ]
  preflight.check_files(config_flag.read_config("digits"))
  lines = list(plan.describe(folder, tmp_path / "run"))
  assert [line.split(" is ")[0] for line in lines[3:5]] == [
    "missing    config.tasks.data_dir",
    "missing    config.weights.path",
  ]
  assert lines[5].endswith("/run: would be refused, for what is missing")


@pytest.mark.parametrize("benchmark", ["digits", "digits_dil", "random_images"])
def test_a_folder_that_a_benchmark_does_not_read_is_refused(benchmark, tmp_path):
  chosen = config.TasksConfig(benchmark=benchmark, data_dir=str(tmp_path))
  with pytest.raises(ConfigError, match=f"data_dir is '{tmp_path}': must be None, the images of"):
    tasks.check(chosen)
  with pytest.raises(ConfigError, match="test_from is 'val': must be 'train'"):
    tasks.check(config.TasksConfig(benchmark=benchmark, test_from="val"))
