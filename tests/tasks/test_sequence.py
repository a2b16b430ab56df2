import dataclasses

import numpy as np
import pytest
import sklearn.datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from fmlora_jax import tasks
from fmlora_jax.config import ConfigError, TasksConfig
from fmlora_jax.tasks import sequence
from fmlora_jax.tasks.benchmarks import digits

FIRST_IDS = {  # (classes, seed): the first classes of the order that SD-LoRA draws
  (200, 1993): [168, 136, 51, 9, 183, 101],
  (200, 1994): [85, 41, 23, 28, 70, 87],
  (200, 1995): [146, 198, 169, 126, 142, 183],
  (200, 1996): [92, 182, 15, 79, 26, 173],
  (200, 1997): [76, 153, 53, 4, 197, 152],
  (100, 1993): [68, 56, 78, 8, 23, 84],
  (100, 1994): [72, 6, 33, 96, 60, 94],
  (100, 1995): [91, 18, 57, 73, 66, 71],
  (345, 1993): [214, 80, 343, 268, 224, 97],
  (345, 1994): [24, 4, 28, 201, 265, 334],
  (345, 1995): [131, 270, 267, 342, 142, 151],
}


def make_source(labels, **fields):
  labels = np.asarray(labels, np.int32)
  names = tuple(f"c{i}" for i in range(labels.max() + 1))
  fields = {"name": "toy", "class_names": names, "canvas": (4, 4), "digest": "0"} | fields
  return sequence.DataSource(labels=labels, decode=lambda rows: None, **fields)


def with_domains(labels, domains, **fields):
  names = tuple(f"d{i}" for i in range(max(domains) + 1))
  return make_source(labels, domains=np.asarray(domains), domain_names=names, **fields)


def splits_of(made):
  return {
    split: np.sort(np.concatenate([getattr(task, split) for task in made.tasks]))
    for split in ("train", "val", "test")
  }


@pytest.mark.parametrize(("count", "seed"), FIRST_IDS)
def test_class_orders_are_those_of_the_published_codes(count, seed):
  order = sequence.make_order(count, "shuffled", seed)
  assert order[:6] == FIRST_IDS[count, seed]
  assert sorted(order) == list(range(count))


@settings(max_examples=50, deadline=None)
@given(
  counts=st.lists(st.integers(3, 30), min_size=2, max_size=8),
  val=st.sampled_from([0.0, 0.125, 0.5]),
  test=st.sampled_from([0.01, 0.2, 0.9]),
  seed=st.integers(0, 5),
)
def test_every_record_lands_once_and_every_class_in_every_split(counts, val, test, seed):
  labels = np.random.RandomState(0).permutation(np.repeat(np.arange(len(counts)), counts))
  config = TasksConfig(num_tasks=1, val_fraction=val, test_fraction=test, split_seed=seed)
  made = sequence.make_sequence(make_source(labels), config, seed=seed)
  splits = splits_of(made)
  assert sorted(np.concatenate([*splits.values()])) == list(range(len(labels)))
  for split, rows in splits.items():
    found = np.bincount(labels[rows], minlength=len(counts))
    assert found.min() >= (0 if split == "val" and not val else 1)
  order = np.asarray(made.class_order)
  np.testing.assert_array_equal(order[made.labels], labels)


def test_tasks_are_blocks_of_positions_with_ascending_rows():
  config = TasksConfig(num_tasks=5)
  made = tasks.make(config, seed=1993, source_size=8)
  assert made.class_order == np.random.RandomState(1993).permutation(10).tolist()
  assert made.class_names[0] == str(made.class_order[0])
  assert [task.name for task in made.tasks] == ["4, 2", "7, 6", "0, 3", "5, 8", "9, 1"]
  assert made.spec.class_ranges == ((0, 2), (2, 4), (4, 6), (6, 8), (8, 10))
  for task in made.tasks:
    for rows in (task.train, task.val, task.test):
      assert rows.dtype == np.int64
      assert (np.diff(rows) > 0).all()
      assert set(made.labels[rows]) == {task.lo, task.lo + 1}
  assert made.split_id == "digits/val0.125-test0.2-seed0"
  sizes = {split: len(rows) for split, rows in splits_of(made).items()}
  assert sizes == {"train": 1259, "val": 179, "test": 359}  # 70/10/20


def test_a_task_of_many_classes_is_named_by_its_first_and_its_last():
  made = tasks.make(TasksConfig(num_tasks=2), seed=1993, source_size=8)
  assert [task.name for task in made.tasks] == ["4 ... 0 (5 classes)", "3 ... 1 (5 classes)"]
  names = [str(i) for i in range(4)]
  assert [sequence.task_name(names[:n]) for n in (1, 3, 4)] == [
    "0",
    "0, 1, 2",
    "0 ... 3 (4 classes)",
  ]


