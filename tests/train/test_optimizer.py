import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax import methods
from fmlora_jax.train import optimizer as optim
from fmlora_jax.types import OptimizerGroup

OPTIM = {
  "learning_rate": 3e-3,
  "weight_decay": 0.1,
  "head_learning_rate": 2e-2,
  "head_weight_decay": 0.0,
}
LABELS = {"core": "adapter", "first": "bases", "prompt": "prompt", "head": "head", "old": "frozen"}
TRAINED = ("core", "first", "prompt", "head")
GROUPS = {
  "adapter": OptimizerGroup(),
  "bases": OptimizerGroup(lr_scale=0.2),
  "prompt": OptimizerGroup(lr_scale=0.5),
  "scale": OptimizerGroup(decays=False),
  "head": OptimizerGroup(is_head=True),
}
STEPS = 7


def make_config(**optim_changes):
  return methods.build_config({"optim": OPTIM | optim_changes})


def draw(seed, *shape):
  return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


PARAMS = {name: draw(i, 2 + i, 2) for i, name in enumerate(LABELS)}


def gradients(step):
  return {name: draw(10 + step, *leaf.shape) for name, leaf in PARAMS.items()}


def optimise(config, labels=LABELS, params=PARAMS, grads=gradients, epochs=(0,) * STEPS):
  """Returns the parameters after STEPS of a task of STEPS, and the state of the optimiser.

  Args:
    epochs: of each step.
  """
  optimizer = optim.make_optimizer(config, GROUPS, labels)
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for step in range(STEPS):
    progress = jnp.float32(step / STEPS)
    updates, state = update(grads(step), state, params, progress=progress, epoch=epochs[step])
    params = jax.tree.map(jnp.add, params, updates)
  return params, state


def adamw(w, grads, learning_rate, weight_decay):
  """AdamW with cosine annealing to 0 over len(grads) steps, in float64; arXiv:1711.05101."""
  w, m, v = w.astype(np.float64), 0.0, 0.0
  for i, g in enumerate(grads):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.astype(np.float64) ** 2
    m_hat, v_hat = m / (1 - 0.9 ** (i + 1)), v / (1 - 0.999 ** (i + 1))
    rate = learning_rate * 0.5 * (1 + np.cos(np.pi * i / len(grads)))
    w = w - rate * (m_hat / (np.sqrt(v_hat) + 1e-8) + weight_decay * w)
  return w


def test_each_group_is_adamw_with_cosine_annealing_at_its_own_rate():
  got, _ = optimise(make_config())
  rates = {
    "core": (3e-3, 0.1),
    "first": (6e-4, 0.1),
    "prompt": (1.5e-3, 0.1),
    "head": (2e-2, 0.0),
  }
  for name, (rate, decay) in rates.items():
    grads = [gradients(step)[name] for step in range(STEPS)]
    expected = adamw(PARAMS[name], grads, rate, decay)
    np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected - PARAMS[name]).max() > rate


def test_the_rate_falls_to_zero_at_the_end_of_a_task():
  optimizer = optim.make_optimizer(make_config(), GROUPS, LABELS)
  state = optimizer.init(PARAMS)

  def size(progress):
    updates, _ = optimizer.update(gradients(0), state, PARAMS, progress=progress, epoch=0)
    return float(jnp.abs(updates["head"]).max())

  full = size(0.0)
  np.testing.assert_allclose(full, 2e-2, rtol=1e-3)  # Adam's first step is the rate itself
  np.testing.assert_allclose(size(0.5), full / 2, rtol=1e-5)
  assert size(1.0) < 1e-6 * full


def test_frozen_leaves_never_move_and_have_no_state():
  """Through optax.multi_transform with set_to_zero; with gradients, decay and clipping."""
  for changes in ({}, {"clip_norm": 0.1}):
    got, state = optimise(make_config(weight_decay=10.0, **changes))
    assert np.asarray(got["old"]).tobytes() == PARAMS["old"].tobytes()
    shapes = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sorted(shapes) == sorted([PARAMS[name].shape for name in TRAINED] * 2)  # two moments


def test_clipping_is_by_the_norm_over_all_trained_leaves():
  """Adam does not see a common factor, so gradients must differ in size from step to step."""

  def growing(step):
    return {name: leaf * 10.0**step for name, leaf in gradients(step).items()}

  def clipped(step):
    grads = growing(step) | {"old": np.zeros_like(PARAMS["old"])}
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in grads.values()))
    return {name: leaf * min(1, 2.0 / norm) for name, leaf in grads.items()}

  def without_old(step):
    return growing(step) | {"old": np.zeros_like(PARAMS["old"])}

  got, _ = optimise(make_config(clip_norm=2.0), grads=without_old)
  expected, _ = optimise(make_config(), grads=clipped)
  unclipped, _ = optimise(make_config(), grads=growing)
  for name in TRAINED:
    np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-7)
    assert np.abs(got[name] - unclipped[name]).max() > 1e-4


