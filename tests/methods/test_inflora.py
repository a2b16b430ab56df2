"""InfLoRA's directions and memory, end to end against NumPy; its freezing, counts and settings."""

import math

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SPANNED

from fmlora_jax import methods
from fmlora_jax.config import ConfigError
from fmlora_jax.models import vit
from fmlora_jax.train.labels import label_leaves, partition
from fmlora_jax.types import SequenceSpec, Sizes

RANK, THRESHOLD, FINAL = 3, 0.99, 0.9999
SETTINGS = {"rank": RANK, "threshold": THRESHOLD, "final_threshold": FINAL}


@pytest.fixture(scope="module")
def learned(lab):
  """Of images that are not augmented, so that NumPy sees the same ones; tasks are padded."""
  return lab("inflora", method=SETTINGS, input={"augmentation": "none"})


def attention_inputs(params, images, num_heads=2):
  """Returns what the attention of each block sees, [L, B·N, D], as a pre-norm ViT computes it."""

  def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

  def dense(x, p):
    return x @ p["dense"]["kernel"] + p["dense"]["bias"]

  def attention(x, p):
    mixed = []
    parts = (dense(x, p[name]) for name in ("query", "key", "value"))
    for query, key, value in zip(*(np.split(y, num_heads, -1) for y in parts), strict=True):
      scores = np.exp(query @ np.swapaxes(key, 1, 2) / np.sqrt(key.shape[-1]))
      mixed.append(scores / scores.sum(-1, keepdims=True) @ value)
    return dense(np.concatenate(mixed, -1), p["out"])

  def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))

  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  size = 8
  grid = images.shape[1] // size
  patches = [
    images[:, i * size : (i + 1) * size, j * size : (j + 1) * size].reshape(len(images), -1)
    for i in range(grid)
    for j in range(grid)
  ]
  embedding = params["embedding"]
  x = np.stack(patches, 1) @ embedding["kernel"] + embedding["bias"]
  cls = np.broadcast_to(params["cls"], (len(x), 1, x.shape[-1]))
  x = np.concatenate([cls, x], 1) + params["position"]
  seen = []
  for name in sorted(n for n in params if n.startswith("block_")):
    block = params[name]
    seen.append(norm(x, block["norm1"]))
    x = x + attention(seen[-1], block["attention"])
    x = x + dense(gelu(dense(norm(x, block["norm2"]), block["fc1"])), block["fc2"])
  return np.stack(seen).reshape(len(seen), -1, x.shape[-1])


def moments(made, task, factors):
  """Returns E[x·xᵀ] over a task's training images of the pre-trained ViT plus all A·Bᵀ."""
  weights = jax.tree.map(lambda leaf: np.array(leaf, np.float64), made.weights)
  for lora in factors:
    for layer in range(2):
      for name in ("key", "value"):
        linear = weights[f"block_{layer}"]["attention"][name]["dense"]
        linear["kernel"] += np.float64(lora["a"][layer]) @ np.float64(lora[name][layer]).T
  count = len(made.sequence.tasks[task].train)
  x = attention_inputs(weights, np.asarray(made.images(count, task=task), np.float64))
  return np.swapaxes(x, 1, 2) @ x / x.shape[1]


def projector(basis):
  return basis @ basis.T


def bases_of(variables):
  """Returns (basis float64, retains) of each layer."""
  gpm = jax.tree.map(np.asarray, variables.mem["gpm"])
  return [
    (basis[:, :k].astype(np.float64), bool(retains))
    for basis, k, retains in zip(gpm["basis"], gpm["columns"], gpm["retains"], strict=True)
  ]


def test_directions_and_memory_are_those_of_the_equations(learned):
  """Three tasks from images to bases, in plain GPM's form: a basis of all that is spanned."""
  width = 16
  memory = [np.zeros((width, 0)) for _ in range(2)]
  factors, kinds = [], set()
  for t, stage in enumerate(learned.stages):
    before = moments(learned, t, factors)
    factors.append(jax.tree.map(np.asarray, stage.trained.cur["lora"]))
    after = moments(learned, t, factors)
    threshold = THRESHOLD + (FINAL - THRESHOLD) * t / 3
    for layer in range(2):
      free = np.eye(width) - projector(memory[layer])
      u = np.linalg.svd(free @ before[layer])[0][:, :RANK]
      a = np.asarray(stage.begun.cur["lora"]["a"][layer], np.float64)
      np.testing.assert_allclose(projector(a), projector(u) / 3, rtol=0, atol=1e-4)

      total = np.sum(np.linalg.svd(after[layer])[1] ** 2)
      u, s, _ = np.linalg.svd(free @ after[layer])
      explained, count = 1 - np.sum(s**2) / total, 0
      while explained < threshold:
        explained += s[count] ** 2 / total
        count += 1
      count = max(count - 1, 1) if t == 0 else count
      memory[layer] = np.hstack([memory[layer], u[:, :count]])

      basis, retains = bases_of(stage.ended)[layer]
      found = np.eye(width) - projector(basis) if retains else projector(basis)
      assert stage.facts["spanned"][layer] == memory[layer].shape[1]
      np.testing.assert_allclose(found, projector(memory[layer]), rtol=0, atol=1e-4)
      kinds.add(retains)
  assert kinds == {False, True}


