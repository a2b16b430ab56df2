"""A lock on a folder: held once, freed when its holder ends in any way."""

import errno
import fcntl
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import pytest

from fmlora_jax.config import ConfigError
from fmlora_jax.workdir import lock

ROOT = pathlib.Path(__file__).parents[2]
HOLD = """
import pathlib, sys
from fmlora_jax.workdir import lock
with lock.hold_lock(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  sys.stdin.read()
"""


def test_a_second_holder_is_refused_and_told_who_the_first_is(tmp_path):
  folder = tmp_path / "a" / "b"
  with lock.hold_lock(folder):
    (folder / "result").touch()
    with pytest.raises(ConfigError) as refused, lock.hold_lock(folder):
      pass
    holder = json.loads((folder / lock.FILE).read_text())
  assert (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid())
  assert str(refused.value) == (
    f"workdir {folder} is in use by process {os.getpid()} on {socket.gethostname()} (since "
    f"{holder['since']}). Only one run may write to it: wait, stop that process, or pass another "
    "--workdir"
  )
  with lock.hold_lock(folder):
    pass


def test_the_kernel_frees_it_when_its_holder_is_killed(tmp_path):
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], env=environment, **pipes) as holder:
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"by process {holder.pid} on"), lock.hold_lock(tmp_path):
      pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lock.hold_lock(tmp_path):
      pass


def test_where_nothing_was_written_nothing_is_left(tmp_path):
  for folder in (tmp_path / "new", tmp_path):
    with pytest.raises(KeyError), lock.hold_lock(folder):
      raise KeyError
    assert not list(tmp_path.iterdir())
  (tmp_path / "of_another_program").touch()
  with pytest.raises(KeyError), lock.hold_lock(tmp_path):
    raise KeyError
  assert [path.name for path in tmp_path.iterdir()] == ["of_another_program"]


def test_a_lock_that_its_holder_deletes_meanwhile_is_made_again(tmp_path, monkeypatch):
  flock, left = fcntl.flock, [1]

  def delete_first(file, operation):
    if left:
      (tmp_path / lock.FILE).unlink()
      left.pop()
    flock(file, operation)

  monkeypatch.setattr(fcntl, "flock", delete_first)
  with lock.hold_lock(tmp_path):
    assert (tmp_path / lock.FILE).exists()
    with pytest.raises(ConfigError), lock.hold_lock(tmp_path):
      pass


def test_a_holder_that_has_not_said_who_it_is_is_refused_too(tmp_path):
  with open(tmp_path / lock.FILE, "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    message = re.escape(f"workdir {tmp_path} is in use. Only")
    with pytest.raises(ConfigError, match=message), lock.hold_lock(tmp_path):
      pass


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch, caplog):
  def flock(file, operation):
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

  monkeypatch.setattr(fcntl, "flock", flock)
  with lock.hold_lock(tmp_path):
    pass
  (line,) = caplog.messages
  assert line == (
    f"workdir {tmp_path} can't be locked ([Errno 95] Operation not supported): start no second run "
    "in it"
  )


def lose(folder):
  (folder / lock.FILE).unlink()


def exchange(folder):
  lose(folder)
  (folder / lock.FILE).touch()


def rename(folder):
  folder.rename(folder.with_name("elsewhere"))


@pytest.mark.parametrize("change", [lose, exchange, rename])
def test_a_lock_that_is_lost_is_noticed_and_what_is_there_left_alone(tmp_path, change):
  folder = tmp_path / "run"
  with pytest.raises(ConfigError) as lost, lock.hold_lock(folder) as require_held:
    require_held()
    change(folder)
    require_held()
  assert f"workdir {folder} is not this run's any more" in str(lost.value)
  assert [path.name for path in folder.glob("*")] == [lock.FILE] * (change is exchange)


def test_a_folder_in_the_place_of_the_lock_is_one_line(tmp_path):
  (tmp_path / lock.FILE).mkdir()
  with pytest.raises(ConfigError, match=r"\.lock is a folder or device: must be a file"):
    lock.hold_lock(tmp_path).__enter__()


def test_a_link_is_not_followed(tmp_path):
  (tmp_path / "mine").write_text("important")
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / lock.FILE).symlink_to(tmp_path / "mine")
  with pytest.raises(
    ConfigError, match=r"holds the link '\.lock': must hold plain files and folders"
  ):
    lock.hold_lock(tmp_path / "run").__enter__()
  assert (tmp_path / "mine").read_text() == "important"
