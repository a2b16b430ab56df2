"""task_file.json: the same images in the same tasks, in another run."""

import base64
import json
import zlib

import numpy as np
import pytest

from fmlora_jax import tasks
from fmlora_jax.config import ConfigError, TasksConfig
from fmlora_jax.tasks import task_file


def make(seed=1993, **fields):
  return tasks.make(TasksConfig(**fields), seed=seed, source_size=8)


@pytest.fixture(params=["cil", "dil"])
def kind(request):
  if request.param == "cil":
    return {"benchmark": "digits", "num_tasks": 5}
  return {"benchmark": "digits_dil", "scenario": "dil", "num_tasks": 3}


def assert_same(left, right):
  assert left.class_order == right.class_order
  assert left.spec == right.spec
  for a, b in zip(left.tasks, right.tasks, strict=True):
    assert (a.name, a.lo, a.hi, a.index) == (b.name, b.lo, b.hi, b.index)
    for split in ("train", "val", "test"):
      np.testing.assert_array_equal(getattr(a, split), getattr(b, split))
  np.testing.assert_array_equal(left.labels, right.labels)
  assert (left.split_id, left.manifest_sha256) == (right.split_id, right.manifest_sha256)


def test_another_seed_and_split_replay_the_same(kind, tmp_path):
  original = make(split_seed=3, **kind)
  path = tmp_path / task_file.FILE
  path.write_text(task_file.dump_task_file(original))
  replayed = make(seed=7, split_seed=4, val_fraction=0.0, task_file=str(path), **kind)
  assert_same(replayed, original)
  assert task_file.dump_task_file(replayed) == task_file.dump_task_file(original)
  with pytest.raises(AssertionError):
    assert_same(make(seed=7, split_seed=4, **kind), original)


def test_the_file_names_tasks_by_positions_as_earlier_versions_did():
  fields = json.loads(task_file.dump_task_file(make(num_tasks=5)))
  assert [task["name"] for task in fields["tasks"]][:2] == ["classes 0-1", "classes 2-3"]
  assert fields["class_names"][:2] == ["4", "2"]
  one = json.loads(task_file.dump_task_file(make(num_tasks=10)))
  assert one["tasks"][3]["name"] == "class 3"


def pack(rows):
  """Returns record numbers as version 1 wrote them."""
  steps = np.diff(np.asarray(rows, np.int64), prepend=0).astype("<i4")
  return base64.b64encode(zlib.compress(steps.tobytes(), 9)).decode()


def test_a_file_of_version_1_is_read(kind, tmp_path):
  original = make(**kind)
  fields = json.loads(task_file.dump_task_file(original))
  for task in fields["tasks"]:
    task |= {split: pack(task[split]) for split in ("train", "val", "test")}
  (tmp_path / "stream.json").write_text(json.dumps(fields))
  assert_same(make(seed=7, task_file=str(tmp_path / "stream.json"), **kind), original)


BAD_ROWS = [[0, 10], [-1, 3], [3, 2], [4, 4], list(range(11))]


@pytest.mark.parametrize("rows", BAD_ROWS, ids=str)
@pytest.mark.parametrize("form", [list, pack])
def test_numbers_that_are_no_records_are_refused(form, rows):
  with pytest.raises(ValueError, match="must ascend from 0 to 9"):
    task_file._rows(form(rows), 10)


@pytest.mark.parametrize("rows", [[0.5], ["1"], [True], [[1]], [None], [10**30]], ids=str)
def test_what_is_no_number_is_refused(rows):
  with pytest.raises((ValueError, OverflowError)):
    task_file._rows(rows, 10)


def test_a_text_that_unpacks_to_too_much_is_not_unpacked():
  bomb = base64.b64encode(zlib.compress(bytes(10_000_000))).decode()
  with pytest.raises(ValueError):
    task_file._rows(bomb, 10)


