"""The training step, and the compiled program that does many of them."""

import functools
from collections.abc import Callable
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from fmlora_jax.config import Config
from fmlora_jax.methods.common.base import AdaptedViT
from fmlora_jax.models import heads
from fmlora_jax.train import mesh as mesh_lib
from fmlora_jax.train import optimizer as optim
from fmlora_jax.train.labels import combine, label_leaves, partition
from fmlora_jax.train.rng import named_key
from fmlora_jax.types import Batch, Examples, Params, Rules, TaskArrays, Variables


class TrainState(flax.struct.PyTreeNode):
  """State of training: all that a step changes, donated to it.

  Attributes:
    params: {"shared", "cur"}.
    opt_state: of trained leaves only.
    step: steps done in this task.
  """

  params: Params
  opt_state: optax.OptState
  step: Int[Array, ""]


class StepContext(flax.struct.PyTreeNode):
  """Inputs that all steps of a task share and none changes.

  Attributes:
    frozen, mem: groups of `Variables`.
    task: the current one.
    total_steps: of this task; the end of learning-rate schedules.
    root: PRNG key of the run.
  """

  frozen: Params
  mem: Params
  task: TaskArrays
  total_steps: Int[Array, ""]
  root: PRNGKeyArray


class TrainStep:
  """The training step of a method under one table of rules: pure functions."""

  def __init__(self, method: AdaptedViT, config: Config, rules: Rules):
    self.method, self.config, self.rules = method, config, rules

  def _optimizer(self, params: Params) -> tuple[optax.GradientTransformationExtraArgs, Params]:
    labels = label_leaves(params, self.rules)
    return optim.make_optimizer(self.config, self.method.groups, labels), labels

  def init(self, variables: Variables) -> TrainState:
    """Returns the state at the start of a task, with a fresh optimizer."""
    params = {"shared": variables.shared, "cur": variables.cur}
    optimizer, _ = self._optimizer(params)
    return TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(0))

  def step(self, state: TrainState, context: StepContext, batch: Batch) -> tuple[TrainState, dict]:
    """Returns the next state and {"loss", "grad_norm"}.

    Where one of these or a trained parameter is not finite, the state stays as it was, its count of
    steps too.
    """
    optimizer, labels = self._optimizer(state.params)
    trained, frozen = partition(state.params, labels)
    key = named_key(context.root, "method", task=context.task.index, step=state.step)

    def loss_fn(trained):
      params = combine(trained, frozen)
      variables = Variables(frozen=context.frozen, mem=context.mem, **params)
      output = self.method.apply(variables, batch.images, context.task, key, batch.valid)
      losses = heads.local_losses(output.logits, batch.labels, context.task, output.old_logits)
      return heads.weighted_mean(losses, batch.valid) + output.penalty

    loss, grads = jax.value_and_grad(loss_fn)(trained)
    stats = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    # set_to_zero ignores the gradients of frozen leaves; nothing is computed for them
    grads = combine(grads, jax.tree.map(jnp.zeros_like, frozen))
    now = {
      "progress": state.step / context.total_steps,
      "epoch": state.step // (context.total_steps // self.config.epochs),
      "task": context.task.index,
    }
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **now)
    updates, _ = partition(cast(Params, updates), labels)
    trained = optax.apply_updates(trained, updates)
    before, _ = partition(state.params, labels)
    trained, opt_state, step = jax.lax.cond(
      is_finite((stats, trained)),
      lambda: (trained, opt_state, state.step + 1),
      lambda: (before, state.opt_state, state.step),
    )
    params = combine(trained, frozen)
    return TrainState(params=params, opt_state=opt_state, step=step), stats


def is_finite(tree) -> Bool[Array, ""]:
  """Returns whether every number of a pytree is finite."""
  # one reduction over all: one for each leaf takes a quarter of the time to compile a step
  return jnp.all(jnp.isfinite(jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])))


class TrainPrograms:
  """Compiled training programs of a method; tasks with the same rules and shapes share them.

  Args:
    method: to train.
    config: of the run, or of one that differs in the seed.
    augment: (examples, rows [B], key) -> Batch.
    mesh: devices.

  Attributes:
    num_compiled: programs compiled so far.
  """

  def __init__(
    self, method: AdaptedViT, config: Config, augment: Callable, mesh: jax.sharding.Mesh
  ):
    self.method, self.augment = method, augment
    self._config, self._mesh = config, mesh
    self._multi_steps: dict[Rules, Callable] = {}
    self.num_compiled = 0

  def train_step(self, rules: Rules) -> TrainStep:
    return TrainStep(self.method, self._config, rules)

  def multi_step(self, rules: Rules) -> Callable:
    """Returns the jitted (state, context, examples, rows [K, B], num) -> (state, stats of K).

    It does the first `num` of K steps, or those before one that is not finite; `num` is traced, so
    a task's last chunk compiles nothing new. Every step draws its crops from the key of (task,
    step), and gathers frozen arrays where it uses them. State and stats are replicated.
    """
    if rules not in self._multi_steps:
      whole = mesh_lib.replicated(self._mesh)
      function = functools.partial(self._run_steps, self.train_step(rules))
      self._multi_steps[rules] = jax.jit(function, donate_argnums=0, out_shardings=whole)
    return self._multi_steps[rules]

  def _run_steps(
    self,
    train_step: TrainStep,
    state: TrainState,
    context: StepContext,
    examples: Examples,
    rows: Int[Array, "K B"],
    num: Int[Array, ""],
  ) -> tuple[TrainState, dict]:
    self.num_compiled += 1  # once a trace
    whole, first = mesh_lib.replicated(self._mesh), state.step
    stats = {name: jnp.zeros(rows.shape[0]) for name in ("loss", "grad_norm")}

    def goes_on(carry):
      i, state, _ = carry
      return (i < num) & (state.step == first + i)

    def body(carry):
      i, state, stats = carry
      key = named_key(context.root, "augment", task=context.task.index, step=state.step)
      batch = jax.lax.with_sharding_constraint(
        self.augment(examples, rows[i], key), mesh_lib.batch_sharding(self._mesh)
      )
      gathered = jax.lax.with_sharding_constraint(context.frozen, whole)
      state, now = train_step.step(state, context.replace(frozen=gathered), batch)
      return i + 1, state, {name: stats[name].at[i].set(now[name]) for name in stats}

    return jax.lax.while_loop(goes_on, body, (jnp.int32(0), state, stats))[1:]
