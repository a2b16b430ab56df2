import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

from fmlora_jax.train import mesh
from fmlora_jax.workdir import digest

RNG = np.random.default_rng(0)
DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool")


def random_bits(dtype, shape):
  raw = RNG.integers(0, 256, (*shape, jnp.dtype(dtype).itemsize), np.uint8)
  raw = raw % 2 if dtype == "bool" else raw
  return np.frombuffer(raw.tobytes(), jnp.dtype(dtype)).reshape(shape)


def reference(array) -> str:
  """The same by plain Python integers, element by element."""
  word = np.ascontiguousarray(array).view(f"uint{8 * array.dtype.itemsize}").ravel()

  def mix(x):
    x = ((x ^ x >> 16) * 0x85EBCA6B) % 2**32
    x = ((x ^ x >> 13) * 0xC2B2AE35) % 2**32
    return x ^ x >> 16

  sums = [
    sum(mix(int(bits) ^ mix((i + lane) % 2**32)) for i, bits in enumerate(word)) % 2**32
    for lane in (0, 0x9E3779B9)
  ]
  shape = ",".join(map(str, array.shape))
  return f"{array.dtype}[{shape}] {sums[0]:08x}{sums[1]:08x}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4)], ids=str)
def test_a_digest_is_that_of_plain_integers(dtype, shape):
  array = random_bits(dtype, shape)
  assert digest.tree_digests(array) == {"": reference(array)}
  assert digest.tree_digests(jnp.asarray(array)) == {"": reference(array)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (2, 3, 5)], ids=str)
def test_a_device_computes_the_same_digest(monkeypatch, dtype, shape):
  monkeypatch.setattr(digest, "HOST_SIZE", -1)
  monkeypatch.setattr(digest, "_host_sums", None)  # which would be called
  array = random_bits(dtype, shape)
  assert digest.tree_digests(jnp.asarray(array)) == {"": reference(array)}


@pytest.mark.parametrize(("size", "where"), [(2**17, "_host_sums"), (2**17 + 1, "_device_sums")])
def test_only_large_arrays_are_digested_by_a_program_of_their_shape(monkeypatch, size, where):
  called, lanes = [], np.zeros(2, np.uint32)
  for name in ("_host_sums", "_device_sums"):
    monkeypatch.setattr(digest, name, lambda leaf, name=name: called.append(name) or lanes)
  digest.tree_digests(jnp.zeros(size, jnp.int8))
  assert called == [where]


def test_leaves_have_their_paths():
  tree = {"a": {"b": jnp.ones(2)}, "c": [jnp.zeros(1), jnp.ones((2, 2), jnp.bfloat16)]}
  found = digest.tree_digests(tree)
  assert set(found) == {"a/b", "c/0", "c/1"}
  assert found["c/1"].startswith("bfloat16[2,2] ")
  assert digest.tree_digests({"a/b": jnp.ones(2)}) == {"a/b": found["a/b"]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4)], ids=str)
def test_a_digest_says_what_its_array_looks_like(dtype, shape):
  sharding = mesh.replicated(mesh.make_mesh())
  found = digest.abstract_array(digest.tree_digests(random_bits(dtype, shape))[""], sharding)
  assert (found.shape, found.dtype, found.sharding) == (shape, jnp.dtype(dtype), sharding)


def test_no_flipped_bit_goes_unseen():
  array = random_bits("float32", (7, 9))
  before = digest.tree_digests(array)
  for _ in range(100):
    flipped = bytearray(array.tobytes())
    flipped[RNG.integers(len(flipped))] ^= 1 << RNG.integers(8)
    assert digest.tree_digests(np.frombuffer(flipped, "f4").reshape(7, 9)) != before


def test_order_shape_and_dtype_count():
  array = random_bits("float32", (4, 6))
  others = (array[::-1], array.T, array.reshape(6, 4), array.view("int32"), array[:, ::-1])
  assert len({digest.tree_digests(a)[""] for a in (array, *others)}) == 6
  zeros = np.zeros(3, "f4")
  assert digest.tree_digests(zeros) != digest.tree_digests(-zeros)  # bits, not values


SHARDED = """
import numpy as np, jax
from jax.sharding import NamedSharding, PartitionSpec as P
from fmlora_jax.workdir import digest
array = np.random.default_rng(0).standard_normal((16, 8)).astype("f4")
mesh = jax.make_mesh((4, 2), ("a", "b"))
specs = P(), P("a"), P(None, "b"), P("b", "a"), P(("a", "b"))
placed = [jax.device_put(array, NamedSharding(mesh, spec)) for spec in specs]
found = {digest.tree_digests(each)[""] for each in placed}
assert jax.device_count() == 8 and len(found) == 1, found
print(found.pop())
"""


@pytest.mark.tier(2)
def test_a_digest_is_the_same_on_eight_devices():
  (environment,) = processes.environment(1, XLA_FLAGS=processes.with_devices(8))
  for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
    del environment[name]
  done = subprocess.run(
    [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, check=True
  )
  array = np.random.default_rng(0).standard_normal((16, 8)).astype("f4")
  assert done.stdout.strip() == digest.tree_digests(jax.device_put(array))[""]
