"""FM-LoRA: low-rank updates on shared bases, a rank per task, and meta-prompt tokens.

Source: Yu et al., arXiv:2504.08823. F-LoRA, Eq. (1-10): `models/flora.py`. DRS, Eq. (11-12):
`models/rank_selector.py` and `drs.py`. DMP, Eq. (13): `models/meta_prompt.py`. The head, Eq. (14):
`models/heads.py`. The past is one core between the bases and is folded into the projections before
a task starts, so neither a training step nor the folded model costs more with more tasks.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from fmlora_jax.methods.common import base
from fmlora_jax.methods.common.base import AdaptedViT, StepInputs
from fmlora_jax.methods.fm_lora import drs, gradient_start, optimizer_groups, rank_checks
from fmlora_jax.methods.fm_lora.settings import Config
from fmlora_jax.models import low_rank
from fmlora_jax.models.flora import FLoRA
from fmlora_jax.models.meta_prompt import MetaPrompt
from fmlora_jax.types import (
  Adapters,
  Facts,
  OptimizerGroup,
  Params,
  Reported,
  Rules,
  TaskView,
  Variables,
)

INTERFERENCE = Reported(
  name="interference",
  kind=list,
  field="interference",
  is_final=True,
  label="cosine of the weight changes",
)


@dataclasses.dataclass(frozen=True, eq=False)
class FMLoRA(AdaptedViT[Config]):
  """FM-LoRA: bases and prompt in `shared`, the task's core in `cur`, all cores in `mem`.

  Raises:
    ConfigError: if r_max is above min(d_in, d_out) of a target, or as `rank_checks.check` says.
  """

  reports = (
    base.RANK,
    Reported(name="complexity", kind=float, field="complexity"),
    Reported(name="complexity_by_rank", kind=list, field="complexity_by_rank"),
    Reported(name="rank_scores", kind=list, field="rank_scores"),
    INTERFERENCE,
    Reported(
      name="interference_by_target", kind=list, field="interference_by_target", is_final=True
    ),
    *AdaptedViT.reports,
  )

  def __post_init__(self):
    bases = self.settings.bases
    base.check_rank(bases.max_rank, "method.bases.max_rank", self.backbone, bases.targets)
    rank_checks.check(self.run, self.spec)

  @functools.cached_property
  def flora(self) -> FLoRA:
    bases = self.settings.bases
    return FLoRA(
      targets=bases.targets,
      sizes=self.backbone.sizes,
      max_rank=bases.max_rank,
      num_tasks=self.spec.num_tasks,
      zero=bases.zero,
      alpha=self.settings.core.alpha,
      columns=bases.columns,
    )

  @functools.cached_property
  def prompt(self) -> MetaPrompt | None:
    """The meta-prompt; None of 0 tokens is FM-LoRA without it."""
    num_tokens = self.settings.prompt.num_tokens
    return MetaPrompt(num_tokens, self.backbone.sizes.width) if num_tokens else None

  @functools.cached_property
  def selection(self) -> drs.RankSelection:
    parts = self.flora, self.prompt, self.backbone, self.head.layer
    return drs.RankSelection(self.run, drs.make_logits(*parts))

  @property
  def feature_epochs(self) -> int:
    """Passes of the rank selection, and in task 1 those that start the bases from a gradient."""
    drs, starts = self.settings.drs, self.settings.bases.init == "gradient"
    each = len(drs.candidate_ranks) if drs.strategy == "validation" else 1  # trains each candidate
    return drs.selects * each * drs.epochs + 2 * starts

  @property
  def groups(self) -> dict[str, OptimizerGroup]:
    return super().groups | optimizer_groups.groups(self.settings)

  def init(self, key: PRNGKeyArray, weights: Params) -> Variables:
    variables = super().init(key, weights)
    flora: Any = self.flora.init({}, self.settings.bases.max_rank, key)
    variables = variables.update(shared=flora["shared"], mem=flora["mem"])
    if self.prompt:
      key = jax.random.fold_in(key, len(self.settings.bases.targets))
      variables = variables.update(**self.prompt.init({}, key))
    return variables

  def begin_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    """Chooses the rank of the task and makes its core; starts the bases of task 1."""
    variables, facts = super().begin_task(variables, view)
    bases = self.settings.bases
    if view.index == 0 and bases.init == "gradient":
      sums = self.head.class_sums(self.fold(view.weights, variables), view)
      started = gradient_start.start(self.backbone, bases.targets, bases.max_rank, sums, view)
      variables = variables.update(shared={"bases": started})
    chosen = self.choose_rank(variables, view)
    core = self.flora.new_core(chosen["rank"])
    if view.index == 0:
      started, core = self.flora.start(variables.shared["bases"])
      variables = variables.update(shared={"bases": started})
    return variables.update(cur={"core": core}), facts | chosen

  def choose_rank(self, variables: Variables, view: TaskView) -> Facts:
    """Returns the rank of a task, r_max of the first, and the complexity where it is measured."""
    selecting, max_rank = self.settings.drs, self.settings.bases.max_rank
    if selecting.ranks:
      return {"rank": selecting.ranks[view.index], "complexity": None}
    if selecting.strategy == "fixed":
      return {"rank": selecting.rank if view.index else max_rank, "complexity": None}
    if view.index == 0 and view.val_batches is None:  # a sequence of one task may have none
      return {"rank": max_rank, "complexity": None}
    fixed = variables.shared | self.freeze(view.weights, variables)
    fixed |= {"cores": variables.mem["cores"]}
    params = {"core": self.flora.new_core(max_rank), "head": variables.cur["head"]}
    selected = self.selection.select(params, fixed, view)
    return selected if view.index else selected | {"rank": max_rank}

  def tokens(self, shared: Params) -> Float[Array, "P D"] | None:
    """Returns the meta-prompt's tokens, None without it."""
    return cast(Array, self.prompt.apply({"shared": shared})) if self.prompt else None

  def call(self, groups: dict[str, Params], *arguments: Any, **how: Any) -> Any:
    """Returns what `flora` makes of the groups of variables."""
    return self.flora.apply(groups, *arguments, **how)

  def adapters(self, variables: Variables, inputs: StepInputs) -> Adapters:
    del inputs
    deltas = self.call(collections(variables))
    return Adapters(deltas=deltas, prompt=self.tokens(variables.shared))

  def end_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    """Writes the core to `mem`; after task 1 the bases may become orthonormal."""
    orthonormalise = view.index == 0 and self.settings.bases.orthonormalise == "svd"
    _, changed = self.call(
      collections(variables),
      view.index,
      orthonormalise,
      method="commit",
      mutable=["shared", "mem"],
    )
    variables = variables.replace(**changed)
    inner = self.call(collections(variables), method="interference")
    variables, facts = super().end_task(variables, view)
    cosines = jnp.mean(jnp.stack([low_rank.cosine(x) for x in inner.values()]), axis=0)
    facts["interference"] = cosines.tolist()
    facts["interference_by_target"] = [inner[name].tolist() for name in self.flora.targets]
    return variables, facts

  def past(self, weights: Params, variables: Variables) -> Params:
    deltas = self.call(collections(variables), method="past")
    return low_rank.fold_deltas(weights, deltas)

  def folded(self, weights: Params, variables: Variables) -> tuple[Params, Adapters]:
    return self.past(weights, variables), Adapters(prompt=self.tokens(variables.shared))

  def rules(self, task: int) -> Rules:
    return (*optimizer_groups.rules(self.settings, task), *super().rules(task))

  def stored(self, facts: list[Facts]) -> dict[str, Any]:
    """Counts the bases and the prompt once, M and N of each task at its rank.

    `mem` pads M·Nᵀ to r_max with zeros, which checkpoints compress.
    """
    bases, sizes = self.settings.bases, self.backbone.sizes
    shared = low_rank.num_parameters(sizes, bases.targets, bases.max_rank)
    shared += self.settings.prompt.num_tokens * sizes.width
    num_cores = 2 * sizes.depth * len(bases.targets)
    per_task = [num_cores * fact["rank"] ** 2 for fact in facts]
    return super().stored(facts) | {"shared": shared, "per_task": per_task}


def collections(variables: Variables) -> dict[str, Params]:
  """Returns the groups that the Flax modules read, which are their collections."""
  return {"shared": variables.shared, "cur": variables.cur, "mem": variables.mem}


METHOD = FMLoRA
