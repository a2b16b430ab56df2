import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax.models import low_rank, vit
from fmlora_jax.types import Adapters, LowRank, Sizes

SIZES = Sizes(image_size=16, patch_size=8, width=16, depth=2, num_heads=2)
LAYERS, D_IN, D_OUT, RANK = 2, 12, 9, 4


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def random_delta(rank=RANK, seed=0, d_in=D_IN, d_out=D_OUT):
  return LowRank(
    a=draw(LAYERS, d_in, rank, seed=seed),
    b=draw(LAYERS, d_out, rank, seed=seed + 1),
    core=draw(LAYERS, rank, rank, seed=seed + 2),
  )


def layer_of(delta, layer):
  return jax.tree.map(lambda leaf: leaf[layer], delta)


def relative_error(got, expected):
  return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def test_dense_is_a_core_b_transposed():
  delta = random_delta()
  expected = [delta.a[i] @ delta.core[i] @ delta.b[i].T for i in range(LAYERS)]
  np.testing.assert_allclose(low_rank.dense(delta), expected, rtol=1e-5, atol=1e-5)
  no_core = delta.replace(core=None)
  identity = delta.replace(core=jnp.broadcast_to(jnp.eye(RANK), (LAYERS, RANK, RANK)))
  np.testing.assert_allclose(low_rank.dense(no_core), low_rank.dense(identity), rtol=1e-6)


@pytest.mark.parametrize("has_core", [True, False])
def test_applying_a_delta_is_multiplying_by_its_dense_form(has_core):
  delta = random_delta() if has_core else random_delta().replace(core=None)
  x = draw(3, 5, D_IN, seed=7)
  got = low_rank.apply(x, layer_of(delta, 1))
  np.testing.assert_allclose(got, x @ low_rank.dense(delta)[1], rtol=1e-5, atol=1e-4)
  assert low_rank.apply(x.astype(jnp.bfloat16), layer_of(delta, 1)).dtype == jnp.bfloat16


def test_a_diagonal_core_is_the_whole_matrix_with_that_diagonal():
  diagonal = draw(LAYERS, RANK, seed=8)
  short = random_delta().replace(core=diagonal)
  whole = short.replace(core=diagonal[:, None] * jnp.eye(RANK))
  expected = [short.a[i] @ np.diag(diagonal[i]) @ short.b[i].T for i in range(LAYERS)]
  np.testing.assert_allclose(low_rank.dense(short), expected, rtol=1e-5, atol=1e-5)
  x = draw(3, 5, D_IN, seed=7)
  for layer in range(LAYERS):
    got = low_rank.apply(x, layer_of(short, layer))
    np.testing.assert_allclose(got, low_rank.apply(x, layer_of(whole, layer)), rtol=1e-5, atol=1e-4)
  assert low_rank.apply(x.astype(jnp.bfloat16), layer_of(short, 1)).dtype == jnp.bfloat16


def test_the_gradient_of_a_diagonal_core_is_one_number_per_rank():
  delta, x, pull = layer_of(random_delta(), 0), draw(6, D_IN, seed=7), draw(6, D_OUT, seed=9)
  diagonal = draw(RANK, seed=8)
  got = jax.grad(lambda core: jnp.sum(low_rank.apply(x, delta.replace(core=core)) * pull))(diagonal)
  expected = np.sum(np.asarray(x @ delta.a) * np.asarray(pull @ delta.b), axis=0)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_several_deltas_of_one_projection_add_up():
  backbone = vit.make_vit(SIZES)
  weights = backbone.init(jax.random.key(0))
  parts = (
    LowRank(a=draw(2, 16, 3, seed=1), b=0.1 * draw(2, 16, 3, seed=2)),
    LowRank(a=draw(2, 16, 5, seed=3), b=0.1 * draw(2, 16, 5, seed=4), core=draw(2, 5, seed=5)),
  )
  images = draw(2, 16, 16, 3, seed=3)
  adapted = backbone.apply(weights, images, Adapters(deltas={"query": parts, "fc1": ()}))
  folded = weights
  for part in parts:
    folded = low_rank.fold_deltas(folded, {"query": part})
  np.testing.assert_allclose(adapted, backbone.apply(folded, images), rtol=0, atol=1e-4)
  one = backbone.apply(weights, images, Adapters(deltas={"query": parts[:1]}))
  assert np.abs(adapted - one).max() > 0.01


