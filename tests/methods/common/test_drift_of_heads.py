"""`head.drift`, `head.loss` and later learning rates in methods that learn tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax.methods.common.drift import Drift
from fmlora_jax.workdir import checkpoint

ALIGNED = {"alignment": {"epochs": 3, "learning_rate": 0.05}, "num_centroids": 2}


def features_of(made, variables, task):
  """The features of a task's training images in the order of training, and their labels."""
  model = made.method.fold(made.weights, variables)
  return made.method.head.collect(model, made.view(task))


@pytest.mark.parametrize(
  ("method", "kind"),
  [
    ("lora", "sdc"),
    pytest.param("finetune", "linear", marks=pytest.mark.tier(2)),
    pytest.param("lora", "linear", marks=pytest.mark.tier(2)),
    pytest.param("finetune", "sdc", marks=pytest.mark.tier(2)),
  ],
)
def test_statistics_of_earlier_classes_follow_the_task_s_images(lab, method, kind):
  made = lab(method, head=ALIGNED | {"drift": kind, "start": "class_mean"})
  for task, stage in enumerate(made.stages):
    assert ("between" in stage.begun.mem) == (task > 0) and "between" not in stage.ended.mem
    if not task:
      assert "mean_drift" not in stage.facts
      continue
    lo = made.spec.class_ranges[task][0]
    old, new = (
      jax.tree.map(np.asarray, s.mem["head_statistics"]) for s in (stage.before, stage.ended)
    )
    before, _ = features_of(made, stage.before, task)
    np.testing.assert_array_equal(stage.begun.mem["between"], before)
    after, _ = (
      features_of(made, stage.trained, task)
      if method == "finetune"
      else (features_of(made, stage.ended, task))
    )
    exists = old["exists"]
    means, variances = Drift(made.config.head, before, after).move(
      old["mean"][exists], old["variance"][exists]
    )
    np.testing.assert_allclose(new["mean"][exists], means, atol=1e-4)
    np.testing.assert_allclose(new["variance"][exists], variances, atol=1e-4)
    length = np.linalg.norm(means - old["mean"][exists], axis=1).mean()
    assert stage.facts["mean_drift"] == pytest.approx(length, rel=1e-3) and length > 1e-3
    assert not new["exists"][:lo][~exists[:lo]].any()
  assert made.setup.programs.num_compiled == 1  # tasks differ in their number of images
  assert made.method.passes.between == 2


def test_start_and_drift_share_a_pass_and_its_means(lab):
  head = ALIGNED | {"start": "class_mean"}
  plain, followed = lab("lora", head=head), lab("lora", head=head | {"drift": "sdc"})
  first, second = (made.stages[1].begun.cur["head"] for made in (plain, followed))
  for name in first:
    np.testing.assert_allclose(first[name], second[name], rtol=1e-4, atol=1e-5)
  assert plain.method.passes.between == followed.method.passes.between == 2
  alone = lab("linear_probe", head=ALIGNED | {"drift": "sdc"})
  assert alone.method.passes.between == 2
  assert alone.stages[1].facts["mean_drift"] == 0  # features do not move


def test_a_checkpoint_within_a_task_holds_the_features_before_it(lab, changed):
  made = lab("lora", head=ALIGNED | {"drift": "sdc", "start": "class_mean"})
  stage = made.stages[1]
  arrays = checkpoint.flatten({"mem": stage.trained.mem})
  assert "mem/between" in arrays
  restored = stage.trained.replace(mem=checkpoint.unflatten(arrays, "mem"))
  ended, facts = made.method.end_task(restored, stage.view)
  assert not changed(ended.mem, stage.ended.mem)
  assert facts["mean_drift"] == stage.facts["mean_drift"]


def test_class_means_follow_too_and_domains_share_them(make_lab):
  head = {"kind": "class_mean", "drift": "sdc"}
  made = make_lab("dil", ((0, 3),) * 2, method={"name": "lora"}, head=head, epochs=1)
  _, stage = made.learn()
  old, new = (jax.tree.map(np.asarray, s.mem["head"]) for s in (stage.before, stage.ended))
  before, _ = features_of(made, stage.before, 1)
  after, labels = features_of(made, stage.ended, 1)
  moved, _ = Drift(made.config.head, before, after).move(old["mean"], old["mean"])
  for label in range(3):
    images = after[labels == label]
    total = old["count"][label] * moved[label] + images.sum(0)
    expected = total / (old["count"][label] + len(images))
    np.testing.assert_allclose(new["mean"][label], expected, atol=1e-4)
  assert np.abs(moved - old["mean"]).max() > 1e-4


@pytest.mark.parametrize(
  ("method", "kind"),
  [
    ("finetune", "cosine"),
    pytest.param("fm_lora", "linear", marks=pytest.mark.tier(2)),
    pytest.param("fm_lora", "cosine", marks=pytest.mark.tier(2)),
    pytest.param("finetune", "linear", marks=pytest.mark.tier(2)),
  ],
)
def test_the_loss_over_all_classes_so_far_fixes_the_rows_of_earlier_ones(lab, method, kind):
  made = lab(method, head={"kind": kind, "loss": "seen"})
  plain = lab(method, head={"kind": kind})
  assert made.stages[0].losses == pytest.approx(plain.stages[0].losses, rel=1e-4)
  for stage in made.stages[1:]:
    lo = made.spec.class_ranges[stage.view.index][0]
    for name, rows in stage.ended.mem["head"].items():
      np.testing.assert_array_equal(rows[:lo], stage.before.mem["head"][name][:lo])
  assert np.abs(made.stages[1].losses[0] - plain.stages[1].losses[0]) > 0.05
  stage, batch = made.stages[1], made.batch(task=1)
  variables = stage.begun.replace(frozen=made.method.freeze(made.weights, stage.begun))
  output = made.method.apply(variables, batch.images, stage.view.arrays, jax.random.key(0))
  assert output.old_logits.shape == (8, 7)

  def total(rows):
    fixed = variables.update(mem={"head": rows})
    return made.method.apply(
      fixed, batch.images, stage.view.arrays, jax.random.key(0)
    ).old_logits.sum()

  assert not any(
    np.asarray(g).any() for g in jax.tree.leaves(jax.grad(total)(stage.begun.mem["head"]))
  )


def test_domains_have_no_earlier_classes_to_join_the_loss(make_lab):
  made = make_lab("dil", ((0, 3),) * 2, method={"name": "lora"}, head={"loss": "seen"}, epochs=1)
  view = made.view(0)
  begun, _ = made.method.begin_task(made.variables, view)
  variables = begun.replace(frozen=made.method.freeze(made.weights, begun))
  output = made.method.apply(variables, made.images(), view.arrays, jax.random.key(0))
  assert output.old_logits is None


def test_later_tasks_move_less_at_a_lower_rate_and_the_first_one_as_before(make_lab, changed):
  plain, slow = (
    make_lab(method={"name": "finetune"}, optim=optim) for optim in ({}, {"later_lr_scale": 1e-3})
  )
  first, second = plain.learn(2), slow.learn(2)
  np.testing.assert_allclose(first[0].losses, second[0].losses, rtol=1e-4)

  def moved(stage):
    pairs = zip(
      jax.tree.leaves(stage.begun.shared), jax.tree.leaves(stage.trained.shared), strict=True
    )
    return float(max(jnp.abs(a - b).max() for a, b in pairs))

  assert moved(second[0]) == pytest.approx(moved(first[0]), rel=0.01)
  assert moved(second[1]) < 0.01 * moved(first[1])
  assert slow.setup.programs.num_compiled == 1
