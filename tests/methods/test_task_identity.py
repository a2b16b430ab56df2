"""The classifier of tasks: its network in NumPy, its training, what it says before and after."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax.methods.common import base, class_statistics
from fmlora_jax.methods.hide_prompt import task_identity
from fmlora_jax.types import NonFiniteError, SequenceSpec

CHANGES = {
  "name": "hide_prompt",
  "layers": (0, 1),
  "prompt_length": 2,
  "num_centroids": 2,
  "identity": {"epochs": 5, "learning_rate": 0.01},
}


def linear(layer, x):
  return x @ np.asarray(layer["kernel"], np.float64).T + np.asarray(layer["bias"], np.float64)


def by_hand(identity, features, epsilon=1e-6):
  """Returns head(LayerNorm(x + up(GELU(down(x))))) in float64."""
  features = np.asarray(features, np.float64)
  hidden = linear(identity["down"], features)
  hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
  x = features + linear(identity["up"], hidden)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
  scale, bias = (np.asarray(identity["norm"][name], np.float64) for name in ("scale", "bias"))
  return linear(identity["head"], x * scale + bias)


def moved(identity):
  """Returns it with every leaf random, so that each one counts."""
  leaves, tree = jax.tree.flatten(identity)
  keys = jax.random.split(jax.random.key(5), len(leaves))
  noise = [0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(tree, [a + b for a, b in zip(leaves, noise, strict=True)])


def test_its_logits_are_those_of_the_formula():
  identity = moved(task_identity.fresh(jax.random.key(0), 6, 4))
  features = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
  got = task_identity.logits(identity, features)
  np.testing.assert_allclose(got, by_hand(identity, features), atol=1e-5)


def test_epsilon_is_added_to_the_variance():
  identity = moved(task_identity.fresh(jax.random.key(0), 6, 4))
  features = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
  got = task_identity.logits(identity, features, 0.5)
  np.testing.assert_allclose(got, by_hand(identity, features, 0.5), atol=1e-5)
  assert np.abs(got - task_identity.logits(identity, features)).max() > 0.01
  ranges = (0, 2), (2, 4)
  spec = SequenceSpec(scenario="cil", num_tasks=2, num_classes=4, class_ranges=ranges)
  rows = class_statistics.Rows(spec)
  many = np.random.default_rng(1).normal(size=(400, 6)).astype(np.float32)
  named = [
    task_identity.predict_tasks(identity, many, rows, jnp.ones(2, bool), epsilon)
    for epsilon in (1e-6, 1.0)
  ]
  assert (np.asarray(named[0]) != np.asarray(named[1])).any()


def test_the_network_of_a_vit_b_has_the_parameters_of_the_public_code():
  network = jax.eval_shape(lambda: task_identity.fresh(jax.random.key(0), 768, 100))
  sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in network.items()}
  assert sizes.pop("head") == 100 * 769
  assert sum(sizes.values()) == 2_363_136


@pytest.mark.parametrize("ranges", [((0, 2), (2, 5), (5, 7)), ((0, 2), (0, 2), (0, 2))])
def test_the_task_is_that_of_the_likeliest_class_seen(ranges):
  scenario = "dil" if ranges[0] == ranges[1] else "cil"
  spec = SequenceSpec(scenario=scenario, num_tasks=3, num_classes=7, class_ranges=ranges)
  rows = class_statistics.Rows(spec)
  identity = moved(task_identity.fresh(jax.random.key(0), 6, len(rows)))
  features = 3 * np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
  scores = by_hand(identity, features)
  for seen in range(4):
    expected = []
    for row in scores:
      count = sum(hi - lo for lo, hi in ranges[:seen])
      best = int(np.argmax(row[:count])) if count else 0
      ends = np.cumsum([hi - lo for lo, hi in ranges])
      expected.append(int(np.argmax(best < ends)))
    got = task_identity.predict_tasks(identity, features, rows, jnp.arange(3) < seen)
    np.testing.assert_array_equal(got, expected)
    assert len(set(expected)) == max(seen, 1)


@pytest.fixture(scope="module")
def made(make_lab):
  return make_lab(method=CHANGES)


def learner_of(made):
  rows = class_statistics.Rows(made.spec)
  learner = task_identity.Learner(made.config, made.config.method.identity, made.backbone, rows)
  identity = task_identity.fresh(jax.random.key(0), 16, len(rows))
  return learner, identity, class_statistics.empty(len(rows), 2, 16)


def test_it_learns_the_tasks_compiles_once_and_leaves_other_outputs_to_the_alignment(made):
  learner, identity, statistics = learner_of(made)
  trunk = base.cast_kernels(made.weights, jnp.dtype("float32"))
  for task in range(3):
    before, view = identity, made.view(task)
    identity, statistics, facts = learner.learn(identity, statistics, trunk, view)
    assert 0 < facts["identity_loss"] < 1.5
    assert ("identity_alignment_loss" in facts) == (task > 0)
    if task == 0:  # before an alignment only the outputs of the task train
      old, new = (np.asarray(network["head"]["kernel"]) for network in (before, identity))
      np.testing.assert_array_equal((old != new).any(1), np.arange(7) < 2)
  assert learner._step._cache_size() == 1
  assert learner._aligner._descend._cache_size() == 1
  rows = class_statistics.Rows(made.spec)
  right = []
  for task in range(3):
    images = made.images(12, part="val", task=task)
    features = made.features(images)
    named = task_identity.predict_tasks(identity, features, rows, jnp.ones(3, bool))
    right.append(np.mean(np.asarray(named) == task))
  assert np.mean(right) > 0.6


def test_its_statistics_are_of_the_untouched_vit_and_of_the_task_alone(make_lab):
  made = make_lab(method=CHANGES | {"num_centroids": 1})
  learner, identity, _ = learner_of(made)
  statistics = class_statistics.empty(7, 1, 16)
  _, kept, _ = learner.learn(identity, statistics, made.weights, made.view(1))
  batch = made.batch(len(made.sequence.tasks[1].train), task=1)
  features = made.features(batch.images)
  for label in range(7):
    own = features[np.asarray(batch.labels) == label]
    assert bool(kept["exists"][label, 0]) == (2 <= label < 5) == bool(len(own))
    if len(own):
      np.testing.assert_allclose(kept["mean"][label, 0], own.mean(0), atol=1e-5)
      np.testing.assert_allclose(kept["variance"][label, 0], own.var(0), atol=1e-5)


def test_a_training_that_diverges_is_refused_by_field(make_lab):
  # a network that normalises its features survives any rate; its rows do not
  made = make_lab(method=CHANGES | {"identity": {"learning_rate": 1e38, "epochs": 2}})
  learner, identity, statistics = learner_of(made)
  with pytest.raises(NonFiniteError, match=r"config\.method\.identity\.learning_rate"):
    learner.learn(identity, statistics, made.weights, made.view(0))