def test_joined_ranks_are_the_sum_of_the_deltas():
  a, b = draw(3, LAYERS, D_IN, RANK, seed=1), draw(3, LAYERS, D_OUT, RANK, seed=2)
  magnitudes = np.asarray(draw(3, LAYERS, seed=3))
  joined = LowRank(
    a=low_rank.join_ranks(a),
    b=low_rank.join_ranks(b),
    core=jnp.asarray(np.repeat(magnitudes.T, RANK, axis=1)),
  )
  expected = np.einsum("tl,tldr,tler->lde", magnitudes, a, b)
  np.testing.assert_allclose(low_rank.dense(joined), expected, rtol=1e-4, atol=1e-4)


def test_fresh_factors_change_nothing_and_differ_by_target_and_layer():
  sizes = Sizes(image_size=16, patch_size=8, width=16, depth=2, num_heads=2)

  def fill(key, depth, width, rank):
    return jax.random.normal(key, (depth, width, rank))

  factors = low_rank.fresh(jax.random.key(0), sizes, ("value", "fc2"), 3, fill)
  shapes = {name: (f["a"].shape, f["b"].shape) for name, f in factors.items()}
  assert shapes == {"value": ((2, 16, 3), (2, 16, 3)), "fc2": ((2, 64, 3), (2, 16, 3))}
  assert not any(f["b"].any() for f in factors.values())
  drawn = [factors["value"]["a"][0], factors["value"]["a"][1], factors["fc2"]["a"][0, :16]]
  assert all((x != y).all() for x, y in itertools.pairwise(drawn))
  held = sum(leaf.size for leaf in jax.tree.leaves(factors))
  assert low_rank.num_parameters(sizes, ("value", "fc2"), 3) == held


@pytest.mark.parametrize("name", vit.PROJECTIONS)
def test_a_folded_vit_is_the_adapted_one_for_every_projection(name):
  backbone = vit.make_vit(SIZES)
  weights = backbone.init(jax.random.key(0))
  d_in, d_out = SIZES.projection(name)
  delta = random_delta(d_in=d_in, d_out=d_out)
  delta = delta.replace(core=0.1 * delta.core)
  images = draw(2, 16, 16, 3, seed=3)
  folded = backbone.apply(low_rank.fold_deltas(weights, {name: delta}), images)
  adapted = backbone.apply(weights, images, Adapters(deltas={name: delta}))
  plain = backbone.apply(weights, images)
  np.testing.assert_allclose(folded, adapted, rtol=0, atol=1e-4)
  assert np.abs(adapted - plain).max() > 0.01  # the delta matters


def test_fold_changes_the_target_kernels_only_and_copies_nothing_else():
  weights = vit.make_vit(SIZES).init(jax.random.key(0))
  delta = random_delta(d_in=16, d_out=16)
  before = jax.tree.map(np.array, weights)
  folded = low_rank.fold_deltas(weights, {"value": delta})
  jax.tree.map(np.testing.assert_array_equal, weights, before)
  old, new = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (weights, folded))
  assert old.keys() == new.keys()
  moved = {jax.tree_util.keystr(k, simple=True, separator="/") for k in old if old[k] is not new[k]}
  assert moved == {f"block_{i}/attention/value/dense/kernel" for i in range(2)}


