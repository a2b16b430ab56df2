"""Every method as the contract tests run it."""

import dataclasses
from typing import Any

from fmlora_jax import config, methods
from fmlora_jax.cli import config_files

# of InfLoRA's layers after ten tasks of ImageNet-R, from the logs of its official code
SPANNED = [17, 52, 124, 178, 237, 254, 304, 353, 483, 558, 524, 651]

# what `AdaptedViT.stored` is given in the tests of formulas
FACTS = [{"rank": 32}, {"rank": 16}, {"rank": 4, "spanned": SPANNED}]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A method with settings that suit the tiny ViT of the tests: 2 blocks, width 16, 2 heads.

  Attributes:
    changes: of `config.method`.
    full_size: further changes of `config.method` for a ViT-B/16.
    stored: what `AdaptedViT.stored` says of three tasks on a ViT-B/16, by hand from the formula;
      None of a method that has no entry below.
    starts_at_nothing: whether a fresh task leaves every logit as it is, bit for bit.
    folds: whether the folded model gives the logits of training to the task just learned.
    kept_in_mem: the entry of `mem` that `stored` counts as shared, of constant size.
    keeps_old_rows: whether only the rows of a task's own classes change in the head.
    tier: of its tests; 2 for one that another case of the method nearly covers.
  """

  name: str
  changes: dict[str, Any] = dataclasses.field(default_factory=dict)
  full_size: dict[str, Any] = dataclasses.field(default_factory=dict)
  stored: dict[str, Any] | None = None
  starts_at_nothing: bool = True
  folds: bool = True
  kept_in_mem: str | None = None
  keeps_old_rows: bool = True
  tier: int = 1

  def __str__(self):
    words = [name if value is True else value for name, value in self.changes.items()]
    return "-".join([self.name, *(word for word in words if isinstance(word, str))])


def official(name: str, benchmark: str, num_tasks: int = 10, **groups: Any) -> config.Config:
  """Returns the config of a method's official recipe, over `groups`."""
  tasks = {"benchmark": benchmark, "num_tasks": num_tasks}
  values = config_files.defaults(recipe="official", method={"name": name}, tasks=tasks, **groups)
  return methods.build_config(values.to_dict())


ALL = [
  # 12 layers, 2·768·64 weights and 64 + 768 biases: beside the MLP, with dropout
  Case(
    name="adapter",
    changes={"kind": "adaptformer", "width": 3},
    full_size={"width": 64},
    stored={"shared": 1_189_632, "per_task": [0, 0, 0]},
    starts_at_nothing=False,
    folds=False,
  ),
  # the same behind both branches
  Case(
    name="adapter",
    changes={"kind": "houlsby", "width": 3},
    full_size={"width": 64},
    stored={"shared": 2_379_264, "per_task": [0, 0, 0]},
    tier=2,
  ),
  # and 25 LayerNorms, 2·768 each
  Case(
    name="adapter",
    changes={"kind": "houlsby", "width": 3, "train_norms": True},
    full_size={"width": 64},
    stored={"shared": 2_379_264 + 38_400, "per_task": [0, 0, 0]},
  ),
  # the sum of the past, 12 layers, key and value: 768² each
  Case(
    name="c_lora",
    changes={"rank": 3},
    full_size={"rank": 64},
    stored={"shared": 14_155_776, "per_task": [0, 0, 0]},
    kept_in_mem="merged",
  ),
  # 5 layers x floor(100 / 3) slots: 8·768 of a component, 768 of a key, 768 of an attention
  Case(
    name="coda_prompt",
    changes={"pool_size": 10, "length": 4, "layers": (0, 1), "orthogonality": 0.1},
    full_size={"pool_size": 100, "length": 8, "layers": (0, 1, 2, 3, 4)},
    stored={"shared": 0, "per_task": [1_267_200] * 3},
    starts_at_nothing=False,
  ),
  # 2 layers of 5 + 5 general tokens, 3 layers of 20 + 20 expert tokens and a key per task
  Case(
    name="dualprompt",
    changes={
      "general_layers": (0,),
      "general_length": 2,
      "expert_layers": (1,),
      "expert_length": 3,
    },
    full_size={"general_layers": (0, 1), "general_length": 5}
    | {"expert_layers": (2, 3, 4), "expert_length": 20},
    stored={"shared": 15_360, "per_task": [92_928] * 3},
    starts_at_nothing=False,
    folds=False,  # at test time the query chooses the task
  ),
  Case(name="finetune", stored={"shared": 85_798_656, "per_task": [0, 0, 0]}),
  # at r_max = 32, with 10 prompt tokens: 12·2·(768 + 768)·32 + 10·768 once, 12·2·2·r² per task
  Case(name="fm_lora", stored={"shared": 1_187_328, "per_task": [49_152, 12_288, 768]}),
  # 12 layers, A once and B for key and value: 3·768·r each; 768·min(k, 768 - k) for GPM's bases
  Case(
    name="inflora",
    changes={"rank": 3},
    full_size={"rank": 10},
    stored={"shared": 0, "per_task": [276_480] * 3, "statistics": 1_824_000},
  ),
  # task classifier: 768·1536·2 + 1536 + 768, LayerNorm 2·768, 769 for each of 6 classes; a task's
  # prefixes: 5 layers, 2·20·768; statistics of a class: 2 kinds of features, 10·2·768 each
  Case(
    name="hide_prompt",
    changes={
      "layers": (0, 1),
      "prompt_length": 2,
      "num_centroids": 4,
      "repulsion": 0.05,
      "identity": {"epochs": 3, "learning_rate": 0.01},
    },
    full_size={"layers": (0, 1, 2, 3, 4), "prompt_length": 20, "num_centroids": 10},
    stored={
      "shared": 2_363_136 + 6 * 769,
      "per_task": [153_600] * 3,
      "statistics": 6 * 30_720,
    },
    starts_at_nothing=False,  # a hundredth of its prefixes is the mean of the others
    folds=False,  # the folded model may name another task, and its head was aligned
    keeps_old_rows=False,
  ),
  # 10 prompts of 5 tokens, and their keys
  Case(
    name="l2p",
    changes={"pool_size": 6, "length": 2, "top_n": 2},
    full_size={"pool_size": 10, "length": 5, "top_n": 5},
    stored={"shared": 46_080, "per_task": [0, 0, 0]},
    starts_at_nothing=False,
  ),
  Case(name="linear_probe", stored={"shared": 0, "per_task": [0, 0, 0]}),
  # 12 layers, query and value: (768 + 768)·r each
  Case(
    name="lora",
    changes={"mode": "incremental", "rank": 3},
    full_size={"rank": 10},
    stored={"shared": 0, "per_task": [368_640] * 3},
  ),
  Case(
    name="lora",
    changes={"mode": "sequential", "rank": 3},
    full_size={"rank": 10},
    stored={"shared": 368_640, "per_task": [0, 0, 0]},
  ),
  # lora's 368,640 and a scalar; its scalars start at 0.8 again, where the task before left others
  Case(
    name="sd_lora",
    changes={"rank": 3},
    full_size={"rank": 10},
    stored={"shared": 0, "per_task": [368_641] * 3},
    starts_at_nothing=False,
  ),
]
ALL += [Case(name=name) for name in methods.names() if name not in {case.name for case in ALL}]