def test_split_does_not_move_with_the_order_of_classes_or_the_number_of_tasks():
  source = digits.make(TasksConfig(), 8)
  one = sequence.make_sequence(source, TasksConfig(num_tasks=5), seed=1)
  other = sequence.make_sequence(source, TasksConfig(num_tasks=2, order="natural"), seed=2)
  assert one.manifest_sha256 == other.manifest_sha256
  for split, rows in splits_of(one).items():
    np.testing.assert_array_equal(rows, splits_of(other)[split])
  moved = sequence.make_sequence(source, TasksConfig(split_seed=1), seed=1)
  assert moved.manifest_sha256 != one.manifest_sha256
  assert moved.split_id == "digits/val0.125-test0.2-seed1"


def test_order_seed_wins_over_the_seed_of_the_run():
  source = make_source(np.repeat(np.arange(4), 5))
  config = TasksConfig(num_tasks=2, order_seed=7)
  assert sequence.make_sequence(source, config, seed=1).class_order == sequence.make_order(
    4, "shuffled", 7
  )


@pytest.mark.parametrize("change", ["labels", "digest", "domains"])
def test_manifest_knows_the_data(change):
  source = with_domains(np.repeat(np.arange(2), 10), [0, 1] * 10)
  config = TasksConfig(num_tasks=1)
  value = {"labels": source.labels[::-1], "digest": "1", "domains": source.domains[::-1]}[change]
  changed = dataclasses.replace(source, **{change: value})
  digests = {sequence.make_sequence(s, config, seed=0).manifest_sha256 for s in (source, changed)}
  assert len(digests) == 2


def test_adding_a_class_leaves_the_splits_of_the_others():
  few, many = (make_source(np.repeat(np.arange(c), 20)) for c in (3, 4))
  config = TasksConfig(num_tasks=1)
  few, many = (splits_of(sequence.make_sequence(s, config, seed=0)) for s in (few, many))
  for split in few:
    np.testing.assert_array_equal(few[split], many[split][many[split] < 60])


def test_published_splits_are_taken_and_the_missing_one_is_drawn():
  labels = np.tile(np.arange(2), 20)
  split = np.repeat([0, 2], 20).astype(np.int8)
  made = sequence.make_sequence(make_source(labels, split=split), TasksConfig(num_tasks=1), seed=0)
  splits = splits_of(made)
  np.testing.assert_array_equal(splits["test"], np.arange(20, 40))
  assert len(splits["val"]) == 2
  assert made.split_id == "toy/val0.125-testown-seed0"
  split[:4] = 1
  made = sequence.make_sequence(make_source(labels, split=split), TasksConfig(num_tasks=1), seed=0)
  np.testing.assert_array_equal(splits_of(made)["val"], np.arange(4))
  assert made.split_id == "toy/valown-testown"


def test_groups_are_never_torn():
  labels = np.tile(np.repeat(np.arange(2), 10), 3)
  group = np.tile(np.arange(20), 3)
  source = with_domains(labels, np.repeat(np.arange(3), 20), group=group)
  splits = splits_of(sequence.make_sequence(source, TasksConfig(num_tasks=2), seed=0))
  groups = [set(group[rows]) for rows in splits.values()]
  assert sum(map(len, groups)) == 20
  assert [len(rows) for rows in splits.values()] == [42, 6, 12]


def test_domains_are_tasks_over_shared_classes():
  labels, domains = np.tile(np.arange(2), 30), np.repeat(np.arange(3), 20)
  source = with_domains(labels, domains)
  made = sequence.make_sequence(source, TasksConfig(scenario="dil", num_tasks=2), seed=3)
  order = np.random.RandomState(3).permutation(3)
  assert [task.name for task in made.tasks] == [f"d{d}" for d in order[:2]]
  assert made.spec.class_ranges == ((0, 2), (0, 2))
  assert made.spec.shares_classes
  for task, domain in zip(made.tasks, order, strict=False):
    assert set(domains[np.concatenate([task.train, task.val, task.test])]) == {domain}
  natural = TasksConfig(scenario="dil", num_tasks=3, order="natural")
  assert [t.name for t in sequence.make_sequence(source, natural, seed=3).tasks] == [
    "d0",
    "d1",
    "d2",
  ]


def test_cil_pools_domains_with_the_splits_of_dil():
  source = with_domains(np.tile(np.arange(2), 30), np.repeat(np.arange(3), 20))
  dil = sequence.make_sequence(source, TasksConfig(scenario="dil", num_tasks=3), seed=0)
  cil = sequence.make_sequence(source, TasksConfig(scenario="cil", num_tasks=2), seed=0)
  assert dil.manifest_sha256 == cil.manifest_sha256
  for split, rows in splits_of(cil).items():
    np.testing.assert_array_equal(rows, splits_of(dil)[split])


def test_til_has_the_data_of_cil():
  source = make_source(np.repeat(np.arange(4), 5))
  cil, til = (
    sequence.make_sequence(source, TasksConfig(scenario=s, num_tasks=2), seed=0)
    for s in ("cil", "til")
  )
  assert til.spec.scenario == "til"
  for one, other in zip(cil.tasks, til.tasks, strict=True):
    np.testing.assert_array_equal(one.test, other.test)


