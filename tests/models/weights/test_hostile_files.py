"""No mutated file of weights runs code, fills memory or loads as another network."""

import io
import json
import math
import pathlib
import pickle
import struct
import time
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest
from on_disk import TINY, random_params, to_google, to_timm, write, write_npz

from fmlora_jax.config import ConfigError, WeightsConfig
from fmlora_jax.models import vit
from fmlora_jax.models.weights import files, layouts, published, registry

WEIGHT, SQUARE = "blocks.1.mlp.fc1.weight", "blocks.1.attn.proj.weight"


@pytest.fixture(autouse=True)
def tiny_tag(monkeypatch):
  """A checkpoint of a size that tests can afford; `pinned` has the sha256 of its file."""
  monkeypatch.setitem(vit.ARCHITECTURES, "tiny", TINY)

  def add(tag, layout, sha256=None):
    file = published.CheckpointFile(layout=layout, repository="ada/tiny", sha256=sha256)
    source = published.Checkpoint(files=(file,), architecture="tiny", normalisation="half")
    monkeypatch.setitem(registry.WEIGHTS, tag, source)

  add("timm", "timm")
  add("google", "google")
  return add


class Trap:
  """Makes the file `sprung` where it is unpickled."""

  def __init__(self, folder):
    self._folder = folder

  def __reduce__(self):
    return pathlib.Path.touch, (self._folder / "sprung",)


def changed_tensors(change):
  """Returns the bytes of a timm file whose tensors `change` has changed in place."""

  def make(folder):
    disk = {k: np.array(v) for k, v in to_timm(random_params(TINY), TINY).items()}
    change(disk)
    return pathlib.Path(write(folder / "changed", disk)).read_bytes()

  return make


def changed_bytes(change, to_disk=write):
  """Returns the bytes of a whole file as `change`, of bytes, leaves them."""

  def make(folder):
    convert = to_timm if to_disk is write else to_google
    whole = pathlib.Path(to_disk(folder / "whole", convert(random_params(TINY), TINY)))
    return change(bytearray(whole.read_bytes()))

  return make


def with_header(change):
  """Returns a safetensors file with a changed JSON header."""

  def changed(content):
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]

  return changed_bytes(changed)


def archive(**members: bytes):
  def make(folder):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
      for name, content in members.items():
        made.writestr(name.replace("__", "."), content)
    return file.getvalue()

  return make


def pickled(folder):
  return pickle.dumps(Trap(folder))


def pickled_array(folder):
  file = io.BytesIO()
  np.savez(file, cls=np.zeros(3), evil=np.array([Trap(folder)], dtype=object))
  return file.getvalue()


def npy(shape, descr="<f4", content=bytes(12)):
  header = io.BytesIO()
  np.lib.format.write_array_header_1_0(
    header, {"descr": descr, "fortran_order": False, "shape": shape}
  )
  return header.getvalue() + content


def flipped(at: float):
  def change(content):
    content[int(at * len(content))] ^= 16
    return content

  return change


def claims(size):
  """A zip directory that says a member unpacks to `size` bytes."""

  def change(content):
    place = content.index(b"PK\x01\x02")
    content[place + 24 : place + 28] = struct.pack("<I", size)
    return content

  return change


