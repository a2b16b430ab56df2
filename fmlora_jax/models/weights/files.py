"""Files of named tensors: safetensors, read and written, and .npz, read; told by their content.

Nothing is ever unpickled, and every fault of a file is one line.
"""

import hashlib
import math
import os
import pathlib
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fmlora_jax.config import ConfigError
from fmlora_jax.models.weights import layouts
from fmlora_jax.types import Params

_DTYPES = ("F16", "BF16", "F32", "F64")

# a ViT-L/16 with a head of 21,843 classes, in float64, is 2.6e9
_MOST_BYTES = 3_000_000_000

_LONGEST_NAME = 200  # of a tensor, in characters: names are shown and logged

# common mistakes, by the first bytes of the file
_MISTAKES = (
  (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run git lfs pull"),
  (b"<", "a web page: download the file itself"),
  (b"\x80", "a Python pickle, which is never opened: use the model.safetensors of that model"),
)


def read(path: pathlib.Path, shown: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Returns (name -> array of a float type, metadata); errors call the file `shown`.

  Raises:
    ConfigError: if it is neither safetensors nor .npz, is truncated, or holds other types or
      unprintable names.
  """
  try:
    with open(path, "rb") as file:
      head = file.read(64)
    if head[8:9] == b"{":
      return _read_safetensors(path, shown)
    if head.startswith(b"PK\x03\x04"):
      return _read_npz(path, shown), {}
  except OSError as error:
    raise ConfigError(f"{shown} can't be read: {error.strerror or error}") from None
  reason = "damaged or truncated: get it again" if head else "empty: get it again"
  for start, mistake in _MISTAKES:
    if head.startswith(start):
      reason = mistake
  raise _refusal(shown, reason)


def _refusal(shown: str, reason: str) -> ConfigError:
  return ConfigError(f"{shown} is not a valid safetensors or .npz file: it is {reason}")


def _read_safetensors(path, shown):
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      names = file.keys()
      _check_names(shown, names)
      for name in names:
        dtype = file.get_slice(name).get_dtype()
        if dtype not in _DTYPES:
          raise _wrong_type(shown, name, dtype)
      return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
  except safetensors.SafetensorError as error:
    raise _refusal(shown, f"damaged or truncated ({error}): get it again") from None


def _check_names(shown: str, names: Iterable[str]) -> None:
  for name in names:
    if not (name.isprintable() and len(name) <= _LONGEST_NAME):
      raise ConfigError(
        f"{shown}: a tensor is called {name[:40]!a}...: must be at most {_LONGEST_NAME} "
        "printable characters; get the file again"
      )


def _wrong_type(shown, name, dtype):
  return ConfigError(
    f"{shown}: tensor {name} is {dtype}: must be one of {', '.join(_DTYPES)}; use the file that "
    "is not quantised"
  )


def _read_npz(path, shown):
  try:
    # np.load itself would leave a damaged file open
    with open(path, "rb") as content, np.load(content, allow_pickle=False) as file:
      members = file.zip.infolist()
      if not all(member.filename.endswith(".npy") for member in members):
        reason = "a zip of other files (PyTorch?): use the model.safetensors of that model"
        raise _refusal(shown, reason)
      size = sum(member.file_size for member in members)
      if size > _MOST_BYTES:
        raise ConfigError(f"{shown} unpacks to {size:.1e} bytes: must be at most {_MOST_BYTES:.0e}")
      _check_names(shown, file.files)
      for member in members:
        _check_room(shown, file.zip, member)
      return {name: _floats(shown, name, file[name]) for name in file.files}
  except (ConfigError, OSError):
    raise
  except Exception as error:  # zipfile, zlib, struct, tokenize and NumPy raise many types
    reason = "an archive of Python pickles, which are never opened: use the model.safetensors"
    if "allow_pickle" not in str(error):
      reason = f"damaged or truncated ({' '.join(str(error).split())}): get it again"
    raise _refusal(shown, reason) from None


def _check_room(shown, archive, member):
  """Refuses an array with a header larger than its bytes: NumPy would allocate its memory."""
  with archive.open(member) as file:
    if np.lib.format.read_magic(file) == (1, 0):
      shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
      shape, _, dtype = np.lib.format.read_array_header_2_0(file)
  if math.prod(shape) * dtype.itemsize > member.file_size:
    raise _refusal(shown, f"damaged or truncated ({member.filename} lacks bytes): get it again")


def _floats(shown, name, array):
  if not isinstance(array, np.ndarray):  # the bytes of a member that is no .npy
    raise _refusal(shown, f"damaged ({name} is no array): get it again")
  if array.dtype == np.dtype("V2"):  # NumPy has no bfloat16 and keeps its bytes
    return array.view(jnp.bfloat16)
  if array.dtype.kind != "f" or array.itemsize > 8:
    raise _wrong_type(shown, name, array.dtype)
  return array


def sha256(path: pathlib.Path) -> str:
  """Returns the hex digest of a file."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def save(params: Params, path: str | os.PathLike, metadata: Mapping[str, str]) -> None:
  """Writes params in layout "ours", each leaf with its dtype; never a partial file.

  Args:
    metadata: architecture, normalisation and, if not "erf", gelu: with these the file loads
      without a tag. Other entries are for people.
  """
  path = pathlib.Path(path)
  # safetensors ignores strides and would write the memory of a transposed array
  leaves = {name: np.ascontiguousarray(leaf) for name, leaf in layouts.flatten(params).items()}
  draft = path.with_name(path.name + ".part")
  safetensors.numpy.save_file(leaves, draft, metadata=dict(metadata))
  os.replace(draft, path)
