"""Classifiers over all classes of a sequence; a task trains the rows of its classes.

`mem` holds every class; `cur` is the slice of K rows that a task trains, copied from `mem` where
the tasks share their classes and fresh elsewhere; `commit` writes it back. By default training sees
the rows of the current task only: local cross-entropy, as InfLoRA, SD-LoRA and the prompt methods
do.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fmlora_jax.types import Params, SequenceSpec, TaskArrays

EPS = 1e-12
NEVER = -1e9  # a logit of what can't be; finite, as -inf would make NaN gradients
DEVIATION = 0.02  # of `truncated_normal`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
  """A kind of classifier.

  Attributes:
    init: key -> mem [C rows].
    logits: (rows, features [B, D]) -> [B, rows], for training.
    predict: (mem, features [B, D]) -> [B, C].
    needs_means: whether `add_means` must be called at each task end.
  """

  init: Callable[..., Params]
  logits: Callable[..., Float[Array, "B K"]]
  predict: Callable[..., Float[Array, "B C"]]
  needs_means: bool = False


def zeros(key: PRNGKeyArray, num_classes: int, width: int) -> Params:
  """Returns rows of zeros: equal starts keep the logits of different tasks comparable."""
  del key
  return {"kernel": jnp.zeros((num_classes, width)), "bias": jnp.zeros(num_classes)}


def torch_linear(key: PRNGKeyArray, num_classes: int, width: int) -> Params:
  """Returns rows and biases from U(-1/√D, 1/√D), the start of torch.nn.Linear."""
  limit, (of_kernel, of_bias) = width**-0.5, jax.random.split(key)
  return {
    "kernel": jax.random.uniform(of_kernel, (num_classes, width), minval=-limit, maxval=limit),
    "bias": jax.random.uniform(of_bias, (num_classes,), minval=-limit, maxval=limit),
  }


def kaiming_uniform(key: PRNGKeyArray, num_classes: int, width: int) -> Params:
  """Returns rows from U(-√(3/D), √(3/D)), variance 1/D, and zero biases.

  Source: He et al. (arXiv:1502.01852) with the gain 1 of a linear layer.
  """
  limit = (3 / width) ** 0.5
  kernel = jax.random.uniform(key, (num_classes, width), minval=-limit, maxval=limit)
  return {"kernel": kernel, "bias": jnp.zeros(num_classes)}


def truncated_normal(key: PRNGKeyArray, num_classes: int, width: int) -> Params:
  """Returns rows from N(0, 0.02²) and zero biases.

  Source: timm's `trunc_normal_(std=0.02)`, which cuts at ±2, a hundred deviations; so nothing is
  cut here.
  """
  kernel = DEVIATION * jax.random.normal(key, (num_classes, width))
  return {"kernel": kernel, "bias": jnp.zeros(num_classes)}


STARTS = {  # values of `config.head.start` that are drawn; class_mean starts from zero
  "zero": zeros,
  "torch_linear": torch_linear,
  "kaiming_uniform": kaiming_uniform,
  "truncated_normal": truncated_normal,
}


def make_head(
  kind: str, num_classes: int, width: int, *, rows: str = "zero", per_class: int = 1
) -> Head:
  """Returns the head named `kind`: linear, cosine, class_mean or lda. Source: ours but for linear.

  Args:
    kind: as `config.head.kind`.
    num_classes: C.
    width: D.
    rows: a name in `STARTS`, the start of rows that are not cosine.
    per_class: Gaussians of a class with lda.
  """

  def plain(key):
    return STARTS[rows](key, num_classes, width)

  def random_directions(key):
    kernel = jax.random.normal(key, (num_classes, width))
    return {"kernel": _unit(kernel), "log_scale": jnp.full(num_classes, jnp.log(10.0))}

  def with_means(key):
    means = {"mean": jnp.zeros((num_classes, width)), "count": jnp.zeros(num_classes)}
    return plain(key) | means

  def with_gaussians(key):
    num = per_class * num_classes
    rows = {"kernel": jnp.zeros((num, width)), "bias": jnp.full(num, NEVER)}
    return plain(key) | {"discriminant": rows}

  if kind == "linear":
    return Head(init=plain, logits=linear, predict=linear)
  if kind == "cosine":
    return Head(init=random_directions, logits=cosine, predict=cosine_similarity)
  if kind == "lda":
    return Head(init=with_gaussians, logits=linear, predict=discriminant)
  return Head(init=with_means, logits=linear, predict=nearest_mean, needs_means=True)


@jax.default_matmul_precision("highest")
def linear(rows: Params, features: Float[Array, "B D"]) -> Float[Array, "B K"]:
  """Returns features·kernelᵀ + bias. Source: FM-LoRA Eq. (14)."""
  return features @ rows["kernel"].T + rows["bias"]


@jax.default_matmul_precision("highest")
def cosine_similarity(rows: Params, features: Float[Array, "B D"]) -> Float[Array, "B K"]:
  """Returns the cosine between features and rows; without the scales, which differ by task."""
  return _unit(features) @ _unit(rows["kernel"]).T


def cosine(rows: Params, features: Float[Array, "B D"]) -> Float[Array, "B K"]:
  """Returns the cosine times a positive scale, learned and the same for all rows of the task."""
  return cosine_similarity(rows, features) * jnp.exp(rows["log_scale"].mean())


@jax.default_matmul_precision("highest")
def nearest_mean(mem: Params, features: Float[Array, "B D"]) -> Float[Array, "B C"]:
  """Returns minus half the squared distance to each class mean, up to a term without a class."""
  return features @ mem["mean"].T - 0.5 * jnp.sum(mem["mean"] ** 2, axis=-1)


@jax.default_matmul_precision("highest")
def discriminant(mem: Params, features: Float[Array, "B D"]) -> Float[Array, "B C"]:
  """Returns the log density of each class, up to a term without a class.

  A class has one Gaussian for each task that has it, and is their mixture with equal weights.
  Source: linear discriminant analysis; mixtures, ours.
  """
  scores = linear(mem["discriminant"], features)
  return jax.nn.logsumexp(scores.reshape(len(scores), -1, len(mem["kernel"])), axis=1)


def old_logits(
  head: Head, mem: Params, cur: Params, features: Float[Array, "B D"]
) -> Float[Array, "B C"]:
  """Returns the logits of all rows of `mem`, which are fixed: their gradient is zero. Ours.

  A cosine head has one scale for all classes, that of the rows `cur` in training: rows are compared
  at test time without their own.
  """
  scale = {name: leaf for name, leaf in cur.items() if name == "log_scale"}
  return head.logits(jax.lax.stop_gradient(mem) | scale, features)


def local_losses(
  logits: Float[Array, "B K"],
  labels: Int[Array, " B"],
  task: TaskArrays,
  old: Float[Array, "B C"] | None = None,
) -> Float[Array, " B"]:
  """Returns the cross-entropy of each sample over the current task's classes, float32, in nats.

  Slots beyond the task's classes are masked; rows whose label is outside them give a finite number
  that the caller weights with 0.

  Args:
    old: logits whose columns of earlier tasks' classes join the cross-entropy; none where None.
  """
  slots = jnp.arange(logits.shape[-1]) < task.hi - task.lo
  masked = jnp.where(slots, logits.astype(jnp.float32), NEVER)
  if old is not None:
    earlier = jnp.arange(old.shape[-1]) < task.lo
    masked = jnp.concatenate([masked, jnp.where(earlier, old.astype(jnp.float32), NEVER)], axis=-1)
  targets = jnp.clip(labels - task.lo, 0, logits.shape[-1] - 1)
  return optax.softmax_cross_entropy_with_integer_labels(masked, targets)


def weighted_mean(values: Float[Array, " B"], valid: Bool[Array, " B"]) -> Float[Array, ""]:
  """Returns the mean over valid rows."""
  return jnp.sum(values * valid) / jnp.maximum(jnp.sum(valid), 1)


def _unit(x):
  return x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + EPS)


def start(head: Head, mem: Params, spec: SequenceSpec, task: int, key) -> Params:
  """Returns the K rows that task `task` trains."""
  lo, hi = spec.class_ranges[task]
  source = mem if spec.shares_classes else head.init(key)
  padding = spec.max_task_classes - (hi - lo)
  return {
    name: jnp.pad(leaf[lo:hi], ((0, padding), *[(0, 0)] * (leaf.ndim - 1)))
    for name, leaf in source.items()
    if name not in ("mean", "count", "discriminant")
  }


def imprint(
  rows: Params, sums: Float[Array, "C D"], counts: Float[Array, " C"], task: TaskArrays
) -> Params:
  """Returns `rows` as the nearest-mean classifier of the task's classes, from sums of features.

  Row c is s·mean_c with bias -s·|mean_c|²/2, whose argmax is the nearest mean; s = 10 / D gives the
  logits of normalised features the scale of a new cosine head. Source: weight imprinting
  (arXiv:1712.07136), here with a bias.
  """
  num_rows, width = rows["kernel"].shape
  classes = task.lo + jnp.arange(num_rows)
  is_class = (classes < task.hi)[:, None]  # the rest is padding
  means = jnp.where(is_class, sums[classes] / jnp.maximum(counts[classes], 1)[:, None], 0)
  scale = 10 / width
  return {"kernel": scale * means, "bias": -0.5 * scale * jnp.sum(means**2, axis=-1)}


def commit(mem: Params, cur: Params, spec: SequenceSpec, task: int) -> Params:
  """Returns `mem` with the trained rows of task `task` written in."""
  lo, hi = spec.class_ranges[task]
  return mem | {name: mem[name].at[lo:hi].set(leaf[: hi - lo]) for name, leaf in cur.items()}


def add_means(mem: Params, sums: Float[Array, "C D"], counts: Float[Array, " C"]) -> Params:
  """Returns `mem` with the class means updated by sums of features and numbers of images."""
  count = mem["count"] + counts
  total = mem["mean"] * mem["count"][:, None] + sums
  return mem | {"mean": total / jnp.maximum(count, 1)[:, None], "count": count}
