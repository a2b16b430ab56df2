"""Letters, their training, and the file that ships."""

import json
import pathlib
import runpy
import string

import chex
import jax
import numpy as np
import pytest

import fmlora_jax
from fmlora_jax import config
from fmlora_jax.models import vit
from fmlora_jax.models.weights import files as weight_files
from fmlora_jax.models.weights import layouts
from fmlora_jax.pretrain import letters, training
from fmlora_jax.types import Sizes

ROOT = pathlib.Path(__file__).parents[2]
SHIPPED = (
  pathlib.Path(fmlora_jax.__file__).parent / "models" / "weights" / "micro_letters.safetensors"
)
TINY = vit.make_vit(Sizes(image_size=32, patch_size=8, width=16, depth=1, num_heads=2))
DRAW = {"faces": letters.FACES, "seed": (3,), "coarse": 0.5, "quarter_turns": 0.2}


def recipe(**changes):
  """Returns the recipe of configs/pretrain_letters.py, tiny, with fields changed."""
  values = runpy.run_path(str(ROOT / "configs" / "pretrain_letters.py"))["get_config"]().to_dict()
  tiny = {"pool": 64, "num_val": 20, "steps": 2, "warmup_steps": 1, "batch_size": 16}
  return config.build(training.Recipe, values | tiny | changes)


def shapes(backbone):
  """Returns the shape of each leaf by its path."""
  params = jax.eval_shape(backbone.init, jax.random.key(0))
  return {name: leaf.shape for name, leaf in layouts.flatten(params).items()}


def test_classes_are_the_letters_each_once_and_no_digit():
  assert sorted("".join(letters.CLASSES)) == sorted(string.ascii_letters)


def test_a_pool_depends_on_its_seed_only_and_starts_with_a_shorter_one():
  images, labels = letters.pool(40, **DRAW)
  shorter, _ = letters.pool(10, **DRAW)
  other, _ = letters.pool(10, **DRAW | {"seed": (4,)})
  np.testing.assert_array_equal(images[:10], shorter)
  assert (images[:10] != other).any(axis=(1, 2)).all()
  assert images.shape == (40, 32, 32) and images.dtype == np.uint8
  assert labels.min() >= 0 and labels.max() < len(letters.CLASSES)


def test_no_image_is_empty_and_letters_are_bright_on_black():
  images, _ = letters.pool(500, **DRAW)
  assert images.max(axis=(1, 2)).min() > 40
  assert np.median(images[:, [0, 0, -1, -1], [0, -1, 0, -1]]) == 0


@pytest.mark.parametrize("face", letters.FACES)
def test_a_face_has_every_letter(face):
  drawn = {letters._glyph(face, letter, 0).tobytes() for letter in string.ascii_letters}
  assert len(drawn) >= 50  # a missing letter would look like all others; l may equal I


def test_splits_share_no_face(monkeypatch):
  seen = {}

  def pool(count, *, faces, **_):
    seen[count] = faces
    return np.zeros((0, 32, 32), np.uint8), np.zeros(0, np.int32)

  monkeypatch.setattr(letters, "pool", pool)
  for split in ("train", "val"):
    training.render(recipe(), split)
  assert set(seen[64]).isdisjoint(seen[20]) and {*seen[64], *seen[20]} == set(letters.FACES)


def test_augmented_images_stay_in_range_and_some_are_inverted():
  grey, _ = letters.pool(64, **DRAW)
  images = training.augment(jax.device_put(grey), jax.random.key(0), 0.5)
  assert images.shape == (64, 32, 32, 3) and np.abs(images).max() <= 1
  corner = np.asarray(images[:, 0, 0, 0])
  assert 16 <= np.sum(corner > 0) <= 48


def test_training_lowers_the_loss_of_one_batch():
  chosen = recipe(inverted=0.0, steps=30, learning_rate=1e-2, label_smoothing=0.0)
  grey, labels = training.render(chosen, "train")
  optimizer, key = training.make_optimizer(chosen), jax.random.key(0)
  state = training.init(TINY, optimizer, key)
  step = training.make_step(TINY, optimizer, chosen)
  losses = []
  for _ in range(10):
    *state, loss = step(*state, grey, labels, key)
    losses.append(float(loss))
  assert losses[0] == pytest.approx(np.log(len(letters.CLASSES)), rel=1e-4)  # the head starts at 0
  assert losses[-1] < 0.97 * losses[0]


def test_two_runs_write_the_same_numbers_and_the_leaves_of_the_vit_only(tmp_path):
  files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
  for file in files:
    params, accuracy = training.train(recipe(), TINY)
    training.save(params, file, recipe(), accuracy)
  (leaves, metadata), (again, _) = (weight_files.read(file, file.name) for file in files)
  chex.assert_trees_all_equal(leaves, again)
  assert {name: leaf.shape for name, leaf in leaves.items()} == shapes(TINY)
  assert 0 <= float(metadata["val_accuracy"]) <= 1
  assert json.loads(metadata["recipe"])["steps"] == 2


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"batch_size": 0}, "config.batch_size is 0: must be at least 1"),
    ({"coarse": 1.5}, r"config.coarse is 1.5: must be in \[0, 1\]"),
    ({"warmup_steps": 2}, r"config.warmup_steps is 2: must be in \[0, steps\)"),
    ({"val_faces": ("Arial",)}, r"config.val_faces is \('Arial',\): must be some"),
    ({"val_faces": letters.FACES}, "must be some, not all, of"),
    ({"val_faces": ()}, "must be some, not all, of"),
    ({"architecture": "vit_b16"}, "config.architecture is 'vit_b16': must be for 32 pixels"),
    ({"fonts": 3}, "config.fonts is not a field"),
  ],
)
def test_a_wrong_field_is_named(changes, message):
  with pytest.raises(config.ConfigError, match=message):
    recipe(**changes)


def test_the_shipped_file_is_small_and_has_the_leaves_of_the_micro_vit():
  leaves, metadata = weight_files.read(SHIPPED, SHIPPED.name)
  assert SHIPPED.stat().st_size <= 3_000_000
  assert {name: leaf.shape for name, leaf in leaves.items()} == shapes(
    vit.make_vit(vit.architecture("micro"))
  )
  assert metadata["architecture"] == "micro" and metadata["normalisation"] == "half"
  assert json.loads(metadata["recipe"])["val_faces"]
  assert str(ROOT) not in json.dumps(metadata)
