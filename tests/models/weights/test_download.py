"""Weights that are not here: found in the Hub's cache, copied from a bucket, or asked for."""

import builtins
import hashlib
import http.server
import os
import subprocess
import sys
import threading

import pytest
from etils.epath import testing
from on_disk import TINY, assert_equal, random_params, to_google, to_timm, write, write_npz

from fmlora_jax.config import ConfigError, WeightsConfig
from fmlora_jax.models import vit
from fmlora_jax.models.weights import published, registry

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = (
  published.CheckpointFile(layout="timm", repository="ada/tiny", revision=COMMIT),
  published.CheckpointFile(layout="google", bucket="ada/augreg", name="Ti.npz"),
)


@pytest.fixture(autouse=True)
def tiny_checkpoint(monkeypatch):
  """One checkpoint that tests can afford, on the Hub and in a bucket."""
  monkeypatch.setitem(vit.ARCHITECTURES, "tiny", TINY)
  source = published.Checkpoint(files=FILES, architecture="tiny", normalisation="half")
  monkeypatch.setitem(registry.WEIGHTS, "tiny", source)


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
  """Returns the empty cache folder of a huggingface_hub that conftest.py keeps offline."""
  constants = pytest.importorskip("huggingface_hub.constants", reason="the extra `hub`")
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
  return tmp_path


def refusal(**fields) -> str:
  with pytest.raises(ConfigError) as caught:
    registry.load(WeightsConfig(**fields))
  message = str(caught.value)
  assert "\n" not in message
  assert caught.value.__suppress_context__ or caught.value.__context__ is None
  return message


COMMANDS = (
  f"run `hf download ada/tiny model.safetensors --revision {COMMIT}` or "
  "`curl -LO https://storage.googleapis.com/ada/augreg/Ti.npz` and pass --config.weights.path=FILE"
)


def test_without_the_hub_library_the_commands_are_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
  message = refusal(tag="tiny")
  assert message.startswith(
    "config.weights.tag is 'tiny': its file does not ship with fmlora_jax: "
  )
  assert "pip install huggingface_hub" in message
  assert COMMANDS in message


def test_offline_the_commands_are_named(hub_cache):
  message = refusal(tag="tiny")
  assert "the download failed: " in message
  assert "offline mode is enabled" in message
  assert COMMANDS in message


def lay_into_cache(folder, params):
  """Writes a file as huggingface_hub keeps it: a blob, and a link to it for each commit."""
  repository = folder / "models--ada--tiny"
  blob, link = repository / "blobs" / ("ab" * 32), repository / "snapshots" / COMMIT
  for parent in (blob.parent, link):
    parent.mkdir(parents=True)
  write(blob, to_timm(params, TINY))
  os.symlink(blob, link / "model.safetensors")


def test_a_file_in_the_cache_of_the_hub_is_taken(hub_cache, caplog):
  lay_into_cache(hub_cache, random_params(TINY))
  with caplog.at_level("INFO", logger="fmlora_jax"):
    params, _, info = registry.load(WeightsConfig(tag="tiny"))
  assert not [record for record in caplog.records if "downloading" in record.getMessage()]
  assert_equal(params, random_params(TINY))
  assert (info.tag, info.file) == ("tiny", "model.safetensors")


def test_a_part_of_a_file_in_the_cache_is_not_taken(hub_cache):
  blobs = hub_cache / "models--ada--tiny" / "blobs"
  blobs.mkdir(parents=True)
  (blobs / ("ab" * 32 + ".incomplete")).write_bytes(b"half")
  assert "the download failed" in refusal(tag="tiny")


class Hub(http.server.BaseHTTPRequestHandler):
  """Answers like the Hub for one file; where `share` < 1 it hangs up on the way."""

  content, share = b"", 1.0

  def do_HEAD(self):
    self.send_response(200)
    self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
    self.send_header("X-Repo-Commit", COMMIT)
    self.send_header("Content-Length", str(len(self.content)))
    self.end_headers()

  def do_GET(self):
    self.do_HEAD()
    self.wfile.write(self.content[: int(self.share * len(self.content))])

  def log_message(self, *arguments):
    """Nothing is written to the terminal."""


