"""The training step, and many of them in one device program."""

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


@flax.struct.dataclass
class TrainState:
  """What a step changes; donated to it.

  Attributes:
    params: {"shared", "cur"}.
    opt_state: exists for trained leaves only.
    step: steps done in this task.
  """

  params: Params
  opt_state: optax.OptState
  step: Int[Array, ""]


@flax.struct.dataclass
class StepContext:
  """What a step only reads.

  Attributes:
    frozen, mem: groups of `Variables`.
    task: the current one.
    total_steps: of this task; ends the cosine.
    root: PRNG key of the run.
  """

  frozen: Params
  mem: Params
  task: TaskArrays
  total_steps: Int[Array, ""]
  root: PRNGKeyArray


class TrainStep:
  """The step of a method under one table of rules; pure functions, made once.

  Attributes:
    step: (state, fixed, batch) -> (state, {"loss", "grad_norm"}). Where one of these or a parameter
      would not be finite, the state stays as it was: its count tells.
  """

  def __init__(self, method: AdaptedViT, config: Config, rules: Rules):
    self.method, self.config, self.rules = method, config, rules

  def _optimizer(self, params: Params) -> tuple[optax.GradientTransformationExtraArgs, Params]:
    labels = label_leaves(params, self.rules)
    return optim.make_optimizer(self.config, self.method.groups, labels), labels

  def init(self, variables: Variables) -> TrainState:
    """Returns the state at the start of a task: a fresh optimiser."""
    params = {"shared": variables.shared, "cur": variables.cur}
    optimizer, _ = self._optimizer(params)
    return TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(0))

  def step(self, state: TrainState, fixed: StepContext, batch: Batch) -> tuple[TrainState, dict]:
    optimizer, labels = self._optimizer(state.params)
    trained, still = partition(state.params, labels)
    key = named_key(fixed.root, "method", task=fixed.task.index, step=state.step)

    def loss_fn(trained):
      params = combine(trained, still)
      variables = Variables(frozen=fixed.frozen, mem=fixed.mem, **params)
      output = self.method.apply(variables, batch.images, fixed.task, key, batch.valid)
      losses = heads.local_losses(output.logits, batch.labels, fixed.task)
      return heads.weighted_mean(losses, batch.valid) + output.penalty

    loss, grads = jax.value_and_grad(loss_fn)(trained)
    stats = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    # set_to_zero ignores what it is given for the frozen leaves; nothing is computed for them
    grads = combine(grads, jax.tree.map(jnp.zeros_like, still))
    now = {
      "progress": state.step / fixed.total_steps,
      "epoch": state.step // (fixed.total_steps // self.config.epochs),
    }
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **now)
    updates, _ = partition(updates, labels)
    trained = optax.apply_updates(trained, updates)
    new = TrainState(params=combine(trained, still), opt_state=opt_state, step=state.step + 1)
    finite = is_finite((stats, trained))
    return jax.tree.map(lambda now, before: jnp.where(finite, now, before), new, state), stats


def is_finite(tree) -> Bool[Array, ""]:
  """Returns whether every number of a pytree is finite."""
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def make_multi_step(stepper: TrainStep, augment, mesh: jax.sharding.Mesh):
  """Returns the jitted (state, fixed, examples, rows [K, B], num) -> (state, stats of K numbers).

  It does the first `num` of K steps, or those before one that is not finite; `num` is traced, so a
  task's last chunk compiles nothing new. Every step draws its crops from the key of (task, step),
  and gathers what is frozen where it uses it. State and stats are whole on each device.
  """
  whole = mesh_lib.replicated(mesh)

  def chunk(
    state: TrainState, fixed: StepContext, examples: Examples, rows: Int[Array, "K B"], num
  ):
    stats = {name: jnp.zeros(rows.shape[0]) for name in ("loss", "grad_norm")}
    first = state.step

    def goes_on(carry):
      i, state, _ = carry
      return (i < num) & (state.step == first + i)

    def body(carry):
      i, state, stats = carry
      key = named_key(fixed.root, "augment", task=fixed.task.index, step=state.step)
      batch = jax.lax.with_sharding_constraint(
        augment(examples, rows[i], key), mesh_lib.batch_sharding(mesh)
      )
      gathered = jax.lax.with_sharding_constraint(fixed.frozen, whole)
      state, now = stepper.step(state, fixed.replace(frozen=gathered), batch)
      return i + 1, state, {name: stats[name].at[i].set(now[name]) for name in stats}

    return jax.lax.while_loop(goes_on, body, (jnp.int32(0), state, stats))[1:]

  return jax.jit(chunk, donate_argnames="state", out_shardings=whole)
