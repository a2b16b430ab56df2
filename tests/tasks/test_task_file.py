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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"class_order": 3}'])
def test_a_file_that_is_none_is_refused(tmp_path, text):
  path = tmp_path / "some.json"
  path.write_text(text)
  with pytest.raises(ConfigError, match="is not a valid task_file.json for digits"):
    make(task_file=str(path))


def test_a_missing_file_is_named():
  with pytest.raises(ConfigError, match=r"config.tasks.task_file is 'gone.json': can't be read"):
    make(task_file="gone.json")
