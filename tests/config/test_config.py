"""Settings: what is refused, with which words, and that every config file builds."""

import pytest

from fmlora_jax import config, methods


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (
      {"optim": {"learning_rat": 1.0}},
      "config.optim.learning_rat is not a field; did you mean 'learning_rate'?",
    ),
    ({"nonsense": 1}, "config.nonsense is not a field; fields are seed, seeds, epochs, "),
    ({"epochs": True}, "config.epochs is True: must be of type int"),
    ({"epochs": 1.5}, "config.epochs is 1.5: must be of type int"),
    ({"epochs": "3"}, "config.epochs is '3': must be of type int"),
    ({"epochs": None}, "config.epochs is None: must be of type int"),
    ({"epochs": 0}, "config.epochs is 0: must be >= 1"),
    ({"seed": -1}, "config.seed is -1: must be in [0, 2**32)"),
    ({"seed": 2**32}, "config.seed is 4294967296: must be in [0, 2**32)"),
    ({"seeds": (1, 2, 1)}, "config.seeds is (1, 2, 1): must be distinct, each in [0, 2**32)"),
    ({"seeds": (1, 2**32)}, "config.seeds is (1, 4294967296): must be distinct, each in [0, 2**32"),
    ({"seed": 7, "seeds": (1, 2)}, "config.seed is 7: must be left out where seeds are given"),
    ({"batch_size": 0}, "config.batch_size is 0: must be >= 1"),
    ({"compute_dtype": "float16"}, "config.compute_dtype is 'float16': must be one of float32, bf"),
    ({"optim": {"learning_rate": float("nan")}}, "config.optim.learning_rate is nan: must be fin"),
    ({"optim": {"learning_rate": float("inf")}}, "config.optim.learning_rate is inf: must be fin"),
    ({"optim": {"learning_rate": 0.0}}, "config.optim.learning_rate is 0.0: must be > 0"),
    ({"optim": {"weight_decay": -0.1}}, "config.optim.weight_decay is -0.1: must be >= 0"),
    ({"optim": {"clip_norm": 0.0}}, "config.optim.clip_norm is 0.0: must be > 0"),
    ({"optim": {"name": "lion"}}, "config.optim.name is 'lion': must be one of adamw, adam, sgd"),
    ({"optim": {"momentum": 1.0}}, "config.optim.momentum is 1.0: must be in [0, 1)"),
    ({"optim": {"decay": 1.0}}, "config.optim.decay is 1.0: must be in [0, 1)"),
    ({"optim": {"head_learning_rate": 0.0}}, "config.optim.head_learning_rate is 0.0: must be > 0"),
    ({"optim": {"head_weight_decay": -1.0}}, "config.optim.head_weight_decay is -1.0: must be >= "),
    (
      {"optim": {"final_learning_rate": -1.0}},
      "config.optim.final_learning_rate is -1.0: must be >= 0",
    ),
    (
      {"optim": {"schedule": "linear"}},
      "config.optim.schedule is 'linear': must be one of cosine, constant, steps, coda_cosine, tim",
    ),
    (
      {"optim": {"schedule": "steps", "milestones": (4, 2)}},
      "config.optim.milestones is (4, 2): must be ascending epochs >= 1",
    ),
    (
      {"optim": {"momentum": 0.5}},
      "config.optim.momentum is 0.5: must be left out, or given with name=sgd",
    ),
    (
      {"optim": {"decay": 0.3}},
      "config.optim.decay is 0.3: must be left out, or given with schedule=steps",
    ),
    (
      {"optim": {"final_learning_rate": 1e-4}},
      "config.optim.final_learning_rate is 0.0001: must be left out, or given with schedule=timm",
    ),
    (
      {"optim": {"schedule": "steps", "milestones": (0, 2)}},
      "config.optim.milestones is (0, 2): must be ascending epochs >= 1",
    ),
    (
      {"optim": {"schedule": "steps"}},
      "config.optim.milestones is (): must be epochs, such as (8, 12)",
    ),
    (
      {"optim": {"milestones": (4,)}},
      "config.optim.milestones is (4,): must be left out, or given with schedule=steps",
    ),
    (
      {"epochs": 5, "optim": {"schedule": "steps", "milestones": (2, 5)}},
      "config.optim.milestones is (2, 5): must be below config.epochs, 5; ",
    ),
    ({"optim": {"learning_rate": True}}, "config.optim.learning_rate is True: must be of type fl"),
    ({"optim": 3}, "config.optim is 3: must be a group of fields"),
    ({"tasks": {"scenario": "online"}}, "config.tasks.scenario is 'online': must be one of cil, "),
    ({"tasks": {"num_tasks": 0}}, "config.tasks.num_tasks is 0: must be >= 1"),
    ({"tasks": {"val_fraction": 1.0}}, "config.tasks.val_fraction is 1.0: must be in [0, 1)"),
    ({"tasks": {"test_fraction": 0.0}}, "config.tasks.test_fraction is 0.0: must be in (0, 1)"),
    ({"tasks": {"order_seed": 1.5}}, "config.tasks.order_seed is 1.5: must be of type int"),
    (
      {"tasks": {"evaluate_on": "val", "val_fraction": 0.0}},
      "config.tasks.val_fraction is 0.0: must be > 0 to evaluate_on val",
    ),
    (
      {"drs": {"candidate_ranks": (8, 4)}},
      "config.method.drs.candidate_ranks is (8, 4): must be ascend",
    ),
    (
      {"drs": {"candidate_ranks": (4, 4)}},
      "config.method.drs.candidate_ranks is (4, 4): must be ascend",
    ),
    (
      {"drs": {"candidate_ranks": (0, 4)}},
      "config.method.drs.candidate_ranks is (0, 4): must be ascend",
    ),
    (
      {"drs": {"candidate_ranks": ()}},
      "config.method.drs.candidate_ranks is (): must be ascending inte",
    ),
    (
      {"drs": {"candidate_ranks": 4}},
      "config.method.drs.candidate_ranks is 4: must be a tuple, such as",
    ),
    (
      {"drs": {"candidate_ranks": (4, "8")}},
      "config.method.drs.candidate_ranks[1] is '8': must be of t",
    ),
    ({"drs": {"tau": 0.0}}, "config.method.drs.tau is 0.0: must be > 0"),
    ({"drs": {"tolerance": -1.0}}, "config.method.drs.tolerance is -1.0: must be >= 0"),
    ({"drs": {"reference": 0.0}}, "config.method.drs.reference is 0.0: must be > 0"),
    ({"bases": {"b_lr_scale": 0.0}}, "config.method.bases.b_lr_scale is 0.0: must be > 0"),
    ({"method": {"core": {"alpha": 0.0}}}, "config.method.core.alpha is 0.0: must be > 0"),
    ({"drs": {"price": 0.5}}, "config.method.drs.price is not a field"),
    ({"bases": {"max_rank": 0}}, "config.method.bases.max_rank is 0: must be >= 1"),
    (
      {"bases": {"targets": ()}},
      "config.method.bases.targets is (): must be at least one projection",
    ),
    (
      {"bases": {"targets": ("query", "query")}},
      "config.method.bases.targets is ('query', 'query'): mu",
    ),
    ({"bases": {"targets": ("qkv",)}}, "config.method.bases.targets[0] is 'qkv': must"),
    ({"prompt": {"num_tokens": -1}}, "config.method.prompt.num_tokens is -1: must be >= 0"),
    ({"head": {"kind": "tree"}}, "config.head.kind is 'tree': must be one of linear, cosine, cl"),
    (
      {"head": {"kind": "cosine", "start": "class_mean"}},
      "config.head.kind is 'cosine': must be linear, class_mean or lda, or head.start zero",
    ),
    (
      {"head": {"kind": "cosine", "start": "torch_linear"}},
      "config.head.kind is 'cosine': must be linear, class_mean or lda, or head.start zero",
    ),
    (
      {"head": {"kind": "class_mean", "alignment": {"epochs": 1}}},
      "config.head.kind is 'class_mean': must be linear or cosine, or head.alignment.epochs 0",
    ),
    (
      {"head": {"kind": "lda", "alignment": {"epochs": 1}}},
      "config.head.kind is 'lda': must be linear or cosine, or head.alignment.epochs 0",
    ),
    (
      {"head": {"drift": "sdc"}},
      "config.head.drift is 'sdc': must be none, or statistics must be stored: head.alignment",
    ),
    ({"head": {"drift": "affine"}}, "config.head.drift is 'affine': must be one of none, sdc, lin"),
    ({"head": {"drift_bandwidth": 0}}, "config.head.drift_bandwidth is 0.0: must be > 0"),
    ({"head": {"drift_ridge": -1.0}}, "config.head.drift_ridge is -1.0: must be > 0"),
    (
      {"head": {"loss": "seen"}, "tasks": {"scenario": "til"}},
      "config.head.loss is 'seen': must be task where tasks.scenario is til",
    ),
    ({"optim": {"later_lr_scale": 0}}, "config.optim.later_lr_scale is 0.0: must be > 0"),
    ({"optim": {"later_head_lr_scale": -1}}, "config.optim.later_head_lr_scale is -1.0: must be"),
    (
      {"head": {"num_centroids": 0}},
      "config.head.num_centroids is 0: must be >= 1 and <= 16384",
    ),
    ({"weights": {"depth": 0}}, "config.weights.depth is 0: must be >= 1"),
    ({"input": {"image_size": 0}}, "config.input.image_size is 0: must be >= 1"),
    ({"checkpoint": {"every_steps": -1}}, "config.checkpoint.every_steps is -1: must be >= 0"),
    ({"method": {"name": "fmlora"}}, "config.method.name is 'fmlora': must be one of "),
    (
      {"method": {"name": "lora", "rnk": 4}},
      "config.method.rnk is not a field; did you mean 'rank'?",
    ),
    ({"method": {"name": "lora", "mode": 1}}, "config.method.mode is 1: must be one of sequential"),
    ({"method": {"name": "fm_lora", "rank": 4}}, "config.method.rank is not a field; fields are n"),
  ],
)
def test_a_setting_that_can_not_be_is_refused_by_its_path(values, message):
  with pytest.raises(config.ConfigError) as error:
    methods.build_config(values)
  assert str(error.value).startswith(message)


def test_absent_fields_of_a_group_keep_the_defaults_that_the_group_has_where_it_stands():
  """Of the head's alignment there are 0 epochs, of another there are 30."""
  for head in ({}, {"alignment": {}}, {"alignment": {"batch_size": 7}}):
    assert methods.build_config({"head": head}).head.alignment.epochs == 0
  built = methods.build_config({"method": {"name": "hide_prompt", "alignment": {}}})
  assert built.method.alignment.epochs == built.method.identity.alignment.epochs == 30


def test_whole_numbers_are_taken_for_decimals_and_lists_for_tuples():
  built = methods.build_config({"optim": {"learning_rate": 1}, "drs": {"candidate_ranks": [2, 4]}})
  assert built.optim.learning_rate == 1.0 and isinstance(built.optim.learning_rate, float)
  assert built.method.drs.candidate_ranks == (2, 4)
