import errno
import os
import types

import pytest

from fmlora_jax.config import ConfigError
from fmlora_jax.workdir import files


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
  files.write_atomically(tmp_path / "file", "old")

  def crash(*_):
    raise OSError("crash")

  monkeypatch.setattr(os, "replace", crash)
  with pytest.raises(OSError, match="crash"):
    files.write_atomically(tmp_path / "file", "new")
  assert (tmp_path / "file").read_text() == "old"


def test_a_quota_a_limit_of_files_and_a_full_disk_are_told_apart(tmp_path, monkeypatch):
  def refusal(code):
    with pytest.raises(ConfigError) as refused, files.explain_failure(tmp_path / "x", 9):
      raise OSError(code, os.strerror(code))
    return str(refused.value)

  assert ": your quota of this disk is used up, 9 bytes needed: make room" in refusal(errno.EDQUOT)
  assert ": a file of this process may have at most " in refusal(errno.EFBIG)
  assert ": the disk is full, 9 bytes needed, " in refusal(errno.ENOSPC)
  no_inodes = types.SimpleNamespace(f_files=12, f_favail=0, f_bavail=1, f_frsize=1, f_blocks=1)
  no_inodes.f_bfree = 1
  monkeypatch.setattr(os, "statvfs", lambda path: no_inodes)
  assert ": the disk takes no more files, though " in refusal(errno.ENOSPC)
