"""What a run says of itself."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from fmlora_jax.experiment import provenance
from fmlora_jax.experiment.provenance import params_sha256


def test_the_hash_of_parameters_sees_names_shapes_types_and_bits():
  base = {"a": np.zeros(2, np.float32), "b": np.ones(3, np.float32)}
  hashes = {
    params_sha256(tree)
    for tree in (
      base,
      {"c": base["a"], "b": base["b"]},
      base | {"a": np.zeros((2, 1), np.float32)},
      base | {"a": np.zeros(2, np.int32)},
      base | {"a": np.array([0.0, -0.0], np.float32)},
    )
  }
  assert len(hashes) == 5
  assert params_sha256({"b": base["b"], "a": base["a"]}) in hashes


def test_the_commit_is_of_the_source_and_not_of_the_checkout_around_it(tmp_path, monkeypatch):
  """As of a package that is installed in a folder which git ignores, or does not know."""
  file = tmp_path / "site" / "provenance.py"
  file.parent.mkdir()
  shutil.copy(provenance.__file__, file)
  monkeypatch.setattr(provenance, "__file__", str(file))

  def git(*arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True)

  def commit():
    return provenance.git_commit.__wrapped__()

  assert commit() is None
  (tmp_path / "theirs.txt").write_text("theirs")
  git("init")
  git("add", "theirs.txt")
  git("commit", "-m", "theirs")
  assert commit() is None
  git("add", "site")
  git("commit", "-m", "ours")
  head = (tmp_path / ".git" / "HEAD").read_text().split()[1]
  assert commit() == (tmp_path / ".git" / head).read_text().strip()
  file.write_text("changed")
  assert commit().endswith("-dirty")


def test_the_environment_that_decides_about_numbers_is_recorded():
  given = {
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_ENABLE_X64": "1",
    "JAX_RANDOM_SEED_OFFSET": "3",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "NVIDIA_TF32_OVERRIDE": "0",
    "XLA_FLAGS": "--xla_cpu_enable_fast_math --xla_dump_to=x",
  }
  program = "import json; from fmlora_jax.experiment import provenance as p; "
  command = [sys.executable, "-c", f"{program}print(json.dumps(p.environment()))"]
  done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True, check=True)
  now, usual = json.loads(done.stdout), provenance.environment()
  assert {name for name in usual if usual[name] != now[name]} == {*given}
  assert now["XLA_FLAGS"] == "xla_cpu_enable_fast_math=true"
  assert now["JAX_ENABLE_X64"] is True and now["JAX_RANDOM_SEED_OFFSET"] == 3


@pytest.mark.parametrize(
  ("flags", "kept"),
  [
    ("--xla_force_host_platform_device_count=8 --xla_dump_to=/x --xla_dump_hlo_as_text", ""),
    ("--xla_gpu_cuda_data_dir=/x --xla_cpu_parallel_codegen_split_count=4", ""),
    ("--xla_b=1  --xla_a", "xla_a=true xla_b=1"),
    ("--xla_a=1 --xla_a=2", "xla_a=2"),
    ("FILE", "xla_cpu_enable_fast_math=true"),
  ],
)
def test_flags_of_xla_that_do_not_decide_about_numbers_are_left_out(
  monkeypatch, tmp_path, flags, kept
):
  (tmp_path / "flags").write_text("--xla_cpu_enable_fast_math=true\n--xla_dump_to=x\n")
  monkeypatch.setenv("XLA_FLAGS", flags.replace("FILE", str(tmp_path / "flags")))
  assert provenance.environment()["XLA_FLAGS"] == kept
