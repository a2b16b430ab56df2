"""InfLoRA: a frozen input factor, orthogonal to earlier tasks, and a trained output factor.

Source: Liang and Li, arXiv:2404.00228; public code IL (see recipes.py). dW_t = A_t·B_tᵀ
at keys and values of every layer, with one A_t for both, since they see the same input. Before a
task, A_t is set to the leading directions of the task's inputs in the space that earlier tasks left
free (`dualgpm.py`); after it, its inputs are remembered. Only B_t is trained: gradients then stay
in the span of A_t. (The paper calls the frozen factor B and the trained one A; the names here are
those of the code.)

Where the public code differs: it fills A_t with arbitrary directions where fewer than `rank` are
free, marks a layer wrongly whose first task spans half of the space (see `dualgpm.py`), and
computes k-means keys that nothing reads.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fmlora_jax import config as config_lib
from fmlora_jax.methods.common import base, recipes
from fmlora_jax.methods.common.base import AdaptedViT, StepInputs
from fmlora_jax.methods.inflora import dualgpm
from fmlora_jax.models import low_rank
from fmlora_jax.types import Adapters, Facts, LowRank, Params, Reported, Rules, TaskView, Variables

TARGETS = ("key", "value")  # IL/models/vit_inflora.py:191-207


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.MethodConfig):
  """Settings of InfLoRA.

  Attributes:
    rank: columns of A_t and B_t.
    threshold: share of the inputs' moment that is remembered after the first task. Of fourth
      powers: see `dualgpm.py`.
    final_threshold: the same after a task that would follow the last; in between it goes up by the
      same step at each task.
    retain: whether a layer whose earlier tasks span more than half of its inputs remembers the free
      space instead (DualGPM). False is plain GPM: the same directions, more numbers stored.
  """

  name: str = "inflora"
  rank: int = 10
  threshold: float = 0.98
  final_threshold: float = 1.0
  retain: bool = True

  def __post_init__(self):
    config_lib.require(self.rank >= 1, "rank", self.rank, ">= 1")
    config_lib.require(0 < self.threshold < 1, "threshold", self.threshold, "in (0, 1)")
    rises = self.threshold <= self.final_threshold <= 1
    config_lib.require(rises, "final_threshold", self.final_threshold, "in [threshold, 1]")


@dataclasses.dataclass(frozen=True, eq=False)
class InfLoRA(AdaptedViT[Config]):
  """InfLoRA: A_t and B_t of the task in `cur`; those of all tasks and DualGPM's memory in `mem`.

  Raises:
    ConfigError: if the rank is above the width.
  """

  feature_epochs = 2
  reports = (base.RANK, Reported(name="spanned", kind=list), *AdaptedViT.reports)

  def __post_init__(self):
    base.check_rank(self.settings.rank, "method.rank", self.backbone, TARGETS)

  @functools.cached_property
  def add_moments(self) -> Callable[..., tuple[Float[Array, "L D D"], Int[Array, ""]]]:
    """The jitted `_add_moments`; sums and count are donated."""
    donated = ("sums", "count")
    return jax.jit(self._add_moments, static_argnames="augment", donate_argnames=donated)

  def init(self, key: PRNGKeyArray, weights: Params) -> Variables:
    sizes = self.backbone.sizes
    stack = jnp.zeros((self.spec.num_tasks, sizes.depth, sizes.width, self.settings.rank))
    lora = {"a": stack} | dict.fromkeys(TARGETS, stack)
    gpm = dualgpm.empty(sizes.depth, sizes.width)
    return super().init(key, weights).update(mem={"lora": lora, "gpm": gpm})

  def begin_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    variables, facts = super().begin_task(variables, view)
    moments, spaces = self.moments(variables, view, "before"), self.spaces(variables)
    a = jnp.asarray(directions(spaces, moments, self.settings.rank), jnp.float32)
    lora = {"a": a} | dict.fromkeys(TARGETS, jnp.zeros_like(a))
    return variables.update(cur={"lora": lora}), facts | {"rank": self.settings.rank}

  def spaces(self, variables: Variables) -> list[dualgpm.Subspace]:
    """Returns the memory of each layer."""
    return dualgpm.unpack(variables.mem["gpm"])

  def moments(self, variables: Variables, view: TaskView, when: str) -> Float[np.ndarray, "L D D"]:
    """Returns E[x·xᵀ] of each layer's attention inputs, with all learned tasks folded in; float64.

    Over all tokens of an epoch of augmented training images. Source: IL/models/vit_inflora.py:236.

    Args:
      when: "before" or "after" the task's training; the crops differ.
    """
    depth, width = self.backbone.sizes.depth, self.backbone.sizes.width
    trunk = base.cast_kernels(self.past(view.weights, variables), self.dtype)
    sums, count = jnp.zeros((depth, width, width)), jnp.int32(0)
    # all with the sharding of the view's arrays: another one would be another program
    sums, count, trunk = jax.device_put((sums, count, trunk), view.arrays.index.sharding)
    for step, batch in enumerate(view.train_batches(0)):
      key = jax.random.fold_in(view.key(f"inflora {when}"), step)
      sums, count = self.add_moments(sums, count, trunk, *batch, key, augment=view.augment)
    return np.asarray(sums, np.float64) / int(count)

  def _add_moments(self, sums, count, weights, examples, rows, key, *, augment):
    """Returns the sums of x·xᵀ, [L, D, D] float32, and the count of tokens with a batch added."""
    batch = augment(examples, rows, key)
    layers = self.backbone.attention_inputs(weights, batch.images)
    # one layer at a time: XLA then never holds the inputs of all
    sums = sums + jnp.stack([second_moment(x, batch.valid) for x in layers])
    return sums, count + batch.valid.sum() * layers.shape[2]

  def adapters(self, variables: Variables, inputs: StepInputs) -> Adapters:
    del inputs
    return Adapters(deltas=deltas_of(variables.cur["lora"]))

  def end_task(self, variables: Variables, view: TaskView) -> tuple[Variables, Facts]:
    lora = base.put_slot(variables.mem["lora"], view.index, variables.cur["lora"])
    variables = variables.update(mem={"lora": lora})
    spaces = [
      dualgpm.update(space, moment, self.threshold(view.index), dual=self.settings.retain)
      for space, moment in zip(
        self.spaces(variables), self.moments(variables, view, "after"), strict=True
      )
    ]
    variables = variables.update(mem={"gpm": dualgpm.pack(spaces)})
    variables, facts = super().end_task(variables, view)
    return variables, {"spanned": [space.num_spanned for space in spaces]} | facts

  def threshold(self, task: int) -> float:
    """Returns the share of the moment that is remembered after a task."""
    first, final = self.settings.threshold, self.settings.final_threshold
    return first + (final - first) * task / self.spec.num_tasks

  def past(self, weights: Params, variables: Variables) -> Params:
    # tasks to come are zero; their ranks are stacked next to those of the past
    joined = {name: low_rank.join_ranks(stack) for name, stack in variables.mem["lora"].items()}
    return low_rank.fold_deltas(weights, deltas_of(joined))

  def rules(self, task: int) -> Rules:
    factors = ("cur/lora/a", "frozen"), ("cur/lora/(key|value)", "adapter")
    return (*factors, *super().rules(task))

  def stored(self, facts: list[Facts]) -> dict[str, Any]:
    """Counts A_t once and B_t twice per layer; the columns of DualGPM's bases as statistics."""
    counts, sizes = super().stored(facts), self.backbone.sizes
    each = (1 + len(TARGETS)) * sizes.depth * sizes.width * self.settings.rank
    spanned = facts[-1]["spanned"]
    columns = [min(k, sizes.width - k) for k in spanned] if self.settings.retain else spanned
    statistics = counts.get("statistics", 0) + sizes.width * sum(columns)
    return counts | {"per_task": [each] * len(facts), "statistics": statistics}