def test_directions_are_orthonormal_over_sqrt_3_and_out_of_the_way_of_old_inputs(learned):
  for before, stage in zip(learned.stages, learned.stages[1:], strict=False):
    for layer, (basis, retains) in enumerate(bases_of(before.ended)):
      a = np.asarray(stage.begun.cur["lora"]["a"][layer], np.float64)
      np.testing.assert_allclose(3 * a.T @ a, np.eye(RANK), rtol=0, atol=1e-5)
      inside = projector(basis) @ a
      np.testing.assert_allclose(inside, a if retains else 0 * a, rtol=0, atol=1e-5)


def test_what_is_learned_leaves_the_keys_and_values_of_old_inputs_as_they_are(learned):
  """In their span: dW of the next task does nothing to it, and something elsewhere."""
  for before, stage in zip(learned.stages, learned.stages[1:], strict=False):
    lora = jax.tree.map(np.asarray, stage.trained.cur["lora"])
    for layer, (basis, retains) in enumerate(bases_of(before.ended)):
      old = np.eye(16) - projector(basis) if retains else projector(basis)
      for name in ("key", "value"):
        change = lora["a"][layer] @ lora[name][layer].T
        assert np.abs(old @ change).max() < 1e-5 * np.abs(change).max()
        assert np.abs(change).max() > 1e-3


def test_only_output_factors_and_head_train(learned, changed):
  """Bit for bit, with weight decay on; a trained parameter has optimiser state, A has none."""
  assert learned.config.optim.weight_decay > 0
  for stage in learned.stages:
    before, after = ({"shared": v.shared, "cur": v.cur} for v in (stage.begun, stage.trained))
    assert changed(before, after) == {
      "cur/lora/key",
      "cur/lora/value",
      "cur/head/kernel",
      "cur/head/bias",
    }
    kept = {"lora": stage.before.mem["lora"], "gpm": stage.before.mem["gpm"]}
    assert not changed(kept, {name: stage.begun.mem[name] for name in kept})


def test_the_space_of_old_inputs_only_grows(learned):
  spans = [np.zeros((16, 16))] * 2
  for stage in learned.stages:
    for layer, (basis, retains) in enumerate(bases_of(stage.ended)):
      now = np.eye(16) - projector(basis) if retains else projector(basis)
      np.testing.assert_allclose(now @ spans[layer], spans[layer], rtol=0, atol=1e-5)
      assert np.trace(now) >= np.trace(spans[layer]) - 1e-5
      spans[layer] = now


def test_directions_are_those_of_augmented_images(make_lab, learned):
  """And of the same ones each time: a task begun again after a restart is the same."""
  made = make_lab(method={"name": "inflora"} | SETTINGS)
  view = made.view(0)
  first, again = (made.method.begin_task(made.variables, view)[0].cur["lora"] for _ in range(2))
  np.testing.assert_array_equal(first["a"], again["a"])
  plain = np.asarray(learned.stages[0].begun.cur["lora"]["a"][0])
  assert np.abs(projector(plain) - projector(np.asarray(first["a"][0]))).max() > 1e-4


def test_the_pass_over_the_images_compiles_once_for_all_tasks(make_lab):
  made = make_lab(method={"name": "inflora"} | SETTINGS, epochs=1)
  made.learn()
  assert made.method.add_moments._cache_size() == 1


def test_moments_are_float32_where_the_model_computes_in_bfloat16(lab, learned):
  made = lab("inflora", method=SETTINGS, input={"augmentation": "none"}, compute_dtype="bfloat16")
  add_moments, view = made.method.add_moments, made.view(0)
  weights = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), made.weights)
  total, count = jnp.zeros((2, 16, 16)), jnp.int32(0)
  for batch in view.train_batches(0):
    total, count = add_moments(
      total, count, weights, *batch, view.key("inflora before"), augment=view.augment
    )
  assert total.dtype == jnp.float32
  assert int(count) == 24 * 5  # 2 classes x 12 images; padding rows do not count
  expected = moments(learned, 0, [])
  error = np.abs(np.asarray(total) / int(count) - expected).max() / np.abs(expected).max()
  assert error < 1e-2  # bfloat16 rounds each input by up to 4e-3
  for stage in made.stages:
    assert np.isfinite(stage.losses).all()
    assert stage.begun.cur["lora"]["a"].dtype == jnp.float32
    assert stage.ended.mem["gpm"]["basis"].dtype == jnp.float32