@pytest.mark.parametrize("has_core", [True, False])
def test_orthonormalising_keeps_dw_makes_bases_orthonormal_and_sorts_the_core(has_core):
  delta = random_delta() if has_core else random_delta().replace(core=None)
  order = low_rank.orthonormalise(delta)
  assert relative_error(low_rank.dense(order), low_rank.dense(delta)) <= 1e-5
  eye = np.broadcast_to(np.eye(RANK), (LAYERS, RANK, RANK))
  for base in (order.a, order.b):
    np.testing.assert_allclose(np.swapaxes(base, -1, -2) @ base, eye, atol=1e-5)
  values = np.diagonal(order.core, axis1=-2, axis2=-1)
  np.testing.assert_array_equal(order.core, values[..., None] * np.eye(RANK))
  assert (np.diff(values, axis=-1) <= 0).all() and (values >= 0).all()
  singular = np.linalg.svd(low_rank.dense(delta), compute_uv=False)[:, :RANK]
  np.testing.assert_allclose(values, singular, rtol=1e-4)


def test_leading_orthonormal_columns_are_the_best_approximation_of_their_rank():
  delta = random_delta()
  order = low_rank.orthonormalise(delta)
  cut = LowRank(a=order.a[..., :2], b=order.b[..., :2], core=order.core[..., :2, :2])
  dense = np.asarray(low_rank.dense(delta))
  for layer in range(LAYERS):
    u, s, vt = np.linalg.svd(dense[layer])
    best = (u[:, :2] * s[:2]) @ vt[:2]
    assert relative_error(low_rank.dense(cut)[layer], best) <= 1e-4


def test_a_padded_core_has_the_same_dense_form():
  delta = random_delta(rank=2)
  wide = random_delta()
  padded = wide.replace(core=low_rank.pad_core(delta.core, RANK))
  narrow = LowRank(a=wide.a[..., :2], b=wide.b[..., :2], core=delta.core)
  assert padded.core.shape == (LAYERS, RANK, RANK)
  np.testing.assert_allclose(low_rank.dense(padded), low_rank.dense(narrow), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("orthonormal", [True, False])
def test_interference_from_cores_is_the_inner_product_of_dense_deltas(orthonormal):
  """FM-LoRA Eq. (5-7): orthonormal bases need the cores alone, others their Gram matrices too."""
  delta = low_rank.orthonormalise(random_delta()) if orthonormal else random_delta()
  cores = draw(3, LAYERS, RANK, RANK, seed=11)
  dense = np.stack([low_rank.dense(delta.replace(core=core)) for core in cores])
  expected = np.einsum("tldo,uldo->tu", dense, dense)
  got = low_rank.interference(cores, delta.a, delta.b)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)
  by_cores = np.einsum("tlrs,ulrs->tu", cores, cores)
  assert np.allclose(by_cores, expected, rtol=1e-4, atol=1e-3) == orthonormal


def test_cosines_have_a_unit_diagonal_and_a_zero_delta_has_none():
  cores = draw(3, LAYERS, RANK, RANK).at[1].set(0.0)
  delta = random_delta()
  cosines = np.asarray(low_rank.cosine(low_rank.interference(cores, delta.a, delta.b)))
  np.testing.assert_allclose(np.diagonal(cosines), [1, 0, 1], atol=1e-6)
  assert not cosines[1].any() and not cosines[:, 1].any()
  assert 0 < abs(cosines[0, 2]) < 1
  np.testing.assert_allclose(cosines, cosines.T, atol=1e-6)


def test_torchs_uniform_fills_a_third_of_the_variance_of_a_unit_column():
  drawn = np.asarray(low_rank.torch_uniform(jax.random.key(0), 4, 64, 50))
  assert drawn.shape == (4, 64, 50)
  assert 0.124 < drawn.max() <= 1 / 8 and -1 / 8 <= drawn.min() < -0.124
  np.testing.assert_allclose((drawn**2).sum(1).mean(), 1 / 3, rtol=0.02)
