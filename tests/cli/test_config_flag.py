"""--config and --config.FIELD=VALUE: files, fields, old names, and names of workdirs."""

import dataclasses
import json
import pathlib
import re

import pytest

import fmlora_jax
from fmlora_jax import methods
from fmlora_jax.cli import config_flag
from fmlora_jax.config import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
read = config_flag.read_config


def test_a_file_is_a_path_or_the_name_of_a_shipped_one():
  assert sorted(config_flag.shipped()) == sorted(p.stem for p in ROOT.glob("configs/*.py"))
  assert read("digits:tasks=2") == read(f"{ROOT}/configs/digits.py:tasks=2")
  with pytest.raises(ConfigError, match="--config is 'digitz': no such file; .* did you mean 'dig"):
    read("digitz")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("1 / 0", r"mine.py, line 2: division by zero"),
    ("raise SystemError('x')", r"SystemError in .*mine.py, line 2: x"),
    ("return config_files.defaults(epoch=1)", "mine.py: NameError|NameError in .*, line 2"),
  ],
)
def test_an_error_in_a_config_file_names_its_line(tmp_path, text, message):
  (tmp_path / "mine.py").write_text(f"def get_config():\n  {text}\n")
  with pytest.raises(ConfigError, match=message):
    read(f"{tmp_path}/mine.py")


NO_CONFIG = {  # file -> its contents, and what is said
  "empty.py": (b"", "empty.py has no function get_config"),
  "number.py": (b"get_config = 3", "number.py has no function get_config"),
  "raises.py": (b"\nraise KeyError('boom')", "KeyError in .*raises.py, line 2: 'boom'"),
  "none.py": (b"def get_config(): pass", "get_config of .*none.py returns NoneType: must return"),
  "dict.py": (b"def get_config(): return {'epochs': 2}", "dict.py returns dict: must return a Con"),
  "list.py": (b"def get_config(): return [1]", "list.py returns list: must return a ConfigDict"),
  "syntax.py": (b"x = 1\ndef get_config(:", "SyntaxError in .*syntax.py, line 2: invalid syntax"),
  "text.py": (b"hello world", "SyntaxError in .*text.py, line 1: invalid syntax"),
  "imports.py": (b"compile('(', 'other.py', 'exec')", "SyntaxError in other.py, line 1: "),
  "bytes.py": (b"x = '\xf8'", "SyntaxError in .*bytes.py, line 1: .*utf-8"),
  "utf16.py": ("def get_config(): pass".encode("utf-16"), "utf16.py is no UTF-8 text"),
  "zero.py": (b"\0", "zero.py is no UTF-8 text, .*; save it as UTF-8"),
  "import.py": (b"import no_such_module", "ModuleNotFoundError in .*import.py, line 1: No module"),
  "exit.py": (b"import sys; sys.exit(0)", "SystemExit in .*exit.py, line 1: 0"),
  "stop.py": (b"raise KeyboardInterrupt", "KeyboardInterrupt in .*stop.py, line 1"),
  "deep.py": (b"def get_config(): return get_config()", "RecursionError in .*deep.py, line 1"),
  "more.py": (b"def get_config(variant): pass", "TypeError in .*more.py: .*missing 1 required"),
  "lacks.py": (
    b"import ml_collections as m\ndef get_config():\n  c = m.ConfigDict()\n"
    b"  c.epochs = m.config_dict.required_placeholder(int)\n  return c",
    "RequiredValueError in .*lacks.py: None value",
  ),
  "a.yaml": (b"epochs: 2", "a.yaml': is no config file, must be a file .py"),
  "a.txt": (b"epochs: 2", "a.txt': is no config file, must be a file .py"),
  "a.json": (b'{"epochs": 2}', "a.json is not the config.json of a run: it has no group 'config'"),
  "twice.json": (
    b'{"config": {"epochs": 1, "seed": 2, "epochs": 7}}',
    "twice.json is not the config.json of a run: 'epochs' is in it 2 times: must be there once",
  ),
  "list.json": (b"[1]", "list.json is not the config.json of a run"),
  "deep.json": (b"[" * 10**5, "deep.json is not the config.json of a run"),
  "bytes.json": (b"\xf8\xff", "bytes.json is not the config.json of a run"),
  "empty.json": (b"", "empty.json is not the config.json of a run"),
  "folder.py": (None, "folder.py': is a folder, must be a file"),
  "folder": (None, "folder': is a folder, must be a file"),
}


