import jax
import numpy as np

from fmlora_jax.train.rng import named_key

ROOT = jax.random.key(3)


def data(*arguments, **keywords):
  return tuple(np.asarray(jax.random.key_data(named_key(*arguments, **keywords))).tolist())


def test_keys_differ_by_root_name_task_and_step():
  keys = {
    data(jax.random.key(seed), name, task=task, step=step)
    for seed in (0, 1) for name in ("augment", "init") for task in (0, 1) for step in (0, 1)
  }  # fmt: skip
  assert len(keys) == 16


def test_a_key_is_the_same_each_time_and_inside_a_compiled_program():
  expected = data(ROOT, "augment", task=2, step=5)
  assert data(ROOT, "augment", task=2, step=5) == expected
  inside = jax.jit(lambda task, step: named_key(ROOT, "augment", task=task, step=step))(2, 5)
  assert tuple(np.asarray(jax.random.key_data(inside)).tolist()) == expected


def test_a_key_never_changes_between_versions():
  """It ties a seed to its numbers: published results rest on it."""
  assert data(jax.random.key(0), "init", task=0) == (381140538, 875988099)
