"""What methods share: heads around adapted features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax.methods.common import base


def features_of(made, variables, images):
  model = made.method.fold(made.weights, variables)
  return np.asarray(jax.jit(made.backbone.apply)(model["backbone"], images, model["memory"]))


def images_of(made, task):
  """All training images of a task as at test time, and their labels."""
  batch = made.batch(len(made.sequence.tasks[task].train), task=task)
  assert batch.valid.all()
  return batch.images, np.asarray(batch.labels)


@pytest.mark.parametrize(
  "method",
  [pytest.param("fm_lora", marks=pytest.mark.tier(2)), "finetune"],  # both move the features
)
def test_rows_start_as_the_nearest_mean_classifier_of_the_features_so_far(make_lab, method):
  made = make_lab(method={"name": method}, head={"start": "class_mean"})
  for task, stage in enumerate(made.learn()):
    images, labels = images_of(made, task)
    before = made.stages[task - 1].ended if task else stage.begun  # of task 1: nothing has moved
    features = features_of(made, before, images)
    lo = made.sequence.tasks[task].lo
    means = np.stack([features[labels == label].mean(0) for label in np.unique(labels)])
    rows = jax.tree.map(np.asarray, stage.begun.cur["head"])
    scale = 10 / features.shape[1]
    np.testing.assert_allclose(rows["kernel"][: len(means)], scale * means, rtol=1e-4, atol=1e-5)
    logits = features @ rows["kernel"].T + rows["bias"]
    nearest = ((features[:, None] - means) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(logits[:, : len(means)].argmax(1), nearest)
    assert (nearest + lo == labels).mean() > 0.8
    assert not rows["kernel"][len(means) :].any() and not rows["bias"][len(means) :].any()


def test_a_head_that_domains_share_is_carried_on_and_not_imprinted_again(make_lab):
  made = make_lab(
    "dil",
    ((0, 3),) * 2,
    method={"name": "linear_probe"},
    head={"start": "class_mean"},
    epochs=1,
  )
  first, second = made.learn()
  assert np.asarray(first.begun.cur["head"]["kernel"]).any()
  for name, leaf in second.begun.cur["head"].items():
    np.testing.assert_array_equal(leaf, first.ended.mem["head"][name])


@pytest.fixture(scope="module")
def class_mean(lab):
  return lab(head={"kind": "class_mean"})


def test_class_means_are_those_of_the_adapted_features_when_their_task_ends(class_mean):
  for task, stage in enumerate(class_mean.stages):
    images, labels = images_of(class_mean, task)
    features = features_of(class_mean, stage.ended, images)
    kept = class_mean.variables.mem["head"]
    for label in np.unique(labels):
      expected = features[labels == label].mean(0)
      np.testing.assert_allclose(kept["mean"][label], expected, rtol=1e-4, atol=1e-4)
      assert int(kept["count"][label]) == (labels == label).sum()
  # what comes later changes the features, and the means stay
  images, labels = images_of(class_mean, 0)
  moved = features_of(class_mean, class_mean.variables, images)[labels == 0].mean(0)
  assert np.abs(moved - kept["mean"][0]).max() > 1e-3


def test_the_class_mean_head_predicts_as_numpy_does(class_mean):
  images = class_mean.images(12, part="val", task=1)
  features = features_of(class_mean, class_mean.variables, images)
  means = np.asarray(class_mean.variables.mem["head"]["mean"])
  nearest = ((features[:, None] - means) ** 2).sum(-1).argmin(1)
  got = class_mean.predictions(class_mean.variables, images)
  np.testing.assert_array_equal(np.argmax(got, axis=1), nearest)
  assert len(set(nearest.tolist())) > 1


def test_domains_share_means_over_all_their_images(make_lab):
  made = make_lab(
    "dil", ((0, 3),) * 2, method={"name": "linear_probe"}, head={"kind": "class_mean"}, epochs=1
  )
  made.learn()
  parts = [images_of(made, task) for task in range(2)]
  features = np.concatenate([features_of(made, made.variables, images) for images, _ in parts])
  labels = np.concatenate([labels for _, labels in parts])
  kept = made.variables.mem["head"]
  for label in range(3):
    np.testing.assert_allclose(kept["mean"][label], features[labels == label].mean(0), atol=1e-5)


def test_the_cosine_head_learns_and_its_scales_do_not_predict(make_lab):
  made = make_lab(method={"name": "linear_probe"}, head={"kind": "cosine"})
  stages = made.learn()
  for stage in stages:
    assert np.isfinite(stage.losses).all()
    before, after = stage.begun.cur["head"], stage.trained.cur["head"]
    count = stage.view.num_classes
    assert (np.asarray(before["log_scale"] != after["log_scale"])[:count]).all()
  got = np.asarray(made.predictions(made.variables, made.images()))
  assert np.abs(got).max() <= 1 + 1e-5


def test_matrices_are_cast_and_vectors_are_not():
  tree = {"kernel": jnp.ones((2, 2)), "norm": {"scale": jnp.ones(3)}}
  cast = base.cast_kernels(tree, jnp.dtype("bfloat16"))
  assert cast["kernel"].dtype == jnp.bfloat16 and cast["norm"]["scale"].dtype == jnp.float32


def test_training_in_bfloat16_keeps_factors_head_and_optimiser_in_float32(make_lab):
  made = make_lab(compute_dtype="bfloat16", epochs=1, prompt={"num_tokens": 1})
  (stage,) = made.learn(1)
  for tree in (stage.ended.shared, stage.ended.cur, stage.ended.mem, stage.state.opt_state):
    assert {leaf.dtype for leaf in jax.tree.leaves(tree) if leaf.ndim} == {jnp.dtype("float32")}
  frozen = made.method.freeze(made.weights, stage.begun)["backbone"]
  assert frozen["block_0"]["fc1"]["dense"]["kernel"].dtype == jnp.bfloat16
  assert frozen["block_0"]["norm1"]["scale"].dtype == jnp.float32
  logits = made.predictions(made.variables, made.images())
  assert logits.dtype == jnp.float32
  unfolded = made.training_logits(stage.trained, stage, made.images())[:, :2]
  # measured 0.01: eight bits of mantissa, folded in one and beside the weights in the other
  np.testing.assert_allclose(logits[:, :2], unfolded, rtol=0, atol=0.05)