@pytest.mark.parametrize("scenario", ["cil", "til"])
@pytest.mark.parametrize(("num_tasks", "says"), [(2, False), (4, True)])
def test_tasks_of_one_class_are_a_caveat_with_advice(scenario, num_tasks, says):
  source = make_source(np.repeat(np.arange(4), 5))
  config = TasksConfig(scenario=scenario, num_tasks=num_tasks)
  caveats = sequence.make_sequence(source, config, seed=0).caveats
  assert len(caveats) == says
  if says:
    assert "4 of 4 tasks have one class, in which cross-entropy is 0" in caveats[0]
    assert "set config.tasks.num_tasks to 2 or less" in caveats[0]


def test_domains_of_one_class_are_a_caveat_too():
  source = with_domains(np.zeros(20, int), np.repeat([0, 1], 10))
  made = sequence.make_sequence(source, TasksConfig(scenario="dil", num_tasks=2), seed=0)
  (caveat,) = made.caveats
  assert "2 of 2 tasks have one class" in caveat and "; add classes" in caveat


REFUSALS = [
  ({"num_tasks": 3}, "config.tasks.num_tasks is 3.* 10 classes of digits.* 1, 2, 5, 10"),
  ({"scenario": "dil"}, "config.tasks.scenario is 'dil': digits has no domains"),
  ({"scenario": "dil", "benchmark": "digits_dil"}, "num_tasks is 5.* at most 4.*plain, inverted"),
  ({"benchmark": "digit"}, "benchmark is 'digit': must be one of .*did you mean 'digits'"),
  (
    {"benchmark": "../x"},
    "benchmark is '../x': must be NAME or tfds:NAME, of letters, digits, '_'",
  ),
  ({"order_seed": -1}, "order_seed is -1: must be >= 0 and <= 4294967295"),
  ({"split_seed": 2**32}, "split_seed is 4294967296"),
  ({"test_from": "val"}, "test_from is 'val': must be 'train', digits has no validation images"),
  (
    {"test_from": "val", "benchmark": "cub200"},
    "test_from is 'val': must be 'train', cub200 has test images of its own",
  ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSALS)
def test_impossible_tasks_are_refused(fields, message):
  with pytest.raises(ConfigError, match=message):
    tasks.make(TasksConfig(**fields), seed=0, source_size=8)


def test_a_class_without_train_or_test_image_is_named():
  config = TasksConfig(num_tasks=1)
  with pytest.raises(ConfigError, match="toy: no test image of class 'c1' in task 1 .c1, c0.:"):
    sequence.make_sequence(make_source([0, 0, 0, 1]), config, seed=0)
  split = np.array([0, 2, 2, 2], np.int8)
  with pytest.raises(ConfigError, match="no train image of class 'c1'"):
    sequence.make_sequence(make_source([0, 0, 1, 1], split=split), config, seed=0)


def test_digit_domains_show_the_same_digits():
  source = tasks.make(
    TasksConfig(benchmark="digits_dil", scenario="dil", num_tasks=4, order="natural"),
    seed=0,
    source_size=16,
  ).source
  images, sizes = source.decode(5 + 1797 * np.arange(4))
  plain, inverted, rotated, noisy = images.astype(int)
  assert images.dtype == np.uint8
  assert sizes.tolist() == [[16, 16]] * 4
  np.testing.assert_array_equal(plain, 255 - inverted)
  np.testing.assert_array_equal(np.rot90(plain), rotated)
  assert 5 < np.abs(noisy - plain).mean() < 60
  np.testing.assert_array_equal(source.decode(np.array([5 + 3 * 1797]))[0][0], noisy)
  assert (images[..., 0] == images[..., 2]).all()


def test_a_digit_for_test_in_one_domain_is_for_test_in_all():
  made = tasks.make(
    TasksConfig(benchmark="digits_dil", scenario="dil", num_tasks=4), seed=0, source_size=8
  )
  for split in ("train", "val", "test"):
    bases = [(getattr(task, split) % 1797).tolist() for task in made.tasks]
    assert bases[0] == bases[1] == bases[2] == bases[3]


def test_digits_keep_the_pixels_of_scikit_learn():
  source = digits.make(TasksConfig(), 8)
  images, labels = digits.load()
  np.testing.assert_array_equal(source.decode(np.arange(3))[0][..., 1], images[:3])
  assert images.max() == 255
  assert labels[:3].tolist() == [0, 1, 2]
  assert source.decode(np.array([], int))[0].shape == (0, 8, 8, 3)


def test_digits_are_those_that_scikit_learn_loads():
  images, labels = digits.load()
  expected, names = sklearn.datasets.load_digits(return_X_y=True)
  np.testing.assert_array_equal(images.reshape(-1, 64), np.rint(expected * (255 / 16)))
  np.testing.assert_array_equal(labels, names)
