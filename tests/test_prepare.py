"""The command that builds benchmarks: all of it that needs neither TensorFlow nor a network."""

import hashlib
import os
import pathlib
import re
import subprocess
import sys

import fakes
import pytest

from fmlora_jax import prepare
from fmlora_jax.cli import errors, flags
from fmlora_jax.config import ConfigError
from fmlora_jax.tasks.benchmarks import domainnet
from fmlora_jax.tasks.tfds import build, prepared

ROOT = pathlib.Path(__file__).parents[1]


def call(*arguments):
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-m", "fmlora_jax.prepare", *map(str, arguments)]
  return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_a_dry_run_says_what_would_be_downloaded_and_does_nothing(tmp_path):
  done = call("domainnet", f"--data_dir={tmp_path}", "--domains=real,sketch", "--dry_run")
  assert done.returncode == 0, done.stderr
  assert "domainnet/real: to be built from" in done.stdout
  assert "real.zip                       5.65 GiB  http://csr.bu.edu/ftp/" in done.stdout
  assert "clipart" not in done.stdout
  assert "to download 8.11 GiB" in done.stdout
  assert not any(tmp_path.iterdir())


def test_what_is_built_is_looked_at_and_not_built_again(tmp_path):
  fakes.cifar100(tmp_path)
  done = call("cifar100", f"--data_dir={tmp_path}")
  assert done.returncode == 0, done.stderr
  assert "cifar100 3.0.2: built already" in done.stdout
  assert "ready: cifar100/official, 20 classes, 220 train, 20 val, 60 test" in done.stdout
  assert len(list(tmp_path.glob(".fmlora_manifest_cifar100_*.json"))) == 1


def test_missing_packages_are_named_with_the_command(tmp_path):
  done = call("cub200", f"--data_dir={tmp_path}")
  assert done.returncode == 2
  last = done.stderr.splitlines()[-1]
  assert last.startswith("error: building needs tensorflow-cpu and opencv-python-headless")
  assert f"{sys.executable} -m pip install tensorflow-cpu opencv-python-headless" in last


def test_weights_and_packages_that_are_missing_are_said_at_once(tmp_path):
  done = call("cub200", f"--data_dir={tmp_path}", "--with_weights")
  assert done.returncode == 2
  first, weights, packages = done.stderr.splitlines()[-3:]
  assert first == "error: 2 problems:" and "`hf download timm/vit_base_patch16" in weights
  assert packages.startswith("  building needs tensorflow-cpu and opencv-python-headless")
  done = call("cub200", f"--data_dir={tmp_path}", "--with_weights", "--dry_run")
  assert done.stdout.startswith("weights augreg2_in21k_ft_in1k: would be downloaded\n")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "name one benchmark"),
    (["imagenet_s"], "'imagenet_s': must be one of .*; did you mean 'imagenet_r'"),
    (["digits"], "'digits': it needs no preparation"),
    (["tfds:cifar1000"], "TFDS knows no data set 'cifar1000'"),
    (["domainnet", "--domains=reel"], "--domains has 'reel': must be one of clipart"),
    (["cifar100", "--domains=real"], "--domains has 'real': must be left out"),
    (["cifar100", "--archives=/no/such"], "--archives is '/no/such': no such folder"),
  ],
)
def test_wrong_input_is_one_line(tmp_path, arguments, message):
  values = prepare.define_flags()
  flags.define_shared(values)
  words = ["prepare", *arguments, *([f"--data_dir={tmp_path}"] if arguments else [])]
  with pytest.raises(ConfigError) as error:
    prepare.main(flags.parse(values, words))
  said = errors.explain(error.value)
  assert re.search(message, said) and "\n" not in said, said


def test_every_domain_has_its_published_files():
  infos = {}
  for name in domainnet.BUILDERS:
    builder = prepared.get_builder(name, pathlib.Path("nowhere"), "domainnet")
    mine = build.url_infos(builder)
    domain = name.split("/")[1]
    names = {info.filename for info in mine.values()}
    assert names == {f"{domain}.zip", f"{domain}_train.txt", f"{domain}_test.txt"}
    infos |= mine
  assert len(infos) == 18
  assert all(len(info.checksum) == 64 and int(info.size) > 0 for info in infos.values())


def test_a_local_archive_is_checked_against_its_published_hash(tmp_path):
  path = tmp_path / "real.zip"
  path.write_bytes(b"some bytes")
  right = build.UrlInfo(10, hashlib.sha256(b"some bytes").hexdigest(), "real.zip")
  assert build.DownloadFile(url="u", info=right, local=path).checked_info(unverified=False) == right
  wrong = build.DownloadFile(url="u", info=build.UrlInfo(10, "0" * 64, "real.zip"), local=path)
  with pytest.raises(ConfigError, match="real.zip has 10 bytes and sha256 .*--unverified"):
    wrong.checked_info(unverified=False)
  assert wrong.checked_info(unverified=True) == right
  assert build.DownloadFile(url="u", info=right, local=None).checked_info(unverified=False) is right


def test_a_folder_without_room_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(build, "SPACE_FACTOR", 10**9)
  with pytest.raises(ConfigError, match="are free there, about .* are needed"):
    build.prepare("imagenet_r", data_dir=str(tmp_path), archives=None)
