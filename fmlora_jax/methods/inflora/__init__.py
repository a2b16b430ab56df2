"""InfLoRA: a frozen input factor, out of the way of old tasks, under a trained output factor.

Source: Liang and Li, arXiv:2404.00228; public code liangyanshuo/InfLoRA (IL below). dW_t = A_t·B_tᵀ
at keys and values of every layer, with one A_t for both, since they see the same input. Before a
task, A_t is set to the leading directions of the task's inputs within what old tasks left free
(`dualgpm.py`); after it, its inputs are remembered. Only B_t is trained: gradients then stay in
the span of A_t. (The paper calls the frozen factor B and the trained one A; the names here are
those of the code.)

Where the public code differs: it fills A_t with arbitrary directions where fewer than `rank` are
free, marks a layer wrongly whose first task spans half of the space (see `dualgpm.py`), and
computes k-means keys that nothing reads.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmlora_jax import config as config_lib
from fmlora_jax.methods.common import base, recipes
from fmlora_jax.methods.inflora import dualgpm
from fmlora_jax.models import low_rank
from fmlora_jax.types import Adapters, Backbone, LowRank, Method, SequenceSpec, TaskView, Variables

TARGETS = ("key", "value")  # IL/models/vit_inflora.py:191-207


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config_lib.MethodConfig):
  """Settings of InfLoRA.

  Attributes:
    rank: columns of A_t and B_t.
    threshold, final_threshold: share of the inputs' moment that is remembered after the first task
      and, going up by the same step at each task, after one that would follow the last. Of fourth
      powers: see `dualgpm.py`.
    retain: whether a layer whose old tasks span more than half of its inputs remembers what they
      left free instead (DualGPM). False is plain GPM: the same directions, more numbers kept.
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


def make(config: config_lib.Config, backbone: Backbone, spec: SequenceSpec) -> Method:
  """Returns InfLoRA as a Method.

  Raises:
    ConfigError: if the rank is above the width.
  """
  settings, sizes = config.method, backbone.sizes
  base.check_rank(settings.rank, "method.rank", backbone, TARGETS)
  add_moments = make_add_moments(backbone)

  def init(key, weights):
    del key, weights
    stack = jnp.zeros((spec.num_tasks, sizes.depth, sizes.width, settings.rank))
    gpm = dualgpm.empty(sizes.depth, sizes.width)
    lora = {"a": stack} | dict.fromkeys(TARGETS, stack)
    return Variables(frozen={}, shared={}, cur={}, mem={"lora": lora, "gpm": gpm})

  def moments(variables, view: TaskView, when: str) -> Float[np.ndarray, "L D D"]:
    """Returns E[x·xᵀ] of each layer's attention inputs under all that was learned; float64.

    Over all tokens of an epoch of augmented training images. Source: IL/models/vit_inflora.py:236.
    """
    trunk = base.cast_kernels(past(view.weights, variables), jnp.dtype(config.compute_dtype))
    sums, count = jnp.zeros((sizes.depth, sizes.width, sizes.width)), jnp.int32(0)
    # all where the view's arrays are: other places would be other programs
    sums, count, trunk = jax.device_put((sums, count, trunk), view.arrays.index.sharding)
    for step, batch in enumerate(view.train_batches(0)):
      key = jax.random.fold_in(view.key(f"inflora {when}"), step)
      sums, count = add_moments(sums, count, trunk, *batch, key, augment=view.augment)
    return np.asarray(sums, np.float64) / int(count)

  def begin_task(variables, view):
    spaces = dualgpm.unpack(variables.mem["gpm"])
    pairs = zip(spaces, moments(variables, view, "before"), strict=True)
    directions = np.stack([dualgpm.leading(*pair, settings.rank) for pair in pairs])
    a = jnp.asarray(directions / np.sqrt(3), jnp.float32)  # IL/methods/inflora.py:126-127
    lora = {"a": a} | dict.fromkeys(TARGETS, jnp.zeros_like(a))
    return variables.replace(cur=variables.cur | {"lora": lora}), {"rank": settings.rank}

  def adapters(variables, inputs):
    del inputs
    lora = variables.cur["lora"]
    return Adapters(deltas={name: LowRank(a=lora["a"], b=lora[name]) for name in TARGETS})

  def end_task(variables, view):
    lora = base.put_slot(variables.mem["lora"], view.index, variables.cur["lora"])
    variables = variables.replace(mem=variables.mem | {"lora": lora})
    rise = settings.final_threshold - settings.threshold
    threshold = settings.threshold + rise * view.index / spec.num_tasks
    pairs = zip(
      dualgpm.unpack(variables.mem["gpm"]), moments(variables, view, "after"), strict=True
    )
    spaces = [dualgpm.update(*pair, threshold, dual=settings.retain) for pair in pairs]
    variables = variables.replace(mem=variables.mem | {"gpm": dualgpm.pack(spaces)})
    return variables, {"spanned": [space.num_spanned for space in spaces]}

  def past(weights, variables):
    # tasks to come are zero; their ranks are stacked next to those of the past
    stacks = {name: low_rank.join_ranks(stack) for name, stack in variables.mem["lora"].items()}
    return low_rank.fold_deltas(
      weights, {name: LowRank(a=stacks["a"], b=stacks[name]) for name in TARGETS}
    )

  def stored(facts):
    """A_t once and B_t twice per layer; the bases of GPM as numbers computed from the data."""
    each = (1 + len(TARGETS)) * sizes.depth * sizes.width * settings.rank
    spanned = facts[-1]["spanned"]
    columns = [min(k, sizes.width - k) for k in spanned] if settings.retain else spanned
    return {
      "shared": 0,
      "per_task": [each] * len(facts),
      "statistics": sizes.width * sum(columns),
    }

  return base.with_head(
    config,
    backbone,
    spec,
    init=init,
    adapters=adapters,
    begin_task=begin_task,
    end_task=end_task,
    past=past,
    rules=lambda task: (("cur/lora/a", "frozen"), ("cur/lora/(key|value)", "adapter")),
    stored=stored,
    feature_epochs=2,
  )


def make_add_moments(backbone: Backbone):
  """Returns the jitted function that adds a batch to the sums of x·xᵀ and to the count of tokens.

  It is one of (sums [L, D, D], count, weights, examples, rows, key); the sums are float32 and
  donated, the images are those of `augment`.
  """

  @functools.partial(jax.jit, static_argnames="augment", donate_argnames=("sums", "count"))
  def add_moments(sums, count, weights, examples, rows, key, *, augment):
    batch = augment(examples, rows, key)

    def product(x: Float[Array, "B N D"]):
      x = x * batch.valid[:, None, None].astype(x.dtype)
      return jnp.einsum(
        "bnd,bne->de", x, x, precision="highest", preferred_element_type=jnp.float32
      )

    layers = backbone.attention_inputs(weights, batch.images)
    # one layer at a time: XLA then never holds the inputs of all
    sums = sums + jnp.stack([product(x) for x in layers])
    return sums, count + batch.valid.sum() * layers.shape[2]

  return add_moments


def _official(benchmark: str, threshold: float) -> dict:
  # IL/configs/mimg{5,10,20}_inflora.json, cifar100_inflora.json
  method = {"rank": 10, "threshold": threshold, "final_threshold": 1.0, "retain": True}
  optim = recipes.optim("adam", 5e-4, schedule="coda_cosine")
  return recipes.like_inflora(benchmark, optim=optim, method=method)


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
