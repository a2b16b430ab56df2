"""result.json: its schema, results of earlier versions, damaged files."""

import json
import re

import numpy as np
import pytest

from fmlora_jax.workdir import result_file


def whole(**changes):
  return dict.fromkeys(result_file.FIELDS) | {"schema": 2, "config": {}, "finished": True} | changes


def test_a_result_is_read_back_as_plain_values(tmp_path):
  result = whole(acc=np.float32(0.5), seed=np.int64(3), accuracy=np.array([[1.0, np.nan]]))
  result |= {"config": {"path": tmp_path, "ranks": (4, 8)}, "aaa": float("inf")}
  path = result_file.write_result(tmp_path, result)
  assert path == tmp_path / "result.json"
  assert "NaN" not in path.read_text()
  back = result_file.read_result(tmp_path)
  assert back == result_file.read_result(path)
  assert (back["acc"], back["seed"], back["aaa"]) == (0.5, 3, None)
  assert back["accuracy"] == [[1.0, None]]
  assert back["config"] == {"path": str(tmp_path), "ranks": [4, 8]}


def test_a_value_that_json_cannot_hold_is_refused_with_its_path(tmp_path):
  with pytest.raises(TypeError, match=r"config\.a\[1\] is of type object"):
    result_file.write_result(tmp_path, whole(config={"a": [1, object()]}))
  assert list(tmp_path.iterdir()) == []


def test_only_a_result_of_the_schema_is_written(tmp_path):
  changed = whole(other=1)
  del changed["acc"]
  with pytest.raises(ValueError, match="fields acc, other are missing or not in the schema"):
    result_file.write_result(tmp_path, changed)


def test_a_result_of_version_1_is_read_as_one_of_today(tmp_path):
  config = {"seed": 1, "tasks": {"stream": "a", "num_tasks": 5}}
  new = whole(statistics_bytes=8, config={"seed": 1, "tasks": {"task_file": "a", "num_tasks": 5}})
  late = (*result_file.ADDED, *result_file.NAMES, "schema", "statistics_bytes")
  old = {name: value for name, value in new.items() if name not in late}
  (tmp_path / "result.json").write_text(json.dumps(old | {"rehearsal_bytes": 8, "config": config}))
  assert result_file.read_result(tmp_path) == new


def test_a_result_without_the_names_of_classes_is_read(tmp_path):
  old = {name: value for name, value in whole().items() if name not in result_file.NAMES}
  (tmp_path / "result.json").write_text(json.dumps(old))
  assert result_file.read_result(tmp_path) == whole()


def test_a_result_of_a_later_version_is_refused(tmp_path):
  (tmp_path / "result.json").write_text(json.dumps(whole(schema=3)))
  with pytest.raises(ValueError, match="schema is 3: must be at most 2; update fmlora_jax"):
    result_file.read_result(tmp_path)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (None, "no result.json; a run writes it at its very end"),
    ('{"acc": 1', "can't be read as a result"),
    ("\udcff", "can't be read as a result"),
    ("[1]", "not the result of a finished run"),
    ('{"acc": 1}', "not the result of a finished run"),
    ('{"finished": true}', "lacks method, benchmark"),
    ('{"finished": true, "config": 3}', "its config is damaged"),
    ('{"finished": true}', "delete the file and rerun the run's command"),
  ],
)
def test_a_missing_or_damaged_result_gives_one_clear_line(tmp_path, text, message):
  if text is not None:
    (tmp_path / "result.json").write_text(text, errors="surrogateescape")
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    result_file.read_result(tmp_path)
  assert str(tmp_path) in str(caught.value)
  assert "\n" not in str(caught.value)


def test_a_path_that_does_not_exist_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"nowhere: no such file or folder"):
    result_file.read_result(tmp_path / "nowhere")
