import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax.models import prompts


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("batch", [1, 3])
def test_prefixes_keep_samples_keys_and_values_apart(batch):
  tokens = np.random.default_rng(0).normal(size=(batch, 2, 2, 5, 12))
  found = prompts.prefixes(tokens, (1, 3), num_heads=4)
  assert [layer is None for layer in found] == [True, False, True, False]
  for row, layer in enumerate((1, 3)):
    for sample in range(batch):
      for part, name in enumerate(("key", "value")):
        for head in range(4):
          np.testing.assert_array_equal(
            getattr(found[layer], name)[sample, :, head],
            tokens[sample, row, part, :, 3 * head : 3 * head + 3],
          )


def cosine(a, b):
  a, b = a.astype(np.float64), b.astype(np.float64)
  return a @ b / np.sqrt((a @ a) * (b @ b))


def test_similarities_are_cosines():
  query, keys = normal(3, 8), normal(5, 8, seed=1)
  expected = [[cosine(q, k) for k in keys] for q in query]
  np.testing.assert_allclose(prompts.similarity(query, keys), expected, atol=1e-6)
  np.testing.assert_allclose(prompts.similarity(1e3 * query, 1e-2 * keys), expected, atol=1e-6)


def test_each_sample_gets_its_nearest_and_the_lower_of_two_equal_ones():
  similarities = jnp.asarray([[0.1, 0.5, 0.4, -1.0], [0.7, 0.2, 0.7, 0.7]])
  chosen = prompts.choose(similarities, 2, batchwise=False)
  np.testing.assert_array_equal(chosen, [[1, 2], [0, 2]])


def test_a_batch_gets_what_most_of_it_chose():
  similarities = jnp.asarray([[9, 8, 0, 0], [0, 9, 8, 0], [0, 8, 9, 0], [8, 0, 0, 9.0]])
  chosen = prompts.choose(similarities, 2, batchwise=True)  # votes 2, 3, 2, 1
  np.testing.assert_array_equal(chosen, [[1, 0]] * 4)


def test_attended_similarities_are_cosines_of_what_each_slot_attends_to():
  query, attention, keys = normal(3, 8), normal(2, 5, 8, seed=1), normal(2, 5, 8, seed=2)
  attention[:, 3:], keys[:, 3:] = 0, 0  # slots to come
  found = np.asarray(prompts.attended_similarity(query, attention, keys))
  for sample, layer, slot in np.ndindex(3, 2, 3):
    expected = cosine(query[sample] * attention[layer, slot], keys[layer, slot])
    np.testing.assert_allclose(found[sample, layer, slot], expected, atol=1e-6)
  assert np.abs(found).max() <= 1 + 1e-6
  assert not found[:, :, 3:].any()
  gradients = jax.grad(lambda *a: prompts.attended_similarity(*a).sum(), argnums=(0, 1, 2))(
    query, attention, keys
  )
  assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_prompts_are_sums_of_components_by_weight():
  weights, components = normal(3, 2, 5), normal(2, 5, 4, 8, seed=1)
  mixed = prompts.mix(weights, components)
  for sample, layer in np.ndindex(3, 2):
    expected = sum(weights[sample, layer, m] * components[layer, m] for m in range(5))
    np.testing.assert_allclose(mixed[sample, layer], expected, atol=1e-5)


def single_projections(earlier, drawn):
  """CODA-Prompt's start of new slots of one layer, vector by vector in float64."""
  known = list(earlier.astype(np.float64))
  for v in drawn.astype(np.float64):
    rest = v - sum((v @ u) / (u @ u) * u for u in known if u.any())
    known.append(rest)
  return np.stack([u / np.linalg.norm(u) for u in known[len(earlier) :]])


def test_new_slots_are_what_single_projections_leave():
  earlier, drawn = normal(2, 6, 24), normal(2, 5, 24, seed=1)  # not orthogonal: trained
  earlier[:, 4:] = 0  # slots to come
  fresh = np.asarray(prompts.gram_schmidt(earlier, drawn))
  for layer in range(2):
    expected = single_projections(earlier[layer], drawn[layer])
    np.testing.assert_allclose(fresh[layer], expected, atol=2e-6)
    assert np.abs(fresh[layer] @ earlier[layer].T).max() > 0.01  # not off their span


def test_new_slots_are_orthonormal_to_each_other_and_to_orthogonal_ones():
  first = prompts.gram_schmidt(np.zeros((1, 30, 64), np.float32), normal(1, 30, 64))
  longer = 3 * first  # what counts is that they are orthogonal
  second = prompts.gram_schmidt(longer, normal(1, 30, 64, seed=1))
  both = np.concatenate([first[0], second[0]])
  np.testing.assert_allclose(both @ both.T, np.eye(60), atol=1e-5)


def test_the_penalty_is_the_mean_distance_of_used_slots_from_orthonormal_ones():
  vectors = normal(2, 6, 8)
  found = prompts.orthogonality(vectors, jnp.arange(6) < 4)
  used = vectors[:, :4].astype(np.float64)
  expected = sum(((x @ x.T - np.eye(4)) ** 2).mean() for x in used)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("function", "shapes"),
  [
    (prompts.similarity, [(3, 8), (5, 8)]),
    (prompts.attended_similarity, [(3, 8), (2, 5, 8), (2, 5, 8)]),
    (prompts.mix, [(3, 2, 5), (2, 5, 4, 8)]),
    (prompts.gram_schmidt, [(2, 6, 8), (2, 3, 8)]),
    (lambda x: prompts.orthogonality(x, jnp.ones(6, bool)), [(2, 6, 8)]),
  ],
)
def test_products_are_in_full_precision_whatever_the_default(function, shapes):
  with jax.default_matmul_precision("bfloat16"):
    program = str(jax.make_jaxpr(function)(*[normal(*shape) for shape in shapes]))
  products = program.count("dot_general[")
  assert products > 0
  assert program.count("Precision.HIGHEST, Precision.HIGHEST") == products
