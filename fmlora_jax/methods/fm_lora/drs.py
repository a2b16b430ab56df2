"""Rank selection: the preliminary training that measures a task's difficulty and chooses its rank.

Fresh cores, and the head that the task starts with (in dil the trained one), train on the task
under nested rank masks, so that one set of cores serves every truncation; validation images of the
same task choose among the candidates. Only the choice leaves the selection. Source: FM-LoRA
(arXiv:2504.08823) Sec. 3.3, Eq. (11-12), Sec. 4.1.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fmlora_jax.config import Config, ConfigError
from fmlora_jax.methods.common import base
from fmlora_jax.methods.fm_lora import rank_checks
from fmlora_jax.methods.fm_lora.settings import Config as Settings
from fmlora_jax.models import heads, rank_selector
from fmlora_jax.models.flora import FLoRA
from fmlora_jax.models.meta_prompt import MetaPrompt
from fmlora_jax.types import (
  Adapters,
  Backbone,
  Facts,
  NonFiniteError,
  Params,
  TaskArrays,
  TaskView,
)


class Probe(flax.struct.PyTreeNode):
  """Cores and a head at r_max, in preliminary training."""

  params: Params
  opt_state: optax.OptState


class Context(flax.struct.PyTreeNode):
  """Read-only inputs of a step besides its batch; passed, so that none is compiled in."""

  fixed: Params
  task: TaskArrays


class RankSelection:
  """Chooses the rank of each task by `config.method.drs`; its programs compile once per run.

  Args:
    config: the run's; `method.drs`, `method.bases.max_rank` and `optim` are used.
    logits: (params, fixed, core mask [R], images) -> [B, K] logits of the adapted model.
  """

  def __init__(self, config: Config, logits: Callable[..., Float[Array, "B K"]]):
    settings = cast(Settings, config.method)
    self.drs, self.max_rank = settings.drs, settings.bases.max_rank
    self.config, self._logits = config, logits
    self.selector = rank_selector.RankSelector(
      self.drs.candidate_ranks, self.max_rank, self.drs.tau
    )
    self.masks = self.selector.masks
    self.optimizer = make_optimizer(config)
    self.train_drawn = jax.jit(self._train_drawn, static_argnames="augment")
    self.train_all = jax.jit(self._train_all, static_argnames="augment")
    self.validate_all = jax.jit(self._validate_all, static_argnames="center")
    self._learn = jax.jit(self._learn_alpha)

  def select(self, params: Params, fixed: Params, view: TaskView) -> Facts:
    """Returns {"rank", "complexity", "rank_scores"} for the task of `view`.

    Args:
      params: {"core": {target: {"m", "n"}}, "head"}: fresh, at r_max.
      fixed: further inputs of `logits`, which are not trained here.
      view: the task.

    Raises:
      ConfigError: if the task has no validation images.
      NonFiniteError: if the preliminary training gives NaN or infinity.
    """
    if view.val_batches is None:
      raise ConfigError(rank_checks.without_val(self.config, f"task {view.index + 1}"))
    context = Context(fixed=fixed, task=view.arrays)
    choose = self._by_gumbel if self.drs.strategy == "gumbel" else self._by_validation
    index, val_loss, scores = choose(params, context, view)
    if not np.isfinite([val_loss, *scores]).all():
      raise NonFiniteError(
        f"validation loss is {val_loss} in the rank selection of task {view.index + 1}: must be "
        "finite; lower config.optim.learning_rate or set config.optim.clip_norm"
      )
    return {
      "rank": self.drs.candidate_ranks[index],
      "complexity": float(rank_selector.complexity(val_loss, view.num_classes)),
      "rank_scores": [float(score) for score in scores],
    }

  def _by_gumbel(self, params, context, view):
    """Returns the likeliest candidate, its loss, and all probabilities."""
    probe = _like_a_step(Probe(params, self.optimizer.init(params)), view)
    state: Any = self.selector.init({}, method="probabilities")
    for epoch in range(self.drs.epochs):
      for batch, key in _steps(view, epoch):
        probe = self.train_drawn(probe, state, context, *batch, key, augment=view.augment)
      losses, _ = self._validate(self.stacked(probe.params), context, view)
      costs = rank_selector.selection_costs(
        losses,
        candidates=self.drs.candidate_ranks,
        max_rank=self.max_rank,
        price=self.drs.price,
        num_classes=view.num_classes,
      )
      state = self._learn(state, costs, jax.random.fold_in(view.key("drs alpha"), epoch))
    index, chances = (self._select(state, method=name) for name in ("choice", "probabilities"))
    return int(index), losses[int(index)], chances

  def _select(self, state, method: str) -> Any:
    return self.selector.apply(state, method=method)

  def _by_validation(self, params, context, view):
    """Returns the smallest candidate that is accurate enough, its loss, and all accuracies."""
    stacked = self.stacked(params)
    probes = _like_a_step(Probe(stacked, jax.vmap(self.optimizer.init)(stacked)), view)
    for epoch in range(self.drs.epochs):
      for batch, key in _steps(view, epoch):
        probes = self.train_all(probes, self.masks, context, *batch, key, augment=view.augment)
    losses, accuracies = self._validate(probes.params, context, view)
    index = first_within(np.asarray(accuracies), self.drs.tolerance)
    return index, losses[index], accuracies

  def stacked(self, params: Params) -> Params:
    """Returns the parameters once for each candidate."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], len(self.masks), axis=0), params)

  def _loss(self, params, mask, context, batch):
    logits = self._logits(params, context.fixed, mask, batch.images)
    losses = heads.local_losses(logits, batch.labels, context.task)
    return heads.weighted_mean(losses, batch.valid)

  def _update(self, probe, mask, context, batch):
    grads = jax.grad(self._loss)(probe.params, mask, context, batch)
    updates, opt_state = self.optimizer.update(grads, probe.opt_state, probe.params)
    params = cast(Params, optax.apply_updates(probe.params, updates))
    return Probe(params, opt_state)

  def _train_drawn(self, probe, state, context, examples, rows, key, *, augment):
    """One training step at a rank drawn with P = softmax(alpha): Eq. (11)."""
    draw_rank, draw_crop = jax.random.split(key)
    mask = self.selector.apply(state, draw_rank)
    return self._update(probe, mask, context, augment(examples, rows, draw_crop))

  def _train_all(self, probes, masks, context, examples, rows, key, *, augment):
    """One training step of every candidate, on the same batch."""
    batch = augment(examples, rows, key)
    return jax.vmap(lambda probe, mask: self._update(probe, mask, context, batch))(probes, masks)

  def _learn_alpha(self, state, costs, key):
    descent = {"steps": self.drs.selector_steps, "learning_rate": self.drs.selector_learning_rate}
    apply = functools.partial(self.selector.apply, method="learn", mutable="cur")
    return apply(state, costs, key, **descent)[1]

  def _validate_all(self, params, masks, context, examples, rows, *, center):
    batch = center(examples, rows)

    def sums(params, mask):
      logits = self._logits(params, context.fixed, mask, batch.images)
      return loss_and_correct(logits, batch.labels, batch.valid, context.task)

    return jax.vmap(sums)(params, masks), jnp.sum(batch.valid)

  def _validate(self, params, context, view) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    """Returns the mean loss and the accuracy of each candidate over the whole validation set."""
    parts = [
      self.validate_all(params, self.masks, context, *batch, center=view.center)
      for batch in view.val_batches(0)
    ]
    totals = sum((sums for sums, _ in parts), jnp.zeros(())) / sum(count for _, count in parts)
    return totals[:, 0], totals[:, 1]


