"""What lies where on a mesh of 8 devices, in one process and in two."""

import json
import sys

import jax
import numpy as np
import processes
import pytest

from fmlora_jax.config import ConfigError
from fmlora_jax.input import augment, resident
from fmlora_jax.train import mesh as mesh_lib
from fmlora_jax.types import Examples

# images of which pixel, size and label tell the row; row 13 is padding
EXAMPLES = Examples(
  images=np.arange(16, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8),
  sizes=np.stack([np.arange(16), np.arange(16) + 100], 1).astype(np.int32),
  labels=np.arange(16, dtype=np.int32),
  valid=np.arange(16) != 13,
)
ROWS = np.asarray([15, 0, 7, -1, 13, 3, 3, 8], np.int32)


def report() -> dict:
  """Returns what is checked of a mesh with fsdp = 4, in every process."""
  mesh = mesh_lib.make_mesh(fsdp=4)
  share = resident.ProcessShard(jax.process_index(), jax.process_count())
  own = share.rows(16)
  examples = mesh_lib.shard_batch(jax.tree.map(lambda leaf: leaf[own], EXAMPLES), mesh)
  taken = jax.jit(mesh_lib.make_gather_rows(mesh))(examples, ROWS)
  weights = {"large": np.ones((768, 3072), np.float32), "odd": np.ones((4, 129, 129), np.float32)}
  weights |= {"small": np.ones((4, 4), np.float32), "none": np.ones((255, 129), np.float32)}
  placed = mesh_lib.place(weights, mesh_lib.fsdp_sharding(mesh, weights))
  shared = mesh_lib.replicate_from_host0({"host": np.full(2, jax.process_index())}, mesh)
  return {
    "shape": dict(mesh.shape),
    "taken": jax.tree.map(lambda leaf: leaf.tolist(), vars(mesh_lib.gather_to_host(taken))),
    "batch_on_a_device": taken.images.addressable_shards[0].data.shape,
    "numbers_on_a_device": {
      name: leaf.addressable_shards[0].data.size for name, leaf in placed.items()
    },
    "host": np.asarray(shared["host"]).tolist(),
  }


PROGRAM = """
import json
from fmlora_jax.distributed import hosts
hosts.join_processes()
from train import test_mesh
print("report " + json.dumps(test_mesh.report()))
hosts.barrier()
"""


@pytest.fixture(scope="module", params=[1, 2])
def reports(request):
  """What each process says: one of 8 devices, or two of 4."""
  flags = processes.with_devices(8 // request.param)
  environments = processes.environment(request.param, XLA_FLAGS=flags)
  done = processes.ended(processes.start([sys.executable, "-c", PROGRAM], environments))
  assert [code for code, *_ in done] == [0] * request.param, done
  return [
    json.loads(line.removeprefix("report "))
    for _, shown, _ in done
    for line in shown.splitlines()
    if line.startswith("report ")
  ]


def test_rows_of_a_batch_come_to_the_devices_that_have_it_from_wherever_they_lie(reports):
  expected = augment.gather_rows(jax.tree.map(np.asarray, EXAMPLES), ROWS)
  for report in reports:
    assert report["shape"] == {"data": 2, "fsdp": 4}
    assert report["batch_on_a_device"] == [1, 2, 3, 3]
    for name, leaf in vars(expected).items():
      np.testing.assert_array_equal(report["taken"][name], leaf, err_msg=name)


def test_a_device_has_a_quarter_of_each_large_array_of_the_backbone(reports):
  for report in reports:
    assert report["numbers_on_a_device"] == {
      "large": 768 * 3072 // 4,
      "odd": 129 * 129,
      "small": 16,
      "none": 255 * 129,
    }


def test_what_hosts_made_is_the_first_ones(reports):
  assert all(report["host"] == [0, 0] for report in reports)


def test_a_group_that_does_not_divide_the_devices_is_refused():
  message = f"config.mesh.fsdp is 3: must divide the number of devices, {len(jax.devices())}"
  with pytest.raises(ConfigError, match=message):
    mesh_lib.make_mesh(3)


def test_shares_are_all_rows_once():
  rows = [np.arange(12)[resident.ProcessShard(i, 4).rows(12)] for i in range(4)]
  np.testing.assert_array_equal(np.concatenate(rows), np.arange(12))
  assert {len(own) for own in rows} == {3}
