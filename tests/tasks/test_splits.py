"""Split rules, against counts that are known of the real data and against TFDS's own slices."""

import dataclasses

import numpy as np
import pytest
import tensorflow_datasets as tfds
import yaml

from fmlora_jax.config import ConfigError
from fmlora_jax.tasks import splits
from fmlora_jax.tasks.benchmarks import cifar100, cub200, domainnet, imagenet_r
from fmlora_jax.tasks.sequence import TEST, TRAIN, VAL


def records_of(counts, official, stratum):
  return splits.Records(
    origin=np.repeat(np.arange(len(counts)), counts),
    official=np.repeat(np.asarray(official, np.int8), counts),
    stratum=np.asarray(stratum),
  )


def numbers(codes):
  return np.bincount(codes, minlength=3).tolist()


CIFAR = records_of([50_000, 10_000], [TRAIN, TEST], np.arange(60_000) % 100)


@pytest.mark.parametrize(
  ("rule", "records", "expected"),
  [
    (
      imagenet_r.SPLITS["slice"],
      records_of([30_000], [TEST], np.arange(30_000) % 200),
      [21000, 3000, 6000],
    ),
    (
      imagenet_r.SPLITS["slice80"],
      records_of([30_000], [TEST], np.zeros(30_000, int)),
      [24000, 0, 6000],
    ),
    (cifar100.SPLITS["official"], CIFAR, [45000, 5000, 10000]),
    (cifar100.SPLITS["paper"], CIFAR, [42000, 6000, 12000]),
    (cifar100.SPLITS["full"], CIFAR, [50000, 0, 10000]),
    (
      cub200.SPLITS["full"],
      records_of([5994, 5794], [0, 2], np.zeros(11788, int)),
      [9430, 0, 2358],
    ),
    (
      cub200.SPLITS["paper"],
      records_of([5994, 5794], [0, 2], np.zeros(11788, int)),
      [8252, 1178, 2358],
    ),
  ],
  ids=[
    "imagenet_r/slice",
    "imagenet_r/slice80",
    "cifar100/official",
    "cifar100/paper",
    "cifar100/full",
    "cub200/full",
    "cub200/paper",
  ],
)
def test_counts_of_the_published_data(rule, records, expected):
  codes = rule(records)
  assert codes.dtype == np.int8
  assert numbers(codes) == expected


@pytest.mark.parametrize("count", [1, 7, 30, 101, 5994, 30_000])
def test_slices_are_rounded_as_tfds_does(count):
  codes = splits.sliced(70, 80)(records_of([count], [TEST], np.zeros(count, int)))
  template = tfds.core.ShardedFileTemplate(
    data_dir="any", dataset_name="any", split="test", filetype_suffix="array_record"
  )
  info = tfds.core.SplitInfo(
    name="test", shard_lengths=[count], num_bytes=0, filename_template=template
  )
  infos = tfds.core.splits.SplitDict([info])
  expected = [infos[f"test[{at}]"].num_examples for at in (":70%", "70%:80%", "80%:")]
  assert numbers(codes) == expected
  assert np.all(np.diff(codes) >= 0)


def test_each_class_is_divided_in_its_reading_order():
  stratum = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [10, 25, 51]))
  codes = splits.stratified(records_of([len(stratum)], [TEST], stratum))
  for label, expected in enumerate([[7, 1, 2], [17, 3, 5], [36, 5, 10]]):
    assert numbers(codes[stratum == label]) == expected
    assert np.all(np.diff(codes[stratum == label]) >= 0)


def test_official_splits_keep_the_published_test_images():
  stratum = np.tile(np.arange(4), 25)
  records = records_of([64, 36], [TRAIN, TEST], stratum)
  codes = domainnet.SPLITS["official"](records)
  np.testing.assert_array_equal(codes == TEST, records.official == TEST)
  for label in range(4):  # 16 of each class for training: the last 2 are for validation
    mine = codes[:64][stratum[:64] == label]
    assert mine.tolist() == [TRAIN] * 14 + [VAL] * 2

  codes = domainnet.SPLITS["paper"](records)
  np.testing.assert_array_equal(codes == TRAIN, records.official == TRAIN)
  for label in range(4):  # 9 of each class for test: the first 3 are for validation
    assert codes[64:][stratum[64:] == label].tolist() == [VAL] * 3 + [TEST] * 6


LISTED = ["n01/art_0.jpg", "n01/toy_1.jpg", "n02/art_0.jpg", "n03/sketch_5.jpg"]


def listed_records(root):
  named = records_of([4], [TEST], [0, 0, 1, 2])
  return dataclasses.replace(named, names=lambda: LISTED, root=root)


def write_lists(root, train, test):
  for name, files in (("train", train), ("test", test)):
    paths = [f"data/imagenet-r/{file}" for file in files]
    lists = {"data": paths, "targets": [0] * len(files)}
    (root / f"imagenet-r_{name}.yaml").write_text(yaml.safe_dump(lists))


def test_lists_of_file_names_make_a_split_in_any_order(tmp_path):
  write_lists(tmp_path, train=[LISTED[3], LISTED[0]], test=[LISTED[2], LISTED[1]])
  codes = imagenet_r.SPLITS["coda"](listed_records(tmp_path))
  assert codes.tolist() == [TRAIN, TEST, TEST, TRAIN]


@pytest.mark.parametrize(
  ("train", "test", "message"),
  [
    (LISTED[:2], [LISTED[2]], "leave out 1 of 4 images"),
    (LISTED[:2], ["n02/art_9.jpg"], "1 of 1 images are not in the prepared data.*n02/art_9"),
  ],
)
def test_lists_that_do_not_fit_the_data_are_refused(tmp_path, train, test, message):
  write_lists(tmp_path, train, test)
  with pytest.raises(ConfigError, match=f"{message}.*CODA-Prompt"):
    imagenet_r.SPLITS["coda"](listed_records(tmp_path))


@pytest.mark.parametrize("text", ["data: [1, 2]", "[]", "data: {", "targets: []"])
def test_a_list_that_is_missing_or_damaged_is_named(tmp_path, text):
  with pytest.raises(ConfigError, match="imagenet-r_train.yaml can't be read .no such file"):
    imagenet_r.SPLITS["coda"](listed_records(tmp_path))
  write_lists(tmp_path, LISTED[:2], LISTED[2:])
  (tmp_path / "imagenet-r_test.yaml").write_text(text)
  with pytest.raises(ConfigError, match="imagenet-r_test.yaml can't be read .*CODA-Prompt"):
    imagenet_r.SPLITS["coda"](listed_records(tmp_path))
