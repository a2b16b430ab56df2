"""SD-LoRA's directions and magnitudes, against NumPy; what a late step costs."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmlora_jax import methods
from fmlora_jax.config import ConfigError
from fmlora_jax.models import heads, vit
from fmlora_jax.train.labels import label_leaves
from fmlora_jax.train.step import StepContext, TrainStep
from fmlora_jax.types import Batch, SequenceSpec, Sizes, TaskArrays, TaskView

RANK = {"rank": 3}


@pytest.fixture
def learned(lab):
  return lab("sd_lora", method=RANK)


def product_of(factors):
  a, b = (np.asarray(factors[name], np.float64) for name in "ab")
  return np.einsum("lir,lor->lio", a, b), np.sqrt((a**2).sum((1, 2)) * (b**2).sum((1, 2)))


def plain_logits(made, changes, rows, images):
  """Of the ViT with W + dW, NumPy's sum, and the given rows."""
  params = jax.tree.map(lambda leaf: leaf, made.weights)
  for name, change in changes.items():
    for layer in range(2):
      place = params[f"block_{layer}"]["attention"][name]["dense"]
      place["kernel"] = place["kernel"] + jnp.asarray(change[layer], jnp.float32)
  return heads.linear(rows, jax.jit(made.backbone.apply)(params, images))


def changes_of(made, task, scales, newest=True):
  """dW in task `task`: directions before it over their norms, and its own as it is."""
  total = {"query": 0.0, "value": 0.0}
  for index, stage in enumerate(made.stages[: task + newest]):
    for name, factors in stage.trained.cur["lora"].items():
      product, norm = product_of(factors)
      divisor = np.ones(2) if index == task else norm
      total[name] = total[name] + float(scales[index]) * product / divisor[:, None, None]
  return total


def test_training_adds_the_current_direction_to_normalised_earlier_ones(learned):
  for task, stage in enumerate(learned.stages):
    images, count = learned.images(task=task), stage.view.num_classes
    changes = changes_of(learned, task, stage.trained.cur["scales"])
    expected = plain_logits(learned, changes, stage.trained.cur["head"], images)
    got = learned.training_logits(stage.trained, stage, images)
    np.testing.assert_allclose(got[:, :count], expected[:, :count], rtol=0, atol=1e-4)


def test_a_task_starts_from_earlier_directions_at_the_first_scale(learned):
  for task, stage in enumerate(learned.stages):
    np.testing.assert_array_equal(stage.begun.cur["scales"], np.float32([0.8] * 3))
    images = learned.images()
    rows = {"kernel": jax.random.normal(jax.random.key(1), (3, 16)), "bias": jnp.zeros(3)}
    changes = changes_of(learned, task, [0.8] * 3, newest=False)
    expected = plain_logits(learned, changes if task else {}, rows, images)
    got = learned.training_logits(stage.begun, stage, images, rows)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 if task else 1e-6)


def test_with_their_norms_as_scalars_the_directions_add_up_as_plain_lora(learned):
  """Layers differ in their norms, and one scalar serves them all: factors of equal norms."""
  stage = learned.stages[2]
  slots, total = {}, {"query": 0.0, "value": 0.0}
  for name, kept in stage.begun.mem["directions"].items():
    unit = {side: np.array(kept[side]) for side in "ab"}
    for side, leaf in unit.items():
      norms = np.sqrt((leaf**2).sum((2, 3), keepdims=True))
      unit[side] = np.divide(leaf, norms, out=np.zeros_like(leaf), where=norms > 0)
    scale = np.float32([2.0, 0.5, 0.0]).reshape(3, 1, 1, 1)
    unit["a"] = unit["a"] * scale
    slots[name] = {side: jnp.asarray(leaf) for side, leaf in unit.items()}
    slots[name]["norm"] = jnp.asarray(np.broadcast_to(scale[:, 0, 0], (3, 2)))
    total[name] = sum(product_of({side: unit[side][i] for side in "ab"})[0] for i in range(2))
  variables = stage.begun.replace(
    mem=stage.begun.mem | {"directions": slots},
    cur=stage.begun.cur | {"scales": jnp.asarray([2.0, 0.5, 0.8])},
  )
  rows = {"kernel": jax.random.normal(jax.random.key(1), (3, 16)), "bias": jnp.zeros(3)}
  got = learned.training_logits(variables, stage, learned.images(), rows)
  expected = plain_logits(learned, total, rows, learned.images())
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_the_length_of_an_earlier_direction_does_not_matter(learned):
  first, second = learned.stages[:2]
  longer = jax.tree.map(lambda leaf: leaf, first.trained.cur["lora"])
  longer["query"]["a"] = 10 * longer["query"]["a"]
  longer["value"]["b"] = 0.1 * longer["value"]["b"]
  rows = {"kernel": jax.random.normal(jax.random.key(1), (3, 16)), "bias": jnp.zeros(3)}

  def logits(factors):
    trained = first.trained.replace(cur=first.trained.cur | {"lora": factors})
    ended, _ = learned.method.end_task(trained, first.view)
    begun, _ = learned.method.begin_task(ended, second.view)
    return learned.training_logits(begun, second, learned.images(), rows)

  expected = logits(first.trained.cur["lora"])
  np.testing.assert_allclose(logits(longer), expected, rtol=0, atol=1e-4)
  halved = jax.tree.map(lambda leaf: leaf, first.trained.cur["lora"])
  halved["query"]["a"] = halved["query"]["a"].at[:, :8].multiply(0.5)  # another direction
  assert np.abs(logits(halved) - expected).max() > 1e-3


