"""SD-LoRA: directions of earlier tasks stay, their magnitudes are learned anew in every task.

Source: Wu et al. (arXiv:2501.13198): in task t
  dW = s_t·A_t·B_tᵀ + sum_{i<t} s_i·A_i·B_iᵀ / (|A_i||B_i|), Frobenius norms,
with one scalar a task for all layers and projections, each back at 0.8 when a task starts, and the
current direction not normalised: as in the code (SD/backbone/lora.py:159-196, 326-353). Its
`ortho_loss` is computed and never used (SD/models/sdlora.py:225-236), so there is none here; it
never reads the scalars that it saves, and its evaluation overwrites the sum over directions
(SD/backbone/lora.py:228-250): here the learned scalars are stored and evaluated.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fmlora_jax import config as config_lib
from fmlora_jax.methods.common import base, recipes
from fmlora_jax.methods.common.base import AdaptedViT, StepInputs
from fmlora_jax.models import low_rank
from fmlora_jax.types import (
  Adapters,
  Facts,
  LowRank,
  OptimizerGroup,
  Params,
  Reported,
  Rules,
  TaskView,
  Variables,
)

FIRST_SCALE = 0.8  # SD/backbone/lora.py:326-328


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.LowRankConfig):
  """Settings of SD-LoRA: rank and targets alone; the defaults are the code's."""

  name: str = "sd_lora"


# exceptions, beside those of common/recipes.py:
# - rank 10 in every task is the code's; the logs with 5 and 10 tasks have 16 from task 2 on
# - the logs' seeds: 1995 for ImageNet-R, 1994 for CIFAR-100; 1993, ours, is that of the json files
# - CUB-200: SD has no settings; ImageNet-R's
# - DomainNet: SD has settings and no loader for its images; the published split
OFFICIAL = recipes.like_sd_lora(rank=10)


@dataclasses.dataclass(frozen=True, eq=False)
class SDLoRA(AdaptedViT[Config]):
  """SD-LoRA: the current direction and all scalars in `cur`, learned directions in `mem`.

  The past is a second low-rank delta of each projection beside the current one, of rank T·r with a
  diagonal core of magnitudes: no gradient of its factors is computed, and tasks to come, whose
  slots are zero, change nothing. mem["scales"] is [T, T]: row t holds the scalars of tasks 0..t
  after task t.

  Raises:
    ConfigError: if the rank is above min(d_in, d_out) of a target.
  """

  reports = (base.RANK, Reported(name="scales", kind=list), *AdaptedViT.reports)

  def __post_init__(self):
    base.check_rank(self.settings.rank, "method.rank", self.backbone, self.settings.targets)

  @property
  def groups(self) -> dict[str, OptimizerGroup]:
    # no decay: a scalar of 0 would switch a task off
    return super().groups | {"scale": OptimizerGroup(decays=False)}

  def fresh(self, key: PRNGKeyArray) -> Params:
    """Returns the factors of a new direction for each target."""
    settings = self.settings
    return low_rank.fresh(
      key, self.backbone.sizes, settings.targets, settings.rank, draw=low_rank.torch_uniform
    )

  def init(self, key: PRNGKeyArray, weights: Params) -> Variables:
    num_tasks = self.spec.num_tasks
    directions = base.empty_slots(with_norms(self.fresh(key)), num_tasks)
    scales = jnp.zeros((num_tasks, num_tasks))
    variables = super().init(key, weights)
    return variables.update(mem={"directions": directions, "scales": scales})

  def begin_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    variables, facts = super().begin_task(variables, view)
    # with a dtype: Python's float alone would be weakly typed, and a second program
    scales = jnp.full(self.spec.num_tasks, FIRST_SCALE, jnp.float32)
    variables = variables.update(cur={"lora": self.fresh(view.key("lora")), "scales": scales})
    return variables, facts | {"rank": self.settings.rank}

  def adapters(self, variables: Variables, inputs: StepInputs) -> Adapters:
    scales, task = variables.cur["scales"], inputs.task.index
    past = weighted_sums(variables.mem["directions"], scales, task)
    core = jnp.broadcast_to(scales[task], (self.backbone.sizes.depth, self.settings.rank))
    current = variables.cur["lora"]
    return Adapters(
      deltas={name: (past[name], LowRank(**f, core=core)) for name, f in current.items()}
    )

  def end_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    t, cur, mem = view.index, variables.cur, variables.mem
    seen = jnp.where(jnp.arange(self.spec.num_tasks) <= t, cur["scales"], 0)
    directions = base.put_slot(mem["directions"], t, with_norms(cur["lora"]))
    scales = mem["scales"].at[t].set(seen)
    variables = variables.update(mem={"directions": directions, "scales": scales})
    variables, facts = super().end_task(variables, view)
    return variables, {"scales": seen[: t + 1].tolist()} | facts

  def folded(self, weights: Params, variables: Variables) -> tuple[Params, Adapters]:
    scales = variables.mem["scales"]
    last = jnp.count_nonzero(scales.any(axis=1)) - 1
    deltas = weighted_sums(variables.mem["directions"], scales[last], last)
    return low_rank.fold_deltas(weights, deltas), Adapters()

  def rules(self, task: int) -> Rules:
    return (("cur/lora/.*", "adapter"), ("cur/scales", "scale"), *super().rules(task))

  def stored(self, facts: list[Facts]) -> dict[str, Any]:
    settings = self.settings
    factors = low_rank.num_parameters(self.backbone.sizes, settings.targets, settings.rank)
    return super().stored(facts) | {"per_task": [factors + 1] * len(facts)}


def with_norms(factors: Params) -> Params:
  """Returns the factors of each target with |A||B| in each layer, "norm" [L]."""
  return {name: f | {"norm": norm(f["a"]) * norm(f["b"])} for name, f in factors.items()}


def norm(factor: Float[Array, "L D R"]) -> Float[Array, " L"]:
  """Returns the Frobenius norm in each layer."""
  return jnp.sqrt(jnp.sum(factor**2, axis=(1, 2)))


def magnitudes(
  scales: Float[Array, " T"], norms: Float[Array, "T L"], newest: int | Int[Array, ""]
) -> Float[Array, "T L"]:
  """Returns the factor on each A_i·B_iᵀ: s_i / (|A_i||B_i|), s_i alone of the newest direction.

  It is 0 of an empty slot, whose norms are 0. Source: the equation in the module's docstring.
  """
  norms = jnp.where((jnp.arange(len(scales)) == newest)[:, None], 1, norms)
  is_empty = norms == 0
  return jnp.where(is_empty, 0, scales[:, None] / jnp.where(is_empty, 1, norms))


def weighted_sums(
  directions: Params, scales: Float[Array, " T"], newest: int | Int[Array, ""]
) -> dict[str, LowRank]:
  """Returns the sum of all directions of each target by their magnitudes, as one delta."""

  def weighted_sum(slots):
    factor = magnitudes(scales, slots["norm"], newest)
    core = jnp.repeat(factor.T, slots["a"].shape[-1], axis=1)
    return LowRank(a=low_rank.join_ranks(slots["a"]), b=low_rank.join_ranks(slots["b"]), core=core)

  return {name: weighted_sum(slots) for name, slots in directions.items()}


METHOD = SDLoRA
