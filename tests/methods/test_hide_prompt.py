"""HiDe-Prompt: what a task trains, keeps and changes, and the two passes at test time."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_task_identity import by_hand as identity_by_hand

from fmlora_jax import methods
from fmlora_jax.cli import config_files
from fmlora_jax.config import ConfigError, build
from fmlora_jax.methods import hide_prompt
from fmlora_jax.methods.common.alignment import Aligner
from fmlora_jax.models import heads, vit
from fmlora_jax.train.step import StepContext
from fmlora_jax.types import Adapters, Prefix, SequenceSpec, Sizes

SETTINGS = {
  "name": "hide_prompt",
  "layers": (0, 1),
  "prompt_length": 2,
  "num_centroids": 1,
  "past_share": 0.2,
  "repulsion": 0.05,
  "identity": {"epochs": 3, "learning_rate": 0.01},
  "alignment": {"learning_rate": 0.05},
}


@pytest.fixture(scope="module")
def learned(lab):
  """Three tasks; one centroid per class: its mean."""
  return lab(name="hide_prompt", method=SETTINGS)


def features_by_hand(made, images, slot):
  """Returns the features of images that all see the same prefixes, [layers, 2, P, D]."""
  slot = np.asarray(slot)
  split = slot.reshape(*slot.shape[:-1], 2, 8)  # heads
  prefix = tuple(Prefix(key=keys[None], value=values[None]) for keys, values in split)
  return made.features(images, Adapters(prefix=prefix))


def mixture(own, slots, count, share):
  return (1 - share) * own + share * np.mean(slots[:count], axis=0) if count else own


def test_a_task_starts_from_the_last_slot_and_leaves_the_mixture_in_its_own(learned):
  for task, stage in enumerate(learned.stages):
    before, after = (np.asarray(s.mem["prompt"]) for s in (stage.before, stage.ended))
    begun = np.asarray(stage.begun.cur["prompt"])
    np.testing.assert_array_equal(begun, before[max(task - 1, 0)])
    expected = mixture(np.asarray(stage.trained.cur["prompt"]), before, task, 0.2)
    np.testing.assert_allclose(after[task], expected, atol=1e-6)
    assert np.abs(after[task] - begun).max() > 0.01
    np.testing.assert_array_equal(stage.ended.mem["seen"], np.arange(3) <= task)
  assert np.abs(learned.stages[0].begun.cur["prompt"]).max() <= 1
  assert np.std(learned.stages[0].begun.cur["prompt"]) == pytest.approx(1 / np.sqrt(3), rel=0.15)


def test_a_step_sees_the_mixture_and_its_gradient_is_the_tasks_own_alone(learned):
  stage = learned.stages[2]
  images = learned.images(task=2)
  variables = stage.trained
  slot = mixture(
    np.asarray(variables.cur["prompt"]), np.asarray(stage.before.mem["prompt"]), 2, 0.2
  )
  rows = jax.tree.map(np.asarray, variables.cur["head"])
  expected = features_by_hand(learned, images, slot) @ rows["kernel"].T + rows["bias"]
  got = learned.training_logits(variables, stage, images)
  np.testing.assert_allclose(got, expected, atol=1e-4)
  without = learned.training_logits(
    variables.replace(mem=variables.mem | {"seen": jnp.zeros(3, bool)}), stage, images
  )
  assert np.abs(np.asarray(without) - expected).max() > 1e-3


def test_statistics_are_of_prefixed_features_at_the_end_of_their_task(learned):
  for task, stage in enumerate(learned.stages):
    batch = learned.batch(len(learned.sequence.tasks[task].train), task=task)
    prefixed = features_by_hand(learned, batch.images, stage.ended.mem["prompt"][task])
    plain = learned.features(batch.images)
    for name, features in (("statistics", prefixed), ("identity_statistics", plain)):
      kept = learned.variables.mem[name]  # later tasks leave them as they are
      for label in range(*learned.spec.class_ranges[task]):
        own = features[np.asarray(batch.labels) == label]
        np.testing.assert_allclose(kept["mean"][label, 0], own.mean(0), atol=1e-4)
        np.testing.assert_allclose(kept["variance"][label, 0], own.var(0), atol=1e-4)
    assert np.abs(prefixed - plain).max() > 0.1


def test_the_end_of_a_task_trains_nothing_but_the_head(learned, changed):
  """Acceptance test 10: task-adaptive prediction touches the head alone, from task 2 on."""
  for task, stage in enumerate(learned.stages):
    assert not changed(stage.trained.shared, stage.ended.shared)
    assert not changed(stage.trained.cur, stage.ended.cur)
    statistics = {f"statistics/{name}" for name in ("mean", "variance", "exists")}
    head = {"head/kernel", "head/bias"}
    assert changed(stage.trained.mem, stage.ended.mem) == statistics | head | {"prompt", "seen"}
    trained = np.asarray(stage.trained.cur["head"]["kernel"])
    old, new = (np.asarray(v.mem["head"]["kernel"]) for v in (stage.before, stage.ended))
    (lo, hi), seen = learned.spec.class_ranges[task], learned.spec.class_ranges[task][1]
    if task == 0:
      np.testing.assert_array_equal(new[lo:hi], trained[: hi - lo])
    else:
      assert np.abs(new[lo:hi] - trained[: hi - lo]).max() > 1e-3
      assert (np.abs(new - old)[:lo].max(1) > 1e-4).all()
    np.testing.assert_array_equal(new[seen:], old[seen:])


def test_the_head_is_aligned_by_the_statistics_of_all_classes_so_far(learned):
  """With one minibatch per class of earlier tasks in an epoch."""
  labels = np.arange(7)
  settings = learned.config.method.alignment
  align = Aligner(settings, "method.alignment", heads.linear, labels).align
  for stage in learned.stages[1:]:
    lo, hi = learned.spec.class_ranges[stage.view.index]
    own = {name: leaf[: hi - lo] for name, leaf in stage.trained.cur["head"].items()}
    head = {name: stage.before.mem["head"][name].at[lo:hi].set(own[name]) for name in own}
    expected, loss = align(
      head, stage.ended.mem["statistics"], labels < hi, lo, stage.view.key("alignment")
    )
    assert loss == pytest.approx(stage.facts["alignment_loss"], rel=1e-4)
    for name, leaf in expected.items():
      np.testing.assert_allclose(stage.ended.mem["head"][name], leaf, atol=1e-5)


def test_without_alignment_the_head_is_as_trained(learned):
  settings = config_files.merged(SETTINGS, {"alignment": {"epochs": 0}})
  config = dataclasses.replace(learned.config, method=build(hide_prompt.Config, settings))
  method = methods.make_method(config, learned.backbone, learned.spec)
  for stage in learned.stages[:2]:
    ended, _ = method.end_task(stage.trained, stage.view)
    lo, hi = learned.spec.class_ranges[stage.view.index]
    for name, rows in stage.trained.cur["head"].items():
      np.testing.assert_array_equal(ended.mem["head"][name][lo:hi], rows[: hi - lo])


def test_two_passes_name_the_task_and_then_the_class(learned):
  """By hand, image by image: the untouched ViT's features, the task, its slot, the head."""
  for stage in learned.stages:
    task, mem = stage.view.index, stage.ended.mem
    images = jnp.concatenate([learned.images(4, part="val", task=t) for t in range(3)])
    plain = learned.features(images)
    scores = identity_by_hand(stage.ended.shared["identity"], plain)
    ends = np.array([hi for _, hi in learned.spec.class_ranges])
    named = [int(np.argmax(np.argmax(row[: ends[task]]) < ends)) for row in scores]
    assert len(set(named)) == task + 1
    head = jax.tree.map(np.asarray, mem["head"])
    expected = [
      features_by_hand(learned, image[None], mem["prompt"][slot])[0] @ head["kernel"].T
      + head["bias"]
      for image, slot in zip(images, named, strict=True)
    ]
    got = learned.predictions(stage.ended, images)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_with_equal_slots_it_does_not_matter_which_task_is_named(learned):
  """Acceptance test 10."""
  images = learned.images(8, part="val", task=1)
  mem = learned.variables.mem
  other = jax.tree.map(lambda leaf: leaf[::-1], learned.variables.shared["identity"])
  equal = learned.variables.replace(
    mem=mem | {"prompt": jnp.broadcast_to(mem["prompt"][1], mem["prompt"].shape)}
  )

  def logits(variables, identity):
    return learned.predictions(variables.replace(shared={"identity": identity}), images)

  own = learned.variables.shared["identity"]
  np.testing.assert_allclose(logits(equal, other), logits(equal, own), atol=1e-6)
  assert np.abs(logits(learned.variables, other) - logits(learned.variables, own)).max() > 1e-3


