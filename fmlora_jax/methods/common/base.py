"""What methods share: a head around adapted features.

Most methods differ only in the `Adapters` they give the ViT and in what they do between tasks;
`with_head` makes a whole `Method` from that.
"""

import functools
import itertools
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from fmlora_jax.config import Config, ConfigError
from fmlora_jax.methods.common.alignment import HeadAlignment
from fmlora_jax.models import heads
from fmlora_jax.types import (
  Adapters,
  Backbone,
  Method,
  OptimizerGroup,
  Output,
  Params,
  Passes,
  Rules,
  SequenceSpec,
  TaskArrays,
  TaskView,
  Variables,
)

BATCH_VOTE = (
  "batchwise: a batch votes on its prompts, so a prediction depends on the batch it is in, and "
  "batches of one task's images tell which task it is"
)


@flax.struct.dataclass
class StepInputs:
  """What a training step sees besides variables and images.

  Attributes:
    task: the current one.
    key: of this step alone.
    valid: False for padding rows.
    query: class tokens of the untouched ViT, float32, without a gradient; None where the method
      asks for none.
  """

  task: TaskArrays
  key: PRNGKeyArray
  valid: Bool[Array, " B"]
  query: Float[Array, "B D"] | None = None


def with_head(
  config: Config,
  backbone: Backbone,
  spec: SequenceSpec,
  *,
  init: Callable[..., Variables],
  adapters: Callable[[Variables, StepInputs], Adapters] = lambda variables, inputs: Adapters(),
  penalty: Callable[..., Any] = lambda variables, inputs, features: jnp.float32(0),
  begin_task: Callable[..., tuple[Variables, dict]] = lambda variables, view: (variables, {}),
  end_task: Callable[..., tuple[Variables, dict]] = lambda variables, view: (variables, {}),
  past: Callable[[Params, Variables], Params] = lambda weights, variables: weights,
  folded: Callable[[Params, Variables], tuple[Params, Any]] | None = None,
  recall: Callable[..., Adapters] = lambda memory, query: memory,
  query: Literal["never", "test", "always"] = "never",
  read: Callable[..., Any] | None = None,
  rules: Callable[[int], Rules] = lambda task: (),
  groups: Mapping[str, OptimizerGroup] = types.MappingProxyType({}),
  stored: Callable[[list[dict]], dict],
  feature_epochs: int = 0,
  caveats: tuple[str, ...] = (),
) -> Method:
  """Returns a method whose features are the adapted ViT's and whose head is `config.head`.

  Args:
    init, begin_task, end_task, rules, stored, caveats: the method's own, without the head.
    adapters: what the ViT is handed during training.
    groups: the optimizer's besides "adapter" and "head".
    penalty: (variables, inputs, features [B, D]) -> what is added to the loss.
    past: (weights, variables) -> the backbone that a task trains on, the past folded in; float32.
      Unless `shared` holds a backbone: then that one is trained.
    folded: (weights, variables) -> backbone and memory for inference; None takes `past` and no
      adapters.
    recall: (memory, query [B, D] or None) -> the adapters at test time; memory is by default the
      adapters themselves.
    query: when the class token of the unadapted backbone is wanted, at one more forward pass.
    read: (backbone, images, adapters) -> features [B, D]; None takes the class token.
    feature_epochs: forward passes over the training images that begin_task and end_task do.
  """
  head = heads.make_head(config.head.kind, spec.num_classes, backbone.sizes.width)
  read = read or backbone.apply
  dtype = jnp.dtype(config.compute_dtype)
  starts_at_means = config.head.start == "class_mean"
  passes_at_test = 1 + (query != "never")

  def step_inputs(variables, images, task, key, valid):
    seen = None
    if query == "always":
      seen = jax.lax.stop_gradient(backbone.apply(variables.frozen["backbone"], images))
    if valid is None:
      valid = jnp.ones(len(images), bool)
    return StepInputs(task=task, key=key, valid=valid, query=seen)

  def features_so_far(model, images):
    """Of the folded model."""
    seen = backbone.apply(model["backbone"], images) if query != "never" else None
    return read(model["backbone"], images, recall(model["memory"], seen))

  class_sums = make_class_sums(features_so_far, spec.num_classes)
  aligned = None
  if config.head.alignment.epochs:
    aligned = HeadAlignment(
      config.head.alignment,
      "head.alignment",
      num_centroids=config.head.num_centroids,
      spec=spec,
      width=backbone.sizes.width,
      logits=head.logits,
      features=features_so_far,
    )

  def init_with_head(key, weights):
    variables = init(key, weights)
    mem = variables.mem | {"head": head.init(_head_key(key, 0))}
    if aligned:
      mem["head_statistics"] = aligned.empty()
    return variables.replace(mem=mem)

  def begin_with_head(variables, view):
    rows = heads.start(
      head, variables.mem["head"], spec, view.index, _head_key(view.key("init"), 1)
    )
    if starts_at_means and not (spec.shares_classes and view.index):
      rows = heads.imprint(rows, *class_sums(fold(view.weights, variables), view), view.arrays)
    variables = variables.replace(cur=variables.cur | {"head": rows})
    return begin_task(variables, view)

  def freeze(weights, variables):
    if "backbone" in variables.shared:
      return {}
    return {"backbone": cast_kernels(past(weights, variables), dtype)}

  def apply(variables, images, task, key, valid=None):
    inputs = step_inputs(variables, images, task, key, valid)
    trunk = variables.shared.get("backbone") or variables.frozen["backbone"]
    features = read(trunk, images, adapters(variables, inputs))
    return Output(
      logits=head.logits(variables.cur["head"], features),
      penalty=penalty(variables, inputs, features),
    )

  def end_with_head(variables, view):
    mem = variables.mem | {
      "head": heads.commit(variables.mem["head"], variables.cur["head"], spec, view.index)
    }
    variables, facts = end_task(variables.replace(mem=mem), view)
    if head.needs_means:
      sums, counts = class_sums(fold(view.weights, variables), view)
      mem = variables.mem | {"head": heads.add_means(variables.mem["head"], sums, counts)}
      variables = variables.replace(mem=mem)
    if aligned:
      mem, model = variables.mem, fold(view.weights, variables)
      rows, statistics, more = aligned.after(mem["head"], mem["head_statistics"], model, view)
      variables = variables.replace(mem=mem | {"head": rows, "head_statistics": statistics})
      facts = facts | more
    return variables, facts

  def fold(weights, variables):
    if folded is None:
      trunk, memory = past(weights, variables), Adapters()
    else:
      trunk, memory = folded(weights, variables)
    return {
      "backbone": cast_kernels(trunk, dtype),
      "memory": memory,
      "head": variables.mem["head"],
    }

  def predict(model, images):
    return head.predict(model["head"], features_so_far(model, images))

  def rules_with_head(task):
    return (*rules(task), ("cur/head/.*", "head"))

  def stored_with_head(facts):
    kept = stored(facts)
    if aligned:
      kept = kept | {"statistics": kept.get("statistics", 0) + aligned.num_kept}
    return kept

  return Method(
    init=init_with_head,
    begin_task=begin_with_head,
    freeze=freeze,
    apply=apply,
    end_task=end_with_head,
    fold=fold,
    predict=predict,
    rules=rules_with_head,
    groups={"adapter": OptimizerGroup(), "head": OptimizerGroup(is_head=True), **groups},
    stored=stored_with_head,
    passes=Passes(
      train=1 + (query == "always"),
      test=passes_at_test,
      between=feature_epochs
      + passes_at_test * (starts_at_means + head.needs_means + (aligned is not None)),
    ),
    caveats=caveats,
  )