def deltas_of(lora: Mapping[str, Float[Array, "L D R"]]) -> dict[str, LowRank]:
  """Returns the deltas of key and value, with one A for both."""
  return {name: LowRank(a=lora["a"], b=lora[name]) for name in TARGETS}


def directions(
  spaces: Sequence[dualgpm.Subspace], moments: Float[np.ndarray, "L D D"], rank: int
) -> Float[np.ndarray, "L D r"]:
  """Returns A_t of each layer: leading free directions over √3; IL/methods/inflora.py:126."""
  pairs = zip(spaces, moments, strict=True)
  return np.stack([dualgpm.leading(*pair, rank) for pair in pairs]) / np.sqrt(3)


def second_moment(x: Float[Array, "B N D"], valid: Bool[Array, " B"]) -> Float[Array, "D D"]:
  """Returns the sum of x·xᵀ over the tokens of valid images, summed in float32."""
  x = x * valid[:, None, None].astype(x.dtype)
  return jnp.einsum("bnd,bne->de", x, x, precision="highest", preferred_element_type=jnp.float32)


METHOD = InfLoRA


def _official(benchmark: str, threshold: float) -> dict:
  # IL/configs/mimg{5,10,20}_inflora.json, cifar100_inflora.json
  method = {"rank": 10, "threshold": threshold, "final_threshold": 1.0, "retain": True}
  optim = recipes.optim("adam", 5e-4, schedule="coda_cosine")
  return recipes.like_inflora(benchmark, optim=optim, method=method)


# exceptions, beside those of common/recipes.py and in the module's docstring:
# - CUB-200: IL has no settings; ImageNet-R's, with the crops that IL has for it
# - DomainNet: IL's lists of images are not public; the published split
OFFICIAL = {
  "imagenet_r": _official("imagenet_r", 0.98),
  "cifar100": _official("cifar100", 0.95),
  "cub200": _official("cub200", 0.98),
  # IL/configs/domainnet_inflora.json, IL/methods/inflora_domain.py: `update_GPM` is plain GPM
  "domainnet": recipes.like_inflora(
    "domainnet",
    optim=recipes.optim(
      "sgd", 5e-3, head_learning_rate=1e-2, schedule="steps", milestones=(4,), decay=0.1
    ),
    method={"rank": 30, "threshold": 0.95, "final_threshold": 1.0, "retain": False},
  ),
}