def torch_adam(w, grads, rates, weight_decay):
  """torch.optim.Adam: the decay is part of the gradient, and so of both moments; in float64."""
  w, m, v = w.astype(np.float64), 0.0, 0.0
  for i, (g, rate) in enumerate(zip(grads, rates, strict=True)):
    g = g + weight_decay * w
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    m_hat, v_hat = m / (1 - 0.9 ** (i + 1)), v / (1 - 0.999 ** (i + 1))
    w = w - rate * m_hat / (np.sqrt(v_hat) + 1e-8)
  return w


def torch_sgd(w, grads, rates, weight_decay, momentum):
  """torch.optim.SGD, no dampening: the first buffer is the first decayed gradient; in float64."""
  w, buffer = w.astype(np.float64), 0.0
  for g, rate in zip(grads, rates, strict=True):
    buffer = momentum * buffer + g + weight_decay * w
    w = w - rate * buffer
  return w


EPOCHS = (0, 0, 1, 1, 1, 2, 2)
FACTORS = (1, 1, 0.5, 0.5, 0.5, 0.25, 0.25)  # halved at epochs 1 and 2
BY_STEPS = {"schedule": "steps", "milestones": (1, 2), "decay": 0.5}


def rates_of(peak):
  return [peak * factor for factor in FACTORS]


def test_adam_takes_its_decay_into_the_gradient():
  got, _ = optimise(make_config(name="adam", **BY_STEPS), epochs=EPOCHS)
  for name, rate, decay in (("core", 3e-3, 0.1), ("prompt", 1.5e-3, 0.1), ("head", 2e-2, 0.0)):
    grads = [gradients(step)[name] for step in range(STEPS)]
    expected = torch_adam(PARAMS[name], grads, rates_of(rate), decay)
    np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-6)
  decoupled, _ = optimise(make_config(name="adamw", **BY_STEPS), epochs=EPOCHS)
  assert np.abs(got["core"] - decoupled["core"]).max() > 1e-4
  assert np.abs(got["head"] - decoupled["head"]).max() < 1e-6  # which has no decay


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_has_momentum_and_takes_its_decay_into_the_gradient(momentum):
  got, _ = optimise(make_config(name="sgd", momentum=momentum, **BY_STEPS), epochs=EPOCHS)
  for name, rate, decay in (("core", 3e-3, 0.1), ("prompt", 1.5e-3, 0.1), ("head", 2e-2, 0.0)):
    grads = [gradients(step)[name] for step in range(STEPS)]
    expected = torch_sgd(PARAMS[name], grads, rates_of(rate), decay, momentum)
    np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected - PARAMS[name]).max() > rate


@pytest.mark.parametrize("optimiser", ["adamw", "adam", "sgd"])
def test_factors_whose_neutral_value_is_not_zero_do_not_decay(optimiser):
  """The group "scale": the adapters' rate, and no decay however large it is elsewhere."""
  labels = LABELS | {"core": "scale"}
  got, _ = optimise(make_config(name=optimiser, weight_decay=5.0), labels)
  expected, _ = optimise(make_config(name=optimiser, weight_decay=0.0))
  decayed, _ = optimise(make_config(name=optimiser, weight_decay=5.0))
  np.testing.assert_array_equal(got["core"], expected["core"])
  assert np.abs(decayed["core"] - got["core"]).max() > 1e-3


def test_a_floor_of_the_rate_is_each_group_s_own():
  """timm_cosine ends at one rate, which is another factor of the head's peak."""
  floor = 1e-3
  config = make_config(name="sgd", momentum=0.0, schedule="timm_cosine", final_learning_rate=floor)
  optimizer = optim.make_optimizer(config, GROUPS, LABELS)
  state = optimizer.init(PARAMS)
  grads = gradients(0)
  late = {"progress": 0.0, "epoch": 1 + config.epochs}  # half a wave: the floor itself
  updates, _ = optimizer.update(grads, state, PARAMS, **late)
  np.testing.assert_allclose(updates["head"], -floor * grads["head"], rtol=1e-4)
  decayed = grads["core"] + 0.1 * PARAMS["core"]
  np.testing.assert_allclose(updates["core"], -floor * decayed, rtol=1e-4)


def test_from_task_2_on_rates_have_a_factor_and_the_head_another():
  config = make_config(name="sgd", momentum=0.0, later_lr_scale=0.25, later_head_lr_scale=0.5)
  optimizer = optim.make_optimizer(config, GROUPS, LABELS)
  state, grads = optimizer.init(PARAMS), gradients(0)
  update = jax.jit(
    lambda task: optimizer.update(grads, state, PARAMS, progress=0.0, epoch=0, task=task)
  )
  first, second, third = (update(jnp.int32(task))[0] for task in range(3))
  for name, factor in {"core": 0.25, "first": 0.25, "prompt": 0.25, "head": 0.5}.items():
    assert np.abs(first[name]).max() > 0
    np.testing.assert_allclose(second[name], factor * first[name], rtol=1e-6)
    np.testing.assert_array_equal(second[name], third[name])
  assert not np.asarray(second["old"]).any()


def test_a_label_that_is_no_group_is_refused():
  with pytest.raises(ValueError, match="haed"):
    optim.make_optimizer(make_config(), GROUPS, LABELS | {"head": "haed"}).init(PARAMS)
