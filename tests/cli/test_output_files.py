"""Outputs that can't be written are refused before work, by each command."""

import importlib
import os

import pytest

from fmlora_jax import __main__ as top
from fmlora_jax.cli import flags, output_files
from fmlora_jax.config import ConfigError

WRONG = [  # command and flag, the value, the reason
  ("pretrain --output", "folder", "must end in .safetensors"),
  ("pretrain --output", "x.bin", "must end in .safetensors"),
  ("pretrain --output", "no/x.safetensors", "there is no folder 'no'; make it first"),
  ("bench --json", "folder", "is a folder, must be a file; name one in it"),
  ("bench --json", "no/x.json", "there is no folder 'no'; make it first"),
  ("bench --json", "", "must be the name of a file"),
  ("bench --peers --peers_python", "/no/python", "must be a Python with torch, .*can't be started"),
  ("bench --peers_python", "python", "needs --peers"),
  ("bench.gpu --out", "file", "'file' is no folder"),
  ("bench.gpu --out", "file/x", "'.*/file' is no folder"),
  ("bench.gpu --out=x --batches", "a", "must be whole numbers"),
  ("report x --plot", "x.jpg", "must end in .png"),
  ("report x --plot", "no/x.png", "there is no folder 'no'"),
  ("report x --plot", "", "must end in .png"),
  ("report --paper x --html", "no/x.html", "there is no folder 'no'"),
  ("report --paper x --html", "folder", "must end in .html"),
  ("prepare cifar100 --data_dir", "file", "'file' is no folder"),
]


@pytest.mark.parametrize(("command", "value", "reason"), WRONG)
def test_an_output_that_cannot_be_written_is_refused_before_work(
  monkeypatch, tmp_path, command, value, reason
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "folder").mkdir()
  (tmp_path / "file").write_text("mine")
  name, *words, flag = command.split()
  module = importlib.import_module(top.COMMANDS[name])
  values = module.define_flags()
  flags.define_shared(values)
  with pytest.raises(ConfigError, match=f"^{flag} is .*{reason}"):
    module.main(flags.parse(values, [name, *words, f"{flag}={value}"]))
  assert sorted(os.listdir()) == ["file", "folder"] and not os.listdir("folder")
  assert (tmp_path / "file").read_text() == "mine"


def test_outputs_that_can_be_written_are_left_as_they_are(tmp_path):
  old = tmp_path / "old.png"
  old.write_text("old")
  assert output_files.require_file("--plot", str(old), ".png") == old
  assert output_files.require_file("--plot", str(tmp_path / "new.png")) == tmp_path / "new.png"
  assert output_files.require_file("--json", os.devnull)
  assert output_files.require_folder("--out", str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
  assert [path.name for path in tmp_path.iterdir()] == ["old.png"] and old.read_text() == "old"


@pytest.mark.parametrize("name", ["x" * 300, "/proc/x"])
def test_names_that_no_file_can_have_are_refused(tmp_path, name):
  with pytest.raises(ConfigError, match="can't be written"):
    output_files.require_file("--json", str(tmp_path / name))
  with pytest.raises(ConfigError, match="can't be written"):
    output_files.require_folder("--out", str(tmp_path / name))