def grown(header, name=WEIGHT, shape=(1 << 20, 1 << 20)):
  header[name] |= {"shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}


def rename(header, old=WEIGHT, new="../../../etc/passwd"):
  header[new] = header.pop(old)


HOSTILE = {  # name -> (makes the bytes in a folder, the tag, what the refusal says)
  "a tensor is missing": (changed_tensors(lambda d: d.pop(WEIGHT)), "timm", "missing (1)"),
  "a bias is missing": (changed_tensors(lambda d: d.pop("norm.bias")), "timm", "missing (1)"),
  "a tensor too many": (
    changed_tensors(lambda d: d.update(reg_token=np.zeros((1, 4, 12), np.float32))),
    "timm",
    "unknown (1): reg_token",
  ),
  "a tensor of another name": (
    changed_tensors(lambda d: d.update({"blocks.1.mlp.fc9.weight": d.pop(WEIGHT)})),
    "timm",
    "unknown (1): blocks.1.mlp.fc9.weight",
  ),
  "a transposed tensor": (
    changed_tensors(lambda d: d.update({WEIGHT: d[WEIGHT].T})),
    "timm",
    f"{WEIGHT} -> block_1/fc1/dense/kernel",
  ),
  "a transposed square tensor": (
    changed_tensors(lambda d: d.update({SQUARE: d[SQUARE].T})),
    "pinned",
    "has sha256",
  ),
  "two tensors exchanged": (
    changed_tensors(lambda d: d.update({SQUARE: d["blocks.0.attn.proj.weight"]})),
    "pinned",
    "has sha256",
  ),
  "an empty tensor": (
    changed_tensors(lambda d: d.update({WEIGHT: np.zeros((0, 12), np.float32)})),
    "timm",
    WEIGHT,
  ),
  "whole numbers": (
    changed_tensors(lambda d: d.update({WEIGHT: d[WEIGHT].astype(np.int32)})),
    "timm",
    f"tensor {WEIGHT} is I32: must be one of",
  ),
  "complex numbers": (with_header(lambda h: h[WEIGHT].update(dtype="C64")), "timm", "damaged"),
  "a type of no library": (with_header(lambda h: h[WEIGHT].update(dtype="X9")), "timm", "damaged"),
  "NaN": (changed_tensors(lambda d: d[WEIGHT].fill(np.nan)), "timm", "holds NaN or infinity"),
  "infinity": (changed_tensors(lambda d: d[WEIGHT].fill(np.inf)), "timm", "holds NaN or infinity"),
  "cut off in the header": (changed_bytes(lambda c: c[:100]), "timm", "damaged or truncated"),
  "cut off in the data": (changed_bytes(lambda c: c[:-7]), "timm", "damaged or truncated"),
  "longer than it says": (changed_bytes(lambda c: c + bytes(9)), "timm", "damaged or truncated"),
  "a flipped bit in the header": (changed_bytes(flipped(0.0005)), "timm", ""),
  "a flipped bit in the data": (changed_bytes(flipped(0.7)), "pinned", "has sha256"),
  "a header of 4 TB": (
    changed_bytes(lambda c: struct.pack("<Q", 1 << 42) + c[8:]),
    "timm",
    "damaged or truncated",
  ),
  "a tensor of 4 TB": (with_header(grown), "timm", "damaged or truncated"),
  "tensors on top of each other": (
    with_header(lambda h: h[WEIGHT].update(data_offsets=h["cls_token"]["data_offsets"])),
    "timm",
    "damaged or truncated",
  ),
  "a name that climbs out": (with_header(rename), "timm", "unknown (1): ../../../etc/passwd"),
  "a name of 100,000 letters": (
    with_header(lambda h: rename(h, new="x" * 100_000)),
    "timm",
    "must be at most 200 printable characters",
  ),
  "a name of several lines": (
    with_header(lambda h: rename(h, new="a\nerror: b")),
    "timm",
    "must be at most 200 printable characters",
  ),
  "a pickle": (pickled, "timm", "a Python pickle, which is never opened"),
  "a pickle in an npz": (pickled_array, "google", "an archive of Python pickles"),
  "the zip of PyTorch": (archive(data__pkl=b"\x80\x02}q\x00."), "timm", "a zip of other files"),
  "a zip bomb": (changed_bytes(claims(3_500_000_000), write_npz), "google", "unpacks to 3.5e+09"),
  "a npz of 4 TB": (archive(cls__npy=npy((1 << 40,))), "google", "damaged or truncated"),
  "an npz of objects": (archive(cls__npy=npy((3,), "|O")), "google", "pickles"),
  "a npz cut off": (changed_bytes(lambda c: c[:-99], write_npz), "google", "damaged or truncated"),
  "an empty file": (lambda folder: b"", "timm", "empty: get it again"),
  "a page of the web": (lambda folder: b"<!DOCTYPE html>", "timm", "a web page"),
}


@pytest.fixture
def peak():
  """Returns a function: the most bytes that Python and NumPy took at a time since its last call."""
  tracemalloc.start()

  def since_last() -> int:
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    return found

  yield since_last
  tracemalloc.stop()


def test_every_mutated_file_is_refused_in_one_line(tmp_path, tiny_tag, peak):
  whole = pathlib.Path(write(tmp_path / "pinned", to_timm(random_params(TINY), TINY)))
  tiny_tag("pinned", "timm", files.sha256(whole))
  peak()
  np.ones(10**7)
  assert peak() > 7 * 10**7  # so the figure below is no idle one
  refused, slowest, most = 0, 0.0, 0
  for i, (name, (make, tag, expected)) in enumerate(HOSTILE.items()):
    path = tmp_path / f"{i}.bin"
    path.write_bytes(make(tmp_path))
    peak()
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
      registry.load(WeightsConfig(tag=tag, path=str(path)))
    slowest = max(slowest, time.process_time() - began)
    most = max(most, peak())
    message = str(caught.value)
    assert str(path) in message and expected in message, (name, message)
    assert "\n" not in message and len(message) < 2000, name
    refused += 1
  assert not (tmp_path / "sprung").exists()
  pickle.loads(pickled(tmp_path))
  assert (tmp_path / "sprung").exists()  # the trap works
  print(
    f"{refused}/{len(HOSTILE)} mutated files refused, slowest {slowest:.2f} s, "
    f"at most {most / 1e6:.0f} MB of memory, no code run"
  )
  assert len(HOSTILE) >= 30 and slowest < 5 and most < 1e9


def test_the_whole_file_gives_every_leaf_and_the_features_of_numpy(tmp_path):
  params = random_params(TINY, scale=0.3)
  path = write(tmp_path / "whole", to_timm(params, TINY))
  loaded, sizes, _ = registry.load(WeightsConfig(tag="timm", path=path))
  ours, theirs = layouts.flatten(loaded), layouts.flatten(params)
  assert ours.keys() == theirs.keys()
  random = layouts.flatten(jax.jit(vit.make_vit(sizes).init)(jax.random.key(1)))
  for name, leaf in ours.items():
    np.testing.assert_array_equal(leaf, theirs[name])
    assert (leaf != random[name]).any()
  images = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)
  features = np.asarray(vit.make_vit(sizes).apply(loaded, images, None))
  expected = numpy_features(params, images.astype(np.float64))
  error = np.max(np.abs(features - expected) / np.maximum(1, np.abs(expected)))
  print(f"{len(ours)} leaves loaded, features within {error:.1e} of NumPy")
  assert error < 1e-5


