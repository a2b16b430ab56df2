"""Settings of FM-LoRA: shared bases, rank selection and meta-prompt."""

import dataclasses
import itertools
from typing import Literal

from fmlora_jax.config import (
  MOST_STEPS,
  MOST_WIDE,
  MethodConfig,
  Projection,
  require,
  require_within,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BasesConfig:
  """F-LoRA's shared bases; FM-LoRA Sec. 3.2.

  Attributes:
    max_rank: r_max, columns of A and B.
    orthonormalise: after task 1, "svd" makes both bases orthonormal with the most important
      columns first and leaves dW_1 as it was (ours); "none" leaves them as trained.
    targets: the projections that are adapted.
    init: start of A and B. random is the paper's; gradient takes the leading singular vectors of
      the loss's gradient with respect to each projection over task 1 (ours, after LoRA-GA,
      arXiv:2407.05000). It costs a forward and a backward pass over the images of task 1.
    zero: the factor that is 0 at the start of task 1, so that dW = 0: n with M = I, or b with
      M = N = I, as in LoRA (ours).
    lr_scale: factor on the learning rate of A and B in task 1 (ours).
    b_lr_scale: a further factor on that of B (LoRA+, arXiv:2402.12354).
    columns: those that a task of small rank uses: the leading ones, which carry most of task 1's
      change, or those that earlier tasks use least, free (ours).
  """

  max_rank: int = 32
  orthonormalise: Literal["svd", "none"] = "svd"
  targets: tuple[Projection, ...] = ("query", "value")
  init: Literal["random", "gradient"] = "random"
  zero: Literal["n", "b"] = "n"
  lr_scale: float = 1.0
  b_lr_scale: float = 1.0
  columns: Literal["leading", "free"] = "leading"

  def __post_init__(self):
    require(self.lr_scale >= 0, "lr_scale", self.lr_scale, ">= 0")
    require(self.b_lr_scale > 0, "b_lr_scale", self.b_lr_scale, "> 0")
    fits = self.columns == "leading" or self.orthonormalise == "svd"
    require(fits, "columns", self.columns, "leading, or orthonormalise svd")
    require_within(self, 1, MOST_WIDE, "max_rank")
    require(len(self.targets) > 0, "targets", self.targets, "at least one projection")
    require(len(set(self.targets)) == len(self.targets), "targets", self.targets, "distinct")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoreConfig:
  """The cores M and N of each task; FM-LoRA Sec. 3.2. The settings are ours.

  Attributes:
    first_lr_scale: factor on the learning rate of M and N in task 1, beside A and B.
    lr_scale: the same from task 2 on.
    alpha: dW is alpha / r times A·M·Nᵀ·Bᵀ; None is a factor of 1. With it a step changes dW about
      as much at each rank.
  """

  first_lr_scale: float = 1.0
  lr_scale: float = 1.0
  alpha: float | None = None

  def __post_init__(self):
    for name in ("first_lr_scale", "lr_scale"):
      require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
    require(self.alpha is None or self.alpha > 0, "alpha", self.alpha, "> 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrsConfig:
  """The dynamic rank selector; FM-LoRA Sec. 3.3 and 4.1.

  Attributes:
    strategy: gumbel (Eq. 11-12), validation (Sec. 4.1: the smallest candidate within `tolerance`
      of the least validation loss), or fixed (`rank`; the rows of Table 3). Without effect
      where `ranks` are given.
    candidate_ranks: R, ascending, at most bases.max_rank.
    rank: for "fixed", from task 2 on; task 1 has bases.max_rank with every strategy.
    ranks: one for each task, beginning with bases.max_rank, such as those that a run selected on
      another split; nothing is selected then, so no validation image is needed (ours). () leaves
      the ranks to `strategy`.
    weight: lambda, what the task's complexity weighs beside the gains on validation images; the
      logits are in models/rank_selector.py, `difficulty_logits`.
    reference: complexity up to which a task asks for less than half of r_max, whatever the tasks
      before it; above it their mean takes its place. 1 is that of guessing.
    deviations: standard errors that are taken off the gain of a rank on validation images; a gain
      below is no evidence.
    tau: temperature of the Gumbel-Softmax, > 0.
    tolerance: validation loss in nats that "validation" gives up for a smaller rank.
    epochs: length of the preliminary training.
    selector_steps: of gradient descent on the selector's logits, after each epoch of the
      preliminary training.
    selector_learning_rate: of the same descent.
  """

  strategy: Literal["gumbel", "validation", "fixed"] = "gumbel"
  candidate_ranks: tuple[int, ...] = (4, 8, 16, 32)
  rank: int = 16
  ranks: tuple[int, ...] = ()
  weight: float = 10.0
  reference: float = 0.5
  deviations: float = 2.0
  tau: float = 1.0
  tolerance: float = 0.01
  epochs: int = 1
  selector_steps: int = 300
  selector_learning_rate: float = 1.0

  def __post_init__(self):
    ranks = self.candidate_ranks
    ascending = all(a < b for a, b in itertools.pairwise(ranks))
    ok = len(ranks) > 0 and ranks[0] >= 1 and ascending
    require(ok, "candidate_ranks", ranks, "ascending integers >= 1")
    require_within(self, 1, MOST_WIDE, "rank")
    require(all(r >= 1 for r in self.ranks), "ranks", self.ranks, "integers >= 1, one a task")
    for name in ("weight", "deviations"):
      require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
    require(self.reference > 0, "reference", self.reference, "> 0")
    require(self.tau > 0, "tau", self.tau, "> 0")
    require(self.tolerance >= 0, "tolerance", self.tolerance, ">= 0")
    require_within(self, 1, MOST_STEPS, "epochs", "selector_steps")
    lr = self.selector_learning_rate
    require(lr > 0, "selector_learning_rate", lr, "> 0")

  @property
  def selects(self) -> bool:
    """Whether ranks are selected, from validation images, rather than given."""
    return self.strategy != "fixed" and not self.ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
  """The dynamic meta-prompt; FM-LoRA Sec. 3.4.

  Attributes:
    num_tokens: n_p; 0 is FM-LoRA without DMP.
    first_lr_scale: factor on the learning rate of the prompt in task 1.
    lr_scale: the same from task 2 on.
  """

  num_tokens: int = 10
  first_lr_scale: float = 1.0
  lr_scale: float = 1.0

  def __post_init__(self):
    require_within(self, 0, MOST_WIDE, "num_tokens")
    for name in ("first_lr_scale", "lr_scale"):
      require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
  """Settings of FM-LoRA.

  Attributes:
    bases: F-LoRA's shared bases.
    core: the cores between them.
    drs: the dynamic rank selector.
    prompt: the dynamic meta-prompt.
  """

  name: str = "fm_lora"
  bases: BasesConfig = BasesConfig()
  core: CoreConfig = CoreConfig()
  drs: DrsConfig = DrsConfig()
  prompt: PromptConfig = PromptConfig()

  def largest(self) -> tuple["Config", list[str]]:
    given = self.drs.ranks
    if self.drs.strategy == "fixed" and not given:
      return self, []
    rank = max(given[1:] or given or self.drs.candidate_ranks)
    drs = dataclasses.replace(self.drs, strategy="fixed", rank=rank, ranks=())
    note = f"ranks are selected task by task: all have {rank} here, and selecting takes no time"
    if given:
      note = f"ranks are given task by task: from task 2 on all have {rank} here"
    return dataclasses.replace(self, drs=drs), [note]
