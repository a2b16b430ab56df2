"""The dynamic rank selector's preliminary epoch: how difficult is this task, what rank does it get?

Fresh cores and the head that the task starts with (in dil it is carried on) train on the task under
nested rank masks, so that one set of cores serves every truncation; validation images of the same
task choose among the candidates. Everything but the answer is thrown away. Source: FM-LoRA
(arXiv:2504.08823) Sec. 3.3, Eq. (11-12), Sec. 4.1.
"""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from fmlora_jax.config import Config, ConfigError
from fmlora_jax.methods.common import base
from fmlora_jax.models import heads, rank_selector
from fmlora_jax.types import NonFiniteError, Params, TaskArrays, TaskView


@flax.struct.dataclass
class Probe:
  """What trains for an epoch: cores and a head at r_max."""

  params: Params
  opt_state: optax.OptState


@flax.struct.dataclass
class Context:
  """What a step reads besides a batch, passed so that nothing is compiled in."""

  fixed: Params
  task: TaskArrays


class RankSelector:
  """Chooses the rank of each task by `config.method.drs`; its programs compile once per run.

  Args:
    config: the run's; `method.drs`, `method.bases.max_rank` and `optim` are used.
    logits: (params, fixed, core mask [R], images) -> [B, K] logits of the adapted model.
  """

  def __init__(self, config: Config, logits: Callable[..., Float[Array, "B K"]]):
    self.config, self.drs, self._logits = config, config.method.drs, logits
    self.masks = rank_selector.rank_masks(self.drs.candidate_ranks, config.method.bases.max_rank)
    optim = config.optim
    grouped = optax.multi_transform(
      {
        "core": optax.adamw(optim.learning_rate, weight_decay=optim.weight_decay),
        "head": optax.adamw(optim.head_learning_rate, weight_decay=optim.head_weight_decay),
      },
      {"core": "core", "head": "head"},
    )
    self.optimizer = optax.chain(base.clipping(config), grouped)
    self._train_drawn = jax.jit(self._train_a_draw, static_argnames="augment")
    self._learn_alpha = jax.jit(
      functools.partial(
        rank_selector.learn_alpha,
        tau=self.drs.tau,
        steps=self.drs.selector_steps,
        learning_rate=self.drs.selector_learning_rate,
      )
    )
    self._train_all = jax.jit(self._train_each, static_argnames="augment")
    self._validate_all = jax.jit(self._validate_each, static_argnames="center")

  def select(self, params: Params, fixed: Params, view: TaskView) -> dict:
    """Returns {"rank", "complexity", "rank_scores"} for the task of `view`.

    Args:
      params: {"core": {target: {"m", "n"}}, "head"}: fresh, at r_max.
      fixed: what `logits` needs besides; not trained here.
      view: the task.

    Raises:
      ConfigError: if the task has no validation images.
      NonFiniteError: if the preliminary training gives NaN or infinity.
    """
    if view.val_batches is None:
      raise ConfigError(
        f"config.method.drs.strategy is {self.drs.strategy!r} and task {view.index + 1} has no "
        "validation images: raise config.tasks.val_fraction or set config.method.drs.strategy=fixed"
      )
    context = Context(fixed=fixed, task=view.arrays)
    find = self._by_gumbel if self.drs.strategy == "gumbel" else self._by_validation
    index, val_loss, scores = find(params, context, view)
    if not np.isfinite([val_loss, *scores]).all():
      raise NonFiniteError(
        f"validation loss is {val_loss} in the rank selection of task {view.index + 1}: must be "
        "finite; lower config.optim.learning_rate or set config.optim.clip_norm"
      )
    hardness = rank_selector.complexity(val_loss, view.num_classes)
    return {
      "rank": self.drs.candidate_ranks[index],
      "complexity": float(hardness),
      "rank_scores": [float(score) for score in scores],
    }

  def _by_gumbel(self, params, context, view):
    probe = _placed(Probe(params, self.optimizer.init(params)), view)
    alpha = jnp.zeros(len(self.masks))
    for epoch in range(self.drs.epochs):
      for batch, key in _steps(view, epoch):
        probe = self._train_drawn(probe, alpha, context, *batch, key, augment=view.augment)
      losses, _ = self._validate(self._stacked(probe.params), context, view)
      costs = rank_selector.selection_costs(
        losses,
        candidates=self.drs.candidate_ranks,
        max_rank=self.config.method.bases.max_rank,
        price=self.drs.price,
        num_classes=view.num_classes,
      )
      alpha = self._learn_alpha(alpha, costs, jax.random.fold_in(view.key("drs alpha"), epoch))
    index = int(jnp.argmax(alpha))  # without noise: Eq. (12)
    return index, losses[index], jax.nn.softmax(alpha)

  def _by_validation(self, params, context, view):
    stacked = self._stacked(params)
    probes = _placed(Probe(stacked, jax.vmap(self.optimizer.init)(stacked)), view)
    for epoch in range(self.drs.epochs):
      for batch, key in _steps(view, epoch):
        probes = self._train_all(probes, self.masks, context, *batch, key, augment=view.augment)
    losses, accuracies = self._validate(probes.params, context, view)
    good = np.asarray(accuracies) >= float(accuracies.max()) - self.drs.tolerance
    index = int(np.argmax(good))  # the smallest rank that is good enough
    return index, losses[index], accuracies

  def _stacked(self, params):
    """Returns the parameters once for each candidate."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], len(self.masks), axis=0), params)

  def _loss(self, params, mask, context, batch):
    logits = self._logits(params, context.fixed, mask, batch.images)
    losses = heads.local_losses(logits, batch.labels, context.task)
    return heads.weighted_mean(losses, batch.valid)

  def _update(self, probe, mask, context, batch):
    grads = jax.grad(self._loss)(probe.params, mask, context, batch)
    updates, opt_state = self.optimizer.update(grads, probe.opt_state, probe.params)
    return Probe(optax.apply_updates(probe.params, updates), opt_state)

  def _train_a_draw(self, probe, alpha, context, examples, rows, key, *, augment):
    """One training step at a rank drawn with P = softmax(alpha): Eq. (11)."""
    draw_rank, draw_crop = jax.random.split(key)
    mask = rank_selector.gumbel_one_hot(alpha, draw_rank, self.drs.tau) @ self.masks
    return self._update(probe, mask, context, augment(examples, rows, draw_crop))

  def _train_each(self, probes, masks, context, examples, rows, key, *, augment):
    """One training step of every candidate, on the same batch."""
    batch = augment(examples, rows, key)
    return jax.vmap(lambda probe, mask: self._update(probe, mask, context, batch))(probes, masks)

  def _validate_each(self, params, masks, context, examples, rows, *, center):
    batch = center(examples, rows)

    def sums(params, mask):
      logits = self._logits(params, context.fixed, mask, batch.images)
      losses = heads.local_losses(logits, batch.labels, context.task)
      slots = jnp.arange(logits.shape[-1]) < context.task.hi - context.task.lo
      correct = jnp.argmax(jnp.where(slots, logits, -jnp.inf), -1) + context.task.lo == batch.labels
      return jnp.stack([jnp.sum(losses * batch.valid), jnp.sum(correct & batch.valid)])

    return jax.vmap(sums)(params, masks), jnp.sum(batch.valid)

  def _validate(self, params, context, view) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    """Returns the mean loss and the accuracy of each candidate over the whole validation set."""
    parts = [
      self._validate_all(params, self.masks, context, *batch, center=view.center)
      for batch in view.val_batches(0)
    ]
    totals = sum(sums for sums, _ in parts) / sum(count for _, count in parts)
    return totals[:, 0], totals[:, 1]


def _placed(probe: Probe, view: TaskView) -> Probe:
  """Returns `probe` placed as what a step returns is, or the second step would compile anew."""
  return jax.device_put(probe, view.arrays.index.sharding)


def _steps(view: TaskView, epoch: int):
  """Yields (training batch, key) for each step of one epoch of the preliminary training."""
  key = jax.random.fold_in(view.key("drs"), epoch)
  for step, batch in enumerate(view.train_batches(epoch)):
    yield batch, jax.random.fold_in(key, step)