def repulsion_by_hand(vectors, temperature):
  """Cross-entropy of each vector's products with all against itself, in float64."""
  losses = []
  for i, vector in enumerate(vectors):
    scores = [float(np.dot(vector, other)) / temperature for other in vectors]
    largest = max(scores)
    total = largest + np.log(sum(np.exp(score - largest) for score in scores))
    losses.append(total - scores[i])
  return np.mean(losses)


@pytest.mark.parametrize("scale", [0.3, 30.0])
def test_repulsion_is_the_cross_entropy_of_products_with_oneself(scale):
  """Of vectors that exist; at 30 the products are thousands, and exponentials overflow."""
  vectors = scale * np.random.default_rng(0).normal(size=(7, 4))
  exists = np.array([1, 1, 0, 1, 1, 0, 1], bool)
  got = hide_prompt.repulsion(jnp.float32(vectors), exists, 0.8)
  np.testing.assert_allclose(got, repulsion_by_hand(vectors[exists], 0.8), rtol=1e-5)
  assert got > 0.1
  vectors[2] = 1e3
  np.testing.assert_array_equal(hide_prompt.repulsion(jnp.float32(vectors), exists, 0.8), got)


@pytest.mark.parametrize("task", [0, 2])
def test_the_penalty_is_the_repulsion_from_the_batch_and_the_past_without_padding(learned, task):
  stage = learned.stages[task]
  variables = stage.trained.replace(frozen=learned.method.freeze(learned.weights, stage.trained))
  images = learned.images(6, task=task)
  valid = np.array([1, 1, 1, 1, 0, 0], bool)

  @jax.jit
  def penalty(images):
    key = stage.view.key("method")
    return learned.method.apply(variables, images, stage.view.arrays, key, valid).penalty

  old = np.asarray(stage.before.mem["prompt"])
  slot = mixture(np.asarray(stage.trained.cur["prompt"]), old, task, 0.2)
  features = features_by_hand(learned, images, slot)[:4]
  count = learned.spec.class_ranges[task][0]  # classes before
  means = np.asarray(stage.before.mem["statistics"]["mean"])[:count, 0]
  expected = 0.05 * repulsion_by_hand(np.concatenate([means, features]).astype(float), 0.8)
  np.testing.assert_allclose(penalty(images), expected, rtol=1e-3)
  np.testing.assert_array_equal(penalty(images.at[4:].set(37.0)), penalty(images))


