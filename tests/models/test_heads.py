import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax.models import heads
from fmlora_jax.types import SequenceSpec, TaskArrays

WIDTH = 8
RANGES = ((0, 2), (2, 5), (5, 6))
CIL = SequenceSpec(scenario="cil", num_tasks=3, num_classes=6, class_ranges=RANGES)
DIL = SequenceSpec(scenario="dil", num_tasks=3, num_classes=4, class_ranges=((0, 4),) * 3)
KINDS = ("linear", "cosine", "class_mean", "lda")


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def fresh(kind, spec=CIL):
  head = heads.make_head(kind, spec.num_classes, WIDTH)
  return head, head.init(jax.random.key(0))


def task_arrays(spec, task):
  return TaskArrays(*map(jnp.int32, (task, *spec.class_ranges[task])))


def test_the_linear_head_is_a_matrix_product_and_a_bias():
  rows = {"kernel": draw(3, WIDTH), "bias": draw(3)}
  x = draw(5, WIDTH)
  expected = np.asarray(x) @ np.asarray(rows["kernel"]).T + np.asarray(rows["bias"])
  np.testing.assert_allclose(heads.linear(rows, x), expected, rtol=1e-5, atol=1e-6)


def test_the_cosine_head_predicts_without_its_learned_scale():
  head, mem = fresh("cosine")
  kernel, x = np.asarray(mem["kernel"]), np.asarray(draw(5, WIDTH))
  cosines = (x @ kernel.T) / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(kernel, axis=1))
  np.testing.assert_allclose(head.logits(mem, x), 10 * cosines, atol=1e-4)  # as it is drawn
  scaled = mem | {"log_scale": jnp.full(6, jnp.log(3.0))}
  np.testing.assert_allclose(head.predict(scaled, x), cosines, atol=1e-5)
  np.testing.assert_allclose(head.logits(scaled, x), 3 * cosines, atol=1e-4)
  np.testing.assert_allclose(head.predict(scaled, 100 * x), cosines, atol=1e-5)
  assert not np.asarray(head.predict(mem, 0 * x)).any()


def test_the_class_mean_head_predicts_the_nearest_mean():
  """Against NumPy: means over two calls of add_means, then the class at the smallest distance."""
  head, mem = fresh("class_mean")
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(6, WIDTH)) * np.linspace(0.5, 2, 6)[:, None]
  labels = np.repeat(np.arange(6), 5)
  x = centres[labels] + rng.normal(size=(30, WIDTH))
  for half in (labels < 3, labels >= 3):
    sums, counts = np.zeros((6, WIDTH), np.float32), np.zeros(6, np.float32)
    np.add.at(sums, labels[half], x[half])
    np.add.at(counts, labels[half], 1)
    mem = heads.add_means(mem, jnp.asarray(sums), jnp.asarray(counts))
  means = np.stack([x[labels == c].mean(0) for c in range(6)])
  np.testing.assert_allclose(mem["mean"], means, atol=1e-5)
  queries = rng.normal(size=(200, WIDTH)) * 2
  distances = ((queries[:, None] - means) ** 2).sum(-1)
  got = np.asarray(head.predict(mem, jnp.asarray(queries, jnp.float32)))
  np.testing.assert_array_equal(got.argmax(1), distances.argmin(1))
  # up to a term without a class it is minus half the squared distance
  np.testing.assert_allclose(
    got - got[:, :1], -0.5 * (distances - distances[:, :1]), rtol=1e-4, atol=1e-3
  )


