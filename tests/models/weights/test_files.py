"""An .npz is read whole and never unpickled, or refused in one line."""

import io
import pathlib
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from on_disk import TINY, random_params, to_google, write_npz

from fmlora_jax.config import ConfigError
from fmlora_jax.models.weights import files


@pytest.fixture
def google_file(tmp_path):
  path = tmp_path / "B_16.npz"
  write_npz(path, to_google(random_params(TINY), TINY))
  return path


def refusal(path: pathlib.Path) -> str:
  """Returns the message that reading this file ends with; it names the file and is one line."""
  with pytest.raises(ConfigError) as caught:
    files.read(path, "FILE")
  message = str(caught.value)
  assert message.startswith("FILE")
  assert "\n" not in message
  return message


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", ["x.npz", "x.safetensors"])
def test_an_npz_is_read_whatever_its_name(tmp_path, save, dtype, name):
  kernel = np.arange(6).reshape(2, 3).astype(dtype)
  with open(tmp_path / name, "wb") as file:
    save(file, **{"params/head/kernel": kernel, "a": kernel.T})
  tensors, metadata = files.read(tmp_path / name, name)
  assert tensors["a"].dtype == dtype
  np.testing.assert_array_equal(tensors["params/head/kernel"], kernel)
  np.testing.assert_array_equal(tensors["a"], kernel.T)
  assert metadata == {}


def test_a_pickle_in_an_npz_is_never_opened(tmp_path):
  class Trap:
    def __reduce__(self):
      return pathlib.Path.touch, (tmp_path / "sprung",)

  path = tmp_path / "x.npz"
  np.savez(path, cls=np.zeros(3), evil=np.array([Trap()], dtype=object))
  assert "an archive of Python pickles, which are never opened" in refusal(path)
  assert not (tmp_path / "sprung").exists()
  np.load(path, allow_pickle=True)["evil"]
  assert (tmp_path / "sprung").exists()  # the trap works


def test_the_zip_of_pytorch_is_refused(tmp_path):
  with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
    archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
  assert "a zip of other files (PyTorch?)" in refusal(tmp_path / "x.pth")


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_an_npz_that_was_cut_off_is_refused(google_file, share):
  content = google_file.read_bytes()
  google_file.write_bytes(content[: int(len(content) * share)])
  assert "damaged or truncated" in refusal(google_file)


def test_whatever_bytes_change_an_npz_is_read_or_refused(google_file):
  content, rng = google_file.read_bytes(), np.random.default_rng(0)
  refused = 0
  for _ in range(200):
    changed = bytearray(content)
    # half of them where zip keeps its directory
    low = 0 if rng.random() < 0.5 else len(content) - 8000
    for place in rng.integers(low, len(content), rng.integers(1, 30)):
      changed[place] = rng.integers(256)
    google_file.write_bytes(changed)
    try:
      files.read(google_file, "FILE")
    except ConfigError:
      refused += 1
  assert refused > 100


@pytest.mark.parametrize(
  "member", [b"", b"abc", b"\x80\x02}q\x00.", b"\x93NUMPY\x01\x00\x02\x00{}"]
)
def test_a_member_that_is_no_array_is_refused(tmp_path, member):
  with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
    archive.writestr("cls.npy", member)
  assert "damaged" in refusal(tmp_path / "x.npz")


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 62, 4), (4,)])
def test_a_header_that_promises_more_than_there_is_is_refused(tmp_path, shape):
  header = io.BytesIO()
  np.lib.format.write_array_header_1_0(
    header, {"descr": "<f4", "fortran_order": False, "shape": shape}
  )
  with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
    archive.writestr("cls.npy", header.getvalue() + bytes(12))
  assert "damaged or truncated" in refusal(tmp_path / "x.npz")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(google_file):
  content = bytearray(google_file.read_bytes())
  directory = content.index(b"PK\x01\x02")
  content[directory + 24 : directory + 28] = struct.pack("<I", 3_500_000_000)
  google_file.write_bytes(content)
  assert "unpacks to 3.5e+09 bytes: must be at most 3e+09" in refusal(google_file)


@pytest.mark.parametrize("dtype", [np.int8, np.complex64, "U3", np.longdouble])
def test_an_npz_of_another_type_is_refused(tmp_path, dtype):
  np.savez(tmp_path / "x.npz", cls=np.zeros(3, dtype))
  expected = f"tensor cls is {np.dtype(dtype)}: must be one of F16, BF16, F32, F64"
  assert expected in refusal(tmp_path / "x.npz")
