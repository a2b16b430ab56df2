"""DualPrompt: which expert a sample gets, where an expert starts, and what pulls the keys."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax import methods
from fmlora_jax.config import ConfigError
from fmlora_jax.models import vit
from fmlora_jax.types import Adapters, Prefix, SequenceSpec, Sizes

SETTINGS = {
  "general_layers": (0,),
  "general_length": 2,
  "expert_layers": (1,),
  "expert_length": 3,
  "pull": 0.5,
}


@pytest.fixture(scope="module")
def learned(lab):
  return lab("dualprompt", method=SETTINGS)


def with_slots(variables, **changes):
  return variables.replace(mem=variables.mem | changes)


@pytest.fixture(scope="module")
def spread(learned):
  """The learned variables with large experts, and keys that make samples choose different ones."""
  images = learned.images(8)
  keys = learned.features(images)[[0, 3, 5]]
  expert = 100 * learned.variables.mem["expert"]
  expert = expert * jnp.asarray([1.0, -1.0, 2.0])[:, None, None, None, None]
  return with_slots(learned.variables, key=jnp.asarray(2 * keys), expert=expert), images


def prefix(tokens):
  """[2, P, D] as the keys and values of two heads."""
  key, value = np.asarray(tokens).reshape(2, 1, -1, 2, 8)
  return Prefix(key=key, value=value)


def logits_of(made, variables, images, expert, head):
  """Of the ViT with the general prompt and one expert [S, 2, P, D]."""
  adapters = Adapters(prefix=(prefix(variables.shared["general"][0]), prefix(expert[0])))
  return made.features(images, adapters) @ np.asarray(head["kernel"]).T + head["bias"]


def test_each_sample_sees_the_general_prompt_and_the_expert_of_the_nearest_key(learned, spread):
  variables, images = spread
  query, keys = learned.features(images), np.asarray(variables.mem["key"])
  norms = np.linalg.norm(query, axis=1)[:, None] * np.linalg.norm(keys, axis=1)
  chosen = (query @ keys.T / norms).argmax(1)
  assert set(chosen) == {0, 1, 2}
  got = learned.predictions(variables, images)
  for sample, slot in enumerate(chosen):
    image, expert = images[sample][None], variables.mem["expert"][slot]
    expected = logits_of(learned, variables, image, expert, variables.mem["head"])
    np.testing.assert_allclose(got[sample], expected[0], atol=1e-5)
    alone = learned.predictions(variables, image)
    np.testing.assert_allclose(alone[0], expected[0], atol=1e-5)


def test_training_sees_the_expert_of_its_task_whatever_the_keys(learned, spread):
  images, stage = spread[1], learned.stages[1]
  cur = stage.trained.cur | {"expert": 100 * stage.trained.cur["expert"]}
  variables = stage.trained.replace(cur=cur)
  got = learned.training_logits(variables, stage, images)
  expected = logits_of(learned, variables, images, cur["expert"], cur["head"])
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_given_the_right_key_the_folded_model_is_the_trained_one(learned):
  for stage in learned.stages:
    t = stage.view.index
    lo, hi = learned.spec.class_ranges[t]
    right = with_slots(stage.ended, learned=jnp.arange(3) == t)
    images = learned.images(task=t)
    folded = learned.predictions(right, images)[:, lo:hi]
    trained = learned.training_logits(stage.trained, stage, images)[:, : hi - lo]
    np.testing.assert_allclose(folded, trained, rtol=0, atol=1e-4)
    fresh = learned.training_logits(stage.begun, stage, images)[:, : hi - lo]
    assert np.abs(fresh - trained).max() > 0.01


def test_keys_of_tasks_to_come_are_never_chosen(learned, spread):
  variables, images = spread
  after_two = with_slots(variables, learned=jnp.arange(3) < 2)
  expected = learned.predictions(after_two, images)
  bait = with_slots(after_two, key=variables.mem["key"].at[2].set(learned.features(images)[1]))
  np.testing.assert_array_equal(learned.predictions(bait, images), expected)
  taken = learned.predictions(with_slots(bait, learned=jnp.ones(3, bool)), images)
  assert np.abs(taken - expected).max() > 1e-3


def test_before_any_task_slot_0_serves(learned, spread):
  variables, images = spread
  none = with_slots(variables, learned=jnp.zeros(3, bool))
  first = with_slots(variables, learned=jnp.arange(3) < 1)
  np.testing.assert_array_equal(
    learned.predictions(none, images), learned.predictions(first, images)
  )
  assert not np.asarray(learned.stages[0].before.mem["learned"]).any()
  for stage in learned.stages:
    expected = np.arange(3) <= stage.view.index
    np.testing.assert_array_equal(stage.ended.mem["learned"], expected)


def test_an_expert_goes_on_from_the_last_one_and_its_key_starts_as_drawn(learned):
  drawn = learned.stages[0].before.mem
  for leaf in (drawn["expert"], drawn["key"], learned.stages[0].before.shared["general"]):
    leaf = np.asarray(leaf)
    assert leaf.min() >= 0 and 0.008 < leaf.max() < 0.01
  for stage in learned.stages:
    t, begun = stage.view.index, stage.begun
    start = learned.stages[t - 1].trained.cur["expert"] if t else drawn["expert"][0]
    np.testing.assert_array_equal(begun.cur["expert"], start)
    np.testing.assert_array_equal(begun.cur["key"], drawn["key"][t])
    np.testing.assert_array_equal(begun.shared["general"], stage.before.shared["general"])
    for name in ("expert", "key"):
      np.testing.assert_array_equal(stage.ended.mem[name][t], stage.trained.cur[name])
      assert np.abs(stage.trained.cur[name] - begun.cur[name]).min() > 0
    assert np.abs(stage.trained.shared["general"] - begun.shared["general"]).min() > 0


def test_the_penalty_pulls_the_key_of_the_task_to_each_query_and_moves_nothing_else(learned):
  images, stage = learned.images(8), learned.stages[1]
  query = learned.features(images)
  key = jax.random.normal(jax.random.key(0), (16,))
  variables = stage.trained.replace(cur=stage.trained.cur | {"key": key})
  frozen = learned.method.freeze(learned.weights, variables)

  def penalty(shared, cur):
    now = variables.replace(frozen=frozen, shared=shared, cur=cur)
    return learned.method.apply(now, images, stage.view.arrays, stage.view.key("method")).penalty

  cosines = query @ key / np.linalg.norm(query, axis=1) / np.linalg.norm(key)
  gradient = jax.jit(jax.value_and_grad(penalty, argnums=(0, 1)))
  got, (shared, cur) = gradient(variables.shared, variables.cur)
  np.testing.assert_allclose(got, -0.5 * cosines.mean(), atol=1e-6)
  assert np.asarray(cur.pop("key")).all()
  assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves((shared, cur)))


def test_a_vote_gives_all_samples_one_expert_and_says_so(make_lab, learned, spread):
  made = make_lab(method={"name": "dualprompt", **SETTINGS, "batchwise": True})
  assert learned.method.caveats == ()
  (caveat,) = made.method.caveats
  assert "votes" in caveat and "\n" not in caveat
  variables, images = spread
  keys = np.asarray(variables.mem["key"], np.float64)
  units = keys / np.linalg.norm(keys, axis=1, keepdims=True)
  chosen = (learned.features(images) @ units.T).argmax(1)
  winner = np.bincount(chosen, minlength=3).argmax()
  voted = made.predictions(variables, images)
  forced = with_slots(variables, learned=jnp.arange(3) == winner)
  np.testing.assert_allclose(voted, learned.predictions(forced, images), atol=1e-5)
  own = learned.predictions(variables, images)
  assert np.abs(voted - own)[chosen != winner].max() > 1e-3


def full_size(num_tasks=10, depth=12, **changes):
  config = methods.build_config({"method": {"name": "dualprompt"} | changes})
  ranges = tuple((i, i + 1) for i in range(num_tasks))
  spec = SequenceSpec(
    scenario="cil", num_tasks=num_tasks, num_classes=num_tasks, class_ranges=ranges
  )
  return methods.make_method(config, vit.make_vit(Sizes(depth=depth)), spec)


def test_stored_parameters_of_ten_tasks():
  stored = full_size().stored([{}] * 10)
  assert stored["shared"] == 15_360
  assert sum(stored["per_task"]) + stored["shared"] == 10 * 92_160 + 10 * 768 + 15_360


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"general_layers": (0, 2)},
      "config.method.expert_layers is (2, 3, 4): must be none of general_layers = (0, 2)",
    ),
    ({"general_length": 0}, "config.method.general_length is 0: must be >= 1"),
    ({"expert_length": 0}, "config.method.expert_length is 0: must be >= 1"),
    ({"pull": -1.0}, "config.method.pull is -1.0: must be >= 0"),
    (
      {"expert_layers": (2, 3, 12)},
      "config.method.expert_layers is (2, 3, 12): must be ascending numbers of blocks in 0..11",
    ),
    (
      {"general_layers": (1, 0)},
      "config.method.general_layers is (1, 0): must be ascending numbers of blocks in 0..11",
    ),
    (
      {"expert_layers": ()},
      "config.method.expert_layers is (): must be ascending numbers of blocks in 0..11",
    ),
    (
      {"general_layers": (-1, 0)},
      "config.method.general_layers is (-1, 0): must be ascending numbers of blocks in 0..11",
    ),
  ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
  with pytest.raises(ConfigError) as error:
    full_size(**changes)
  assert str(error.value) == message


@pytest.mark.parametrize(
  ("benchmark", "num_tasks", "rate", "epochs", "batch", "length"),
  [
    ("cifar100", 10, 0.0225, 5, 192, 5),
    ("imagenet_r", 5, 0.00375, 50, 192, 20),
    ("cub200", 10, 0.0028125, 5, 24, 20),
    ("domainnet", 5, 0.0225, 5, 192, 5),
  ],
)
def test_official_settings(benchmark, num_tasks, rate, epochs, batch, length):
  built = cases.official("dualprompt", benchmark, num_tasks)
  optim, method = built.optim, built.method
  assert (optim.name, optim.schedule, optim.clip_norm) == ("adam", "constant", 1.0)
  assert optim.learning_rate == optim.head_learning_rate == rate
  assert optim.weight_decay == optim.head_weight_decay == 0
  assert (built.epochs, built.batch_size, built.compute_dtype) == (epochs, batch, "float32")
  assert (method.general_layers, method.expert_layers) == ((0, 1), (2, 3, 4))
  assert (method.general_length, method.expert_length, method.pull) == (5, length, 1.0)
  assert not method.batchwise
  assert (built.weights.tag, built.tasks.order) == ("orig_in21k", "natural")
  assert built.tasks.split == ("slice80" if benchmark == "imagenet_r" else "full")
