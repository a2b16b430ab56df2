"""`head.alignment`: a head of any method learns from what is kept of all classes so far."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax.methods.common.alignment import Aligner
from fmlora_jax.models import heads

SETTINGS = {"alignment": {"epochs": 20, "learning_rate": 0.05}, "num_centroids": 1}
# nothing moves, shared weights move, and the features are of a pass that a first one chooses
METHODS = (
  "linear_probe",
  pytest.param("fm_lora", marks=pytest.mark.tier(2)),  # shared factors move, as finetune's weights
  "finetune",
  "dualprompt",
)
SMALL = {"dualprompt": {"general_layers": (0,), "expert_layers": (1,)}}


@pytest.fixture(params=METHODS)
def learned(request, lab):
  return lab(request.param, method=SMALL.get(request.param, {}), head=SETTINGS)


def training_images(made, task):
  batch = made.batch(len(made.sequence.tasks[task].train), task=task)
  return batch.images, np.asarray(batch.labels)


def features_at_test_time(made, variables, images):
  """Reads them off the logits of a head whose rows are the unit vectors."""
  width = made.backbone.sizes.width
  model = made.method.fold(made.weights, variables)
  unit = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}
  return np.asarray(jax.jit(made.method.predict)(model | {"head": unit}, images))


def test_statistics_are_of_the_features_of_test_time_at_the_end_of_their_task(learned):
  kept = learned.variables.mem["head_statistics"]  # later tasks leave them as they are
  assert kept["mean"].shape == (7, 1, 16)
  for task, stage in enumerate(learned.stages):
    images, labels = training_images(learned, task)
    features = features_at_test_time(learned, stage.ended, images)
    for label in range(*learned.spec.class_ranges[task]):
      own = features[labels == label]
      np.testing.assert_allclose(kept["mean"][label, 0], own.mean(0), atol=1e-4)
      np.testing.assert_allclose(kept["variance"][label, 0], own.var(0), atol=1e-4)


def test_the_head_is_aligned_with_all_classes_so_far_from_task_2_on(learned):
  labels = np.arange(7)
  align = Aligner(learned.config.head.alignment, "head.alignment", heads.linear, labels).align
  for stage in learned.stages:
    lo, hi = learned.spec.class_ranges[stage.view.index]
    trained = {
      name: stage.before.mem["head"][name].at[lo:hi].set(rows[: hi - lo])
      for name, rows in stage.trained.cur["head"].items()
    }
    after = stage.ended.mem["head"]
    if lo == 0:
      assert "alignment_loss" not in stage.facts
      jax.tree.map(np.testing.assert_array_equal, after, trained)
      continue
    expected, loss = align(
      trained, stage.ended.mem["head_statistics"], labels < hi, lo, stage.view.key("alignment")
    )
    assert stage.facts["alignment_loss"] == pytest.approx(loss, rel=1e-4)
    for name, leaf in expected.items():
      np.testing.assert_allclose(after[name], leaf, atol=1e-5)
      moved = np.abs(np.asarray(after[name] - trained[name])).reshape(7, -1).max(1)
      assert (moved[:hi] > 1e-4).all() and not moved[hi:].any()


def test_nothing_else_changes_with_it(lab, learned, changed):
  """But the statistics and the head: what the next task starts from is as without."""
  for stage in learned.stages:
    before, after = stage.trained, stage.ended
    assert {path for path in changed(before.mem, after.mem) if path.startswith("head")} == {
      f"head_statistics/{name}" for name in ("mean", "variance", "exists")
    } | {"head/kernel", "head/bias"}
  plain = lab(learned.config.method.name, method=SMALL.get(learned.config.method.name, {}))
  assert "head_statistics" not in plain.variables.mem
  for ours, theirs in zip(learned.stages, plain.stages, strict=True):
    assert not changed(ours.ended.shared, theirs.ended.shared)
    assert not changed(ours.ended.cur, theirs.ended.cur)


def test_what_it_costs_is_told(lab, learned):
  facts = [stage.facts for stage in learned.stages]
  assert learned.method.stored(facts)["statistics"] == 7 * 2 * 16
  off = lab("linear_probe").method
  assert "statistics" not in off.stored([{}, {}, {}])
  assert (off.passes.between, lab("linear_probe", head=SETTINGS).method.passes.between) == (0, 1)


def test_domains_of_one_class_are_rows_of_their_own_and_one_output(make_lab):
  made = make_lab("dil", ((0, 3),) * 2, method={"name": "linear_probe"}, head=SETTINGS, epochs=1)
  made.learn()
  kept = made.variables.mem["head_statistics"]
  assert kept["mean"].shape == (6, 1, 16) and made.variables.mem["head"]["kernel"].shape == (3, 16)
  for task in range(2):
    images, labels = training_images(made, task)
    features = made.features(images)
    for label in range(3):
      own = features[labels == label].mean(0)
      np.testing.assert_allclose(kept["mean"][3 * task + label, 0], own, atol=1e-4)


def test_the_next_domain_goes_on_from_the_aligned_rows(make_lab):
  made = make_lab("dil", ((0, 3),) * 3, method={"name": "linear_probe"}, head=SETTINGS, epochs=1)
  for before, stage in itertools.pairwise(made.learn()):
    for name, leaf in stage.begun.cur["head"].items():
      np.testing.assert_array_equal(leaf, before.ended.mem["head"][name])


def test_classes_of_different_tasks_are_told_apart(lab):
  """Rows that start at zero and never see another task's classes take each other's images."""

  def right(made):
    found = []
    for task in range(made.spec.num_tasks):
      batch = made.batch(30, "test", task)
      logits = made.predictions(made.variables, batch.images)
      found.append((np.argmax(logits, axis=1) == batch.labels)[np.asarray(batch.valid)])
    return np.concatenate(found).mean()

  settings = SETTINGS | {"num_centroids": 3}
  assert right(lab("linear_probe", head=settings)) > right(lab("linear_probe")) + 0.1


def test_the_cosine_head_is_aligned_too(make_lab):
  made = make_lab(method={"name": "linear_probe"}, head=SETTINGS | {"kind": "cosine"})
  stage = made.learn()[1]
  assert np.isfinite(stage.facts["alignment_loss"])
  old = stage.before.mem["head"]["kernel"][:2]
  assert np.abs(np.asarray(stage.ended.mem["head"]["kernel"][:2] - old)).max() > 1e-3
