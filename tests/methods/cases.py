"""Every method as the contract tests run it; a method without an entry fails them."""

import dataclasses
from typing import Any

# what `Method.stored` is given in the tests of formulas
FACTS = [{"rank": 32}, {"rank": 16}, {"rank": 4}]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A method with settings that suit the tiny ViT of the tests: 2 blocks, width 16, 2 heads.

  Attributes:
    changes: of `config.method`.
    full_size: further changes of `config.method` for a ViT-B/16.
    stored: what `Method.stored` says of three tasks on a ViT-B/16, by hand from the formula.
    starts_at_nothing: whether a fresh task leaves every logit as it is, bit for bit.
    folds: whether the folded model gives the logits of training to the task just learned.
  """

  name: str
  changes: dict[str, Any] = dataclasses.field(default_factory=dict)
  full_size: dict[str, Any] = dataclasses.field(default_factory=dict)
  stored: dict[str, Any]
  starts_at_nothing: bool = True
  folds: bool = True

  def __str__(self):
    return "-".join([self.name, *(v for v in self.changes.values() if isinstance(v, str))])


ALL = [
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
]
