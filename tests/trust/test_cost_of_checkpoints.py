"""Row 26 of the bar: what digests and reading again cost, for all of a ViT-B/16 in float32."""

import contextlib
import time

import jax
import numpy as np
import pytest

from fmlora_jax import checkpoint, digest, disk
from fmlora_jax.checkpoint import Snapshot, Store
from fmlora_jax.models import vit
from fmlora_jax.train import mesh


class Stopwatch:
  """Sums the seconds spent in functions."""

  def __init__(self, patch):
    self.seconds, self._patch = {}, patch

  def watch(self, owner, name):
    original = getattr(owner, name)

    def timed(*args, **kwargs):
      with self.time(name):
        return original(*args, **kwargs)

    self._patch.setattr(owner, name, timed)

  @contextlib.contextmanager
  def time(self, label):
    began = time.monotonic()
    yield
    self.seconds[label] = self.seconds.get(label, 0) + time.monotonic() - began


@pytest.mark.tier(3)
def test_a_checkpoint_of_a_whole_vit_is_verified_in_seconds(tmp_path, monkeypatch):
  shapes = jax.eval_shape(vit.make(vit.architecture("vit_b16")).init, jax.random.key(0))
  rng = np.random.default_rng(0)
  draw = {name: rng.standard_normal(leaf.shape, np.float32)
          for name, leaf in checkpoint.flatten(shapes).items()}  # fmt: skip
  whole = mesh.replicated(mesh.make())
  arrays = mesh.put(draw, whole)
  digest.of_tree(arrays)  # compiles
  clock = Stopwatch(monkeypatch)
  clock.watch(digest, "of_tree")
  clock.watch(disk, "sync")
  clock.watch(checkpoint.ocp, "save")
  clock.watch(Store, "_load")
  store = Store(tmp_path, whole, identity={})
  with clock.time("all"):
    store.save(1, Snapshot(arrays=arrays, record={}), keep=True)
  told = dict(clock.seconds)
  began = time.monotonic()
  Store(tmp_path, whole, identity={}).latest()
  restored = time.monotonic() - began
  one = told["of_tree"] / 2  # at save, and where it is read again
  added = told["all"] - told["save"]
  print(
    f"row 26: {checkpoint.num_bytes(arrays) / 1e6:.0f} MB: a save {told['all']:.2f} s,",
    f"orbax's part {told['save']:.2f} s, a digest {one:.2f} s, to sync {told['sync']:.2f} s,",
    f"to read again with its digest {told['_load']:.2f} s: {added:.2f} s added, 2 % where",
    f"{added / 0.02:.0f} s of training lie between saves;",
    f"to restore {restored:.2f} s, {one:.2f} s of them for digests",
  )
  assert one <= 5
