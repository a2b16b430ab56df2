import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax.models import rank_selector

RANKS = (1, 2, 4)
ALPHAS = ((0.0, 0.0, 0.0), (1.0, -0.5, 0.3), (4.0, 0.0, -4.0))


def test_masks_are_nested_and_have_the_candidates_as_sums():
  masks = np.asarray(rank_selector.rank_masks((1, 3, 4), 5))
  np.testing.assert_array_equal(masks, [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("tau", [0.05, 1.0, 20.0])
def test_gumbel_draws_follow_the_softmax_of_alpha_at_any_temperature(alpha, tau):
  count = 20_000
  keys = jax.random.split(jax.random.key(3), count)
  draws = jax.vmap(lambda key: rank_selector.gumbel_one_hot(jnp.array(alpha), key, tau))(keys)
  np.testing.assert_allclose(np.sort(draws, axis=-1), np.tile([0, 0, 1], (count, 1)), atol=1e-6)
  wanted = np.asarray(jax.nn.softmax(jnp.array(alpha)))
  deviation = np.sqrt(wanted * (1 - wanted) / count)
  assert (np.abs(np.mean(draws, axis=0) - wanted) < 4 * deviation + 1e-6).all()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("tau", [0.3, 1.0, 20.0])
def test_gradients_of_a_draw_are_finite_and_not_zero(alpha, tau):
  costs = jnp.array([3.0, -1.0, 0.5])
  keys = jax.random.split(jax.random.key(0), 200)

  def cost(alpha, key):
    return rank_selector.gumbel_one_hot(alpha, key, tau) @ costs

  grads = jax.vmap(jax.grad(cost), in_axes=(None, 0))(jnp.array(alpha), keys)
  assert np.isfinite(grads).all()
  assert (np.abs(grads).max(axis=-1) > 0).all()
  np.testing.assert_allclose(np.sum(grads, axis=-1), 0, atol=1e-4)  # as of any softmax


def test_the_gradient_of_a_draw_is_that_of_the_soft_sample():
  alpha, tau, key = jnp.array([0.2, -0.3, 0.5]), 0.7, jax.random.key(5)
  costs = jnp.array([3.0, -1.0, 0.5])
  noise = jax.random.gumbel(key, alpha.shape)
  got = jax.grad(lambda a: rank_selector.gumbel_one_hot(a, key, tau) @ costs)(alpha)
  expected = jax.grad(lambda a: jax.nn.softmax((a + noise) / tau) @ costs)(alpha)
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  assert np.abs(expected).max() > 0.01


def test_a_masked_core_is_that_of_the_leading_columns():
  m, n = (jnp.asarray(np.random.default_rng(i).normal(size=(2, 4, 4)), jnp.float32) for i in (0, 1))
  mask = rank_selector.rank_masks((2,), 4)[0]
  got = np.asarray(rank_selector.mask_core(m, n, mask))
  expected = np.zeros((2, 4, 4))
  expected[:, :2, :2] = m[:, :2, :2] @ np.swapaxes(n[:, :2, :2], -1, -2)
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_masked_out_entries_get_no_gradient():
  m, n = jnp.ones((1, 4, 4)), jnp.ones((1, 4, 4))
  mask = rank_selector.rank_masks((2,), 4)[0]
  grads = jax.grad(lambda mn: jnp.sum(rank_selector.mask_core(*mn, mask)))((m, n))
  for grad in grads:
    assert (np.asarray(grad)[:, :2, :2] != 0).all()
    assert not np.asarray(grad)[:, 2:].any() and not np.asarray(grad)[:, :, 2:].any()


def test_complexity_is_one_for_guessing():
  for num_classes in (2, 5, 100):
    guess = jnp.log(num_classes)
    np.testing.assert_allclose(rank_selector.complexity(guess, num_classes), 1.0, rtol=1e-6)
  assert np.isfinite(rank_selector.complexity(jnp.float32(0.1), 1))  # log 1 = 0


def test_the_share_of_rank_compares_a_task_with_those_before_it():
  share = functools.partial(rank_selector.rank_share, reference=0.5)
  np.testing.assert_allclose(share(0.5, []), 0.5)  # no task before: the reference
  np.testing.assert_allclose(share(0.3, [0.1, 0.2]), 0.3)  # easy ones: the reference
  np.testing.assert_allclose(share(0.9, [0.8, 1.0]), 0.5, rtol=1e-6)  # as hard as usual
  np.testing.assert_allclose(share(0.3, [0.8, 1.0]), 1 / 6, rtol=1e-6)
  assert share(3.0, [0.8, 1.0]) == 1


def test_without_evidence_the_candidate_next_to_the_share_is_the_likeliest():
  candidates = (4, 8, 16, 32)
  for share in np.linspace(0, 1, 60):
    logits = rank_selector.difficulty_logits(jnp.float32(share), candidates, 32, 20.0)
    nearest = np.argmin(np.abs(np.array(candidates) / 32 - share))
    assert int(jnp.argmax(logits)) == nearest
    x = np.array(candidates) / 32
    density = -20.0 * (x - share) ** 2  # of a normal distribution, up to a constant
    apart = np.asarray(logits) - density
    np.testing.assert_allclose(apart, np.full(4, apart[0]), atol=1e-5)


def test_a_gain_within_its_noise_is_none_and_a_clear_one_is_kept_less_the_noise():
  rng = np.random.default_rng(0)
  first = rng.normal(1.0, 1.0, (100, 1))
  noisy = first + rng.normal(0.0, 1.0, (100, 1)) * 0.1  # differs by chance
  better = first - 0.5 + rng.normal(0.0, 1.0, (100, 1)) * 0.1
  losses = np.concatenate([first, noisy, better], axis=1).astype(np.float32)
  apart = losses - losses[:, :1]
  error = apart.std(0) / 10
  got = np.asarray(rank_selector.significant_gains(losses, 4.0))
  assert got[0] == got[1] == 0
  np.testing.assert_allclose(got[2], apart[:, 2].mean() + 4.0 * error[2], rtol=1e-5)
  plain = rank_selector.significant_gains(losses, 0.0)
  np.testing.assert_allclose(plain, apart.mean(0), rtol=1e-5, atol=1e-7)


def select(costs, key):
  alpha = rank_selector.learn_alpha(jnp.zeros(3), costs, key, tau=1.0, steps=300, learning_rate=1.0)
  return jnp.argmax(alpha)


@pytest.mark.parametrize("best", range(len(RANKS)))
def test_the_cheapest_candidate_is_found_however_small_its_lead(best):
  """For a hundred sequences of draws."""
  costs = 0.5 - 0.002 * jnp.eye(3)[best]
  keys = jax.random.split(jax.random.key(0), 100)
  assert (np.asarray(jax.vmap(lambda key: select(costs, key))(keys)) == best).all()


@pytest.mark.parametrize("size", [0.0, 0.02, 0.3])
def test_a_harder_task_never_gets_a_smaller_rank(size):
  """For the same alpha, which may say anything; and without gains ranks rise with complexity."""
  candidates, alphas = (4, 8, 16, 32), jax.random.normal(jax.random.key(1), (40, 4)) * size * 50
  levels = jnp.linspace(0.02, 1.5, 30)

  def choose(alpha, complexity):
    share = rank_selector.rank_share(complexity, [0.2, 0.4], 0.5)
    difficulty = rank_selector.difficulty_logits(share, candidates, 32, 20.0)
    selector, state = rank_selector.RankSelector(candidates, 32), {"cur": {"alpha": alpha}}
    return jnp.argmax(selector.apply(state, difficulty, method="probabilities"))

  chosen = np.asarray(jax.vmap(lambda a: jax.vmap(lambda h: choose(a, h))(levels))(alphas))
  assert (np.diff(chosen, axis=1) >= 0).all()
  if size == 0:
    assert sorted(set(chosen.ravel().tolist())) == [0, 1, 2, 3]
  else:
    assert (chosen[:, 0] < chosen[:, -1]).mean() > 0.2


def test_the_selector_draws_masks_with_evidence_and_difficulty():
  selector = rank_selector.RankSelector(RANKS, 8, tau=0.7)
  alpha, difficulty = jnp.array([0.2, 1.5, 0.1]), jnp.array([0.0, -3.0, 0.5])
  state, key = {"cur": {"alpha": alpha}}, jax.random.key(2)
  drawn = rank_selector.gumbel_one_hot(alpha + difficulty, key, 0.7)
  expected = rank_selector.rank_masks(RANKS, 8)[jnp.argmax(drawn)]
  np.testing.assert_allclose(selector.apply(state, difficulty, key), expected, atol=1e-6)
  chances = selector.apply(state, difficulty, method="probabilities")
  np.testing.assert_allclose(chances, jax.nn.softmax(alpha + difficulty), rtol=1e-6)
  fresh = selector.init({}, difficulty, method="probabilities")
  costs, descent = jnp.array([0.5, 0.4, 0.6]), {"steps": 20, "learning_rate": 1.0}
  _, learned = selector.apply(fresh, costs, key, **descent, method="learn", mutable="cur")
  by_function = rank_selector.learn_alpha(jnp.zeros(3), costs, key, tau=0.7, **descent)
  np.testing.assert_array_equal(learned["cur"]["alpha"], by_function)
