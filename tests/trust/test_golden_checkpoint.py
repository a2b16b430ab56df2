"""Checkpoints written by earlier versions resume with the same losses."""

import json
import pathlib
import shutil

import golden_checkpoint
import numpy as np
import on_devices
import pytest

from fmlora_jax.experiment import provenance

ARCHIVES = sorted((pathlib.Path(__file__).parents[1] / "golden").glob("checkpoint_*.zip"))


@pytest.mark.tier(2)
@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.stem)
def test_a_checkpoint_of_an_earlier_version_is_gone_on_from(tmp_path, archive):
  workdir = tmp_path / "run"
  shutil.unpack_archive(archive, workdir)
  expected = json.loads((workdir / golden_checkpoint.EXPECTED).read_text())
  assert on_devices.go_on(str(workdir), fsdp=1, saves=None) == expected["digests"]
  found = golden_checkpoint.losses(workdir, expected["step"])
  exact = sum(a == b for a, b in zip(found, expected["losses"], strict=True))
  apart = np.max(np.abs(np.divide(found, expected["losses"]) - 1))
  same = expected["versions"]["jaxlib"] == provenance.versions()["jaxlib"]
  print(f"{archive.stem}: digests equal, {exact}/{len(found)} losses identical, all within "
        f"{apart:.0e}, {'same' if same else 'another'} jaxlib")  # fmt: skip
  assert apart <= 1e-5


def test_there_is_a_golden_checkpoint():
  assert ARCHIVES
