"""What stops a run is named: the leaf that drifted, the array that is not finite."""

import re

import jax.numpy as jnp
import pytest

from fmlora_jax.experiment import guards
from fmlora_jax.types import FrozenError, NonFiniteError

RULES = (("cur/head", "head"), (".*", "frozen"))


def watched():
  """Returns (guard, weights a and b, params: shared c and d, and a head)."""
  weights = {"a": jnp.ones(2), "b": jnp.ones(2)}
  params = {"shared": {"c": jnp.ones(3), "d": jnp.ones(3)}, "cur": {"head": jnp.ones(2)}}
  frozen = guards.FrozenGuard(weights, lambda task: RULES)
  frozen.begin(0, params)
  return frozen, weights, params


def test_what_trains_may_change():
  frozen, _, params = watched()
  frozen.check(0, params | {"cur": {"head": jnp.zeros(2)}})


def test_the_first_leaf_that_drifted_is_named_and_the_others_counted():
  frozen, weights, params = watched()
  weights["b"] = jnp.zeros(2)
  with pytest.raises(FrozenError, match=r"^weights/b is frozen .* in task 3, .*\(1 of 4 frozen"):
    frozen.check(2, params)
  moved = params | {"shared": {"c": jnp.zeros(3), "d": jnp.zeros(3)}}
  with pytest.raises(FrozenError, match=r"^shared/c is frozen .* in task 1, .*\(3 of 4 frozen"):
    frozen.check(0, moved)


def test_a_leaf_that_came_or_went_is_named():
  frozen, _, params = watched()
  with pytest.raises(FrozenError, match=r"^shared/d .* to None"):
    frozen.check(0, params | {"shared": {"c": jnp.ones(3)}})
  with pytest.raises(FrozenError, match=r"^shared/e .* from None"):
    frozen.check(0, params | {"shared": params["shared"] | {"e": jnp.ones(1)}})


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_the_first_array_that_is_not_finite_is_named_and_the_others_counted(bad):
  arrays = {"c": jnp.full(2, bad), "a": jnp.ones(2), "b": jnp.ones(3).at[1].set(bad)}
  message = "b holds NaN or infinity at the end of step 7 (as do 1 other arrays): it is not saved"
  with pytest.raises(NonFiniteError, match="^" + re.escape(message)):
    guards.require_finite(arrays, "at the end of step 7")
  guards.require_finite({"a": arrays["a"]}, "at the end of step 7")