CHANGES = {
  "other data": ({"source_sha256": "0"}, r"its data \(source_sha256\) is '0'"),
  "another benchmark": ({"benchmark": "cub200"}, "its benchmark is 'cub200'"),
  "another scenario": ({"scenario": "til"}, "its tasks.scenario is 'til', this run's 'cil'"),
  "fewer tasks": ({"tasks": []}, "its tasks.num_tasks is 0, this run's 5"),
  "a class twice": ({"class_order": [0] * 10}, "class_order must hold each of 0..9 once"),
  "no tasks": ({"tasks": None}, "is not a valid task_file.json"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_what_does_not_fit_is_refused(tmp_path, change, message):
  path = tmp_path / "changed.json"
  path.write_text(json.dumps(json.loads(task_file.dump_task_file(make())) | change))
  with pytest.raises(ConfigError, match=message):
    make(task_file=str(path))


def exchange(tasks, split, other):
  tasks[0][split], tasks[1][split] = tasks[1][split], tasks[0][split]
  tasks[2][split], tasks[3][other] = tasks[3][other], tasks[2][split]


def move(tasks, before, after):
  tasks[0][after] = sorted([*tasks[0][after], tasks[0][before].pop()])


LIES = {  # what is done to the fields and to the tasks of a file -> the refusal
  "training images exchanged": (
    lambda fields, tasks: exchange(tasks, "train", "train"),
    r"train of task 1 lacks record \d+: of class '2', for train by split_id",
  ),
  "an image of another task": (
    lambda fields, tasks: tasks[0].update(val=[*tasks[0]["val"], 1796]),
    "val of task 1 has record 1796: of class '8', for",
  ),
  "test images from training": (
    lambda fields, tasks: tasks[2].update(test=tasks[2]["train"]),
    r"test of task 3 has record \d+: of class .*, for train by split_id",
  ),
  "a test image moved": (
    lambda fields, tasks: move(tasks, "test", "train"),
    "train of task 1 has record .* for test by split_id",
  ),
  "an image left out": (lambda fields, tasks: tasks[1]["train"].pop(), "train of task 2 lacks"),
  "no test images": (lambda fields, tasks: tasks[1].update(test=[]), "test of task 2 lacks"),
  "ranges that overlap": (lambda fields, tasks: tasks[1].update(lo=1), r"lo and hi .*\(1, 4\)"),
  "ranges with a gap": (lambda fields, tasks: tasks[0].update(hi=1), "must follow each other"),
  "more classes than there are": (lambda fields, tasks: tasks[4].update(hi=99), r"\(8, 99\)"),
  "fewer classes than there are": (lambda fields, tasks: tasks[4].update(hi=9), r"\(8, 9\)"),
  "negative positions": (lambda fields, tasks: tasks[0].update(lo=-5, hi=-1), r"\(-5, -1\)"),
  "a position in letters": (lambda fields, tasks: tasks[0].update(lo="0"), r"\('0', 2\)"),
  "a position between two": (lambda fields, tasks: tasks[0].update(lo=0.5), r"\(0.5, 2\)"),
  "another class order": (lambda fields, tasks: fields["class_order"].reverse(), "class_names is"),
  "other class names": (lambda fields, tasks: fields["class_names"].reverse(), "class_names is"),
  "another order with its names": (
    lambda fields, tasks: fields["class_order"].reverse() or fields["class_names"].reverse(),
    "train of task 1 lacks",
  ),
  "tasks in another order": (lambda fields, tasks: tasks.reverse(), "must follow each other"),
  "names of tasks exchanged": (
    lambda fields, tasks: exchange(tasks, "name", "name"),
    "names of the tasks are .*: must be .'classes 0-1', 'classes 2-3'",
  ),
  "a split that the data do not have": (
    lambda fields, tasks: fields.update(split_id="digits/official"),
    "split_id is 'digits/official': the data have 'digits/val0.125-test0.2-seed0'",
  ),
  "another split": (
    lambda fields, tasks: fields.update(split_id="digits/val0.125-test0.2-seed1"),
    "manifest_sha256 is",
  ),
  "a split that can't be": (
    lambda fields, tasks: fields.update(split_id="digits/val0.125-test2-seed1"),
    "its split_id is 'digits/val0.125-test2-seed1': test_fraction is 2.0: must be in",
  ),
  "a split in no numbers": (
    lambda fields, tasks: fields.update(split_id="digits/val--1-test0.2-seed1"),
    "split_id is 'digits/val--1-test0.2-seed1': the data have",
  ),
  "no rows": (lambda fields, tasks: tasks[0].update(val=None), "record numbers must be integers"),
  "another manifest": (
    lambda fields, tasks: fields.update(manifest_sha256="0" * 64),
    "manifest_sha256 is '0000.*: the data have",
  ),
  "another number of records": (lambda fields, tasks: fields.update(num_records=5), "is 5: the"),
  "no manifest": (lambda fields, tasks: fields.pop("manifest_sha256"), "lacks 'manifest_sha256'"),
  "an object of tasks": (
    lambda fields, tasks: fields.update(tasks=dict.fromkeys("abcde")),
    "a list of",
  ),
}


@pytest.mark.parametrize(("change", "message"), LIES.values(), ids=LIES)
def test_no_field_of_a_file_is_believed(tmp_path, change, message):
  fields = json.loads(task_file.dump_task_file(make()))
  change(fields, fields["tasks"])
  path = tmp_path / "changed.json"
  path.write_text(json.dumps(fields))
  with pytest.raises(ConfigError, match=f"config.tasks.task_file is .*{message}") as info:
    make(task_file=str(path))
  assert "\n" not in str(info.value)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda tasks: tasks[0].update(name=tasks[1]["name"]), "must be distinct domains, of .'plain'"),
    (lambda tasks: tasks[0].update(name="none"), "must be distinct domains, of .'plain'"),
    (lambda tasks: tasks.reverse() or tasks[0].update(lo=1), "must each be 0, 10"),
    (
      lambda tasks: exchange([*tasks, tasks[0]], "name", "name"),
      "train of task 1 has record .*, domain",
    ),
  ],
)
def test_no_domain_of_a_file_is_believed(tmp_path, change, message):
  kind = {"benchmark": "digits_dil", "scenario": "dil", "num_tasks": 3}
  fields = json.loads(task_file.dump_task_file(make(**kind)))
  change(fields["tasks"])
  (tmp_path / "changed.json").write_text(json.dumps(fields))
  with pytest.raises(ConfigError, match=message):
    make(task_file=str(tmp_path / "changed.json"), **kind)