def test_a_step_does_not_depend_on_padding(learned, changed):
  stage, trainer = learned.stages[1], learned.trainer
  batch = learned.batch(6, task=1)
  stepper = learned.setup.programs.train_step(learned.method.rules(1))
  fixed = StepContext(
    frozen=learned.method.freeze(learned.weights, stage.begun),
    mem=stage.begun.mem,
    task=stage.view.arrays,
    total_steps=jnp.int32(8),
    root=learned.root,
  )
  padded = batch.replace(valid=jnp.arange(6) < 4)
  other = padded.replace(images=padded.images.at[4:].set(37.0), labels=padded.labels.at[4:].set(0))
  step = jax.jit(stepper.step)
  state = trainer.init(stage.begun, 1)
  one, two, whole = (step(state, fixed, b)[0].params for b in (padded, other, batch))
  assert not changed(one, two)
  assert "cur/prompt" in changed(one, whole)


def test_domains_that_share_classes_have_an_identity_of_their_own(lab):
  made = lab("hide_prompt", "dil", ((0, 3),) * 2, method=SETTINGS)
  assert made.variables.shared["identity"]["head"]["bias"].shape == (6,)
  assert made.variables.mem["statistics"]["mean"].shape == (6, 1, 16)
  assert np.asarray(made.variables.mem["statistics"]["exists"]).all()
  assert "no classes" in made.method.caveats[0]
  right = []
  for task in range(2):
    batch = made.batch(18, part="val", task=task)
    named = np.argmax(made.predictions(made.variables, batch.images), axis=1)
    right.append(np.mean(named == np.asarray(batch.labels)))
  assert np.mean(right) > 0.6  # of three classes


def test_what_it_costs_is_said(learned):
  assert dataclasses.astuple(learned.method.passes) == (1, 2, 3 + 2)
  assert not learned.method.caveats
  for task, stage in enumerate(learned.stages):
    names = {"identity_loss"} | ({"identity_alignment_loss", "alignment_loss"} if task else set())
    assert set(stage.facts) == names


