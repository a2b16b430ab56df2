"""What methods share: a head around adapted features.

Most methods differ only in the `Adapters` they give the ViT and in what they do between tasks;
`with_head` makes a whole `Method` from that.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fmlora_jax.config import Config, ConfigError
from fmlora_jax.models import heads
from fmlora_jax.types import (
  Adapters,
  Backbone,
  Method,
  Output,
  Params,
  Rules,
  SequenceSpec,
  TaskView,
  Variables,
)


def with_head(
  config: Config,
  backbone: Backbone,
  spec: SequenceSpec,
  *,
  init: Callable[..., Variables],
  adapters: Callable[[Variables], Adapters] = lambda variables: Adapters(),
  begin_task: Callable[..., tuple[Variables, dict]] = lambda variables, view: (variables, {}),
  end_task: Callable[..., tuple[Variables, dict]] = lambda variables, view: (variables, {}),
  past: Callable[[Params, Variables], Params] = lambda weights, variables: weights,
  folded: Callable[[Params, Variables], tuple[Params, Adapters]] | None = None,
  rules: Callable[[int], Rules] = lambda task: (),
  stored: Callable[[list[dict]], dict],
) -> Method:
  """Returns a method whose features are the adapted ViT's and whose head is `config.head`.

  Args:
    init, begin_task, end_task, rules, stored: the method's own, without the head.
    adapters: what the ViT is handed during training, from the variables.
    past: (weights, variables) -> the backbone that a task trains on, the past folded in; float32.
      Unless `shared` holds a backbone: then that one is trained.
    folded: (weights, variables) -> backbone and remaining adapters for inference; None takes `past`
      and no adapters.
  """
  head = heads.make(config.head.kind, spec.num_classes, backbone.sizes.width)
  class_sums = make_class_sums(backbone, spec.num_classes)
  dtype = jnp.dtype(config.compute_dtype)

  def trunk(variables):
    return variables.shared.get("backbone") or variables.frozen["backbone"]

  def features(variables, images):
    return backbone.apply(trunk(variables), images, adapters(variables))

  def init_with_head(key, weights):
    variables = init(key, weights)
    return variables.replace(mem=variables.mem | {"head": head.init(_head_key(key, 0))})

  def begin_with_head(variables, view):
    rows = heads.start(
      head, variables.mem["head"], spec, view.index, _head_key(view.key("init"), 1)
    )
    if config.head.start == "class_mean" and not (spec.shares_classes and view.index):
      rows = heads.imprint(rows, *class_sums(fold(view.weights, variables), view), view.arrays)
    variables = variables.replace(cur=variables.cur | {"head": rows})
    return begin_task(variables, view)

  def freeze(weights, variables):
    if "backbone" in variables.shared:
      return {}
    return {"backbone": cast_kernels(past(weights, variables), dtype)}

  def apply(variables, images, task, key):
    del task, key
    logits = head.logits(variables.cur["head"], features(variables, images))
    return Output(logits=logits, penalty=jnp.float32(0))

  def end_with_head(variables, view):
    mem = variables.mem | {
      "head": heads.commit(variables.mem["head"], variables.cur["head"], spec, view.index)
    }
    variables, facts = end_task(variables.replace(mem=mem), view)
    if head.needs_means:
      sums, counts = class_sums(fold(view.weights, variables), view)
      mem = variables.mem | {"head": heads.add_means(variables.mem["head"], sums, counts)}
      variables = variables.replace(mem=mem)
    return variables, facts

  def fold(weights, variables):
    if folded is None:
      trained, rest = past(weights, variables), Adapters()
    else:
      trained, rest = folded(weights, variables)
    return {
      "backbone": cast_kernels(trained, dtype),
      "adapters": rest,
      "head": variables.mem["head"],
    }

  def predict(model, images):
    return head.predict(model["head"], backbone.apply(model["backbone"], images, model["adapters"]))

  def rules_with_head(task):
    return (*rules(task), ("cur/head/.*", "head"))

  return Method(
    init=init_with_head,
    begin_task=begin_with_head,
    freeze=freeze,
    apply=apply,
    end_task=end_with_head,
    fold=fold,
    predict=predict,
    rules=rules_with_head,
    stored=stored,
  )


def _head_key(key, purpose: int):
  return jax.random.fold_in(key, 7 + purpose)


def cast_kernels(backbone: Params, dtype: jnp.dtype) -> Params:
  """Returns the backbone with its matrices in `dtype`; vectors stay as they are."""
  return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, backbone)


def make_class_sums(backbone: Backbone, num_classes: int) -> Callable:
  """Returns the function (folded model, view) -> sums of features [C, D], numbers of images [C].

  They are of each class in the view's training images, as at test time.
  """

  @functools.partial(jax.jit, static_argnames="center")
  def batch_sums(model, examples, rows, *, center):
    batch = center(examples, rows)
    features = backbone.apply(model["backbone"], batch.images, model["adapters"])
    one_hot = jax.nn.one_hot(batch.labels, num_classes) * batch.valid[:, None]
    return jnp.matmul(one_hot.T, features, precision="highest"), one_hot.sum(0)

  def class_sums(model, view: TaskView):
    totals = [batch_sums(model, *batch, center=view.center) for batch in view.train_batches(0)]
    return jax.tree.map(lambda *parts: sum(parts), *totals)

  return class_sums


def random_factor(key, depth: int, width: int, rank: int):
  """Returns [depth, width, rank] normal entries with columns of expected norm 1."""
  return jax.random.normal(key, (depth, width, rank)) / jnp.sqrt(width)


def check_rank(rank: int, field: str, backbone: Backbone, targets) -> None:
  """Raises ConfigError if `rank` is above min(d_in, d_out) of a target."""
  for name in targets:
    limit = min(backbone.sizes.projection(name))
    if rank > limit:
      raise ConfigError(
        f"config.{field} is {rank}: must be at most {limit}, the smaller side of {name!r}"
      )
