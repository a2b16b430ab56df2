"""The package as it is installed: what is in it, and its public names."""

import pathlib
import tomllib

import fmlora_jax
from fmlora_jax.config import Config
from fmlora_jax.experiment.run import run

ROOT = pathlib.Path(__file__).parents[1]


def test_pyproject_lists_every_package():
  listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
  folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("fmlora_jax/**/*.py")}
  assert sorted(listed) == sorted({"fmlora_jax.configs", *(".".join(f.parts) for f in folders)})


def test_public_names_are_imported_when_they_are_used():
  assert fmlora_jax.Config is Config and fmlora_jax.run is run
  assert all(hasattr(fmlora_jax, name) for name in fmlora_jax.__all__)
  assert not hasattr(fmlora_jax, "nothing")
