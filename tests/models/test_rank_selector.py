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


def costs_of(losses, price=0.3):
  return rank_selector.selection_costs(
    jnp.asarray(losses), candidates=RANKS, max_rank=8, price=price, num_classes=5
  )


def test_the_price_of_rank_falls_with_complexity():
  for losses in (np.array([0.3, 0.2, 0.1]), np.array([1.5, 1.4, 1.6])):
    hardness = losses.mean() / np.log(5)
    expected = losses + 0.3 / hardness * np.array(RANKS) / 8  # a share of r_max
    np.testing.assert_allclose(costs_of(losses), expected, rtol=1e-5)
  assert np.isfinite(costs_of(np.zeros(3))).all()


def select(costs, key):
  alpha = rank_selector.learn_alpha(jnp.zeros(3), costs, key, tau=1.0, steps=300, learning_rate=1.0)
  return jnp.argmax(alpha)


@pytest.mark.parametrize("best", range(len(RANKS)))
def test_the_cheapest_candidate_is_found_however_small_its_lead(best):
  """For a hundred sequences of draws."""
  costs = 0.5 - 0.002 * jnp.eye(3)[best]
  keys = jax.random.split(jax.random.key(0), 100)
  assert (np.asarray(jax.vmap(lambda key: select(costs, key))(keys)) == best).all()


def test_a_larger_validation_loss_never_lowers_the_selected_rank():
  """With everything else equal: what each rank gains is kept while the loss is raised."""
  levels = np.linspace(0.35, 4.0, 20, dtype=np.float32)
  gains = np.random.default_rng(0).uniform(-0.3, 0.3, (40, 3)).astype(np.float32)
  gains = np.sort(gains, axis=1)[:, ::-1]  # more rank, less loss
  costs = jax.vmap(jax.vmap(costs_of))(levels[None, :, None] + gains[:, None, :])
  keys = jax.random.split(jax.random.key(1), len(gains))
  chosen = jax.jit(jax.vmap(jax.vmap(select, in_axes=(0, None))))(costs, keys)
  assert (np.diff(chosen, axis=1) >= 0).all()
  assert (chosen[:, 0] < chosen[:, -1]).mean() > 0.3  # and often it rises
  margin = np.diff(np.sort(costs, axis=-1)[..., :2], axis=-1)[..., 0]
  clear = margin > 0.02
  assert clear.mean() > 0.7
  np.testing.assert_array_equal(chosen[clear], np.argmin(costs, axis=-1)[clear])


def test_the_selector_draws_masks_and_chooses_the_likeliest_candidate():
  selector = rank_selector.RankSelector(RANKS, 8, tau=0.7)
  state, key = {"cur": {"alpha": jnp.array([0.2, 1.5, 0.1])}}, jax.random.key(2)
  drawn = rank_selector.gumbel_one_hot(state["cur"]["alpha"], key, 0.7)
  expected = rank_selector.rank_masks(RANKS, 8)[jnp.argmax(drawn)]
  np.testing.assert_allclose(selector.apply(state, key), expected, atol=1e-6)
  assert int(selector.apply(state, method="choice")) == 1
  np.testing.assert_allclose(
    selector.apply(state, method="probabilities"), jax.nn.softmax(state["cur"]["alpha"])
  )
  fresh = selector.init({}, method="probabilities")
  costs, descent = jnp.array([0.5, 0.4, 0.6]), {"steps": 20, "learning_rate": 1.0}
  _, learned = selector.apply(fresh, costs, key, **descent, method="learn", mutable="cur")
  by_function = rank_selector.learn_alpha(jnp.zeros(3), costs, key, tau=0.7, **descent)
  np.testing.assert_array_equal(learned["cur"]["alpha"], by_function)
