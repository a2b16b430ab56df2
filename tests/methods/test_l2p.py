"""L2P: which prompts a sample gets, what it is classified by, and what pulls the keys."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax import methods
from fmlora_jax.config import ConfigError
from fmlora_jax.models import vit
from fmlora_jax.train.step import StepContext, TrainStep
from fmlora_jax.types import Adapters, SequenceSpec, Sizes

SETTINGS = {"pool_size": 6, "length": 2, "top_n": 2, "pull": 0.5}


@pytest.fixture(scope="module")
def learned(lab):
  return lab("l2p", method=SETTINGS)


def nearest(query, keys, count=2):
  """Cosines [B, M] in float64 and the numbers of the largest ones [B, N]."""
  query, keys = np.asarray(query, np.float64), np.asarray(keys, np.float64)
  norms = np.linalg.norm(query, axis=1)[:, None] * np.linalg.norm(keys, axis=1)
  cosines = query @ keys.T / norms
  return cosines, np.argsort(-cosines, axis=1)[:, :count]


def spread(pool):
  """The pool with keys in all directions: drawn from [0, 0.01), all samples choose the same."""
  keys = jax.random.normal(jax.random.key(1), pool["key"].shape)
  return {"prompt": 50 * pool["prompt"], "key": keys}


def with_pool(variables, pool):
  return variables.replace(shared={"pool": pool})


def penalty_of(made, variables, stage, images):
  variables = variables.replace(frozen=made.method.freeze(made.weights, variables))
  arguments = variables, images, stage.view.arrays, stage.view.key("method")
  return jax.jit(made.method.apply)(*arguments).penalty


def test_a_sample_is_classified_by_the_mean_output_of_its_nearest_prompts(learned):
  images = learned.images(8)
  pool = spread(learned.variables.shared["pool"])
  variables = with_pool(learned.variables, pool)
  _, chosen = nearest(learned.features(images), pool["key"])
  assert len({tuple(row) for row in chosen}) > 1
  tokens = np.asarray(pool["prompt"])[chosen].reshape(8, 4, -1)
  outputs = jax.jit(learned.backbone.tokens)(learned.weights, images, Adapters(prompt=tokens))
  head = variables.mem["head"]
  expected = np.asarray(outputs)[:, 1:5].mean(1) @ np.asarray(head["kernel"]).T + head["bias"]
  got = learned.predictions(variables, images)
  np.testing.assert_allclose(got, expected, atol=1e-5)
  alone = jnp.concatenate([learned.predictions(variables, x[None]) for x in images])
  np.testing.assert_allclose(alone, got, atol=1e-5)


def test_the_penalty_is_the_mean_over_samples_of_the_sum_of_their_cosines(learned):
  images, stage = learned.images(8), learned.stages[1]
  pool = spread(stage.trained.shared["pool"])
  cosines, chosen = nearest(learned.features(images), pool["key"])
  expected = -0.5 * np.take_along_axis(cosines, chosen, axis=1).sum(1).mean()
  got = penalty_of(learned, with_pool(stage.trained, pool), stage, images)
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_the_penalty_trains_the_chosen_keys_alone_and_the_loss_the_chosen_prompts(learned):
  images, stage = learned.images(8)[:1], learned.stages[1]
  pool = spread(stage.trained.shared["pool"])
  _, chosen = nearest(learned.features(images), pool["key"])
  others = np.setdiff1d(np.arange(6), chosen)
  frozen = learned.method.freeze(learned.weights, stage.trained)

  @jax.jit
  def gradients(pool):
    def parts(pool):
      variables = with_pool(stage.trained, pool).replace(frozen=frozen)
      output = learned.method.apply(variables, images, stage.view.arrays, stage.view.key("method"))
      return output.penalty, output.logits.sum()

    return jax.jacrev(parts)(pool)

  pull, fit = gradients(pool)
  assert not np.asarray(pull["prompt"]).any()
  assert np.asarray(pull["key"])[chosen[0]].any(axis=1).all()
  assert not np.asarray(pull["key"])[others].any()
  assert not np.asarray(fit["key"]).any()
  assert np.asarray(fit["prompt"])[chosen[0]].any(axis=(1, 2)).all()
  assert not np.asarray(fit["prompt"])[others].any()


def test_padding_pulls_no_key(learned):
  """A step is the same, bit for bit, whatever the rows that are not valid show."""
  stage = learned.stages[0]
  batch = learned.batch(8)
  batch = batch.replace(valid=jnp.arange(8) < 5)
  other = batch.replace(images=batch.images.at[5:].set(-batch.images[5:] + 0.3))
  begun = with_pool(stage.begun, spread(stage.begun.shared["pool"]))
  stepper = TrainStep(learned.method, learned.config, learned.method.rules(0))
  fixed = StepContext(
    frozen=learned.method.freeze(learned.weights, begun),
    mem=begun.mem,
    task=stage.view.arrays,
    total_steps=jnp.int32(10),
    root=learned.root,
  )
  step = jax.jit(stepper.step)
  (one, stats), (two, more) = (step(stepper.init(begun), fixed, x) for x in (batch, other))
  jax.tree.map(np.testing.assert_array_equal, (one.params, stats), (two.params, more))
  shown = batch.replace(valid=jnp.ones(8, bool))
  assert step(stepper.init(begun), fixed, shown)[1]["loss"] != stats["loss"]


def test_a_vote_makes_a_prediction_depend_on_its_batch_and_says_so(make_lab, learned):
  made = make_lab(method={"name": "l2p", **SETTINGS, "batchwise": True})
  assert learned.method.caveats == ()
  (caveat,) = made.method.caveats
  assert "votes" in caveat and "\n" not in caveat
  images = made.images(8)
  pool = spread(made.variables.shared["pool"])
  variables = with_pool(learned.variables, pool)
  _, chosen = nearest(made.features(images), pool["key"])
  winners = np.argsort(-np.bincount(chosen.ravel(), minlength=6), kind="stable")[:2]
  outvoted = [i for i, row in enumerate(chosen) if set(row) != set(winners)]
  assert outvoted
  voted, own = made.predictions(variables, images), learned.predictions(variables, images)
  assert np.abs(voted - own)[outvoted].max() > 1e-3
  # a sample alone is its own majority
  alone = made.predictions(variables, images[outvoted[0]][None])
  np.testing.assert_allclose(alone[0], own[outvoted[0]], atol=1e-5)
  cosines, _ = nearest(made.features(images), pool["key"])
  stage = learned.stages[1]
  got = penalty_of(made, with_pool(stage.trained, pool), stage, images)
  np.testing.assert_allclose(got, -0.5 * cosines[:, winners].sum(1).mean(), atol=1e-6)


def test_the_pool_starts_in_the_range_of_the_official_code(make_lab):
  pool = make_lab(method={"name": "l2p", **SETTINGS}).variables.shared["pool"]
  for leaf in pool.values():
    leaf = np.asarray(leaf)
    assert leaf.min() >= 0 and 0.009 < leaf.max() < 0.01
    assert abs(leaf.mean() - 0.005) < 5e-4


def test_pool_and_head_have_as_many_parameters_as_pilot_logs():
  """LAMDA-PILOT#7: 199,880 trainable on ImageNet-R."""
  config = methods.build_config({"method": {"name": "l2p"}})
  spec = SequenceSpec(scenario="cil", num_tasks=1, num_classes=200, class_ranges=((0, 200),))
  made = methods.make_method(config, vit.make_vit(Sizes()), spec)
  weights = jax.eval_shape(vit.make_vit(Sizes()).init, jax.random.key(0))
  variables = jax.eval_shape(made.init, jax.random.key(0), weights)
  leaves = jax.tree.leaves((variables.shared, variables.mem["head"]))
  assert sum(leaf.size for leaf in leaves) == 199_880
  assert made.passes.train == made.passes.test == 2


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"top_n": 11}, "config.method.top_n is 11: must be in 1..pool_size = 10"),
    ({"top_n": 0}, "config.method.top_n is 0: must be in 1..pool_size = 10"),
    ({"pool_size": 0}, "config.method.pool_size is 0: must be >= 1"),
    ({"length": 0}, "config.method.length is 0: must be >= 1"),
    ({"pull": -1.0}, "config.method.pull is -1.0: must be >= 0"),
  ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
  with pytest.raises(ConfigError) as error:
    methods.build_config({"method": {"name": "l2p"} | changes})
  assert str(error.value) == message


@pytest.mark.parametrize(
  ("benchmark", "num_tasks", "rate", "epochs", "batch", "pool", "clip"),
  [
    ("cifar100", 10, 0.015, 5, 128, (10, 10, 4, 1.0), 1.0),
    ("imagenet_r", 20, 0.001875, 10, 32, (10, 5, 5, 0.1), None),
    ("cub200", 10, 0.0028125, 5, 24, (10, 5, 4, 0.1), 1.0),
    ("domainnet", 5, 0.015, 5, 128, (10, 10, 4, 1.0), 1.0),
  ],
)
def test_official_settings(benchmark, num_tasks, rate, epochs, batch, pool, clip):
  built = cases.official("l2p", benchmark, num_tasks)
  optim, method = built.optim, built.method
  assert (optim.name, optim.schedule, optim.clip_norm) == ("adam", "constant", clip)
  assert optim.learning_rate == optim.head_learning_rate == rate
  assert optim.weight_decay == optim.head_weight_decay == 0
  assert (built.epochs, built.batch_size, built.compute_dtype) == (epochs, batch, "float32")
  assert (method.pool_size, method.length, method.top_n, method.pull) == pool
  assert not method.batchwise
  assert built.tasks.num_tasks == num_tasks
