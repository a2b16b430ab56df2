"""The accuracy matrix is what counting by hand gives, to the last image."""

from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax.input import resident, streaming
from fmlora_jax.methods.common.base import AdaptedViT
from fmlora_jax.train import metrics
from fmlora_jax.train.evaluator import Evaluator, allowed_classes, iterate_batches
from fmlora_jax.types import Batch, Examples, SequenceSpec

CLASSES, TASKS = 12, 4
SIZES = (7, 1, 9, 6)  # of the test sets: no batch of several is full


def logits_of(model, images):
  """The class that an image shows in its first pixel, or a constant one, or random ones."""
  shown = images[:, 0, 0, 0].astype(jnp.int32)
  if "constant" in model:
    shown = jnp.full_like(shown, model["constant"])
  one_hot = jnp.zeros((len(shown), CLASSES)).at[jnp.arange(len(shown)), shown].set(1.0)
  return model["noise"][images[:, 0, 0, 1].astype(jnp.int32)] if "noise" in model else one_hot


def center(examples, rows):
  images = examples.images[rows].astype(jnp.float32)
  return Batch(images=images, labels=examples.labels[rows], valid=examples.valid[rows])


@pytest.fixture(scope="module")
def tests():
  """Labels, and images whose first pixel shows label and number; task i has classes 3i..3i+2."""
  rng = np.random.default_rng(0)
  owner = np.repeat(np.arange(TASKS), SIZES)
  labels = (3 * owner + rng.integers(0, 3, len(owner))).astype(np.int32)
  images = np.zeros((len(owner), 2, 2, 3), np.uint8)
  images[:, 0, 0, 0], images[:, 0, 0, 1] = labels, np.arange(len(owner))
  return owner, labels, images


def counted(tests, model, learned, batch_size, hosts=1, scenario="cil"):
  """Returns right answers on each test set, as a run counts them, on one or several hosts."""
  _, labels, images = tests
  ranges = tuple((3 * i, 3 * i + 3) for i in range(TASKS))
  masks = allowed_classes(
    SequenceSpec(scenario=scenario, num_tasks=TASKS, num_classes=CLASSES, class_ranges=ranges),
    learned,
  )
  share = [resident.ProcessShard(i, hosts) for i in range(hosts)]

  def read(blocks):
    for rows in blocks:
      parts = []
      for own in share:  # each host has its rows of the batch
        part = rows[own.rows(len(rows))]
        parts.append((images[part], labels[part], part >= 0))
      pixels, truth, valid = (np.concatenate(x) for x in zip(*parts, strict=True))
      sizes = np.full((len(rows), 2), 2, np.int32)
      yield Examples(images=pixels, sizes=sizes, labels=truth, valid=valid), rows

  evaluator = Evaluator(mock.Mock(AdaptedViT, predict=logits_of), center)
  batches = iterate_batches(read, SIZES[: learned + 1], batch_size, lambda rows: rows)
  return evaluator.correct(model, batches, masks)


def by_hand(tests, model, learned, scenario):
  """Counts image by image."""
  owner, labels, images = tests
  right = [0] * TASKS
  for i in range(sum(SIZES[: learned + 1])):
    own, so_far = range(3 * owner[i], 3 * owner[i] + 3), range(3 * (learned + 1))
    candidates = own if scenario == "til" else so_far
    if "noise" in model:
      answer = max(candidates, key=model["noise"][i].tolist().__getitem__)
    else:
      shown = model.get("constant", int(images[i, 0, 0, 0]))
      answer = shown if shown in candidates else candidates[0]  # all are equal: the first
    right[owner[i]] += answer == labels[i]
  return right


@pytest.mark.parametrize("scenario", ["cil", "til"])
def test_counts_are_those_of_counting_by_hand(tests, scenario):
  noise = jnp.asarray(np.random.default_rng(1).normal(size=(sum(SIZES), CLASSES)))
  models = [{}, {"constant": 4}, {"noise": noise}]
  cells = 0
  for model in models:
    for learned in range(TASKS):
      expected = by_hand(tests, model, learned, scenario)
      for batch_size, hosts in ((1, 1), (4, 1), (4, 2), (6, 2), (8, 1), (32, 1)):
        got = counted(tests, model, learned, batch_size, hosts, scenario)
        assert got.tolist() == expected, (model, learned, batch_size, hosts)
        cells += learned + 1
  print(f"{scenario}: {cells} cells of the accuracy matrix equal to counts by hand")


def matrix(tests, model):
  correct = np.stack([counted(tests, model, learned, 4) for learned in range(TASKS)])
  return metrics.summarise(correct, np.asarray(SIZES))


def test_an_oracle_has_100_and_a_constant_the_share_of_its_class(tests):
  oracle = matrix(tests, {})
  assert oracle["acc"] == oracle["aaa"] == 100.0 and oracle["forgetting"] == 0.0
  _, labels, _ = tests
  most = int(np.argmax(np.bincount(labels)))
  constant = matrix(tests, {"constant": most})
  assert constant["acc"] == 100 * np.sum(labels == most) / len(labels) > 0
  print(f"oracle {oracle['acc']}, constant {constant['acc']:.2f}, the share of its class")


def test_hosts_read_each_image_once(make_lab):
  """Two hosts' shares of streamed test images are the batches of one."""
  made = make_lab(method={"name": "linear_probe"})
  indices = np.concatenate([task.test for task in made.sequence.tasks])
  rows = [np.arange(8), np.arange(8, 16)]

  def read(share):
    place = {"put": lambda examples: examples, "shard": share}
    streamed = streaming.StreamingReader(sequence=made.sequence, indices=indices, **place)
    return [examples for examples, _ in streamed.read(rows)]

  whole, *halves = (read(resident.ProcessShard(*share)) for share in ((0, 1), (0, 2), (1, 2)))
  for i, examples in enumerate(whole):
    joined = np.concatenate([half[i].images for half in halves])
    np.testing.assert_array_equal(joined, examples.images)
