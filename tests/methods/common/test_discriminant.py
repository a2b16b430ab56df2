"""`head.kind=lda`: statistics of Gaussians with one covariance, and the classifier they give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf_shrinkage, shrunk_covariance
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from fmlora_jax.methods.common.discriminant import LEAST, Discriminant, shrunk
from fmlora_jax.models import heads
from fmlora_jax.types import NonFiniteError, SequenceSpec

WIDTH = 12


def spec_of(scenario, *ranges):
  num_classes = max(hi for _, hi in ranges)
  return SequenceSpec(
    scenario=scenario, num_tasks=len(ranges), num_classes=num_classes, class_ranges=ranges
  )


def drawn(each, num_classes=6, *, width=WIDTH, seed=0):
  """Features of correlated noise around class means, and labels."""
  rng = np.random.default_rng(seed)
  labels = np.repeat(np.arange(num_classes), each)
  mixing = rng.normal(size=(width, width))
  features = 3 * rng.normal(size=(num_classes, width))[labels]
  features += rng.normal(size=(len(labels), width)) @ mixing + 40  # far from 0, as ViTs' are
  return features.astype(np.float32), labels


def learned(spec, tasks, width=WIDTH):
  """Statistics after [(features, labels)] of the tasks, and what makes them."""
  maker = Discriminant(spec, width)
  statistics = maker.empty()
  for task, images in enumerate(tasks):
    statistics = maker.add(statistics, task, *images)
  return maker, statistics


def predictions(spec, maker, statistics, features):
  per_class = spec.num_tasks if spec.shares_classes else 1
  head = heads.make_head("lda", spec.num_classes, features.shape[1], per_class=per_class)
  mem = head.init(jax.random.key(0)) | {"discriminant": maker.classifier(statistics)}
  return np.asarray(head.predict(mem, jnp.asarray(features)))


def residuals(features, labels):
  means = np.stack([features[labels == c].mean(0) for c in range(labels.max() + 1)])
  return (features - means[labels]).astype(np.float64)


@pytest.mark.parametrize("each", [3, 20, 200])
def test_the_covariance_is_shrunk_as_scikit_learn_does(each):
  z = residuals(*drawn(each))
  fourth = np.sum(np.sum(z**2, axis=1) ** 2)
  shrinkage = ledoit_wolf_shrinkage(z, assume_centered=True)
  assert LEAST < shrinkage < 1
  expected = shrunk_covariance(z.T @ z / len(z), shrinkage)
  np.testing.assert_allclose(shrunk(z.T @ z, fourth, len(z)), expected, rtol=1e-9, atol=1e-9)


def test_it_predicts_as_scikit_learns_linear_discriminant_analysis():
  spec = spec_of("cil", (0, 2), (2, 6))
  features, labels = drawn(30)
  tasks = [(features[labels < 2], labels[labels < 2]), (features[labels >= 2], labels[labels >= 2])]
  maker, statistics = learned(spec, tasks)
  shrinkage = ledoit_wolf_shrinkage(residuals(features, labels), assume_centered=True)
  peer = LinearDiscriminantAnalysis("lsqr", shrinkage=shrinkage).fit(features, labels)
  queries = features[::-1] + np.random.default_rng(1).normal(size=features.shape)
  got = predictions(spec, maker, statistics, queries.astype(np.float32))
  scores = peer.decision_function(queries)
  np.testing.assert_allclose(got - got[:, :1], scores - scores[:, :1], rtol=1e-3, atol=1e-2)
  np.testing.assert_array_equal(got.argmax(1), peer.predict(queries))
  assert len(set(got.argmax(1).tolist())) > 3


def test_classes_not_seen_yet_are_never_predicted_nor_nan():
  spec = spec_of("cil", (0, 2), (2, 6))
  features, labels = drawn(30)
  maker, statistics = learned(spec, [(features[labels < 2], labels[labels < 2])])
  got = predictions(spec, maker, statistics, features)
  assert np.isfinite(got).all() and (got.argmax(1) < 2).all() and (got[:, 2:] < -1e8).all()
  assert (got.argmax(1) == labels)[labels < 2].mean() > 0.9


def test_frozen_features_give_the_same_classifier_however_classes_come_in_tasks():
  features, labels = drawn(25)
  rows = []
  for ranges in (((0, 6),), ((0, 1), (1, 4), (4, 6))):
    parts = [(labels >= lo) & (labels < hi) for lo, hi in ranges]
    maker, statistics = learned(spec_of("cil", *ranges), [(features[p], labels[p]) for p in parts])
    rows.append(maker.classifier(statistics))
  for name in ("kernel", "bias"):
    np.testing.assert_allclose(rows[1][name], rows[0][name], rtol=1e-4, atol=1e-4)


def test_a_class_of_two_domains_is_a_mixture_of_its_gaussians():
  spec = spec_of("dil", (0, 3), (0, 3))
  domains = [drawn(20, 3, seed=s) for s in (3, 4)]
  maker, statistics = learned(spec, domains)
  means = [np.stack([x[y == c].mean(0) for c in range(3)]) for x, y in domains]
  z = np.concatenate([x - m[y] for (x, y), m in zip(domains, means, strict=True)]).astype(float)
  precision = np.linalg.inv(shrunk(z.T @ z, np.sum(np.sum(z**2, axis=1) ** 2), len(z)))
  queries = np.concatenate([drawn(4, 3, seed=s)[0] for s in (3, 4)])
  apart = queries[:, None, None] - np.stack(means)  # [B, T, C, D]
  density = np.exp(-0.5 * np.einsum("btcd,de,btce->btc", apart, precision, apart)).sum(1)
  expected = density / density.sum(1, keepdims=True)
  got = predictions(spec, maker, statistics, queries)
  got = np.exp(got - got.max(1, keepdims=True))
  np.testing.assert_allclose(got / got.sum(1, keepdims=True), expected, rtol=2e-2, atol=1e-6)
  only_first = predictions(spec, *learned(spec, domains[:1]), domains[0][0])
  assert (only_first.argmax(1) == domains[0][1]).mean() > 0.9


@pytest.mark.parametrize("copies", [1, 3])
def test_without_any_spread_the_nearest_mean_is_predicted(copies):
  """One image a class, or copies of one: the covariance is 0."""
  spec = spec_of("cil", (0, 2), (2, 4))
  points = np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float32)
  labels = np.repeat(np.arange(4), copies)
  tasks = [(points[labels[m]], labels[m]) for m in (labels < 2, labels >= 2)]
  queries = np.random.default_rng(1).normal(size=(50, WIDTH)).astype(np.float32)
  got = predictions(spec, *learned(spec, tasks), queries).argmax(1)
  nearest = ((queries[:, None] - points) ** 2).sum(-1).argmin(1)
  np.testing.assert_array_equal(got, nearest)


def test_features_that_are_not_finite_are_refused():
  features, labels = drawn(3)
  features[2, 1] = np.inf
  with pytest.raises(NonFiniteError, match=r"features of task 1 are NaN or infinite at its end"):
    learned(spec_of("cil", (0, 6)), [(features, labels)])


@pytest.mark.parametrize("count", [2, 3])
def test_fewer_images_than_dimensions_give_a_covariance_that_can_be_inverted(count):
  z = np.random.default_rng(count).normal(size=(count, WIDTH))
  z[-1] = -z[:-1].sum(0)
  made = shrunk(z.T @ z, np.sum(np.sum(z**2, axis=1) ** 2), count)
  assert np.linalg.eigvalsh(made).min() >= 0.9 * LEAST * np.trace(z.T @ z) / count / WIDTH


def test_a_task_leaves_the_model_what_its_features_say(make_lab):
  """A method that moves its features: each task's mean is of the features at its own end."""
  made = make_lab(method={"name": "lora"}, head={"kind": "lda", "start": "class_mean"})
  stages = made.learn()
  mem = made.variables.mem
  for task, stage in enumerate(stages):
    batch = made.batch(len(made.sequence.tasks[task].train), task=task)
    model = made.method.fold(made.weights, stage.ended)
    features = np.asarray(made.method.features(model, batch.images))
    for label in np.unique(batch.labels):
      mean = features[np.asarray(batch.labels) == label].mean(0)
      np.testing.assert_allclose(mem["head_statistics"]["mean"][label], mean, rtol=1e-4, atol=1e-4)
  expected = made.method.head.discriminant.classifier(mem["head_statistics"])
  for name, leaf in expected.items():
    np.testing.assert_allclose(mem["head"]["discriminant"][name], leaf, rtol=1e-5, atol=1e-5)
  stored = made.method.stored([stage.facts for stage in stages])["statistics"]
  assert stored == sum(leaf.size for leaf in mem["head_statistics"].values())


def test_means_follow_the_drift_and_the_covariance_stays(make_lab):
  head = {"kind": "lda", "start": "class_mean", "drift": "sdc"}
  made = make_lab(method={"name": "finetune"}, head=head)
  first, second = made.learn()[:2]
  before, after = (stage.ended.mem["head_statistics"] for stage in (first, second))
  num = first.view.num_classes
  moved = np.linalg.norm(after["mean"][:num] - before["mean"][:num], axis=1)
  assert second.facts["mean_drift"] == pytest.approx(moved.mean(), rel=1e-4) and moved.min() > 0
  np.testing.assert_array_equal(after["count"][:num], before["count"][:num])
