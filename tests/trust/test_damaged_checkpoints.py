"""No changed value is restored, and nothing else is taken for a checkpoint."""

import json
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax.train import mesh
from fmlora_jax.workdir import checkpoint, step_folders
from fmlora_jax.workdir.checkpoint import CheckpointStore, DamagedError, Snapshot

# orbax drops coroutines when it can't read a file
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

IDENTITY = {"config": {"seed": 1}, "weights_sha256": "ab"}
RNG = np.random.default_rng(0)
ARRAYS = {  # noise: what can be compressed hides flips in nothing
  "shared/a": RNG.standard_normal((64, 32), "f4"),
  "cur/head": RNG.standard_normal((32, 10), "f4"),
  "mem/half": jnp.asarray(RNG.standard_normal(300), jnp.bfloat16),
  "opt_state/count": np.int32(7),
}


def store(workdir, identity=IDENTITY, **how):
  return CheckpointStore(workdir, mesh.replicated(mesh.make_mesh()), identity=identity, **how)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A workdir with steps 4 and 8."""
  workdir = tmp_path_factory.mktemp("saved")
  opened = store(workdir)
  for step in (4, 8):
    arrays = {name: leaf + leaf.dtype.type(step) for name, leaf in ARRAYS.items()}
    opened.save(step, Snapshot(arrays=arrays, record={"progress": step}), keep=True)
  return workdir


def bits(snapshot):
  return {name: np.asarray(leaf).tobytes() for name, leaf in snapshot.arrays.items()}


def read(workdir, step=8):
  """Returns (bits and record, or None where the step is refused; the reason)."""
  try:
    snapshot = store(workdir)._load(step)
  except DamagedError as error:
    return None, str(error)
  return (bits(snapshot), snapshot.record), ""


def damaged(saved, tmp_path, kinds):
  """Does damage after damage to copies of step 8; returns refusals and what was not harmless."""
  whole, _ = read(saved)
  refused, silent = [], []
  for i, (name, damage) in enumerate(kinds):
    workdir = shutil.copytree(saved, tmp_path / str(i))
    damage(workdir / "checkpoints" / "8" / name)
    found, reason = read(workdir)
    if found is None:
      refused.append(reason)
    elif found != whole:
      silent.append(name)
    shutil.rmtree(workdir)
  assert all("checkpoints/8 is unusable: " in reason for reason in refused)
  return refused, silent


def files(saved):
  root = saved / "checkpoints" / "8"
  return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def flips(saved, count):
  rng, names = random.Random(count), files(saved)
  root = saved / "checkpoints" / "8"
  names = [name for name in names if (root / name).stat().st_size]
  weights = [(root / name).stat().st_size for name in names]
  for i in range(count):  # half of them anywhere, half in any file
    name = rng.choices(names, weights)[0] if i % 2 else rng.choice(names)

    def flip(path, rng=rng):
      content = bytearray(path.read_bytes())
      content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
      path.write_bytes(content)

    yield name, flip


@pytest.mark.parametrize(
  "count", [12, pytest.param(200, marks=pytest.mark.tier(2))], ids=["12", "200"]
)
def test_no_flipped_bit_is_restored(saved, tmp_path, count):
  refused, silent = damaged(saved, tmp_path, flips(saved, count))
  print(f"{count} flips, {len(silent)} restored with changed values, {len(refused)} refused")
  assert not silent and len(refused) > count / 4


@pytest.mark.tier(2)
def test_no_file_is_cut_emptied_or_lost_unseen(saved, tmp_path):
  kinds = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
  }
  every = [(name, kind) for name in files(saved) for kind in kinds.values()]
  refused, silent = damaged(saved, tmp_path, every)
  print(f"{len(every)} times a file {', '.join(kinds)}: {len(silent)} restored with changed "
        f"values, {len(refused)} refused")  # fmt: skip
  assert not silent and len(refused) > len(every) / 4


def exchange(workdir):
  shutil.rmtree(workdir / "checkpoints" / "8" / "state")
  shutil.copytree(workdir / "checkpoints" / "4" / "state", workdir / "checkpoints" / "8" / "state")


def test_arrays_that_were_exchanged_are_named(saved, tmp_path):
  workdir = shutil.copytree(saved, tmp_path / "run")
  exchange(workdir)
  _, reason = read(workdir)
  assert "cur/head, mem/half, opt_state/count and 1 others differ from what was saved" in reason


def test_three_arrays_are_all_named(tmp_path):
  opened = store(tmp_path)
  for step in (4, 8):
    arrays = {name: jnp.full(2, step) for name in "abc"}
    opened.save(step, Snapshot(arrays=arrays, record={}), keep=True)
  exchange(tmp_path)
  _, reason = read(tmp_path)
  assert "is unusable: its arrays a, b, c differ from what was saved" in reason


def change_record(path, change):
  file = path / "_CHECKPOINT_METADATA"
  content = json.loads(file.read_text())
  change(content["custom_metadata"])
  file.write_text(json.dumps(content))


def no_step(workdir):
  (workdir / "checkpoints" / "999").mkdir()


def unfinished(workdir):
  target = workdir / "checkpoints" / f"12{step_folders.TEMPORARY}"
  shutil.copytree(workdir / "checkpoints" / "8", target)


def without_digests(workdir):
  shutil.copytree(workdir / "checkpoints" / "8", workdir / "checkpoints" / "999")
  change_record(workdir / "checkpoints" / "999", lambda record: record.pop("digests"))


def of_another_run(workdir):
  other = store(workdir, identity={"config": {"seed": 2}, "weights_sha256": "ab"})
  other._permanent = [4, 8]
  other.save(999, Snapshot(arrays=ARRAYS, record={}), keep=False)


def renamed(workdir):
  shutil.copytree(workdir / "checkpoints" / "4", workdir / "checkpoints" / "999")


def edited(workdir):
  renamed(workdir)
  change_record(workdir / "checkpoints" / "999", lambda record: record.update(step=999))


NO_STEPS = {
  no_step: "it can't be read",
  unfinished: "checkpoint 12 was not finished: dropped",
  without_digests: "it has no digests",
  of_another_run: "it is another run's (config.seed: 2 there, 1 now)",
  renamed: "it is that of step 4",
  edited: "its record, in _CHECKPOINT_METADATA, differs from what was saved",
}


def test_what_is_no_step_of_this_run_is_reported_and_not_taken(saved, tmp_path):
  taken, reported = 0, 0
  for spoil, reason in NO_STEPS.items():
    workdir, notes = shutil.copytree(saved, tmp_path / spoil.__name__), []
    spoil(workdir)
    snapshot = store(workdir, note=notes.append).latest()
    taken += snapshot.record["progress"] != 8
    reported += len(notes) == 1 and reason in notes[0]
    left = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert left == {"4", "8"} | ({"999.unusable"} if spoil is not unfinished else set())
    again = []
    assert store(workdir, note=again.append).latest().record["progress"] == 8 and not again
  print(f"{taken} taken as latest, {reported}/{len(NO_STEPS)} reported")
  assert taken == 0 and reported == len(NO_STEPS)


def test_the_newest_good_one_is_taken_or_none_and_nothing_is_lost(saved, tmp_path):
  workdir, notes = shutil.copytree(saved, tmp_path / "run"), []
  for step in (4, 8):
    (workdir / "checkpoints" / str(step) / "state" / "manifest.ocdbt").unlink()
    (workdir / "checkpoints" / f"{step}.unusable").mkdir()
  assert store(workdir, note=notes.append).latest() is None
  assert len(notes) == 3 and "set aside as 8.unusable-" in notes[0]
  assert notes[2] == "no usable checkpoint: starting from the beginning"
  left = {path.name for path in (workdir / "checkpoints").iterdir()}
  assert left == {"4.unusable", "4.unusable-", "8.unusable", "8.unusable-"}


def test_a_run_may_rather_be_refused(saved, tmp_path):
  workdir = shutil.copytree(saved, tmp_path / "run")
  no_step(workdir)
  with pytest.raises(DamagedError, match=r"checkpoints/999 is unusable: "):
    store(workdir, on_damage="refuse").latest()
  assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"4", "8", "999"}


def test_what_the_disk_does_not_give_back_stops_the_run_and_replaces_nothing(
  saved, tmp_path, monkeypatch
):
  workdir = shutil.copytree(saved, tmp_path / "run")
  opened = store(workdir)
  opened.latest()

  def rot(arrays_path, *args, save=checkpoint.ocp.save, **kwargs):
    save(arrays_path, *args, **kwargs)
    shutil.rmtree(pathlib.Path(arrays_path, "state", "d"))
    shutil.rmtree(pathlib.Path(arrays_path, "state", "ocdbt.process_0"))

  opened.save(11, Snapshot(arrays=ARRAYS, record={}), keep=False)
  monkeypatch.setattr(checkpoint.ocp, "save", rot)
  with pytest.raises(DamagedError, match=r"checkpoints/12 is unusable: "):
    opened.save(12, Snapshot(arrays=ARRAYS, record={}), keep=False)
  left = {path.name for path in (workdir / "checkpoints").iterdir()}
  assert left == {"4", "8", "11", "12"}


@pytest.mark.tier(2)
def test_the_kept_and_the_newest_good_one_outlive_any_damage(saved, tmp_path):
  """Forty saves, between which steps are spoilt and runs start again."""
  rng, workdir = random.Random(0), tmp_path / "run"
  workdir.mkdir()
  opened, kept, good = store(workdir, note=lambda line: None), set(), None
  for step in range(1, 41):
    keep = rng.random() < 0.2
    opened.save(step, Snapshot(arrays={"x": jnp.full(3, step)}, record={}), keep=keep)
    kept |= {step} if keep else set()
    good = step
    if rng.random() < 0.3:
      (workdir / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").write_bytes(b"{")
      kept -= {step}
      good = max(kept, default=None)
    if rng.random() < 0.5:
      opened = store(workdir, note=lambda line: None)
      found = opened.latest()
      assert (found and found.record["step"]) == good
    there = {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal()}
    assert kept <= there and (good is None or good in there)
  assert len(kept) >= 2


def test_restored_arrays_lie_where_they_must(saved):
  sharding = mesh.replicated(mesh.make_mesh())
  snapshot = store(saved)._load(8)
  assert all(leaf.sharding == sharding for leaf in snapshot.arrays.values())
  assert all(isinstance(leaf, jax.Array) for leaf in snapshot.arrays.values())


def test_files_and_folders_of_a_step_are_synced_after_it_has_its_name(tmp_path, monkeypatch):
  """B6: orbax leaves its own JSON files, the last move and the folder above to the system."""
  synced, real = [], checkpoint.files.os.fsync

  def fsync(file):
    synced.append(checkpoint.files.os.readlink(f"/proc/self/fd/{file}"))
    real(file)

  monkeypatch.setattr(checkpoint.files.os, "fsync", fsync)
  store(tmp_path).save(4, Snapshot(arrays=ARRAYS, record={}), keep=True)
  step = tmp_path / "checkpoints" / "4"
  assert {str(path) for path in (step.parent, step, *step.rglob("*"))} <= set(synced)
