import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmlora_jax.train import optimizer
from fmlora_jax.train.step import StepContext, TrainStep
from fmlora_jax.types import Batch


@pytest.fixture(scope="module")
def ready(lab):
  """(lab, Stepper of task 2, its state, Fixed, eight valid images)."""
  made = lab()
  stage = made.stages[1]
  stepper = TrainStep(made.method, made.config, made.method.rules(1))
  variables = stage.trained  # N is not zero, so that every trained leaf has a gradient
  fixed = StepContext(
    frozen=made.method.freeze(made.weights, variables),
    mem=variables.mem,
    task=stage.view.arrays,
    total_steps=jnp.int32(10),
    root=made.root,
  )
  batch = made.batch(task=1)
  return made, jax.jit(stepper.step), stepper.init(variables), fixed, batch


def pad(batch: Batch, rows: int, image: float, label: int) -> Batch:
  images = jnp.full((rows, *batch.images.shape[1:]), image)
  return Batch(
    images=jnp.concatenate([batch.images, images]),
    labels=jnp.concatenate([batch.labels, jnp.full(rows, label, batch.labels.dtype)]),
    valid=jnp.concatenate([batch.valid, jnp.zeros(rows, bool)]),
  )


@pytest.mark.parametrize("label", [0, 3, 6])
def test_padded_rows_change_neither_loss_nor_gradients_nor_parameters(ready, label):
  """Whatever they hold: labels of this task, of the one before and of the one to come."""
  _, step, state, fixed, batch = ready
  expected, stats = step(state, fixed, batch)
  got, padded_stats = step(state, fixed, pad(batch, 3, 50.0, label))
  np.testing.assert_allclose(padded_stats["loss"], stats["loss"], rtol=1e-6)
  np.testing.assert_allclose(padded_stats["grad_norm"], stats["grad_norm"], rtol=1e-5)
  moments = [jax.tree.leaves(s.opt_state) for s in (got, expected)]
  for mine, other in zip(*moments, strict=True):  # Adam's first moment is the gradient
    np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-7)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), got.params, expected.params
  )
  assert stats["loss"] > 0.1 and stats["grad_norm"] > 0.01


def test_rows_that_are_valid_do_change_them(ready):
  _, step, state, fixed, batch = ready
  padded = pad(batch, 3, 0.5, 3)
  _, stats = step(state, fixed, padded)
  _, others = step(state, fixed, padded.replace(valid=jnp.ones(11, bool)))
  assert abs(stats["loss"] - others["loss"]) > 1e-3


def test_a_step_counts_itself_and_gives_the_loss_before_it(ready):
  made, step, state, fixed, batch = ready
  after, stats = step(state, fixed, batch)
  assert int(after.step) == int(state.step) + 1
  logits = made.training_logits(made.stages[1].trained, made.stages[1], batch.images)
  log_p = jax.nn.log_softmax(logits)[jnp.arange(8), batch.labels - 2]
  np.testing.assert_allclose(stats["loss"], -log_p.mean(), rtol=1e-5)


def test_the_epoch_of_a_long_task_does_not_overflow(make_lab):
  """Step 2,147,500 of 2500 an epoch, over 1000 epochs: their product is more than 2^31."""
  steps = {"name": "sgd", "schedule": "steps", "milestones": (859,), "decay": 0.0}
  made = make_lab(method={"name": "linear_probe"}, epochs=1000, optim=steps)
  view = made.view(0)
  variables, _ = made.method.begin_task(made.variables, view)
  fixed = made.trainer.step_context(variables, view).replace(total_steps=jnp.int32(2_500_000))
  stepper = made.setup.programs.train_step(made.method.rules(0))
  state = stepper.init(variables)
  moved = []
  for number in (2_147_499, 2_147_500):  # the last of epoch 858 and the first of 859
    after, _ = jax.jit(stepper.step)(state.replace(step=jnp.int32(number)), fixed, made.batch())
    head = state.params["cur"]["head"]["kernel"], after.params["cur"]["head"]["kernel"]
    moved.append(not np.array_equal(*head))
  assert moved == [True, False]


def test_the_norm_is_that_of_the_gradients_of_trained_leaves(ready):
  """By Adam's first step from a fresh state: its first moment is a tenth of the gradient."""
  _, step, state, fixed, batch = ready
  after, stats = step(state, fixed, batch)
  trained = sum(leaf.size for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim) // 2
  moments = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(after.opt_state)
    if ".mu" in jax.tree_util.keystr(path) and leaf.ndim
  ]
  assert sum(leaf.size for leaf in moments) == trained
  norm = np.sqrt(sum(np.sum((np.asarray(leaf) / 0.1) ** 2) for leaf in moments))
  np.testing.assert_allclose(stats["grad_norm"], norm, rtol=1e-4)


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 750, 12_345])
def test_the_epoch_is_exact_whatever_the_number_of_steps(ready, monkeypatch, steps_per_epoch):
  """The last step of an epoch and the first of the next, which schedules by epochs tell apart."""
  made, _, state, fixed, batch = ready
  epochs, seen = 50, []

  def recorded(*arguments):
    chosen = original(*arguments)

    def update(updates, state, params, **now):
      seen.append((now["progress"], now["epoch"]))
      return chosen.update(updates, state, params, **now)

    return optax.GradientTransformationExtraArgs(chosen.init, update)

  original = optimizer.make_optimizer
  monkeypatch.setattr(optimizer, "make_optimizer", recorded)
  config = dataclasses.replace(made.config, epochs=epochs)
  stepper = TrainStep(made.method, config, made.method.rules(1))
  total = jnp.int32(epochs * steps_per_epoch)

  @jax.jit
  def now(step):
    seen.clear()
    stepper.step(state.replace(step=step), fixed.replace(total_steps=total), batch)
    return seen[-1]

  for epoch in range(1, epochs):
    first = epoch * steps_per_epoch
    for step, expected in ((first - 1, epoch - 1), (first, epoch)):
      progress, got = now(jnp.int32(step))
      assert int(got) == expected
      np.testing.assert_allclose(progress, step / (epochs * steps_per_epoch), rtol=1e-6)