DOWNLOAD = """
import logging, sys
from fmlora_jax.config import WeightsConfig
from fmlora_jax.models import vit
from fmlora_jax.models.weights import published, registry
from fmlora_jax.types import Sizes

logging.basicConfig(level=logging.INFO, stream=sys.stdout)
vit.ARCHITECTURES["tiny"] = Sizes(image_size=16, patch_size=4, width=12, depth=3, num_heads=2)
file = published.CheckpointFile(layout="timm", repository="ada/tiny")
source = published.Checkpoint(files=(file,), architecture="tiny", normalisation="half")
registry.WEIGHTS["tiny"] = source
try:
  print(registry.load(WeightsConfig(tag="tiny"))[2].sha256)
except ValueError as error:
  print(error)
"""


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.usefixtures("hub_cache")
def test_a_download_is_announced_and_counts_only_if_whole(tmp_path, share):
  write(tmp_path / "file", to_timm(random_params(TINY), TINY))
  content = (tmp_path / "file").read_bytes()
  handler = type("Handler", (Hub,), {"content": content, "share": share})
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    threading.Thread(target=server.serve_forever).start()
    env = os.environ | {
      "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
      "HF_HUB_CACHE": str(tmp_path / "hub"),
      "HF_HUB_OFFLINE": "0",
    }
    done = subprocess.run(
      [sys.executable, "-c", DOWNLOAD], env=env, capture_output=True, text=True, check=True
    )
    server.shutdown()
  assert "downloading model.safetensors of ada/tiny, 0 MB, once" in done.stdout
  links = list((tmp_path / "hub").rglob("model.safetensors"))
  if share == 1:
    assert done.stdout.splitlines()[-1] == hashlib.sha256(content).hexdigest()
    assert [link.read_bytes() for link in links] == [content]
  else:
    assert "the download failed: " in done.stdout.splitlines()[-1]
    assert not links


def test_a_file_in_a_bucket_is_read(tmp_path):
  """etils' stand-in for its file system; the bucket itself needs a network."""
  write_npz(tmp_path / "local", to_google(random_params(TINY), TINY))
  opened = []

  def open_bucket(original, path, mode):
    del original
    opened.append(str(path))
    return builtins.open(tmp_path / "local", mode)

  with testing.mock_epath(open=open_bucket):
    config = WeightsConfig(tag="tiny", path="gs://ada/augreg/Ti.npz")
    params, _, info = registry.load(config)
  assert opened == ["gs://ada/augreg/Ti.npz"]
  assert_equal(params, random_params(TINY))
  assert info.file == "Ti.npz"


def test_a_bucket_without_its_library_is_refused(monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
  message = refusal(tag="tiny", path="gs://ada/augreg/Ti.npz")
  assert message.startswith("config.weights.path is 'gs://ada/augreg/Ti.npz': can't be read (")
  assert "gcsfs" in message
  assert "copy the file here" in message


@pytest.mark.parametrize("path", ["https://host/Ti.npz", "s3://bucket/Ti.npz"])
def test_another_address_is_refused(path):
  expected = f"config.weights.path is '{path}': must be a local file or gs://BUCKET/FILE; download"
  assert refusal(tag="tiny", path=path).startswith(expected)


def test_a_file_that_ships_and_is_gone_is_named(monkeypatch):
  source = published.Checkpoint(
    files=(published.CheckpointFile(layout="ours", name="gone.safetensors"),),
    architecture="tiny",
    normalisation="half",
  )
  monkeypatch.setitem(registry.WEIGHTS, "gone", source)
  expected = "gone.safetensors is missing; reinstall fmlora_jax, which ships it"
  assert expected in refusal(tag="gone")
