"""Labels of leaves from a method's rules: every leaf has a rule, and every rule a leaf."""

import re

import jax

from fmlora_jax.types import Params, Rules


def label_leaves(tree: Params, rules: Rules) -> Params:
  """Returns one label per leaf, from the first rule whose pattern matches the leaf's whole path.

  Raises:
    ValueError: if a leaf has no rule or a rule no leaf.
  """
  used = set()

  def label(path, leaf):
    del leaf
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for pattern, value in rules:
      if re.fullmatch(pattern, name):
        used.add(pattern)
        return value
    raise ValueError(f"no rule matches leaf {name!r}; rules are {[p for p, _ in rules]}")

  labels = jax.tree.map_with_path(label, tree)
  if unused := [pattern for pattern, _ in rules if pattern not in used]:
    raise ValueError(f"rules that match no leaf: {unused}")
  return labels


def partition(tree: Params, labels: Params) -> tuple[Params, Params]:
  """Returns (trained, frozen): each has None where the other has the leaf."""
  trained = jax.tree.map(lambda leaf, label: None if label == "frozen" else leaf, tree, labels)
  frozen = jax.tree.map(lambda leaf, label: leaf if label == "frozen" else None, tree, labels)
  return trained, frozen


def num_trained(tree: Params, rules: Rules) -> int:
  """Returns how many numbers of a pytree of arrays, or of their shapes, train."""
  trained, _ = partition(tree, label_leaves(tree, rules))
  return sum(leaf.size for leaf in jax.tree.leaves(trained))


def combine(trained: Params, frozen: Params) -> Params:
  """Inverse of `partition`."""
  return jax.tree.map(
    lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda leaf: leaf is None
  )
