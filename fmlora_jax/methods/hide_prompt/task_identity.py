"""The task classifier: names the task of an image from the untouched ViT's features.

It is trained before each task and has an output for each class of each task, so that it tells tasks
apart where they share their classes too; the likeliest output names the task. Source: HiDe-Prompt
(arXiv:2310.07234), task-identity inference.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fmlora_jax import config as config_lib
from fmlora_jax.config import AlignmentConfig, Config
from fmlora_jax.methods.common import base, class_statistics
from fmlora_jax.methods.common.alignment import Aligner
from fmlora_jax.methods.common.class_statistics import Rows
from fmlora_jax.models import heads
from fmlora_jax.types import (
  Backbone,
  Batch,
  Facts,
  Features,
  NonFiniteError,
  Params,
  Scalar,
  TaskArrays,
  TaskView,
)

EPSILON = 1e-6
HIDDEN = 2  # times the width; HD/vits/hide_prompt_vision_transformer.py:321-369


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdentityConfig:
  """Training of the task classifier: Adam at a constant rate, clipped as `optim` says.

  Attributes:
    epochs: before each task; every one is a forward pass over its images, augmented.
    learning_rate: of Adam.
    alignment: of the whole network afterwards, on the statistics of all classes so far; from task 2
      on. HD/engines/hide_tii_engine.py trains everything but the ViT, too.
    epsilon: added to the variance in the classifier's LayerNorm; HD's is 1e-5.
  """

  epochs: int = 20
  learning_rate: float = 1e-3
  alignment: AlignmentConfig = dataclasses.field(default_factory=AlignmentConfig)
  epsilon: float = EPSILON

  def __post_init__(self):
    config_lib.require(self.epochs >= 1, "epochs", self.epochs, ">= 1")
    rate = self.learning_rate
    config_lib.require(rate > 0, "learning_rate", rate, "> 0")
    config_lib.require(0 < self.epsilon <= 1, "epsilon", self.epsilon, "in (0, 1]")


def fresh(key: PRNGKeyArray, width: int, num_rows: int) -> Params:
  """Returns a new task classifier."""
  shapes = {
    "down": (HIDDEN * width, width),
    "up": (width, HIDDEN * width),
    "head": (num_rows, width),
  }
  layers = {
    name: {
      "kernel": 0.02 * jax.random.normal(jax.random.fold_in(key, i), shape),
      "bias": jnp.zeros(shape[0]),
    }
    for i, (name, shape) in enumerate(shapes.items())
  }
  return layers | {"norm": {"scale": jnp.ones(width), "bias": jnp.zeros(width)}}


@jax.default_matmul_precision("highest")
def logits(identity: Params, features: Features, epsilon: float = EPSILON) -> Float[Array, "B R"]:
  """Returns head(LayerNorm(x + up(GELU(down(x)))))."""
  hidden = jax.nn.gelu(heads.linear(identity["down"], features), approximate=False)
  x = features + heads.linear(identity["up"], hidden)
  normed = jax.nn.standardize(x, epsilon=epsilon)
  return heads.linear(
    identity["head"], normed * identity["norm"]["scale"] + identity["norm"]["bias"]
  )


def predict_tasks(
  identity: Params,
  features: Features,
  rows: Rows,
  seen: Bool[Array, " T"],
  epsilon: float = EPSILON,
) -> Int[Array, " B"]:
  """Returns the task of the likeliest class of the tasks seen; 0 before there is one."""
  task = jnp.asarray(rows.task)
  masked = jnp.where(seen[task], logits(identity, features, epsilon), -jnp.inf)
  return task[jnp.argmax(masked, axis=-1)]


def local_loss(
  identity: Params,
  features: Features,
  batch: Batch,
  task: TaskArrays,
  rows: Rows,
  epsilon: float = EPSILON,
) -> Scalar:
  """Returns the mean cross-entropy of a batch over the outputs of one task, in nats."""
  outputs = logits(identity, features, epsilon)
  masked = jnp.where(jnp.asarray(rows.task) == task.index, outputs, heads.NEVER)
  targets = batch.labels - task.lo + jnp.asarray(rows.first)[task.index]
  # the target of a padding row is arbitrary; its weight is 0
  losses = optax.softmax_cross_entropy_with_integer_labels(
    masked, jnp.clip(targets, 0, len(rows) - 1)
  )
  return heads.weighted_mean(losses, batch.valid)


class Learner:
  """Trains the task classifier before each task; its programs compile once per run.

  Args:
    config: the run's; `optim.clip_norm` is used.
    settings: of the training.
    backbone: the ViT.
    rows: the classes of all tasks.
  """

  def __init__(self, config: Config, settings: IdentityConfig, backbone: Backbone, rows: Rows):
    self.settings, self._rows, self._features = settings, rows, backbone.apply
    adam = optax.adam(self.settings.learning_rate)
    self._optimizer = optax.chain(base.clipping(config), adam)
    self._step = jax.jit(self._train_step, static_argnames="augment")
    self._collect = class_statistics.make_collector(backbone.apply)
    field = "method.identity.alignment"
    outputs = functools.partial(logits, epsilon=settings.epsilon)
    self._aligner = Aligner(settings.alignment, field, outputs, np.arange(len(rows)))

  def learn(
    self, identity: Params, statistics: Params, trunk: Params, view: TaskView
  ) -> tuple[Params, Params, Facts]:
    """Returns the task classifier and the statistics, with the task of `view`, and facts of it.

    Args:
      identity: the task classifier.
      statistics: of the untouched ViT's features, of the tasks before.
      trunk: the untouched ViT.
      view: the task.

    Raises:
      NonFiniteError: if the loss becomes NaN or infinite.
    """
    identity, loss = self._train(identity, trunk, view)
    features, labels = self._collect(trunk, view)
    statistics = view.replicate(
      class_statistics.add(statistics, self._rows, view.index, features, labels, view.seed)
    )
    facts: Facts = {"identity_loss": loss}
    if view.index:
      seen, num_old = self._rows.task <= view.index, int(self._rows.first[view.index])
      identity, facts["identity_alignment_loss"] = self._aligner.align(
        identity, statistics, seen, num_old, view.key("identity alignment")
      )
    return identity, statistics, facts

  def _train(self, identity: Params, trunk: Params, view: TaskView) -> tuple[Params, float]:
    """Returns the classifier after all epochs on the task's images, and the last loss."""
    state = self._optimizer.init(identity)
    # with the sharding of the task: another one at the first step would compile it twice
    identity, state = jax.device_put((identity, state), view.arrays.index.sharding)
    for epoch in range(self.settings.epochs):
      key = jax.random.fold_in(view.key("identity"), epoch)
      for step, (examples, rows) in enumerate(view.train_batches(epoch)):
        now = jax.random.fold_in(key, step)
        identity, state, loss = self._step(
          identity, state, trunk, view.arrays, examples, rows, now, augment=view.augment
        )
    if not np.isfinite(loss):
      raise NonFiniteError(
        f"loss is {loss} in the task classifier's training for task {view.index + 1}: must be "
        "finite; lower config.method.identity.learning_rate or set config.optim.clip_norm"
      )
    return identity, float(loss)

  def _train_step(self, identity, state, trunk, task, examples, rows, key, *, augment):
    batch = augment(examples, rows, key)
    features = self._features(trunk, batch.images)
    loss, grads = jax.value_and_grad(local_loss)(
      identity, features, batch, task, self._rows, self.settings.epsilon
    )
    updates, state = self._optimizer.update(grads, state, identity)
    return optax.apply_updates(identity, updates), state, loss