def test_domains_with_shared_classes_are_remembered_one_after_another(lab):
  made = lab("inflora", "dil", ((0, 3),) * 3, method=SETTINGS)
  spanned = np.asarray([stage.facts["spanned"] for stage in made.stages])
  assert (np.diff(spanned, axis=0) >= 0).all() and (np.diff(spanned, axis=0) > 0).any()
  right = made.predictions(made.variables, made.images(36, task=2)).argmax(-1)
  assert (np.asarray(right) == np.asarray(made.batch(36, task=2).labels)).mean() > 0.5


def full_size(num_classes, num_tasks=10, **settings):
  """Returns InfLoRA on a ViT-B/16 and the sizes of a sequence of equal tasks."""
  each = num_classes // num_tasks
  spec = SequenceSpec(
    scenario="cil",
    num_tasks=num_tasks,
    num_classes=num_classes,
    class_ranges=tuple((i, i + each) for i in range(0, num_classes, each)),
  )
  built = methods.build_config({"method": {"name": "inflora"} | settings})
  return methods.make_method(built, vit.make_vit(Sizes()), spec)


@pytest.mark.parametrize(("num_classes", "trained"), [(200, 199_700), (100, 192_010)])
def test_trained_parameters_on_a_vit_b16(num_classes, trained):
  """Ten tasks of ImageNet-R, as logged by the official code, and of CIFAR-100, by formula."""
  method = full_size(num_classes)
  mem = method.init(jax.random.key(0), {}).mem
  cur = {
    "lora": {name: leaf[0] for name, leaf in mem["lora"].items()},
    "head": {name: leaf[: num_classes // 10] for name, leaf in mem["head"].items()},
  }
  params = {"cur": cur}
  learning, _ = partition(params, label_leaves(params, method.rules(0)))
  assert sum(leaf.size for leaf in jax.tree.leaves(learning)) == trained


@pytest.mark.parametrize(("retain", "columns"), [(True, 2_375), (False, 3_735)])
def test_statistics_are_the_columns_that_are_kept(retain, columns):
  stored = full_size(200, retain=retain).stored([{"rank": 10}, {"rank": 10, "spanned": SPANNED}])
  assert stored == {"shared": 0, "per_task": [276_480] * 2, "statistics": 768 * columns}


@pytest.mark.parametrize("retain", [True, False])
def test_statistics_are_the_columns_that_mem_holds(lab, retain):
  made = lab("inflora", method=SETTINGS | {"retain": retain})
  columns = np.asarray(made.variables.mem["gpm"]["columns"])
  stored = made.method.stored([stage.facts for stage in made.stages])
  assert stored["statistics"] == 16 * columns.sum()
  assert (columns <= 8).all() == retain
  assert np.asarray(made.variables.mem["gpm"]["retains"]).any() == retain


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"rank": 0}, "config.method.rank is 0: must be >= 1"),
    ({"rank": 17}, "config.method.rank is 17: must be at most 16, the smaller side of 'key'"),
    ({"threshold": 1.0}, "config.method.threshold is 1.0: must be in (0, 1)"),
    ({"final_threshold": 0.9}, "config.method.final_threshold is 0.9: must be in [threshold, 1]"),
  ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(make_lab, settings, message):
  with pytest.raises(ConfigError) as error:
    make_lab(method={"name": "inflora"} | settings)
  assert str(error.value) == message


@pytest.mark.parametrize(
  ("benchmark", "num_tasks", "expected"),
  [
    ("imagenet_r", 20, ("adam", 5e-4, 5e-4, "coda_cosine", 50, 10, 0.98, True, "slice80")),
    ("cifar100", 10, ("adam", 5e-4, 5e-4, "coda_cosine", 20, 10, 0.95, True, "full")),
    ("cub200", 10, ("adam", 5e-4, 5e-4, "coda_cosine", 50, 10, 0.98, True, "full")),
    ("domainnet", 5, ("sgd", 5e-3, 1e-2, "steps", 5, 30, 0.95, False, "full")),
  ],
)
def test_official_settings(benchmark, num_tasks, expected):
  built = cases.official("inflora", benchmark, num_tasks)
  optim, method = built.optim, built.method
  assert expected == (
    optim.name,
    optim.learning_rate,
    optim.head_learning_rate,
    optim.schedule,
    built.epochs,
    method.rank,
    method.threshold,
    method.retain,
    built.tasks.split,
  )
  assert optim.milestones == ((4,) if benchmark == "domainnet" else ())
  assert (optim.weight_decay, optim.head_weight_decay, optim.clip_norm) == (0, 0, None)
  assert (built.batch_size, built.compute_dtype) == (128, "float32")
  assert built.weights.tag == "augreg_in21k" and built.input.normalisation == "zero_one"
  assert built.tasks.order == "natural" and built.tasks.num_tasks == num_tasks
  assert method.final_threshold == 1.0
