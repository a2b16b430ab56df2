"""What a run says of itself."""

import shutil
import subprocess

import numpy as np

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
