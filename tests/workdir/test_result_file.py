"""result.json: its schema, results of earlier versions, damaged files."""

import json
import re

import made_up
import numpy as np
import pytest
from rich.console import Console

from fmlora_jax.config import ConfigError
from fmlora_jax.report import paper, paper_markdown, tables
from fmlora_jax.report.runs import load
from fmlora_jax.workdir import result_file

WRONG = (None, True, -1, 2.5, "x", [], {}, [[1]], {"x": None}, 10**400)


def whole(**changes):
  return made_up.result("lora", ranks=None, **changes)


def test_a_result_is_read_back_as_plain_values(tmp_path):
  result = whole(seed=np.int64(1993), statistics_bytes=np.int64(3))
  result["accuracy"] = np.array(result["accuracy"], float)
  result["config"] |= {"path": tmp_path, "ranks": (4, 8), "share": float("inf")}
  path = result_file.write_result(tmp_path, result)
  assert path == tmp_path / "result.json"
  assert "NaN" not in path.read_text()
  back = result_file.read_result(tmp_path)
  assert back == result_file.read_result(path)
  assert (back["statistics_bytes"], back["seed"], back["config"]["share"]) == (3, 1993, None)
  assert back["accuracy"] == whole()["accuracy"]
  assert back["config"]["path"] == str(tmp_path) and back["config"]["ranks"] == [4, 8]


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
  new = whole(config={"tasks.task_file": "a", "tasks.num_tasks": 5})
  late = (*result_file.ADDED, *result_file.NAMES, "schema", "statistics_bytes")
  old = {name: value for name, value in new.items() if name not in late}
  tasks = {"data_dir": "data of seed 1993", "stream": "a", "num_tasks": 5}
  old |= {"rehearsal_bytes": 0, "config": new["config"] | {"tasks": tasks}}
  (tmp_path / "result.json").write_text(json.dumps(old))
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
    ('{"finished": 1}', "not the result of a finished run"),
    ("[" * 100_000, "can't be read as a result"),
    ('{"finished": true}', "put back a copy of what the run wrote"),
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


def test_what_to_do_about_a_file_that_is_no_result_loses_nothing(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(ConfigError, match="; name the folder of a run, or its result.json$"):
    result_file.read_result(tmp_path / "config.json")
  (tmp_path / "result.json").write_text("{}")
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(
    ConfigError, match="; move it away, and the command of the run makes it again"
  ):
    result_file.read_result(tmp_path)


def test_every_field_has_a_kind():
  assert result_file.KINDS.keys() == result_file.FIELDS.keys()


def places(value, path=()):
  """Yields the paths of all fields and of the fields and items within them."""
  items = value.items() if isinstance(value, dict) else enumerate(value)
  for key, inner in items:
    yield (*path, key)
    if isinstance(inner, (dict, list)) and len(path) < 3:
      yield from places(inner, (*path, key))


def test_a_result_with_a_value_of_another_kind_is_left_out_and_named(tmp_path):
  card = {"old_image_bytes": 0, "old_statistics_bytes": 0, "validation_images": 0}
  card |= {"task_identity_at_test": False, "validation_read_by_method": False}
  card |= {"measured_on": "test", "copies": dict.fromkeys(result_file.COPIES, 0)}
  result = made_up.result(tasks=2, ranks=[8, 4], complexity=[None, 0.5], protocol=card)
  result["config"]["head"] = {"kind": "linear", "alignment": {"epochs": 1}}
  made_up.save(tmp_path / "good", result)
  made_up.save(tmp_path / "odd", result | {"params_sha256": "0" * 24})
  text, left_out = (tmp_path / "odd" / "result.json").read_text(), 0
  for i, path in enumerate(places(json.loads(text))):
    for wrong in WRONG if len(path) == 1 else WRONG[i % 5 :: 5]:  # all of each field
      changed = json.loads(text)
      inner = changed
      for key in path[:-1]:
        inner = inner[key]
      inner[path[-1]] = wrong
      (tmp_path / "odd" / "result.json").write_text(json.dumps(changed))
      results, notes = load([tmp_path])
      if notes:
        (note,) = notes
        assert (
          note.startswith(f"left out: {tmp_path / 'odd' / 'result.json'}: ") and len(note) < 500
        )
        left_out += 1
      else:  # what is read can be reported
        tables.show(results, Console(quiet=True))
        paper_markdown.markdown(paper.compare(results), notes)
  assert left_out > 300


@pytest.mark.parametrize("name", [*result_file.SCORES, "accuracy", "seed", "method", "epochs"])
def test_a_field_that_was_edited_beside_the_others_is_refused(tmp_path, name):
  made_up.save(tmp_path / "run", whole())
  path = tmp_path / "run" / "result.json"
  result = json.loads(path.read_text())
  edited = {"accuracy": [*result["accuracy"][:-1], [0.99] * 5], "method": "l2p"}
  result[name] = edited[name] if name in edited else result[name] + 1
  path.write_text(json.dumps(result))
  with pytest.raises(ConfigError, match=f"result.json: {name} is .*: must be .*; put back a copy"):
    result_file.read_result(path)


@pytest.mark.parametrize(
  "path",
  [
    ("n_test", 0),
    ("params", "trained"),
    ("params", "stored_per_task", 0),
    ("params", "stored_total"),
    ("passes", "train"),
    ("statistics_bytes",),
    ("batch_size",),
    ("wall_seconds", "total"),
  ],
)
def test_a_result_with_a_negative_count_is_left_out_with_its_line(tmp_path, path):
  made_up.save(tmp_path / "good", whole())
  made_up.save(tmp_path / "odd", whole(seed=7, params_sha256="0" * 24))
  file = tmp_path / "odd" / "result.json"
  changed = inner = json.loads(file.read_text())
  for key in path[:-1]:
    inner = inner[key]
  inner[path[-1]] = -1
  file.write_text(json.dumps(changed))
  results, (note,) = load([tmp_path])
  assert [result["seed"] for result in results] == [whole()["seed"]]
  assert note.startswith(f"left out: {file}: {path[0]} is ") and "-1" in note
  assert "must be as runs write it, no count below 0" in note and "\n" not in note
