import os

import pytest

from fmlora_jax.workdir import files


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
  files.write_atomically(tmp_path / "file", "old")

  def crash(*_):
    raise OSError("crash")

  monkeypatch.setattr(os, "replace", crash)
  with pytest.raises(OSError, match="crash"):
    files.write_atomically(tmp_path / "file", "new")
  assert (tmp_path / "file").read_text() == "old"
