"""C-LoRA's penalty and its sum of the past, against NumPy."""

import jax
import numpy as np
import pytest

from fmlora_jax.config import ConfigError

RANK = {"rank": 3}


def change_of(factors):
  """A·Bᵀ of each layer, float64."""
  a, b = (np.asarray(factors[name], np.float64) for name in "ab")
  return np.einsum("lir,lor->lio", a, b)


def penalty_of(made, variables, view):
  frozen = made.method.freeze(made.weights, variables)

  def penalty(cur):
    now = variables.replace(frozen=frozen, cur=cur)
    return made.method.apply(now, made.images(), view.arrays, view.key("method")).penalty

  return jax.jit(jax.value_and_grad(penalty))(variables.cur)


@pytest.fixture
def learned(lab):
  return lab("c_lora", method=RANK | {"penalty_weight": 2.0})


def test_the_penalty_is_the_sum_of_squared_products_of_old_and_new_changes(learned):
  for stage in learned.stages[1:]:
    value, grads = penalty_of(learned, stage.trained, stage.view)
    expected = 0.0
    for name, factors in stage.trained.cur["lora"].items():
      old = np.asarray(stage.trained.mem["merged"][name], np.float64)
      new = change_of(factors)
      expected += 2.0 * np.sum((old * new) ** 2)
      toward = 4.0 * old**2 * new
      a, b = (np.asarray(factors[side], np.float64) for side in "ab")
      got = grads["lora"][name]
      scale = np.abs(got["a"]).max()
      assert scale > 0
      np.testing.assert_allclose(got["a"], toward @ b, rtol=1e-4, atol=1e-5 * scale)
      toward = np.swapaxes(toward, 1, 2)
      np.testing.assert_allclose(got["b"], toward @ a, rtol=1e-4, atol=1e-5 * scale)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert stage.facts["penalty"] == pytest.approx(expected, rel=1e-5) and expected > 0


def test_the_penalty_is_zero_in_the_first_task_and_at_each_start(learned):
  first = learned.stages[0]
  cases = [(first.trained, first)] + [(stage.begun, stage) for stage in learned.stages]
  for variables, stage in cases:
    value, grads = penalty_of(learned, variables, stage.view)
    assert value == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads["lora"]))
  assert first.facts["penalty"] == 0


def test_the_kept_change_is_the_sum_over_tasks(learned):
  for name in ("key", "value"):
    total = 0.0
    for stage in learned.stages:
      np.testing.assert_allclose(stage.begun.mem["merged"][name], total, atol=1e-5)
      assert stage.trained.mem["merged"][name] is stage.begun.mem["merged"][name]
      total = total + change_of(stage.trained.cur["lora"][name])
    np.testing.assert_allclose(learned.variables.mem["merged"][name], total, rtol=1e-4, atol=1e-5)


def test_key_and_value_change_and_no_other_weight(learned, changed):
  folded = learned.method.fold(learned.weights, learned.variables)["backbone"]
  assert changed(learned.weights, folded) == {
    f"block_{layer}/attention/{name}/dense/kernel"
    for layer in range(2)
    for name in ("key", "value")
  }


def test_a_large_weight_keeps_new_changes_off_the_old_ones(lab):
  def overlap(weight):
    """Weighted by where the old changes are, whatever the length of the new ones: 1 by chance."""
    made = lab("c_lora", method=RANK | {"penalty_weight": weight}, epochs=6)
    stage, total = made.stages[1], 0.0
    for name, factors in stage.trained.cur["lora"].items():
      old, new = np.asarray(stage.trained.mem["merged"][name]), change_of(factors)
      total += np.sum((old * new) ** 2) / np.sum(new**2) / np.mean(old**2)
    return total / 2

  assert overlap(1e4) < 0.5 * overlap(0.0)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rank": 0}, r"config\.method\.rank is 0: must be >= 1"),
    ({"rank": 17}, r"config\.method\.rank is 17: must be at most 16, .* 'key'"),
    ({"targets": ("key", "key")}, r"config\.method\.targets is .*: must be at least one .* once"),
    ({"targets": ()}, r"config\.method\.targets is \(\): must be at least one projection"),
    ({"penalty_weight": -1.0}, r"config\.method\.penalty_weight is -1\.0: must be >= 0"),
  ],
)
def test_settings_that_cannot_be_are_refused_by_field(make_lab, changes, message):
  with pytest.raises(ConfigError, match=message):
    make_lab(method={"name": "c_lora", "rank": 3} | changes)
