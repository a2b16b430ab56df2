"""A disk that fills up loses nothing that was saved."""

import os
import subprocess

import micro_runs
import pytest

from fmlora_jax.config import ConfigError
from fmlora_jax.experiment.run import run
from fmlora_jax.experiment.setup import SetupCache
from fmlora_jax.workdir import checkpoint, files, log, result_file

MESSAGE = r"^\S+: the disk is full, [\d,]+ bytes needed, [\d,]+ free: make room, and "


@pytest.fixture
def small_disk(tmp_path):
  if os.geteuid() != 0:
    pytest.skip("mounting a tmpfs needs root")
  place = tmp_path / "disk"
  place.mkdir()
  mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", place], check=False)
  if mounted.returncode:
    pytest.skip("no tmpfs can be mounted here")
  yield place
  subprocess.run(["umount", "--lazy", place], check=True)


def fill(filler):
  """Leaves no byte free where `filler` lies."""
  with open(filler, "wb", buffering=0) as file:
    while True:
      try:
        file.write(bytes(2**12))
      except OSError:
        return


def run_until_full(settings, workdir, cache, owner, name, call) -> bool:
  """Runs with a disk that is full from the call-th call of a function; returns if it came to it."""
  filler, original, left = workdir.parent / "filler", getattr(owner, name), [call]

  def on_full_disk(*args, **kwargs):
    left[0] -= 1
    if left[0] == 0:
      fill(filler)
    return original(*args, **kwargs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(owner, name, on_full_disk)
    try:
      with pytest.raises(ConfigError, match=MESSAGE):
        run(settings, workdir, cache=cache)
    finally:
      filler.unlink(missing_ok=True)
  return left[0] <= 0


@pytest.mark.tier(2)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_that_met_a_full_disk_goes_on_to_the_same_result(small_disk):
  settings, cache = micro_runs.settings("lora"), SetupCache()
  with micro_runs.small_parts():
    saves, save = [], checkpoint.CheckpointStore.save
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(
        checkpoint.CheckpointStore, "save", lambda *a, **k: (saves.append(a), save(*a, **k))
      )
      run(settings, small_disk / "whole", cache=cache)
    expected = micro_runs.outcome(small_disk / "whole")
    writes = [(checkpoint.CheckpointStore, "save", call + 1) for call in range(len(saves))]
    writes += [(log.RunLog, "scalars", call) for call in (1, 7)]
    writes += [(result_file, "write_result", 1)]
    equal = 0
    for i, (owner, name, call) in enumerate(writes):
      workdir = small_disk / str(i)
      run_until_full(settings, workdir, cache, owner, name, call)
      equal += micro_runs.resumed(settings, workdir, cache) == expected
      subprocess.run(["rm", "-r", workdir], check=True)
  print(f"disk full at {len(saves)} saves and {len(writes) - len(saves)} other writes, "
        f"{equal}/{len(writes)} went on to the identical result")  # fmt: skip
  assert equal == len(writes)


def test_a_run_that_will_not_fit_is_refused_in_one_line(tmp_path):
  with pytest.raises(ConfigError, match=r"checkpoints need 9(,000){6} bytes, [\d,]+ are free"):
    files.require_free_space(tmp_path, 9_000_000_000_000_000_000, "checkpoints")
  files.require_free_space(tmp_path, 1, "checkpoints")
