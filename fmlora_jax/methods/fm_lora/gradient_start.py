"""A start of the shared bases from the gradient of task 1's loss; ours, after LoRA-GA.

The leading singular vectors of dL/dW span the changes of rank r that lower the loss fastest. Source
of the idea: LoRA-GA (arXiv:2407.05000), which starts both factors of LoRA there.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fmlora_jax.models import heads, low_rank
from fmlora_jax.types import Backbone, Params, TaskView


def make_gradient(backbone: Backbone, targets: Sequence[str]) -> Callable[..., Params]:
  """Returns the function (weights, linear head, view) -> dL/dW [L, D_in, D_out] of each target.

  L is the cross-entropy of the task's classes, summed over its training images as at test time.
  """

  @functools.partial(jax.jit, static_argnames="center")
  def add_gradient(sums, weights, rows, task, examples, indices, *, center):
    batch = center(examples, indices)

    def loss(changes):
      features = backbone.apply(low_rank.add(weights, changes), batch.images)
      losses = heads.local_losses(heads.linear(rows, features), batch.labels, task)
      return jnp.sum(losses * batch.valid)

    zeros = jax.tree.map(jnp.zeros_like, sums)
    return jax.tree.map(jnp.add, sums, jax.grad(loss)(zeros))

  def gradient(weights: Params, rows: Params, view: TaskView) -> Params:
    sizes: Any = backbone.sizes
    sums = {name: jnp.zeros((sizes.depth, *sizes.projection(name))) for name in targets}
    sums, rows = jax.device_put((sums, rows), view.arrays.index.sharding)
    for batch in view.train_batches(0):
      sums = add_gradient(sums, weights, rows, view.arrays, *batch, center=view.center)
    return sums

  return gradient


def start(
  backbone: Backbone, targets: Sequence[str], rank: int, sums: tuple[Array, Array], view: TaskView
) -> Params:
  """Returns the bases that task 1 starts from, under a head whose rows are class means.

  Args:
    sums: of features [C, D] and numbers of images [C] of the task's classes.
  """
  rows = {"kernel": jnp.zeros((view.num_classes, backbone.sizes.width))}
  rows = heads.imprint(rows, *sums, view.arrays)
  gradient = make_gradient(backbone, targets)(view.weights, rows, view)
  return view.replicate(principal_bases(gradient, rank))


def principal_bases(gradient: Params, rank: int) -> Params:
  """Returns bases a [L, D_in, r] and b [L, D_out, r] of each target from its gradient.

  They are the singular vectors of the r largest singular values, orthonormal.
  """
  bases = {}
  for name, matrix in gradient.items():
    u, _, vt = jnp.linalg.svd(matrix, full_matrices=False)
    bases[name] = {"a": u[..., :rank], "b": jnp.swapaxes(vt[..., :rank, :], -1, -2)}
  return bases
