"""Rank selection: the preliminary training that measures a task's difficulty and chooses its rank.

Fresh cores, and the head that the task starts with (in dil the trained one), train on the task
under nested rank masks, so that one set of cores serves every truncation; validation images of the
same task choose among the candidates. Only the choice leaves the selection. Source: FM-LoRA
(arXiv:2504.08823) Sec. 3.3, Eq. (11-12), Sec. 4.1.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

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


class Evidence(NamedTuple):
  """The losses that the preliminary training of a task shows.

  Attributes:
    losses: of each validation image with each candidate, in nats, float32.
    unseen: the losses of training images before a step saw them, in the second half of the epoch;
      none after several epochs, whose images were all seen in the first.
  """

  losses: Float[np.ndarray, "n k"]
  unseen: Float[np.ndarray, " m"]

  def complexities(self, num_classes: int) -> list[float]:
    """Returns H on the validation images by candidate."""
    return [complexity_of(losses, num_classes) for losses in self.losses.T]

  def complexity(self, num_classes: int) -> float:
    """Returns H_t over all images that were not trained on yet, the mean over the candidates.

    Validation images alone are few, and training images are as new before their first step.
    """
    return complexity_of(np.concatenate([self.losses.mean(1), self.unseen]), num_classes)


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
    """Returns the rank of the task of `view` and what it follows from.

    The facts are "rank", "complexity", "complexity_by_rank" and "rank_scores": P of each candidate,
    or its validation loss with strategy "validation".

    Args:
      params: {"core": {target: {"m", "n"}}, "head"}: fresh, at r_max.
      fixed: further inputs of `logits`, which are not trained here.
      view: the task; its `earlier` facts hold the complexities to compare with.

    Raises:
      ConfigError: if the task has no validation images.
      NonFiniteError: if the preliminary training gives NaN or infinity.
    """
    if view.val_batches is None:
      raise ConfigError(rank_checks.without_val(self.config, f"task {view.index + 1}"))
    context = Context(fixed=fixed, task=view.arrays)
    choose = self._by_gumbel if self.drs.strategy == "gumbel" else self._by_validation
    evidence, scores = choose(params, context, view)
    require_finite(evidence, view)
    scores = np.asarray(view.replicate(scores))  # of process 0: CPUs round differently
    best = np.argmax(scores)
    if self.drs.strategy == "validation":
      best = first_within(scores, self.drs.tolerance)
    return {
      "rank": self.drs.candidate_ranks[int(best)],
      "complexity": evidence.complexity(view.num_classes),
      "complexity_by_rank": evidence.complexities(view.num_classes),
      "rank_scores": [float(score) for score in scores],
    }

  def _by_gumbel(self, params, context, view) -> tuple[Evidence, Float[Array, " k"]]:
    """Returns the evidence and P of each candidate.

    In the first half of the first epoch all ranks are as likely, in the second P follows the
    complexity so far; after each epoch alpha learns on the validation images.
    """
    probe = _like_a_step(Probe(params, self.optimizer.init(params)), view)
    difficulty, evidence = view.replicate(jnp.zeros(len(self.masks))), None
    state = _like_a_step(self.selector.init({}, difficulty, method="probabilities"), view)
    for epoch in range(self.drs.epochs):
      unseen = []
      for step, batch, key in _steps(view, epoch):
        if epoch == 0 < step == view.steps_per_epoch // 2:
          so_far = complexity_of(_valid(view.gather(unseen)), view.num_classes)
          difficulty, unseen = difficulty_logits(self.config, so_far, view), []
        probe, losses = self.train_drawn(
          probe, state, difficulty, context, *batch, key, augment=view.augment
        )
        unseen.append(losses)
      fresh = unseen if epoch == 0 else []
      evidence = self._evidence(stacked(len(self.masks), probe.params), fresh, context, view)
      difficulty = difficulty_logits(self.config, evidence.complexity(view.num_classes), view)
      gains = rank_selector.significant_gains(jnp.asarray(evidence.losses), self.drs.deviations)
      state = self._learn(state, gains, jax.random.fold_in(view.key("drs alpha"), epoch))
    chances: Any = self.selector.apply(state, difficulty, method="probabilities")
    return cast(Evidence, evidence), chances  # epochs >= 1

  def _by_validation(self, params, context, view) -> tuple[Evidence, Float[np.ndarray, " k"]]:
    """Returns the evidence and the validation loss of each candidate, trained alone."""
    each = stacked(len(self.masks), params)
    probes = _like_a_step(Probe(each, jax.vmap(self.optimizer.init)(each)), view)
    unseen = []
    for epoch in range(self.drs.epochs):
      for step, batch, key in _steps(view, epoch):
        probes, losses = self.train_all(
          probes, self.masks, context, *batch, key, augment=view.augment
        )
        if self.drs.epochs == 1 and step >= view.steps_per_epoch // 2:
          unseen.append(losses)
    evidence = self._evidence(probes.params, unseen, context, view)
    return evidence, evidence.losses.mean(0)

  def _losses(self, params, mask, context, batch) -> Float[Array, " B"]:
    logits = self._logits(params, context.fixed, mask, batch.images)
    return heads.local_losses(logits, batch.labels, context.task)  # float32

  def _update(self, probe, mask, context, batch):
    """Returns a probe after one step, and the losses of the batch before it."""

    def loss(params):
      losses = self._losses(params, mask, context, batch)
      return heads.weighted_mean(losses, batch.valid), losses

    grads, losses = jax.grad(loss, has_aux=True)(probe.params)
    updates, opt_state = self.optimizer.update(grads, probe.opt_state, probe.params)
    params = cast(Params, optax.apply_updates(probe.params, updates))
    return Probe(params, opt_state), losses

  def _train_drawn(self, probe, state, difficulty, context, examples, rows, key, *, augment):
    """One training step at a rank drawn with P: Eq. (11)."""
    draw_rank, draw_crop = jax.random.split(key)
    mask = self.selector.apply(state, difficulty, draw_rank)
    batch = augment(examples, rows, draw_crop)
    probe, losses = self._update(probe, mask, context, batch)
    return probe, (losses, batch.valid)

  def _train_all(self, probes, masks, context, examples, rows, key, *, augment):
    """One training step of every candidate, on the same batch."""
    batch = augment(examples, rows, key)
    probes, losses = jax.vmap(lambda probe, mask: self._update(probe, mask, context, batch))(
      probes, masks
    )
    return probes, (losses.mean(0), batch.valid)

  def _learn_alpha(self, state, costs, key):
    descent = {"steps": self.drs.selector_steps, "learning_rate": self.drs.selector_learning_rate}
    apply = functools.partial(self.selector.apply, method="learn", mutable="cur")
    return apply(state, costs, key, **descent)[1]

  def _validate_all(self, params, masks, context, examples, rows, *, center):
    batch = center(examples, rows)
    losses = jax.vmap(lambda params, mask: self._losses(params, mask, context, batch))
    return losses(params, masks).T, batch.valid

  def _evidence(self, params, unseen, context, view) -> Evidence:
    """Returns the losses of `unseen` batches and those of all validation images."""
    parts = [
      self.validate_all(params, self.masks, context, *batch, center=view.center)
      for batch in view.val_batches(0)
    ]
    return Evidence(losses=_valid(view.gather(parts)), unseen=_valid(view.gather(unseen)))


def complexity_of(losses: Float[np.ndarray, " n"], num_classes: int) -> float:
  """Returns H of the mean of losses in nats."""
  return float(rank_selector.complexity(jnp.asarray(losses.mean()), num_classes))


def difficulty_logits(config: Config, complexity: float, view: TaskView) -> Float[Array, " k"]:
  """Returns what the complexity of a task adds to the logits of the candidate ranks."""
  settings = cast(Settings, config.method)
  drs, max_rank = settings.drs, settings.bases.max_rank
  earlier = [fact["complexity"] for fact in view.earlier if fact.get("complexity") is not None]
  share = rank_selector.rank_share(complexity, earlier, drs.reference)
  logits = rank_selector.difficulty_logits(share, drs.candidate_ranks, max_rank, drs.weight)
  return view.replicate(logits)


def stacked(count: int, params: Params) -> Params:
  """Returns the parameters once for each of the candidates."""
  return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], count, axis=0), params)


def require_finite(evidence: Evidence, view: TaskView) -> None:
  """Raises NonFiniteError if a validation loss is NaN or infinite."""
  loss = evidence.losses.mean()
  if not np.isfinite(loss):
    raise NonFiniteError(
      f"validation loss is {loss} in the rank selection of task {view.index + 1}: must be "
      "finite; lower config.optim.learning_rate or set config.optim.clip_norm"
    )


def make_logits(
  flora: FLoRA, prompt: MetaPrompt | None, backbone: Backbone, layer: heads.Head
) -> Callable[..., Float[Array, "B K"]]:
  """Returns the function (params, fixed, core mask [R], images) -> logits of the adapted model.

  `params` are core at r_max and head, `fixed` the group `shared` and the backbone.
  """

  def logits(params, fixed, mask, images):
    groups = {"shared": fixed, "cur": params, "mem": fixed}
    deltas: Any = flora.apply(groups, mask, method="masked")
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


def first_within(losses: Float[np.ndarray, " k"], tolerance: float) -> int:
  """Returns the first candidate whose loss is within `tolerance` nats of the least; Sec. 4.1."""
  return int(np.argmax(losses <= float(losses.min()) + tolerance))


def _valid(parts) -> np.ndarray:
  """Returns the losses of valid images, side by side, from (losses, valid) of each batch."""
  if not parts:
    return np.zeros(0, np.float32)
  losses, valid = map(np.concatenate, zip(*parts, strict=True))
  return np.asarray(losses, np.float32)[np.asarray(valid)]


def _like_a_step(tree: Any, view: TaskView) -> Any:
  """Gives arrays the sharding that a step returns; otherwise the second step recompiles."""
  return jax.device_put(tree, view.arrays.index.sharding)


def _steps(view: TaskView, epoch: int) -> Iterator[tuple[int, tuple, PRNGKeyArray]]:
  """Yields (step, training batch, key) for each step of an epoch of the preliminary training."""
  key = jax.random.fold_in(view.key("drs"), epoch)
  for step, batch in enumerate(view.train_batches(epoch)):
    yield step, batch, jax.random.fold_in(key, step)
