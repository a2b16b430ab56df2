"""FM-LoRA: low-rank updates on shared bases, a rank per task, and meta-prompt tokens.

Source: Yu et al., arXiv:2504.08823. F-LoRA, Eq. (1-10): dW_i = A·M_i·N_iᵀ·Bᵀ with A and B trained
in task 1 only. DRS, Eq. (11-12): `drs.py`. DMP, Eq. (13): prompt tokens trained in every task. The
past is one core between the bases and is folded into the projections before a task starts, so
neither a training step nor the folded model costs more with more tasks.
"""

import jax
import jax.numpy as jnp

from fmlora_jax import config as config_lib
from fmlora_jax.config import ConfigError
from fmlora_jax.methods.common import base
from fmlora_jax.methods.fm_lora import drs
from fmlora_jax.methods.fm_lora.settings import Config
from fmlora_jax.models import heads, low_rank, rank_selector
from fmlora_jax.types import (
  Adapters,
  Backbone,
  LowRank,
  Method,
  OptimizerGroup,
  SequenceSpec,
  Variables,
)


def make(config: config_lib.Config, backbone: Backbone, spec: SequenceSpec) -> Method:
  """Returns FM-LoRA as a Method.

  Raises:
    ConfigError: if a rank is above r_max or r_max above min(d_in, d_out) of a target, or if the
      rank selector has no validation images.
  """
  settings: Config = config.method
  targets, max_rank, depth = settings.bases.targets, settings.bases.max_rank, backbone.sizes.depth
  _check(settings, backbone, spec)
  head = heads.make_head(config.head.kind, spec.num_classes, backbone.sizes.width)

  def init(key, weights):
    del weights
    shared = {"bases": {}}
    for i, name in enumerate(targets):
      key_a, key_b = jax.random.split(jax.random.fold_in(key, i))
      d_in, d_out = backbone.sizes.projection(name)
      shared["bases"][name] = {
        "a": base.random_factor(key_a, depth, d_in, max_rank),
        "b": base.random_factor(key_b, depth, d_out, max_rank),
      }
    if settings.prompt.num_tokens:
      shape = (settings.prompt.num_tokens, backbone.sizes.width)
      shared["prompt"] = 0.02 * jax.random.normal(jax.random.fold_in(key, len(targets)), shape)
    cores = {name: jnp.zeros((spec.num_tasks, depth, max_rank, max_rank)) for name in targets}
    return Variables(frozen={}, shared=shared, cur={}, mem={"cores": cores})

  def fresh_core(rank):
    """M = I and N = 0: dW = 0, and N sees a gradient at once."""
    eye = jnp.broadcast_to(jnp.eye(rank), (depth, rank, rank))
    return {name: {"m": eye, "n": jnp.zeros((depth, rank, rank))} for name in targets}

  def deltas(bases, cores):
    """Pairs each core with the leading columns of its bases: slices, so a small rank is cheaper."""
    rank = {name: core.shape[-1] for name, core in cores.items()}
    return {
      name: LowRank(
        a=bases[name]["a"][..., : rank[name]], b=bases[name]["b"][..., : rank[name]], core=core
      )
      for name, core in cores.items()
    }

  def adapters(variables, inputs):
    del inputs
    cores = {name: _product(core) for name, core in variables.cur["core"].items()}
    return Adapters(
      deltas=deltas(variables.shared["bases"], cores), prompt=variables.shared.get("prompt")
    )

  def past(weights, variables):
    """Returns W0 + A·C·Bᵀ with C the sum of the cores of the tasks so far."""
    cores = {name: core.sum(0) for name, core in variables.mem["cores"].items()}
    return low_rank.fold_deltas(weights, deltas(variables.shared["bases"], cores))

  def folded(weights, variables):
    return past(weights, variables), Adapters(prompt=variables.shared.get("prompt"))

  def masked_logits(params, fixed, mask, images):
    cores = {
      name: rank_selector.mask_core(core["m"], core["n"], mask)
      for name, core in params["core"].items()
    }
    adapted = Adapters(deltas=deltas(fixed["bases"], cores), prompt=fixed.get("prompt"))
    return head.logits(params["head"], backbone.apply(fixed["backbone"], images, adapted))

  selector = drs.RankSelector(config, masked_logits)

  def choose_rank(variables, view):
    if view.index == 0:
      return {"rank": max_rank, "complexity": None}
    if settings.drs.strategy == "fixed":
      return {"rank": settings.drs.rank, "complexity": None}
    trunk = base.cast_kernels(past(view.weights, variables), jnp.dtype(config.compute_dtype))
    fixed = variables.shared | {"backbone": trunk}
    params = {"core": fresh_core(max_rank), "head": variables.cur["head"]}
    return selector.select(params, fixed, view)

  def begin_task(variables, view):
    facts = choose_rank(variables, view)
    return variables.replace(cur=variables.cur | {"core": fresh_core(facts["rank"])}), facts

  def end_task(variables, view):
    cores = {name: _product(core) for name, core in variables.cur["core"].items()}
    shared = variables.shared
    if view.index == 0 and settings.bases.orthonormalise == "svd":
      order = {
        name: low_rank.orthonormalise(delta)
        for name, delta in deltas(shared["bases"], cores).items()
      }
      shared = shared | {"bases": {name: {"a": d.a, "b": d.b} for name, d in order.items()}}
      cores = {name: delta.core for name, delta in order.items()}
    stacks = {
      name: stack.at[view.index].set(low_rank.pad_core(cores[name], max_rank))
      for name, stack in variables.mem["cores"].items()
    }
    variables = variables.replace(shared=shared, mem=variables.mem | {"cores": stacks})
    return variables, {"interference": interference(variables)}

  def interference(variables):
    """Mean over targets of the cosines between the tasks' deltas: T x T nested lists."""
    cosines = [
      low_rank.cosine(low_rank.interference(stack, *map(variables.shared["bases"][name].get, "ab")))
      for name, stack in variables.mem["cores"].items()
    ]
    return jnp.mean(jnp.stack(cosines), axis=0).tolist()

  def rules(task):
    bases, core, prompt = ("frozen", "adapter", "prompt") if task else ("bases",) * 3
    table = [("shared/bases/.*", bases), ("cur/core/.*", core)]
    if settings.prompt.num_tokens:
      table.append(("shared/prompt", prompt))
    return tuple(table)

  def stored(facts):
    ends = sum(sum(backbone.sizes.projection(name)) for name in targets)
    prompt = settings.prompt.num_tokens * backbone.sizes.width
    per_task = [2 * fact["rank"] ** 2 * depth * len(targets) for fact in facts]
    return {"shared": depth * ends * max_rank + prompt, "per_task": per_task}

  return base.with_head(
    config,
    backbone,
    spec,
    init=init,
    adapters=adapters,
    begin_task=begin_task,
    end_task=end_task,
    past=past,
    folded=folded,
    rules=rules,
    groups={
      "bases": OptimizerGroup(lr_scale=settings.bases.lr_scale),
      "prompt": OptimizerGroup(lr_scale=settings.prompt.lr_scale),
    },
    stored=stored,
  )


@jax.default_matmul_precision("highest")
def _product(core):
  """M·Nᵀ."""
  return core["m"] @ jnp.swapaxes(core["n"], -1, -2)


def _check(settings: Config, backbone: Backbone, spec: SequenceSpec) -> None:
  max_rank = settings.bases.max_rank
  base.check_rank(max_rank, "method.bases.max_rank", backbone, settings.bases.targets)
  if settings.drs.strategy == "fixed":
    chosen, field = settings.drs.rank, "rank"
  else:
    chosen, field = settings.drs.candidate_ranks[-1], "candidate_ranks"
    if spec.num_tasks > 1 and not spec.has_val:
      raise ConfigError(
        f"config.method.drs.strategy is {settings.drs.strategy!r} and a task has no validation "
        "images: set config.tasks.val_fraction > 0 or config.method.drs.strategy=fixed"
      )
  if chosen > max_rank:
    value = getattr(settings.drs, field)
    raise ConfigError(
      f"config.method.drs.{field} is {value}: must be at most config.method.bases.max_rank = "
      f"{max_rank}"
    )