@pytest.mark.parametrize("name", NO_CONFIG)
def test_what_is_no_config_file_is_refused_by_its_name(tmp_path, name):
  contents, said = NO_CONFIG[name]
  if contents is None:
    (tmp_path / name).mkdir()
  else:
    (tmp_path / name).write_bytes(contents)
  with pytest.raises(ConfigError, match=said) as error:
    read(f"{tmp_path / name}")
  assert "\n" not in str(error.value)
  assert [path.name for path in tmp_path.iterdir()] == [name]  # no __pycache__ either


def test_values_are_set_with_the_type_of_their_field():
  changes = {
    "epochs": "3",
    "optim.clip_norm": "1",
    "tasks.order_seed": "7",
    "tasks.domains": "('a','b')",
    "seeds": "3,4",
    "weights.gelu": "tanh",
  }
  config = read("digits", changes.items())
  assert (config.epochs, config.optim.clip_norm, config.tasks.order_seed) == (3, 1.0, 7)
  assert (config.tasks.domains, config.seeds) == (("a", "b"), (3, 4))
  assert read("digits:method=l2p", [("method.batchwise", "true")]).method.batchwise is True
  assert read("digits", [("seeds", "3"), ("seeds", "4")]).seeds == (3, 4)


@pytest.mark.parametrize(
  "given",
  [["query,value"], ["query, value"], ["(query,value)"], ["('query','value')"], ["query", "value"]],
)
def test_a_tuple_of_texts_needs_no_quotes(given):
  changes = [("method.targets", text) for text in given]
  assert read("digits:method=lora", changes).method.targets == ("query", "value")


def test_one_text_stays_one():
  assert read("digits", [("tasks.domains", "real,clip-art")]).tasks.domains == ("real", "clip-art")
  assert read("digits", [("tasks.domains", "'a,b'")]).tasks.domains == ("a,b",)


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("1993,01993", r"seeds\[1\] is '01993': must be"),
    ("1993,x", r"seeds\[1\] is 'x': must be"),
    ("1993,,1994", r"seeds is '1993,,1994': must be a tuple, such as \(1, 2\)"),
  ],
)
def test_what_is_no_number_in_a_tuple_is_named(text, said):
  with pytest.raises(ConfigError, match=said):
    read("digits", [("seeds", text)])


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ([("method", "lora")], "--config.method: a method is named by .* --config=FILE:method=NAME"),
    ([("method.name", "lora")], "--config.method.name: a method is named by .*FILE:method=NAME"),
    ([("learning_rate", "1")], r"did you mean --config.optim.learning_rate\?"),
    ([("weight_decay", "1")], r"did you mean --config.optim.weight_decay\?"),
    ([("lora.rank", "1")], r"are --config.method.FIELD, with --config=FILE:method=lora"),
    ([("optim.epochs", "1")], r"'epochs' is not a field; did you mean --config.epochs\?"),
  ],
)
def test_a_setting_that_is_given_wrongly_is_told_the_right_way(changes, said):
  with pytest.raises(ConfigError, match=said):
    read("digits", changes)


def test_old_names_of_fields_set_the_new_ones_and_nothing_in_compared_methods():
  old = {"bases.max_rank": "16", "drs.rank": "4", "prompt.num_tokens": "3"}
  settings = read("digits", old.items()).method
  assert (settings.bases.max_rank, settings.drs.rank, settings.prompt.num_tokens) == (16, 4, 3)
  assert read("digits", [("tasks.stream", "a.json")]).tasks.task_file == "a.json"
  assert read("digits:method=lora", shared=old.items()) == read("digits:method=lora")
  with pytest.raises(ConfigError, match="'drs' is not a field of this method; fm_lora has it"):
    read("digits:method=lora", [("drs.rank", "4")])
  with pytest.raises(ConfigError, match="'rnk' is not a field; did you mean 'rank'"):
    read("digits", [("drs.rnk", "4")])