def numpy_features(params, images):
  """Returns what the ViT is by definition, in float64."""
  p, grid = TINY.patch_size, TINY.grid
  patches = images.reshape(-1, grid, p, grid, p, 3).transpose(0, 1, 3, 2, 4, 5)
  x = dense(patches.reshape(len(images), grid * grid, -1), params["embedding"])
  cls = np.broadcast_to(params["cls"], (len(images), 1, TINY.width))
  x = np.concatenate([cls, x], axis=1) + params["position"]
  for layer in range(TINY.depth):
    block = params[f"block_{layer}"]
    x = x + attention(norm(x, block["norm1"]), block["attention"])
    hidden = dense(norm(x, block["norm2"]), block["fc1"]["dense"])
    x = x + dense(gelu(hidden), block["fc2"]["dense"])
  return norm(x, params["norm"])[:, 0]


def dense(x, layer):
  return x @ layer["kernel"].astype(np.float64) + layer["bias"]


def norm(x, layer, epsilon=1e-6):
  centred = x - x.mean(-1, keepdims=True)
  deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
  return centred / deviation * layer["scale"] + layer["bias"]


def gelu(x):
  erf = np.vectorize(math.erf)
  return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def attention(x, layer):
  heads = [
    dense(x, layer[name]["dense"]).reshape(*x.shape[:2], TINY.num_heads, -1)
    for name in ("query", "key", "value")
  ]
  query, key, value = heads
  scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  mixed = np.einsum("bhqk,bkhd->bqhd", weights, value)
  return dense(mixed.reshape(x.shape), layer["out"]["dense"])
