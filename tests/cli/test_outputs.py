"""Folders and files to write: what can't be is refused in one line, and nothing is made."""

import importlib
import os
import pathlib
import re

import pytest

from fmlora_jax import __main__ as top
from fmlora_jax.cli import flags, outputs
from fmlora_jax.config import ConfigError

ODD = [f"a{c}b" for c in outputs.GLOBS] + ["x[1]", "gs:/x", "y" * 300, "y/" * 2500, "a\nb"]


def tree(folder):
  return sorted(folder.rglob("*"))


def refused(check, *arguments):
  with pytest.raises(ConfigError) as error:
    check(*arguments)
  message = str(error.value)
  assert re.match(r"--out is '.+': must ", message) and "\n" not in message and len(message) < 600
  return message


@pytest.mark.parametrize("name", [*ODD, "file", "file/below", "loop"])
def test_a_folder_that_cannot_be_is_refused_and_nothing_is_made(tmp_path, name):
  (tmp_path / "file").write_text("mine")
  (tmp_path / "loop").symlink_to("loop")
  before = tree(tmp_path)
  refused(outputs.require_folder, "--out", tmp_path / name)
  assert tree(tmp_path) == before and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("path", ["/dev/null", "/dev/null/x", "/proc", "/proc/x", "/sys/x"])
def test_what_is_no_place_for_files_is_refused(path):
  refused(outputs.require_folder, "--out", pathlib.Path(path))
  refused(outputs.require_file, "--out", pathlib.Path(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
  tmp_path.chmod(0o500)
  assert "Permission denied" in refused(outputs.require_folder, "--out", tmp_path / "a" / "b")
  assert "Permission denied" in refused(outputs.require_file, "--out", tmp_path / "a")
  assert not outputs.is_writable(tmp_path)


def test_a_folder_that_can_be_made_is_not_made_yet(tmp_path):
  for name in ("", "new", "a/b/c d/é", "x" * 255):
    outputs.require_folder("--out", tmp_path / name)
  assert outputs.is_writable(tmp_path) and not tree(tmp_path)


def test_a_file_needs_a_folder_and_its_ending(tmp_path):
  (tmp_path / "old.png").write_text("old")
  for name in ("old.png", "new.png"):
    outputs.require_file("--out", tmp_path / name, ".png")
  assert [path.name for path in tree(tmp_path)] == ["old.png"]
  assert "must end in .png" in refused(outputs.require_file, "--out", tmp_path / "x.pdf", ".png")
  for name in ("no/x.png", "old.png/x.png", "", f"{'y' * 300}.png"):
    refused(outputs.require_file, "--out", tmp_path / name)


WRONG = [  # command and flag, the value, the reason
  ("pretrain --output", "folder", "must end in .safetensors"),
  ("pretrain --output", "x.bin", "must end in .safetensors"),
  ("pretrain --output", "no/x.safetensors", "in a folder that exists, no does not"),
  ("pretrain --output", "old.safetensors", "must be a new file; name another"),
  ("bench --json", "folder", "a file or new, it is a folder"),
  ("bench --json", "file", "new or of this program, it is another file; name another"),
  ("bench --json", "no/x.json", "in a folder that exists, no does not"),
  ("bench --json", "", "a file or new, it is a folder"),
  ("bench --peers --peers_python", "/no/python", "must be a Python with torch, .*can't be started"),
  ("bench --peers_python", "python", "needs --peers"),
  ("bench --methods=lora --rank", "4", "is not used beside --methods; .*lora:rank=8"),
  ("bench --methods=lora --prompts", "10", "is not used beside --methods"),
  ("bench --methods=lora --repeats", "5", "is not used beside --methods"),
  ("bench --variants", "peft", "needs --peers"),
  ("bench.gpu --out=x --batches", "64,64", "must be whole numbers, each once"),
  ("bench.gpu --out=x --batches", "64,064", "must be whole numbers, each once"),
  ("bench --architecture", "VIT", "must be one of"),
  ("bench.gpu --out=x --architecture", "VIT", "must be one of"),
  ("bench.gpu --out=x --seconds", "nan", "must be a number"),
  ("bench.gpu --out=x --seconds", "inf", "must be a number"),
  ("bench.gpu --out", "file", "a folder, this is none"),
  ("bench.gpu --out", "file/x", "a folder, .*/file is none"),
  ("bench.gpu --out=x --batches", "a", "must be whole numbers"),
  ("report x --plot", "x.jpg", "must end in .png"),
  ("report x --plot", "old.png", "new or of this program, it is another file; name another"),
  ("report x --plot", "no/x.png", "in a folder that exists, no does not"),
  ("report x --plot", "", "must end in .png"),
  ("report --paper x --html", "no/x.html", "in a folder that exists, no does not"),
  ("report --paper x --html", "folder", "must end in .html"),
  ("report x --share", "old.zip", "must be a new file; name another"),
  ("prepare cifar100 --data_dir", "file", "a folder, this is none"),
]


@pytest.mark.parametrize(("command", "value", "reason"), WRONG)
def test_an_output_that_cannot_be_written_is_refused_before_work(
  monkeypatch, tmp_path, command, value, reason
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "folder").mkdir()
  own = ["file", "old.png", "old.safetensors", "old.zip"]
  for mine in own:
    (tmp_path / mine).write_text("mine")
  name, *words, flag = command.split()
  module = importlib.import_module(top.COMMANDS[name])
  values = module.define_flags()
  flags.define_shared(values)
  with pytest.raises(ConfigError, match=f"^{flag} is .*{reason}"):
    module.main(flags.parse(values, [name, *words, f"{flag}={value}"]))
  assert sorted(os.listdir()) == sorted(["folder", *own]) and not os.listdir("folder")
  assert all((tmp_path / mine).read_text() == "mine" for mine in own)