def test_tasks_may_have_different_numbers_of_classes(tmp_path):
  fields, halves = (json.loads(task_file.dump_task_file(make(num_tasks=n))) for n in (5, 2))
  first, *others = fields["tasks"]
  merged = {"name": "classes 2-9", "lo": 2, "hi": 10}
  for split in ("train", "val", "test"):
    merged[split] = sorted(row for task in others for row in task[split])
  (tmp_path / "own.json").write_text(json.dumps(halves | {"tasks": [first, merged]}))
  made = make(seed=7, num_tasks=2, task_file=str(tmp_path / "own.json"))
  assert made.spec.class_ranges == ((0, 2), (2, 10))


def test_the_split_of_a_file_is_taken_whatever_the_config_names(prepared, tmp_path):
  kind = {"benchmark": "cifar100", "data_dir": str(prepared), "num_tasks": 2}
  original = make(split="paper", **kind)
  (tmp_path / "paper.json").write_text(task_file.dump_task_file(original))
  assert_same(make(seed=7, task_file=str(tmp_path / "paper.json"), **kind), original)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"class_order": 3}', "[" * 10**6])
def test_a_file_that_is_none_is_refused(tmp_path, text):
  path = tmp_path / "some.json"
  path.write_text(text)
  with pytest.raises(ConfigError, match="is not a valid task_file.json for digits"):
    make(task_file=str(path))


def test_a_missing_file_is_named():
  with pytest.raises(ConfigError, match=r"config.tasks.task_file is 'gone.json': can't be read"):
    make(task_file="gone.json")