def test_the_config_of_a_run_of_any_version_is_a_config_file(tmp_path):
  file = tmp_path / "config.json"
  config = read("digits:method=lora", [("method.rank", "3")])
  file.write_text(json.dumps({"config": dataclasses.asdict(config)}))
  assert read(str(file)) == config
  assert read(str(file), [("method.rank", "4")]).method.rank == 4
  file.write_text(json.dumps({"config": {"drs": {"rank": 5}, "tasks": {"stream": "x"}}}))
  assert read(str(file)).method.drs.rank == 5 and read(str(file)).tasks.task_file == "x"
  wrong = {
    "{}": "is not the config.json of a run",
    '{"config": {"a": 1}}': "config.a is not a field",
    '{"seed": 7, "config": {}}': "'seed' stands beside the group 'config': move it into it",
  }
  for text, message in wrong.items():
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
      read(str(file))
  with pytest.raises(ConfigError, match="takes no :VARIANT"):
    read(f"{file}:method=lora")


def test_python_loads_what_a_shell_does():
  load = fmlora_jax.load_config
  assert load("digits", method="lora", epochs=2) == read("digits:method=lora", [("epochs", "2")])
  shell = read("digits:tasks=2,method=lora", [("method.rank", "3")])
  assert load("digits:tasks=2", method={"name": "lora", "rank": 3}) == shell
  assert load("digits", drs={"rank": 4}) == read("digits", [("drs.rank", "4")])
  assert load(pathlib.Path("digits")) == load("digits")
  for wrong, message in (
    ({"epoch": 2}, "config.epoch is not a field"),
    ({"tasks": 2}, "config.tasks is 2: must be a group of fields"),
    ({"method": 3}, "config.method is 3: must be a name"),
  ):
    with pytest.raises(fmlora_jax.ConfigError, match=message):
      load("digits", **wrong)


@pytest.mark.parametrize(
  ("file", "changes", "name"),
  [
    ("digits", {}, "digits-fm_lora-1993"),
    ("configs/digits.py", {"epochs": "30", "seed": "3"}, "digits-fm_lora-3"),
    ("digits:method=lora,tasks=2", {"epochs": "2"}, "digits-lora-1993-tasks=2-epochs=2"),
    ("digits", {"seeds": "1,2", "input.workers": "2"}, "digits-fm_lora"),
    ("image_folder", {"tasks.data_dir": "/a/b"}, "image_folder-fm_lora-1993-tasks.data_dir=b"),
    (
      "digits",
      {"drs.candidate_ranks": "(4,8)"},
      "digits-fm_lora-1993-method.drs.candidate_ranks=4-8",
    ),
  ],
)
def test_the_default_workdir_is_named_after_what_differs_from_the_file(
  monkeypatch, file, changes, name
):
  monkeypatch.chdir(ROOT)
  assert config_flag.workdir_name(file, read(file, changes.items())) == name


def test_a_long_name_is_hashed_and_a_config_json_always(tmp_path):
  changes = [(f"optim.{name}", "0.5") for name in ("learning_rate", "weight_decay", "clip_norm")]
  names = [config_flag.workdir_name("digits", read("digits", changes[:n])) for n in (1, 2, 3)]
  assert names[0] == "digits-fm_lora-1993-optim.learning_rate=0.5"
  assert len({*names}) == 3 and all(len(name) < 82 for name in names)
  file = tmp_path / "config.json"
  for epochs in (30, 31):
    config = dataclasses.replace(read("digits"), epochs=epochs)
    file.write_text(json.dumps({"config": dataclasses.asdict(config)}))
    names.append(config_flag.workdir_name(str(file), read(str(file))))
  assert len({*names}) == 5
  assert all(re.fullmatch("digits-fm_lora-1993-[0-9a-f]{8}", name) for name in names[3:])


def test_fields_of_another_method_name_the_method():
  for method in methods.names():
    if method != "inflora":
      with pytest.raises(ConfigError, match="inflora has it: --config=FILE:method=inflora"):
        read(f"digits:method={method}", [("method.final_threshold", "1")])