@pytest.mark.parametrize(("length", "expected"), [(20, 153_600), (5, 38_400)])
def test_a_slot_of_a_vit_b_has_the_parameters_of_the_public_code(length, expected):
  """Acceptance test 1."""
  config = methods.build_config({"method": {"name": "hide_prompt", "prompt_length": length}})
  spec = SequenceSpec(scenario="cil", num_tasks=2, num_classes=4, class_ranges=((0, 2), (2, 4)))
  method = methods.make_method(config, vit.make_vit(Sizes()), spec)
  mem = jax.eval_shape(method.init, jax.random.key(0), {}).mem
  assert mem["prompt"].size == 2 * expected
  assert method.stored([{}, {}])["per_task"] == [expected] * 2


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"layers": (0, 2)}, r"config\.method\.layers is \(0, 2\): must be ascending .* in 0\.\.1"),
    ({"layers": ()}, r"config\.method\.layers is \(\): must be ascending"),
    ({"layers": (1, 0)}, r"config\.method\.layers is \(1, 0\): must be ascending"),
    ({"prompt_length": 0}, r"config\.method\.prompt_length is 0: must be >= 1"),
    ({"past_share": 1.0}, r"config\.method\.past_share is 1\.0: must be in \[0, 1\)"),
    ({"repulsion": -1.0}, r"config\.method\.repulsion is -1\.0: must be >= 0"),
    ({"temperature": 0.0}, r"config\.method\.temperature is 0\.0: must be > 0"),
    ({"num_centroids": 0}, r"config\.method\.num_centroids is 0: must be >= 1"),
    ({"identity": {"epochs": 0}}, r"config\.method\.identity\.epochs is 0: must be >= 1"),
    (
      {"identity": {"alignment": {"batch_size": 0}}},
      r"config\.method\.identity\.alignment\.batch_size is 0: must be >= 1",
    ),
    ({"alignment": {"epoch": 3}}, r"config\.method\.alignment\.epoch is not a field"),
  ],
)
def test_settings_that_do_not_fit_are_refused_by_field(make_lab, changes, message):
  with pytest.raises(ConfigError, match=message):
    make_lab(method=SETTINGS | changes)


@pytest.mark.parametrize(
  ("head", "message"),
  [
    ({"kind": "class_mean"}, r"config\.head\.kind is 'class_mean': must be linear or cosine"),
    (
      {"alignment": {"epochs": 3}},
      r"config\.head\.alignment\.epochs is 3: must be 0, .* set config\.method\.alignment instead",
    ),
  ],
)
def test_a_head_that_it_cannot_align_by_itself_is_refused(make_lab, head, message):
  with pytest.raises(ConfigError, match=message):
    make_lab(method=SETTINGS, head=head)


@pytest.mark.parametrize("num_tasks", [5, 10])
@pytest.mark.parametrize(
  ("benchmark", "epochs", "schedule", "rates", "length", "repulsion", "identity"),
  [
    ("imagenet_r", 150, "timm_cosine", (0.0028125, 0.00028125), 20, 0.5, 5e-4 * 24 / 256),
    ("cifar100", 50, "steps", (0.0028125, 0.00028125), 5, 0.1, 5e-4 * 24 / 256),
    ("cub200", 50, "steps", (0.0028125, 0.0028125), 20, 0.01, 0.01 * 24 / 256),
    ("domainnet", 5, "constant", (0.0028125, 0.00028125), 5, 0.1, 5e-4 * 24 / 256),
  ],
)
def test_official_settings_build(
  benchmark, epochs, schedule, rates, length, repulsion, identity, num_tasks
):
  config = cases.official("hide_prompt", benchmark, num_tasks)
  assert (config.epochs, config.batch_size, config.compute_dtype) == (epochs, 192, "float32")
  optim, method = config.optim, config.method
  assert (optim.name, optim.schedule, optim.clip_norm) == ("adam", schedule, 1.0)
  assert (optim.weight_decay, optim.head_weight_decay) == (0, 0)
  np.testing.assert_allclose((optim.learning_rate, optim.head_learning_rate), rates)
  assert (method.prompt_length, method.repulsion, method.past_share) == (length, repulsion, 0.01)
  assert method.identity.learning_rate == pytest.approx(identity)
  assert method.identity.alignment.learning_rate == pytest.approx(0.005 * 24 / 256)
  assert (method.identity.alignment.batch_size, method.alignment.batch_size) == (24, 120)
  assert (method.alignment.learning_rate, method.alignment.epochs) == (0.005, 30)
  assert config.tasks.order == "natural" and config.weights.tag == "orig_in21k"
