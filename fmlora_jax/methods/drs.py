"""The dynamic rank selector's preliminary epoch: how difficult is this task, what rank does it get?

Fresh cores and a fresh head train on the task under nested rank masks, so that one set of cores
serves every truncation; validation images of the same task choose among the candidates. Everything
but the answer is thrown away. Source: FM-LoRA (arXiv:2504.08823) Sec. 3.3, Eq. (11-12), Sec. 4.1.
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
from fmlora_jax.models import heads, rank_selector
from fmlora_jax.types import Examples, Params, TaskArrays, TaskView


@flax.struct.dataclass
class Probe:
  """What trains for an epoch: cores and a head at r_max."""

  params: Params
  opt_state: optax.OptState


@flax.struct.dataclass
class Data:
  """What a step reads: the task and its images, passed so that nothing is compiled in."""

  fixed: Params
  task: TaskArrays
  train: Examples
  val: Examples


class RankSelector:
  """Chooses the rank of each task by `config.drs`; its programs compile once per run.

  Args:
    config: the run's; `drs`, `optim` and `bases.max_rank` are used.
    logits: (params, fixed, core mask [R], images) -> [B, K] logits of the adapted model.
  """

  def __init__(self, config: Config, logits: Callable[..., Float[Array, "B K"]]):
    self.config, self.drs, self._logits = config, config.drs, logits
    self.masks = rank_selector.rank_masks(self.drs.candidate_ranks, config.bases.max_rank)
    optim = config.optim
    self.optimizer = optax.multi_transform(
      {
        "core": optax.adamw(optim.learning_rate, weight_decay=optim.weight_decay),
        "head": optax.adamw(optim.head_learning_rate, weight_decay=optim.head_weight_decay),
      },
      {"core": "core", "head": "head"},
    )
    self.alpha_optimizer = optax.adam(self.drs.selector_learning_rate)
    self._gumbel_step = jax.jit(self._gumbel, static_argnames=("augment", "center"))
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
    """
    if view.val is None:
      raise ConfigError(
        f"config.drs.strategy is {self.drs.strategy!r} and task {view.index + 1} has no validation "
        "images: raise config.tasks.val_fraction or set drs.strategy=fixed"
      )
    data = Data(fixed=fixed, task=view.arrays, train=view.train, val=view.val)
    find = self._by_gumbel if self.drs.strategy == "gumbel" else self._by_validation
    index, val_loss, scores = find(params, data, view)
    hardness = rank_selector.complexity(val_loss, view.num_classes)
    return {
      "rank": self.drs.candidate_ranks[index],
      "complexity": float(hardness),
      "rank_scores": [float(score) for score in scores],
    }

  def _steps(self, view: TaskView):
    """Yields (training rows, validation rows, key) for each step of the preliminary training."""
    val_rows = np.concatenate([view.val_rows(epoch) for epoch in range(self.drs.epochs)])
    step = 0
    for epoch in range(self.drs.epochs):
      for rows in view.train_rows(epoch):
        key = jax.random.fold_in(view.key("drs"), step)
        yield rows, val_rows[step % len(val_rows)], key
        step += 1

  def _by_gumbel(self, params, data, view):
    probe = Probe(params, self.optimizer.init(params))
    alpha = jnp.zeros(len(self.drs.candidate_ranks))
    alpha_state = self.alpha_optimizer.init(alpha)
    for rows, val_rows, key in self._steps(view):
      probe, alpha, alpha_state = self._gumbel_step(
        probe,
        alpha,
        alpha_state,
        data,
        rows,
        val_rows,
        key,
        augment=view.augment,
        center=view.center,
      )
    index = int(jnp.argmax(alpha))  # without noise: Eq. (12)
    stacked = jax.tree.map(lambda leaf: leaf[None], probe.params)
    loss, _ = self._validate(stacked, self.masks[index][None], data, view)
    return index, loss[0], jax.nn.softmax(alpha)

  def _by_validation(self, params, data, view):
    count = len(self.drs.candidate_ranks)
    stacked = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], count, axis=0), params)
    probes = Probe(stacked, jax.vmap(self.optimizer.init)(stacked))
    for rows, _, key in self._steps(view):
      probes = self._train_all(probes, self.masks, data, rows, key, augment=view.augment)
    losses, accuracies = self._validate(probes.params, self.masks, data, view)
    good = np.asarray(accuracies) >= float(accuracies.max()) - self.drs.tolerance
    index = int(np.argmax(good))  # the smallest rank that is good enough
    return index, losses[index], accuracies

  def _loss(self, params, mask, data, batch):
    logits = self._logits(params, data.fixed, mask, batch.images)
    losses = heads.local_losses(logits, batch.labels, data.task)
    return heads.weighted_mean(losses, batch.valid)

  def _update(self, probe, mask, data, batch):
    grads = jax.grad(self._loss)(probe.params, mask, data, batch)
    updates, opt_state = self.optimizer.update(grads, probe.opt_state, probe.params)
    return Probe(optax.apply_updates(probe.params, updates), opt_state)

  def _gumbel(self, probe, alpha, alpha_state, data, rows, val_rows, key, *, augment, center):
    """One step: cores and head on a training batch, then alpha alone on a validation batch."""
    draw_train, draw_crop, draw_val = jax.random.split(key, 3)
    sample = functools.partial(rank_selector.gumbel_one_hot, tau=self.drs.tau)
    mask = sample(alpha, draw_train) @ self.masks
    probe = self._update(probe, mask, data, augment(data.train, rows, draw_crop))
    val_batch = center(data.val, val_rows)

    def selection(alpha):
      val_loss = self._loss(probe.params, sample(alpha, draw_val) @ self.masks, data, val_batch)
      return rank_selector.selection_loss(
        alpha,
        val_loss,
        self.drs.candidate_ranks,
        price=self.drs.price,
        num_classes=data.task.hi - data.task.lo,
      )

    updates, alpha_state = self.alpha_optimizer.update(jax.grad(selection)(alpha), alpha_state)
    return probe, optax.apply_updates(alpha, updates), alpha_state

  def _train_each(self, probes, masks, data, rows, key, *, augment):
    """One training step of every candidate, on the same batch."""
    batch = augment(data.train, rows, key)
    return jax.vmap(lambda probe, mask: self._update(probe, mask, data, batch))(probes, masks)

  def _validate_each(self, params, masks, data, rows, *, center):
    batch = center(data.val, rows)

    def sums(params, mask):
      logits = self._logits(params, data.fixed, mask, batch.images)
      losses = heads.local_losses(logits, batch.labels, data.task)
      slots = jnp.arange(logits.shape[-1]) < data.task.hi - data.task.lo
      correct = jnp.argmax(jnp.where(slots, logits, -jnp.inf), -1) + data.task.lo == batch.labels
      return jnp.stack([jnp.sum(losses * batch.valid), jnp.sum(correct & batch.valid)])

    return jax.vmap(sums)(params, masks), jnp.sum(batch.valid)

  def _validate(self, params, masks, data, view) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    """Returns the mean loss and the accuracy of each candidate over the whole validation set."""
    parts = [
      self._validate_all(params, masks, data, rows, center=view.center) for rows in view.val_rows(0)
    ]
    totals = sum(sums for sums, _ in parts) / sum(count for _, count in parts)
    return totals[:, 0], totals[:, 1]
