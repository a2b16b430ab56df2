"""Settings: what is refused, with which words, and that every config file builds."""

import importlib.util
import pathlib

import pytest

from fmlora_jax import config

CONFIGS = sorted(pathlib.Path(__file__).parents[1].glob("configs/*.py"))


def load(path: pathlib.Path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("path", [p for p in CONFIGS if "pretrain" not in p.name], ids=str)
def test_every_config_file_builds_and_takes_a_method(path):
  chosen = load(path).get_config("method=lora")
  built = config.build(config.Config, chosen.to_dict())
  assert built.method.name == "lora" and built.method.mode == "incremental"
  assert config.build(config.Config, load(path).get_config().to_dict()).method.name == "fm_lora"


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"optim": {"learning_rat": 1.0}}, "config.optim.learning_rat is not a field; did you mean"),
    ({"nonsense": 1}, "config.nonsense is not a field; fields are"),
    ({"epochs": True}, "config.epochs is True: must be of type int"),
    ({"epochs": 1.5}, "config.epochs is 1.5: must be of type int"),
    ({"epochs": 0}, "config.epochs is 0: must be >= 1"),
    ({"optim": {"learning_rate": float("nan")}}, "config.optim.learning_rate is nan"),
    ({"optim": 3}, "config.optim is 3: must be a group of fields"),
    ({"tasks": {"scenario": "online"}}, "must be one of cil, dil, til"),
    ({"drs": {"candidate_ranks": (8, 4)}}, "config.drs.candidate_ranks is (8, 4): must be ascend"),
    ({"drs": {"candidate_ranks": (4, "8")}}, "config.drs.candidate_ranks[1] is '8'"),
    ({"bases": {"targets": ("query", "query")}}, "config.bases.targets"),
    ({"method": {"name": "fmlora"}}, "config.method.name is 'fmlora': must be one of finetune"),
    ({"method": {"name": "lora", "rnk": 4}}, "config.method.rnk is not a field; did you mean"),
    ({"tasks": {"evaluate_on": "val", "val_fraction": 0.0}}, "config.tasks.val_fraction is 0.0"),
  ],
)
def test_a_setting_that_can_not_be_is_refused_by_its_path(values, message):
  with pytest.raises(config.ConfigError) as error:
    config.build(config.Config, values)
  assert str(error.value).startswith(message) or message in str(error.value)


def test_whole_numbers_are_taken_for_decimals_and_lists_for_tuples():
  built = config.build(
    config.Config, {"optim": {"learning_rate": 1}, "drs": {"candidate_ranks": [2, 4]}}
  )
  assert built.optim.learning_rate == 1.0 and isinstance(built.optim.learning_rate, float)
  assert built.drs.candidate_ranks == (2, 4)


def test_fields_that_may_be_none_can_be_set_later_with_their_type():
  tree = config.defaults()
  tree.tasks.order_seed = 5
  with pytest.raises(TypeError):
    tree.tasks.order_seed = "five"
  assert config.build(config.Config, tree.to_dict()).tasks.order_seed == 5


def test_a_variant_is_read_as_pairs():
  assert config.parse_variant("method=lora,tasks=2", "method", "tasks") == {
    "method": "lora",
    "tasks": "2",
  }
  assert config.parse_variant(None) == {}
  with pytest.raises(config.ConfigError, match="key=value"):
    config.parse_variant("lora")
  with pytest.raises(config.ConfigError, match="the key must be one of method"):
    config.parse_variant("metod=lora", "method")
