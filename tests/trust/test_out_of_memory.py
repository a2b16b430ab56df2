"""A batch that the machine can't hold is one line with what lowers the need."""

import os
import subprocess
import sys

import processes
import pytest

LIMIT = 'ulimit -v 8388608 && exec "$0" "$@"'  # KiB of addresses; XLA maps more than it uses


@pytest.mark.tier(2)
def test_too_large_a_batch_is_one_line_with_its_size(tmp_path):
  command = [
    "bash",
    "-c",
    LIMIT,
    sys.executable,
    "-m",
    "fmlora_jax.main",
    "--config=configs/digits.py",
  ]
  command += ["--config.batch_size=16384", "--config.epochs=1", f"--workdir={tmp_path / 'run'}"]
  env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  done = subprocess.run(
    command,
    cwd=processes.ROOT,
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2, done.stderr
  line = done.stderr.splitlines()[-1]
  assert line.startswith("error: config.batch_size is 16384: out of memory, the machine has ")
  assert "lower it, config.eval_batch_size or config.input.source_size" in line
  assert not (tmp_path / "run" / "result.json").exists()
