"""Damaged or exchanged data are refused with file and record; no image is in two splits unseen."""

import itertools
import logging
import os
import shutil

import fakes
import numpy as np
import pytest

from fmlora_jax import tasks
from fmlora_jax.config import ConfigError, TasksConfig

CLASSES = 4
FILE = r"cifar100-(train|test)\.array_record-00000-of-00001"


def example(index, label, image=None, copy_of=None):
  seed = index if copy_of is None else copy_of
  image = image or fakes.encode(fakes.picture(label, seed, (32, 32)), "JPEG")
  return index, {"id": f"{index:05d}", "image": image, "label": label, "coarse_label": 0}


def train_examples(num=40):
  return [example(i, i % CLASSES) for i in range(num)]


def test_examples_of(num=16):
  return [example(1000 + i, i % CLASSES) for i in range(num)]


test_examples_of.__test__ = False


def write(root, train=None, test=None):
  splits = {"train": train or train_examples(), "test": test or test_examples_of()}
  fakes.write("cifar100", splits, root)
  return root


def look(root, **fields):
  """Looks at all there is and decodes it, as a run would."""
  settings = TasksConfig(benchmark="cifar100", num_tasks=2, data_dir=str(root), **fields)
  sequence = tasks.make(settings, seed=0, source_size=16)
  for task in sequence.tasks:
    for part in ("train", "val", "test"):
      sequence.source.decode(getattr(task, part))
  return sequence


def file_of(root, split):
  (path,) = root.glob(f"cifar100/*/cifar100-{split}.array_record*")
  return path


def unnoticed(path, change):
  """Changes a file's bytes, and leaves its size and time as they were, as failing disks do."""
  stat, content = path.stat(), bytearray(path.read_bytes())
  path.write_bytes(change(content))
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A folder with data that a run has looked at."""
  root = write(tmp_path_factory.mktemp("whole"))
  look(root)
  return root


def truncated(root, share=0.5):
  path = file_of(root, "train")
  content = path.read_bytes()
  path.write_bytes(content[: int(share * len(content))])


def flipped(root):
  def flip(content):
    content[len(content) // 2] ^= 4
    return content

  unnoticed(file_of(root, "train"), flip)


def exchanged(root):
  shutil.copyfile(file_of(root, "test"), file_of(root, "train"))


def rebuilt(**splits):
  def rebuild(root):
    for folder in root.glob("cifar100/*"):
      shutil.rmtree(folder)
    write(root, **splits)

  return rebuild


CUT = train_examples()[9][1]["image"]
CORRUPTIONS = {  # what is done to data that were looked at, and what the refusal says
  "a truncated file": (truncated, FILE),
  "a flipped bit": (flipped, rf"record \d+ of cifar100 train \({FILE}\)"),
  "empty records": (lambda root: truncated(root, 0.98), FILE),
  "a truncated JPEG": (
    rebuilt(train=[*train_examples(39), example(39, 3, CUT[: len(CUT) // 2])]),
    rf"record \d+ of cifar100 train \({FILE}\)",
  ),
  "a missing class": (
    rebuilt(test=[example(1000 + i, i % 3) for i in range(16)]),
    rf"record \d+ of cifar100 test \({FILE}\)",
  ),
  "one record more": (rebuilt(train=train_examples(41)), r"cifar100 train .*41 records now"),
  "the test images for training": (exchanged, FILE),
}


def test_damaged_and_exchanged_data_are_refused_with_file_and_record(whole, tmp_path):
  refused = 0
  for i, (name, (corrupt, expected)) in enumerate(CORRUPTIONS.items()):
    root = shutil.copytree(whole, tmp_path / str(i))
    corrupt(root)
    with pytest.raises(ConfigError, match=expected) as error:
      look(root)
    assert "\n" not in str(error.value), name
    refused += 1
  print(f"{refused}/{len(CORRUPTIONS)} corruptions refused with file or record")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75, 0.9, 0.98])
def test_a_truncated_file_is_refused_at_the_first_look_too(tmp_path, share):
  root = write(tmp_path)
  truncated(root, share)
  with pytest.raises(ConfigError, match=FILE):
    look(root)


def test_at_the_first_look_damage_is_refused_with_what_it_is(tmp_path):
  rebuilt(train=[*train_examples(39), example(39, 3, CUT[: len(CUT) // 2])])(tmp_path)
  with pytest.raises(ConfigError, match=r"record \d+ of cifar100 train .*Truncated"):
    look(tmp_path)
  rebuilt(test=[example(1000 + i, i % 3) for i in range(16)])(tmp_path)
  for manifest in tmp_path.glob(".fmlora_manifest*"):
    manifest.unlink()
  with pytest.raises(ConfigError, match="cifar100: no test image of class '3'"):
    look(tmp_path)


def test_a_test_image_that_is_a_training_image_too_is_reported_or_refused(tmp_path, caplog):
  copies = [example(1000 + i, i % CLASSES, copy_of=i if i < 3 else None) for i in range(16)]
  root = write(tmp_path, test=copies)
  with caplog.at_level(logging.WARNING):
    sequence = look(root)
  example_of = rf"record \d+ of cifar100 test \({FILE}\) is record \d+ of cifar100 train"
  found = tasks.copies.find_copies(sequence)
  assert found.test_of_train + found.test_of_val == 3
  assert "are copies of training images" in caplog.text
  with pytest.raises(ConfigError, match=f"config.tasks.copies is 'refuse': .*{example_of}"):
    look(root, copies="refuse")


@pytest.mark.parametrize("benchmark", ["digits", "digits_dil"])
def test_no_image_of_the_sets_that_ship_is_in_two_splits(benchmark):
  tasks_of = {"num_tasks": 4, "scenario": "dil"} if benchmark == "digits_dil" else {}
  config = TasksConfig(benchmark=benchmark, **tasks_of)
  sequence = tasks.make(config, seed=0, source_size=8)
  contents = {}
  for part in ("train", "val", "test"):
    rows = np.concatenate([getattr(task, part) for task in sequence.tasks])
    contents[part] = {image.tobytes() for image in sequence.source.decode(rows)[0]}
  pairs = itertools.combinations(contents.values(), 2)
  overlap = sum(len(one & other) for one, other in pairs)
  print(f"{overlap} images of {benchmark} in two splits")
  assert overlap == 0
