"""Every method as the contract tests run it; a method without an entry fails them."""

import dataclasses
from typing import Any

# of InfLoRA's layers after ten tasks of ImageNet-R, from the logs of its official code
SPANNED = [17, 52, 124, 178, 237, 254, 304, 353, 483, 558, 524, 651]

# what `Method.stored` is given in the tests of formulas
FACTS = [{"rank": 32}, {"rank": 16}, {"rank": 4, "spanned": SPANNED}]


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