def test_means_of_a_class_seen_twice_are_over_all_its_images():
  _, mem = fresh("class_mean", DIL)
  x = np.asarray(draw(12, WIDTH))
  for part in (x[:2], x[2:]):  # unequal counts: not a mean of means
    sums = jnp.zeros((4, WIDTH)).at[1].set(part.sum(0))
    mem = heads.add_means(mem, sums, jnp.zeros(4).at[1].set(len(part)))
  np.testing.assert_allclose(mem["mean"][1], x.mean(0), atol=1e-6)
  assert not np.asarray(mem["mean"])[[0, 2, 3]].any()
  np.testing.assert_array_equal(mem["count"], [0, 12, 0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_of_unequal_class_counts_train_padded_rows_and_commit_their_own(kind):
  head, mem = fresh(kind)
  for task, (lo, hi) in enumerate(RANGES):
    cur = heads.start(head, mem, CIL, task, jax.random.key(task))
    assert "mean" not in cur and "count" not in cur
    for name, leaf in cur.items():
      assert leaf.shape == (3, *mem[name].shape[1:])
      assert not np.asarray(leaf)[hi - lo :].any()
    trained = jax.tree.map(lambda leaf: leaf + 1 + task, cur)  # noqa: B023
    after = heads.commit(mem, trained, CIL, task)
    others = [c for c in range(6) if not lo <= c < hi]
    for name in cur:
      np.testing.assert_array_equal(after[name][lo:hi], trained[name][: hi - lo])
      np.testing.assert_array_equal(after[name][jnp.array(others)], mem[name][jnp.array(others)])
    mem = after


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_tasks_share_is_carried_over(kind):
  head, mem = fresh(kind, DIL)
  cur = heads.start(head, mem, DIL, 0, jax.random.key(0))
  trained = jax.tree.map(lambda leaf: leaf + 1.5, cur)
  mem = heads.commit(mem, trained, DIL, 0)
  again = heads.start(head, mem, DIL, 1, jax.random.key(1))
  assert again.keys() == trained.keys()
  for name in again:
    np.testing.assert_array_equal(again[name], trained[name])


def test_a_task_with_new_classes_starts_from_new_rows():
  head, mem = fresh("cosine")
  starts = [heads.start(head, mem, CIL, 1, jax.random.key(seed))["kernel"] for seed in (0, 0, 1)]
  np.testing.assert_array_equal(starts[0], starts[1])
  assert np.abs(starts[0] - starts[2]).max() > 0.1
  linear, mem = fresh("linear")
  dirty = jax.tree.map(jnp.ones_like, mem)
  assert not np.asarray(heads.start(linear, dirty, CIL, 1, jax.random.key(0))["kernel"]).any()


WIDE = 768


def drawn(rows, *, kind="linear", seed=0):
  """Returns kernel and bias of a large head."""
  mem = heads.make_head(kind, 1000, WIDE, rows=rows).init(jax.random.key(seed))
  return np.asarray(mem["kernel"]), np.asarray(mem["bias"])


@pytest.mark.parametrize(
  ("rows", "limit", "bias_limit"),
  [("torch_linear", 768**-0.5, 768**-0.5), ("kaiming_uniform", (3 / 768) ** 0.5, 0)],
)
def test_uniform_starts_fill_their_bounds_evenly(rows, limit, bias_limit):
  kernel, bias = drawn(rows)
  assert 0.9999 * limit < np.abs(kernel).max() <= limit * (1 + 1e-6)
  np.testing.assert_allclose(kernel.std(), limit / 3**0.5, rtol=3e-3)
  np.testing.assert_allclose(np.quantile(kernel, [0.25, 0.5]), [-limit / 2, 0], atol=3e-3 * limit)
  assert 0.99 * bias_limit <= np.abs(bias).max() <= bias_limit * (1 + 1e-6)
  np.testing.assert_allclose(bias.std(), bias_limit / 3**0.5, rtol=0.05)
  assert len(np.unique(kernel[:10])) > 7600  # no row, no entry is drawn twice


def test_the_truncated_normal_start_is_cut_at_100_deviations():
  kernel, bias = drawn("truncated_normal")
  np.testing.assert_allclose([kernel.mean(), kernel.std()], [0, 0.02], atol=1e-4)
  shares = [np.mean(np.abs(kernel) < 0.02 * k) for k in (1, 2, 3)]
  np.testing.assert_allclose(shares, [0.6827, 0.9545, 0.9973], atol=2e-3)
  assert not bias.any()


@pytest.mark.parametrize("rows", heads.STARTS)
def test_a_start_depends_on_its_key_alone_and_not_on_the_rows_before(rows):
  for got, same, other in zip(drawn(rows), drawn(rows), drawn(rows, seed=1), strict=True):
    np.testing.assert_array_equal(got, same)
    assert np.array_equal(got, other) == (not got.any())
  for got, of_means in zip(drawn(rows), drawn(rows, kind="class_mean"), strict=True):
    np.testing.assert_array_equal(got, of_means)


@pytest.mark.parametrize("rows", ["torch_linear", "kaiming_uniform", "truncated_normal"])
def test_each_task_draws_its_rows_and_padding_stays_zero(rows):
  head = heads.make_head("linear", 6, WIDTH, rows=rows)
  mem = head.init(jax.random.key(0))
  first, second = (heads.start(head, mem, CIL, 0, jax.random.key(seed)) for seed in (1, 2))
  assert (np.asarray(first["kernel"][:2]) != np.asarray(second["kernel"][:2])).all()
  assert not np.asarray(first["kernel"][2]).any() and not np.asarray(first["bias"][2])


def test_local_losses_are_the_cross_entropy_over_the_classes_of_the_task():
  task = task_arrays(CIL, 0)  # 2 of 3 slots
  logits = draw(4, 3)
  labels = jnp.array([0, 1, 1, 0])
  got = heads.local_losses(logits, labels, task)
  own = np.asarray(logits)[:, :2]
  expected = np.log(np.exp(own).sum(1)) - own[np.arange(4), np.asarray(labels)]
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  every = np.array([0, 1, 2, 2])
  np.testing.assert_allclose(
    heads.local_losses(logits, every + 2, task_arrays(CIL, 1)),
    np.log(np.exp(logits).sum(1)) - np.asarray(logits)[np.arange(4), every],
    rtol=1e-5,
  )
  last = task_arrays(CIL, 2)  # one class, the 5th: no other can be meant
  np.testing.assert_array_equal(heads.local_losses(logits, jnp.full(4, 5), last), np.zeros(4))


def test_losses_over_all_classes_so_far_are_those_of_numpy_and_mask_classes_to_come():
  task, labels = task_arrays(CIL, 1), jnp.array([2, 4, 3, 2])  # after classes 0 and 1; 5 to come
  logits, old = draw(4, 3), draw(4, 6)
  joined = np.concatenate([np.asarray(old)[:, :2], np.asarray(logits)], axis=1)
  expected = np.log(np.exp(joined).sum(1)) - joined[np.arange(4), np.asarray(labels)]
  np.testing.assert_allclose(heads.local_losses(logits, labels, task, old), expected, rtol=1e-5)
  grad = jax.grad(lambda x: heads.local_losses(logits, labels, task, x).sum())(old)
  assert np.asarray(grad)[:, :2].all() and not np.asarray(grad)[:, 2:].any()
  first = task_arrays(CIL, 0)  # nothing is before it
  labels = jnp.array([0, 1, 1, 0])
  np.testing.assert_array_equal(
    heads.local_losses(logits, labels, first, old), heads.local_losses(logits, labels, first)
  )


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_rows_have_no_gradient_and_the_features_have_one(kind):
  head, mem = fresh(kind)
  mem = mem | {"kernel": draw(6, WIDTH)}
  cur = heads.start(head, mem, CIL, 1, jax.random.key(0))
  x = draw(5, WIDTH)

  def total(mem, cur, x):
    return (heads.old_logits(head, mem, cur, x) ** 2).sum()

  of_mem, of_cur, of_x = jax.grad(total, argnums=(0, 1, 2))(mem, cur, x)
  assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(of_mem))
  assert np.asarray(of_x).any()
  assert [name for name, leaf in of_cur.items() if leaf.any()] == ["log_scale"] * (kind == "cosine")
  expected = head.logits(mem, x)
  if kind == "cosine":
    expected = head.predict(mem, x) * np.exp(np.asarray(cur["log_scale"]).mean())
  np.testing.assert_allclose(heads.old_logits(head, mem, cur, x), expected, rtol=1e-5)


def test_slots_beyond_the_task_get_no_gradient_and_no_row_gives_nan():
  task = task_arrays(CIL, 0)
  labels = jnp.array([0, 1, 5, 0])  # 5: a padding row's label may be of another task

  def loss(logits):
    losses = heads.local_losses(logits, labels, task)
    return heads.weighted_mean(losses, jnp.array([True, True, False, False]))

  value, grad = jax.value_and_grad(loss)(1e4 * draw(4, 3))
  assert np.isfinite(value) and np.isfinite(grad).all()
  assert not np.asarray(grad)[:, 2].any()  # the slot beyond
  assert not np.asarray(grad)[2:].any()  # padding rows
  assert np.asarray(jax.grad(loss)(draw(4, 3)))[:2, :2].any()
  assert heads.local_losses(draw(4, 3).astype(jnp.bfloat16), labels, task).dtype == jnp.float32


@pytest.mark.parametrize(("label", "slot"), [(-3, 0), (1, 0), (2, 0), (4, 2), (5, 2), (99, 2)])
def test_a_label_outside_the_task_has_the_loss_of_the_nearest_slot(label, slot):
  """Task 2 has classes 2 to 4; a NaN there would reach the mean although its weight is 0."""
  logits = draw(2, 3)
  got = heads.local_losses(logits, jnp.full(2, label), task_arrays(CIL, 1))
  expected = np.log(np.exp(logits).sum(1)) - np.asarray(logits)[:, slot]
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_mean_over_no_valid_row_is_zero():
  assert heads.weighted_mean(jnp.ones(3), jnp.zeros(3, bool)) == 0
  assert heads.weighted_mean(jnp.full(3, 7.0), jnp.arange(3) == 1) == 7
  np.testing.assert_allclose(heads.weighted_mean(jnp.arange(3.0), jnp.array([0, 1, 1]) > 0), 1.5)


def test_a_class_of_one_image_has_it_as_its_mean_and_one_without_has_none():
  x = draw(WIDTH)
  sums, counts = jnp.zeros((6, WIDTH)).at[2].set(x), jnp.zeros(6).at[2].set(1)
  mem = heads.add_means(fresh("class_mean")[1], sums, counts)
  np.testing.assert_array_equal(mem["mean"], sums)
  task = task_arrays(CIL, 1)  # classes 2 to 4
  rows = heads.imprint({"kernel": jnp.ones((3, WIDTH)), "bias": jnp.ones(3)}, sums, counts, task)
  scale = 10 / WIDTH
  np.testing.assert_allclose(rows["kernel"][0], scale * x, rtol=1e-6)
  np.testing.assert_allclose(rows["bias"][0], -0.5 * scale * np.sum(np.square(x)), rtol=1e-5)
  assert not np.asarray(rows["kernel"][1:]).any() and not np.asarray(rows["bias"][1:]).any()


def test_rows_beyond_a_task_are_no_copy_of_the_next_class():
  sums, task = draw(6, WIDTH), task_arrays(CIL, 0)  # two of three rows
  rows = heads.imprint({"kernel": jnp.ones((3, WIDTH))}, sums, jnp.full(6, 4.0), task)
  np.testing.assert_allclose(rows["kernel"][:2], 10 / WIDTH * sums[:2] / 4, rtol=1e-6)
  assert not np.asarray(rows["kernel"][2]).any()


def test_only_the_class_mean_head_asks_for_means():
  assert [heads.make_head(kind, 6, WIDTH).needs_means for kind in KINDS] == [
    False,
    False,
    True,
    False,
  ]
