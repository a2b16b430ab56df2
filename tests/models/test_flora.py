"""F-LoRA and the meta-prompt as Flax modules: their collections, and what they return."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax.models import low_rank
from fmlora_jax.models.flora import FLoRA
from fmlora_jax.models.meta_prompt import MetaPrompt
from fmlora_jax.models.rank_selector import rank_masks
from fmlora_jax.types import Sizes

SIZES = Sizes(image_size=16, patch_size=8, width=16, depth=2, num_heads=2)
FLORA = FLoRA(targets=("query", "fc1"), sizes=SIZES, max_rank=4, num_tasks=3)


@pytest.fixture
def collections():
  """Of a task in training at rank 4: N is random."""
  made = FLORA.init({}, 4, jax.random.key(0))
  keys = jax.random.split(jax.random.key(1))
  for key, core in zip(keys, made["cur"]["core"].values(), strict=True):
    core["n"] = jax.random.normal(key, core["n"].shape)
  return made


def dense(deltas):
  return {name: np.asarray(low_rank.dense(delta)) for name, delta in deltas.items()}


def assert_equal(one, two, tolerance=1e-5):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), one, two)


def test_collections_are_the_groups_and_a_new_core_changes_nothing():
  deltas, made = FLORA.init_with_output({}, 2, jax.random.key(0))
  shapes = jax.tree.map(jnp.shape, made)
  assert shapes["shared"]["bases"]["fc1"] == {"a": (2, 16, 4), "b": (2, 64, 4)}
  assert shapes["cur"]["core"]["query"] == {"m": (2, 2, 2), "n": (2, 2, 2)}
  assert shapes["mem"]["cores"] == dict.fromkeys(("query", "fc1"), (3, 2, 4, 4))
  assert deltas["fc1"].a.shape == (2, 16, 2)
  assert not any(change.any() for change in dense(deltas).values())


def test_a_mask_of_the_whole_rank_masks_nothing_and_a_small_one_is_the_small_core(collections):
  masks = rank_masks((2, 4), 4)
  whole = FLORA.apply(collections)
  assert_equal(dense(FLORA.apply(collections, masks[1], method="masked")), dense(whole), 1e-6)
  small = jax.tree.map(lambda leaf: leaf[:, :2, :2], collections["cur"])
  expected = FLORA.apply(collections | {"cur": small})
  assert_equal(dense(FLORA.apply(collections, masks[0], method="masked")), dense(expected), 1e-6)


@pytest.mark.parametrize("orthonormalise", [True, False])
def test_a_committed_task_is_the_past(collections, orthonormalise):
  before = dense(FLORA.apply(collections))
  _, changed = FLORA.apply(
    collections, 0, orthonormalise, method="commit", mutable=["shared", "mem"]
  )
  after = collections | changed
  assert_equal(dense(FLORA.apply(after, method="past")), before, 1e-4)
  bases = after["shared"]["bases"]["query"]
  grams = np.einsum("ldr,lds->lrs", bases["a"], bases["a"])
  assert np.allclose(grams, np.eye(4), atol=1e-5) == orthonormalise
  for inner in FLORA.apply(after, method="interference").values():
    np.testing.assert_allclose(low_rank.cosine(inner), np.diag([1.0, 0, 0]), atol=1e-5)


def test_the_prompt_is_the_collection_shared():
  prompt = MetaPrompt(num_tokens=5, width=16)
  tokens, made = prompt.init_with_output({}, jax.random.key(0))
  np.testing.assert_array_equal(made["shared"]["prompt"], tokens)
  assert tokens.shape == (5, 16) and 0.01 < np.std(tokens) < 0.03