def test_scalars_are_learned_and_kept_and_those_of_tasks_to_come_wait(learned):
  kept = np.asarray(learned.variables.mem["scales"])
  for task, stage in enumerate(learned.stages):
    scales = np.asarray(stage.trained.cur["scales"])
    assert (scales[: task + 1] != np.float32(0.8)).all()
    np.testing.assert_array_equal(scales[task + 1 :], np.float32(0.8))  # nor does decay touch them
    np.testing.assert_array_equal(kept[task, : task + 1], scales[: task + 1])
    np.testing.assert_array_equal(kept[task, task + 1 :], 0)
    assert stage.facts["scales"] == pytest.approx(scales[: task + 1].tolist())
    assert stage.facts["rank"] == 3


def test_the_folded_model_needs_nothing_of_the_task_that_was_learned(learned):
  """As after a restart: the scalars and the last direction are in `mem`."""
  variables = learned.variables.replace(cur={})
  got = learned.predictions(variables, learned.images())
  np.testing.assert_array_equal(got, learned.predictions(learned.variables, learned.images()))


def test_before_the_first_task_the_folded_model_is_the_pretrained_one(make_lab, changed):
  made = make_lab(method={"name": "sd_lora"} | RANK)
  assert not changed(made.weights, made.method.fold(made.weights, made.variables)["backbone"])


def test_empty_slots_get_no_gradient_and_make_no_nan(learned):
  for task, stage in enumerate(learned.stages):
    variables = stage.trained.replace(frozen=learned.method.freeze(learned.weights, stage.trained))
    batch = learned.batch(task=task)

    def loss(cur, variables=variables, batch=batch, view=stage.view):
      now = variables.replace(cur=cur)
      output = learned.method.apply(now, batch.images, view.arrays, view.key("method"))
      return heads.local_losses(output.logits, batch.labels, view.arrays).mean()

    grads = jax.jit(jax.grad(loss))(variables.cur)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert np.asarray(grads["scales"])[: task + 1].all()
    assert not np.asarray(grads["scales"])[task + 1 :].any()


def full_size(name, num_tasks=20, depth=12, **changes):
  """Returns config, method, and by shape the variables of a first task on a ViT-B/16."""
  settings = {"method": {"name": name} | changes, "batch_size": 2, "compute_dtype": "float32"}
  config = methods.build_config(settings)
  backbone = vit.make_vit(Sizes(depth=depth))
  spec = SequenceSpec(
    scenario="cil",
    num_tasks=num_tasks,
    num_classes=10 * num_tasks,
    class_ranges=tuple((lo, lo + 10) for lo in range(0, 10 * num_tasks, 10)),
  )
  method = methods.make_method(config, backbone, spec)
  view = mock.Mock(TaskView, index=0, key=lambda name: jax.random.key(0))
  weights = jax.eval_shape(backbone.init, jax.random.key(0))

  def begin(weights):
    variables = method.init(jax.random.key(0), weights)
    return method.begin_task(variables, view)[0]

  return config, method, weights, jax.eval_shape(begin, weights)


def test_a_first_task_of_twenty_trains_lora_and_a_scalar_for_each_task():
  """The code's 368,661 are 20 scalars of the past and one of the present; ours share a vector."""
  *_, variables = full_size("sd_lora")
  trained = {name: leaf for name, leaf in variables.cur.items() if name != "head"}
  assert sum(leaf.size for leaf in jax.tree.leaves(trained)) == 368_640 + 20


def step_flops(name, depth=2):
  """Of one step as written, at 2 images; the parts of ViT-B/16 are as large as in all 12 blocks."""
  config, method, weights, variables = full_size(name, depth=depth, rank=10)
  stepper = TrainStep(method, config, method.rules(0))

  def first(weights, variables):
    fixed = StepContext(
      frozen=method.freeze(weights, variables),
      mem=variables.mem,
      task=TaskArrays(*map(jnp.int32, (0, 0, 10))),
      total_steps=jnp.int32(10),
      root=jax.random.key(0),
    )
    return stepper.init(variables), fixed

  state, fixed = jax.eval_shape(first, weights, variables)
  batch = Batch(
    images=jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32),
    labels=jax.ShapeDtypeStruct((2,), jnp.int32),
    valid=jax.ShapeDtypeStruct((2,), bool),
  )
  return jax.jit(stepper.step).lower(state, fixed, batch).cost_analysis()["flops"]


def test_twenty_tasks_cost_one_product_of_their_joint_rank_forward_and_backward():
  """No gradient of earlier factors is computed: that would be half as much again."""
  tokens, width, joint = 2 * 197, 768, 20 * 10
  product = 2 * 2 * width * joint * tokens  # through A and B
  looking = 2 * 197 + 1 - 197  # in the last block the class token alone has a query
  forward = product * (2 + looking / 197)  # value in both blocks, and query
  limit = 2 * forward
  growth = step_flops("sd_lora") - step_flops("lora")
  assert 0.5 * limit < growth <= 1.01 * limit


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rank": 0}, r"config\.method\.rank is 0: must be >= 1"),
    ({"rank": 17}, r"config\.method\.rank is 17: must be at most 16, .* 'query'"),
    ({"targets": ("out", "out")}, r"config\.method\.targets is .*: must be at least one .* once"),
  ],
)
def test_settings_that_cannot_be_are_refused_by_field(make_lab, changes, message):
  with pytest.raises(ConfigError, match=message):
    make_lab(method={"name": "sd_lora"} | changes)


def test_scalars_are_spared_weight_decay(learned):
  labels = label_leaves({"cur": learned.variables.cur}, learned.method.rules(0))["cur"]
  assert labels["scales"] == "scale"
  assert set(jax.tree.leaves(labels["lora"])) == {"adapter"}
  assert optax.tree.norm(learned.variables.mem["directions"]) > 0