def make_logits(
  flora: FLoRA, prompt: MetaPrompt | None, backbone: Backbone, layer: heads.Head
) -> Callable[..., Float[Array, "B K"]]:
  """Returns the function (params, fixed, core mask [R], images) -> logits of the adapted model.

  `params` are core at r_max and head, `fixed` the group `shared` and the backbone.
  """

  def logits(params, fixed, mask, images):
    deltas: Any = flora.apply({"shared": fixed, "cur": params}, mask, method="masked")
    tokens: Any = prompt.apply({"shared": fixed}) if prompt else None
    features = backbone.apply(fixed["backbone"], images, Adapters(deltas=deltas, prompt=tokens))
    return layer.logits(params["head"], features)

  return logits


def make_optimizer(config: Config) -> optax.GradientTransformation:
  """Returns AdamW at constant rates for {"core", "head"}, clipped as `config.optim` says."""
  optim = config.optim
  grouped = optax.multi_transform(
    {
      "core": optax.adamw(optim.learning_rate, weight_decay=optim.weight_decay),
      "head": optax.adamw(optim.head_learning_rate, weight_decay=optim.head_weight_decay),
    },
    {"core": "core", "head": "head"},
  )
  return optax.chain(base.clipping(config), grouped)


def loss_and_correct(
  logits: Float[Array, "B K"],
  labels: Int[Array, " B"],
  valid: Bool[Array, " B"],
  task: TaskArrays,
) -> Float[Array, "2"]:
  """Returns the sum of losses in nats and the number of right answers over the valid images."""
  losses = heads.local_losses(logits, labels, task)
  slots = jnp.arange(logits.shape[-1]) < task.hi - task.lo
  correct = jnp.argmax(jnp.where(slots, logits, -jnp.inf), -1) + task.lo == labels
  return jnp.stack([jnp.sum(losses * valid), jnp.sum(correct & valid)])


def first_within(accuracies: Float[np.ndarray, " k"], tolerance: float) -> int:
  """Returns the first candidate whose accuracy is within `tolerance` of the best; Sec. 4.1."""
  return int(np.argmax(accuracies >= float(accuracies.max()) - tolerance))


def _like_a_step(probe: Probe, view: TaskView) -> Probe:
  """Gives `probe` the sharding that a step returns; otherwise the second step recompiles."""
  return jax.device_put(probe, view.arrays.index.sharding)


def _steps(view: TaskView, epoch: int) -> Iterator[tuple[tuple, PRNGKeyArray]]:
  """Yields (training batch, key) for each step of one epoch of the preliminary training."""
  key = jax.random.fold_in(view.key("drs"), epoch)
  for step, batch in enumerate(view.train_batches(epoch)):
    yield batch, jax.random.fold_in(key, step)
