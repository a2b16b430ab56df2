"""CODA-Prompt: how prompts are mixed, where components start, and what stays as it is."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax import methods
from fmlora_jax.config import ConfigError
from fmlora_jax.models import vit
from fmlora_jax.types import Adapters, Prefix, SequenceSpec, Sizes

SETTINGS = {"pool_size": 10, "length": 4, "layers": (0, 1), "orthogonality": 0.1}
SLOTS = 3  # of 10 components and 3 tasks


@pytest.fixture(scope="module")
def learned(lab):
  return lab("coda_prompt", method=SETTINGS)


def slots_of(stack, tasks):
  """[T, L, M, ...] -> [L, tasks·M, D] in float64."""
  stack = np.asarray(stack, np.float64)[:tasks]
  return np.moveaxis(stack, 0, 1).reshape(2, tasks * SLOTS, np.prod(stack.shape[3:], dtype=int))


def mixed(components, query, tasks):
  """The prefix of each sample and layer from the slots of the first tasks: [B, L, P, D]."""
  prompt, key, attention = (slots_of(components[n], tasks) for n in ("prompt", "key", "attention"))
  found = np.zeros((len(query), 2, 4 * 16))
  for b, layer, m in np.ndindex(len(query), 2, tasks * SLOTS):
    seen, k = query[b] * attention[layer, m], key[layer, m]
    weight = seen @ k / np.linalg.norm(seen) / np.linalg.norm(k)
    assert abs(weight) <= 1 + 1e-9
    found[b, layer] += weight * prompt[layer, m]
  return found.reshape(-1, 2, 4, 16)


def expected_logits(made, variables, images, tasks, head):
  query = made.features(images).astype(np.float64)
  prompts = mixed(variables, query, tasks).reshape(len(query), 2, 2, 2, 2, 8)
  layers = (Prefix(key=p[:, 0], value=p[:, 1]) for p in np.moveaxis(np.float32(prompts), 1, 0))
  features = made.features(images, Adapters(prefix=tuple(layers)))
  return features @ np.asarray(head["kernel"]).T + head["bias"]


@pytest.mark.parametrize("task", [0, 1, 2])
def test_predictions_mix_the_slots_of_the_tasks_so_far_and_of_no_others(learned, task):
  images, ended = learned.images(6, task=task), learned.stages[task].ended
  head, components = ended.mem["head"], ended.mem["components"]
  got = learned.predictions(ended, images)
  expected = expected_logits(learned, components, images, task + 1, head)
  np.testing.assert_allclose(got, expected, atol=1e-5)
  for stack in components.values():
    assert not np.asarray(stack)[task + 1 :].any()
  if task:
    fewer = expected_logits(learned, components, images, task, head)
    assert np.abs(got - fewer).max() > 1e-3


def test_training_mixes_the_tasks_own_slots_with_those_before(learned):
  images, stage = learned.images(6, task=1), learned.stages[1]
  components = {
    name: np.asarray(stack).copy() for name, stack in stage.before.mem["components"].items()
  }
  for name, own in stage.trained.cur["components"].items():
    components[name][1] = own
  head = stage.trained.cur["head"]
  got = learned.training_logits(stage.trained, stage, images)
  expected = expected_logits(learned, components, images, 2, head)
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_new_slots_are_what_single_projections_on_all_earlier_ones_leave_of_random_vectors(learned):
  for stage in learned.stages:
    t = stage.view.index
    for i, (name, own) in enumerate(stage.begun.cur["components"].items()):
      fresh = np.asarray(own, np.float64).reshape(2, SLOTS, -1)
      key = jax.random.fold_in(stage.view.key("components"), i)
      drawn = np.asarray(jax.random.normal(key, fresh.shape), np.float64)
      for layer, known in enumerate(slots_of(stage.before.mem["components"][name], t)):
        known = list(known)
        for v in drawn[layer]:
          known.append(v - sum((v @ u) / (u @ u) * u for u in known))
        expected = np.stack([u / np.linalg.norm(u) for u in known[t * SLOTS :]])
        np.testing.assert_allclose(fresh[layer], expected, atol=1e-5)
        if t == 0:
          np.testing.assert_allclose(fresh[layer] @ fresh[layer].T, np.eye(SLOTS), atol=1e-5)


def test_slots_of_earlier_tasks_stay_bit_for_bit_under_weight_decay(learned):
  assert learned.config.optim.weight_decay == 0.5
  for t, stage in enumerate(learned.stages):
    for name, stack in stage.ended.mem["components"].items():
      np.testing.assert_array_equal(stack[t], stage.trained.cur["components"][name])
      np.testing.assert_array_equal(stack[:t], stage.before.mem["components"][name][:t])


def penalty(made, variables, stage, cur):
  frozen = made.method.freeze(made.weights, variables)
  now = variables.replace(frozen=frozen, cur=cur)
  arguments = now, made.images(4), stage.view.arrays, stage.view.key("method")
  return jax.jit(made.method.apply)(*arguments).penalty


def test_the_penalty_is_the_distance_of_used_slots_from_orthonormal_ones(learned):
  stage = learned.stages[1]
  expected = 0
  for name, stack in stage.before.mem["components"].items():
    stack = np.asarray(stack).copy()
    stack[1] = stage.trained.cur["components"][name]
    for x in slots_of(stack, 2):
      expected += ((x @ x.T - np.eye(2 * SLOTS)) ** 2).mean()
  got = penalty(learned, stage.trained, stage, stage.trained.cur)
  np.testing.assert_allclose(got, 0.1 * expected, rtol=1e-4)
  begun = learned.stages[0].begun
  np.testing.assert_allclose(penalty(learned, begun, learned.stages[0], begun.cur), 0, atol=1e-6)
  gradient = jax.jit(jax.grad(functools.partial(penalty, learned, stage.trained, stage)))(
    stage.trained.cur
  )
  assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient["components"]))


def test_in_bfloat16_slots_and_their_weights_stay_in_float32(make_lab):
  made = make_lab(method={"name": "coda_prompt", **SETTINGS}, compute_dtype="bfloat16", epochs=1)
  (stage,) = made.learn(1)
  for tree in (stage.begun.cur, stage.ended.mem):
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
  for own in stage.begun.cur["components"].values():
    fresh = np.asarray(own).reshape(2, SLOTS, -1)
    grams = fresh @ fresh.swapaxes(1, 2)
    np.testing.assert_allclose(grams, np.broadcast_to(np.eye(SLOTS), grams.shape), atol=1e-5)
  assert made.predictions(made.variables, made.images()).dtype == jnp.float32


def full_size(num_tasks=10, depth=12, **changes):
  config = methods.build_config({"method": {"name": "coda_prompt"} | changes})
  ranges = tuple((20 * i, 20 * i + 20) for i in range(num_tasks))
  spec = SequenceSpec(
    scenario="cil", num_tasks=num_tasks, num_classes=20 * num_tasks, class_ranges=ranges
  )
  return methods.make_method(config, vit.make_vit(Sizes(depth=depth)), spec)


def test_components_and_head_of_ten_tasks_have_as_many_parameters_as_the_official_ones():
  made = full_size()
  assert sum(made.stored([{}] * 10)["per_task"]) == 3_840_000
  weights = jax.eval_shape(vit.make_vit(Sizes()).init, jax.random.key(0))
  mem = jax.eval_shape(made.init, jax.random.key(0), weights).mem
  assert sum(leaf.size for leaf in jax.tree.leaves(mem["components"])) == 3_840_000
  assert sum(leaf.size for leaf in jax.tree.leaves(mem["head"])) == 153_800
  assert full_size(num_tasks=20).stored([{}])["per_task"] == [192_000]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"length": 7}, "config.method.length is 7: must be even and >= 2: half keys, half values"),
    ({"length": 0}, "config.method.length is 0: must be even and >= 2: half keys, half values"),
    ({"orthogonality": -1.0}, "config.method.orthogonality is -1.0: must be >= 0"),
    (
      {"pool_size": 9},
      "config.method.pool_size is 9: must give each of 10 tasks a slot, and all together at most "
      "768, as many as can be orthonormal",
    ),
    (
      {"pool_size": 780},
      "config.method.pool_size is 780: must give each of 10 tasks a slot, and all together at most "
      "768, as many as can be orthonormal",
    ),
    (
      {"layers": (0, 12)},
      "config.method.layers is (0, 12): must be ascending numbers of blocks in 0..11",
    ),
  ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
  with pytest.raises(ConfigError) as error:
    full_size(**changes)
  assert str(error.value) == message


@pytest.mark.parametrize(
  ("benchmark", "num_tasks", "epochs", "split"),
  [
    ("imagenet_r", 20, 50, "slice80"),
    ("cifar100", 10, 20, "full"),
    ("domainnet", 5, 5, "full"),
    ("cub200", 10, 50, "full"),
  ],
)
def test_official_settings(benchmark, num_tasks, epochs, split):
  built = cases.official("coda_prompt", benchmark, num_tasks)
  optim, method = built.optim, built.method
  assert (optim.name, optim.schedule, optim.clip_norm) == ("adam", "coda_cosine", None)
  assert optim.learning_rate == optim.head_learning_rate == 1e-3
  assert optim.weight_decay == optim.head_weight_decay == 0
  assert (built.epochs, built.batch_size, built.compute_dtype) == (epochs, 128, "float32")
  assert (method.pool_size, method.length, method.orthogonality) == (100, 8, 0.0)
  assert method.layers == (0, 1, 2, 3, 4)
  augmentation = "coda_uncropped" if benchmark == "cifar100" else "coda"
  assert (built.input.augmentation, built.tasks.split) == (augmentation, split)