def _head_key(key, purpose: int):
  return jax.random.fold_in(key, 7 + purpose)


def cast_kernels(backbone: Params, dtype: jnp.dtype) -> Params:
  """Returns the backbone with its matrices in `dtype`; vectors stay as they are."""
  return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, backbone)


def make_class_sums(features: Callable[..., Float[Array, "B D"]], num_classes: int) -> Callable:
  """Returns the function (model, view) -> sums of features [C, D], numbers of images [C].

  They are of each class in the view's training images, as at test time; `features` is a function of
  (model, images).
  """

  @functools.partial(jax.jit, static_argnames="center")
  def batch_sums(model, examples, rows, *, center):
    batch = center(examples, rows)
    one_hot = jax.nn.one_hot(batch.labels, num_classes) * batch.valid[:, None]
    sums = jnp.matmul(one_hot.T, features(model, batch.images), precision="highest")
    return sums, one_hot.sum(0)

  def class_sums(model, view: TaskView):
    totals = [batch_sums(model, *batch, center=view.center) for batch in view.train_batches(0)]
    return jax.tree.map(lambda *parts: sum(parts), *totals)

  return class_sums


def put_slot(stacks: Params, task, slot: Params) -> Params:
  """Returns stacks [T, ...] with the leaves of `slot` as row `task`, which may be traced."""
  return jax.tree.map(lambda stack, leaf: stack.at[task].set(leaf), stacks, slot)


def clipping(config: Config) -> optax.GradientTransformation:
  """Returns what clips the gradients of a training between tasks, as `config.optim` says."""
  limit = config.optim.clip_norm
  return optax.identity() if limit is None else optax.clip_by_global_norm(limit)


def random_factor(key, depth: int, width: int, rank: int):
  """Returns [depth, width, rank] normal entries with columns of expected norm 1."""
  return jax.random.normal(key, (depth, width, rank)) / jnp.sqrt(width)


def torch_uniform(key, depth: int, width: int, rank: int):
  """Returns [depth, width, rank] entries of U(-1/√width, 1/√width): torch's new linear layer."""
  limit = width**-0.5
  return jax.random.uniform(key, (depth, width, rank), minval=-limit, maxval=limit)


def check_rank(rank: int, field: str, backbone: Backbone, targets) -> None:
  """Raises ConfigError if `rank` is above min(d_in, d_out) of a target."""
  for name in targets:
    limit = min(backbone.sizes.projection(name))
    if rank > limit:
      raise ConfigError(
        f"config.{field} is {rank}: must be at most {limit}, the smaller side of {name!r}"
      )


def check_layers(layers: tuple[int, ...], field: str, backbone: Backbone) -> None:
  """Raises ConfigError unless `layers` are numbers of blocks, from 0, ascending."""
  depth = backbone.sizes.depth
  ascending = all(a < b for a, b in itertools.pairwise((-1, *layers)))
  if not (layers and ascending and layers[-1] < depth):
    raise ConfigError(
      f"config.{field} is {layers}: must be ascending numbers of blocks in 0..{depth - 1}"
    )
