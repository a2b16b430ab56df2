import jax.numpy as jnp
import pytest

from fmlora_jax.train import labels as rules

TREE = {
  "shared": {"bases": {"query": {"a": jnp.ones(2), "b": jnp.zeros(3)}}, "prompt": jnp.ones(1)},
  "cur": {"head": {"kernel": jnp.ones(4)}},
}
TABLE = (("shared/bases/.*", "frozen"), ("shared/prompt", "prompt"), ("cur/.*", "head"))


def test_each_leaf_gets_the_label_of_its_rule():
  assert rules.label_leaves(TREE, TABLE) == {
    "shared": {"bases": {"query": {"a": "frozen", "b": "frozen"}}, "prompt": "prompt"},
    "cur": {"head": {"kernel": "head"}},
  }


def test_the_first_rule_that_matches_counts():
  labels = rules.label_leaves(TREE, (("shared/bases/query/a", "adapter"), *TABLE))
  assert labels["shared"]["bases"]["query"] == {"a": "adapter", "b": "frozen"}


def test_a_leaf_without_a_rule_is_refused_by_name():
  with pytest.raises(ValueError, match="no rule matches leaf 'shared/prompt'"):
    rules.label_leaves(TREE, (TABLE[0], TABLE[2]))


def test_a_pattern_must_match_the_whole_path():
  with pytest.raises(ValueError, match="no rule matches leaf 'cur/head/kernel'"):
    rules.label_leaves(TREE, (*TABLE[:2], ("cur/head", "head")))


def test_a_rule_without_a_leaf_is_refused_by_pattern():
  with pytest.raises(ValueError, match="match no leaf: .'cur/lora/"):
    rules.label_leaves(TREE, (*TABLE, ("cur/lora/.*", "adapter")))


def test_a_rule_that_others_shadow_is_refused():
  with pytest.raises(ValueError, match="match no leaf: .'cur/head/kernel'"):
    rules.label_leaves(TREE, (*TABLE, ("cur/head/kernel", "adapter")))


def test_partition_splits_by_label_and_combine_undoes_it():
  labels = rules.label_leaves(TREE, TABLE)
  trained, frozen = rules.partition(TREE, labels)
  assert trained["shared"]["bases"]["query"] == {"a": None, "b": None}
  assert trained["shared"]["prompt"] is TREE["shared"]["prompt"]
  assert frozen["shared"]["prompt"] is None and frozen["cur"]["head"]["kernel"] is None
  whole = rules.combine(trained, frozen)
  assert whole["shared"]["bases"]["query"]["a"] is TREE["shared"]["bases"]["query"]["a"]
  assert whole["cur"]["head"]["kernel"] is TREE["cur"]["head"]["kernel"]
