"""SD-LoRA: directions of earlier tasks stay, their magnitudes are learned anew in every task.

Source: Wu et al. (arXiv:2501.13198): in task t
  dW = s_t·A_t·B_tᵀ + sum_{i<t} s_i·A_i·B_iᵀ / (|A_i||B_i|), Frobenius norms,
with one scalar a task for all layers and projections, each back at 0.8 when a task starts, and the
current direction not normalised: as in the code (SD/backbone/lora.py:159-196, 326-353). Its
`ortho_loss` is computed and never used (SD/models/sdlora.py:225-236), so there is none here; what
it saves of the scalars is never read, and its evaluation overwrites the sum over directions
(SD/backbone/lora.py:228-250): here the learned scalars are kept, and evaluated.
"""

import dataclasses

import jax
import jax.numpy as jnp

from fmlora_jax import config as config_lib
from fmlora_jax.methods.common import base, recipes
from fmlora_jax.models import low_rank
from fmlora_jax.types import (
  Adapters,
  Backbone,
  LowRank,
  Method,
  OptimizerGroup,
  SequenceSpec,
  Variables,
)

FIRST_SCALE = 0.8  # SD/backbone/lora.py:326-328


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.LowRankConfig):
  """No settings beyond rank and targets, which are the code's."""

  name: str = "sd_lora"


# rank 10 in every task is the code's; the logs with 5 and 10 tasks have 16 from task 2 on
OFFICIAL = recipes.like_sd_lora(rank=10)


def make(config: config_lib.Config, backbone: Backbone, spec: SequenceSpec) -> Method:
  """Returns SD-LoRA as a Method.

  The past is a second low-rank delta of each projection beside the current one, of rank T·r with a
  diagonal core of magnitudes: no gradient of its factors is computed, and tasks to come, whose
  slots are zero, change nothing.

  Raises:
    ConfigError: if the rank is above min(d_in, d_out) of a target.
  """
  settings, sizes, num_tasks = config.method, backbone.sizes, spec.num_tasks
  base.check_rank(settings.rank, "method.rank", backbone, settings.targets)

  def fresh(key):
    return low_rank.fresh(key, sizes, settings.targets, settings.rank, draw=base.torch_uniform)

  def slot(factors):
    """What `mem` keeps of one task: its factors and the product of their norms per layer."""
    return {name: f | {"norm": _norm(f["a"]) * _norm(f["b"])} for name, f in factors.items()}

  def init(key, weights):
    """`scales` is [T, T]: row t is what task t made of the scalars of tasks 0..t."""
    del weights
    directions = jax.tree.map(lambda leaf: jnp.zeros((num_tasks, *leaf.shape)), slot(fresh(key)))
    scales = jnp.zeros((num_tasks, num_tasks))
    return Variables(frozen={}, shared={}, cur={}, mem={"directions": directions, "scales": scales})

  def weighted(directions, scales, newest):
    """The sum of all directions, each but the newest divided by its norm and times its scalar."""

    def delta(slots):
      norm = jnp.where((jnp.arange(num_tasks) == newest)[:, None], 1, slots["norm"])
      is_empty = norm == 0
      magnitude = jnp.where(is_empty, 0, scales[:, None] / jnp.where(is_empty, 1, norm))
      return LowRank(
        a=low_rank.join_ranks(slots["a"]),
        b=low_rank.join_ranks(slots["b"]),
        core=jnp.repeat(magnitude.T, settings.rank, axis=1),
      )

    return {name: delta(slots) for name, slots in directions.items()}

  def adapters(variables, inputs):
    scales, task = variables.cur["scales"], inputs.task.index
    past = weighted(variables.mem["directions"], scales, task)
    core = jnp.broadcast_to(scales[task], (sizes.depth, settings.rank))
    return Adapters(
      deltas={
        name: (past[name], LowRank(**f, core=core)) for name, f in variables.cur["lora"].items()
      }
    )

  def begin_task(variables, view):
    # with a dtype: Python's float alone would be weakly typed, and a second program
    scales = jnp.full(num_tasks, FIRST_SCALE, jnp.float32)
    cur = variables.cur | {"lora": fresh(view.key("lora")), "scales": scales}
    return variables.replace(cur=cur), {"rank": settings.rank}

  def end_task(variables, view):
    t, cur, mem = view.index, variables.cur, variables.mem
    seen = jnp.where(jnp.arange(num_tasks) <= t, cur["scales"], 0)
    directions = base.put_slot(mem["directions"], t, slot(cur["lora"]))
    mem = mem | {"directions": directions, "scales": mem["scales"].at[t].set(seen)}
    return variables.replace(mem=mem), {"scales": seen[: t + 1].tolist()}

  def folded(weights, variables):
    scales = variables.mem["scales"]
    last = jnp.count_nonzero(scales.any(axis=1)) - 1
    everything = weighted(variables.mem["directions"], scales[last], last)
    return low_rank.fold_deltas(weights, everything), Adapters()

  def stored(facts):
    each = low_rank.num_parameters(sizes, settings.targets, settings.rank) + 1
    return {"shared": 0, "per_task": [each] * len(facts)}

  return base.with_head(
    config,
    backbone,
    spec,
    init=init,
    adapters=adapters,
    begin_task=begin_task,
    end_task=end_task,
    folded=folded,
    rules=lambda task: (("cur/lora/.*", "adapter"), ("cur/scales", "scale")),
    groups={"scale": OptimizerGroup(decays=False)},  # a scalar of 0 would switch a task off
    stored=stored,
  )


def _norm(factor):
  """Frobenius norms [L] of [L, D, R]."""
  return jnp.sqrt(jnp.sum(factor**2, axis=(1, 2)))
