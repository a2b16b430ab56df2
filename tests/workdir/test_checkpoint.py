import errno
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmlora_jax.config import ConfigError
from fmlora_jax.train import mesh
from fmlora_jax.workdir import checkpoint
from fmlora_jax.workdir.checkpoint import CheckpointStore, Snapshot

TREE = {
  "shared": {"bases": {"query": {"a": jnp.arange(6.0).reshape(2, 3)}}, "prompt": jnp.ones(2)},
  "mem": {"count": jnp.array([1, 2]), "half": jnp.ones(3, jnp.bfloat16)},
  "cur": {},
  "step": jnp.int32(7),
}
IDENTITY = {"config": {"seed": 1, "optim": {"learning_rate": 0.1}}, "weights_sha256": "ab"}


def store(workdir, identity=IDENTITY, **how):
  return CheckpointStore(workdir, mesh.replicated(mesh.make_mesh()), identity=identity, **how)


def steps(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def snapshot(value=0.0, **record):
  return Snapshot(arrays={"shared/x": jnp.full(2, value)}, record=record)


def test_leaves_have_paths_and_groups_come_back_from_them():
  flat = checkpoint.flatten(TREE)
  assert set(flat) == {
    "shared/bases/query/a", "shared/prompt", "mem/count", "mem/half", "step"
  }  # fmt: skip
  for group in ("shared", "mem", "cur"):
    back = checkpoint.unflatten(flat, group)
    assert jax.tree.structure(back) == jax.tree.structure(TREE[group])
    jax.tree.map(np.testing.assert_array_equal, back, TREE[group])


def test_bytes_are_those_of_all_elements():
  tree = {"a": jnp.zeros((2, 3)), "b": [jnp.zeros(5, jnp.bfloat16), jnp.uint8(1)]}
  assert checkpoint.num_bytes(tree) == 24 + 10 + 1


def test_a_saved_tree_comes_back_bit_for_bit_with_its_record(tmp_path):
  record = {"progress": {"task": 2, "facts": [{"rank": 4, "complexity": None}], "share": 0.1}}
  flat = checkpoint.flatten(TREE)
  opened = store(tmp_path)
  assert opened.latest() is None
  opened.save(7, Snapshot(arrays=flat, record=record), keep=True)
  opened = store(tmp_path)
  got = opened.latest()
  assert got.record["progress"] == record["progress"]
  assert got.arrays.keys() == flat.keys()
  for name, leaf in flat.items():
    assert got.arrays[name].dtype == leaf.dtype
    assert np.asarray(got.arrays[name]).tobytes() == np.asarray(leaf).tobytes()


def test_the_zeros_that_pad_small_cores_take_no_room_on_disk(tmp_path):
  cores = jax.random.normal(jax.random.key(0), (10, 12, 4, 4))
  padded = jnp.pad(cores, ((0, 0), (0, 0), (0, 28), (0, 28)))
  opened = store(tmp_path)
  opened.save(1, Snapshot(arrays={"mem/cores": padded}, record={}), keep=True)
  files = [path for path in (tmp_path / "checkpoints/1").rglob("*") if path.is_file()]
  written = sum(path.stat().st_size for path in files)
  assert 0.8 * cores.nbytes < written < 3 * cores.nbytes < padded.nbytes / 20


def test_the_order_of_a_record_is_no_part_of_it():
  assert checkpoint._sha256({"a": 1, "b": [2]}) == checkpoint._sha256({"b": [2], "a": 1})
  assert checkpoint._sha256({"a": 1, "b": [2]}) != checkpoint._sha256({"a": 1, "b": [3]})


def test_the_newest_checkpoint_is_taken_by_number(tmp_path):
  opened = store(tmp_path / "deep" / "run")
  for step in (9, 10, 100):
    opened.save(step, snapshot(step), keep=True)
  opened = store(tmp_path / "deep" / "run")
  assert float(opened.latest().arrays["shared/x"][0]) == 100


def test_task_ends_are_kept_and_within_a_task_only_the_newest(tmp_path):
  opened = store(tmp_path)
  for step, keep in ((3, False), (6, False), (8, True), (11, False)):
    opened.save(step, snapshot(step), keep=keep)
  assert steps(tmp_path) == [8, 11]
  opened = store(tmp_path)
  assert float(opened.latest().arrays["shared/x"][0]) == 11
  opened.save(14, snapshot(14), keep=False)
  assert steps(tmp_path) == [8, 14]
  opened.save(16, snapshot(16), keep=True)
  assert steps(tmp_path) == [8, 16]


def test_a_checkpoint_that_a_kill_left_behind_goes_with_the_next_start(tmp_path, monkeypatch):
  opened = store(tmp_path)
  opened.save(3, snapshot(3), keep=True)
  opened.save(5, snapshot(5), keep=False)
  monkeypatch.setattr(opened._folders, "_drop", lambda path: None)  # killed before it
  opened.save(7, snapshot(7), keep=False)
  assert steps(tmp_path) == [3, 5, 7]
  half_gone = next(path for path in (tmp_path / "checkpoints" / "5").iterdir() if path.is_dir())
  shutil.rmtree(half_gone)
  opened = store(tmp_path)
  assert float(opened.latest().arrays["shared/x"][0]) == 7
  assert steps(tmp_path) == [3, 7]


def test_a_step_that_is_saved_again_is_overwritten(tmp_path):
  opened = store(tmp_path)
  opened.save(3, snapshot(1.0), keep=False)
  opened.save(3, snapshot(2.0), keep=False)
  assert steps(tmp_path) == [3]
  opened = store(tmp_path)
  assert float(opened.latest().arrays["shared/x"][0]) == 2.0


def left(workdir):
  return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def test_a_step_stays_until_it_is_saved_once_more_and_verified(tmp_path, monkeypatch):
  opened = store(tmp_path)
  opened.save(3, snapshot(1.0), keep=False)

  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "no space")

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.ocp, "save", full)
    with pytest.raises(ConfigError, match="disk"):
      opened.save(3, snapshot(2.0), keep=True)
  with monkeypatch.context() as patch:
    patch.setattr(opened, "_verified", full)  # what was written can't be read
    with pytest.raises(checkpoint.DamagedError, match=r"checkpoints/3\.again is unusable"):
      opened.save(3, snapshot(2.0), keep=True)
  notes = []
  opened = store(tmp_path, note=notes.append)
  assert float(opened.latest().arrays["shared/x"][0]) == 1.0
  assert left(tmp_path) == ["3"] and notes == ["checkpoint 3.again was not verified: dropped"]


@pytest.mark.parametrize("renamed", [False, True])
def test_a_kill_while_a_step_is_replaced_does_no_harm(tmp_path, monkeypatch, renamed):
  opened = store(tmp_path)
  opened.save(3, snapshot(1.0), keep=False)
  with monkeypatch.context() as patch:
    if renamed:
      patch.setattr(opened._folders, "_drop", lambda path: None)
    else:
      patch.setattr(opened._folders, "_finish_replacement", lambda step: None)
      patch.setattr(opened, "_drop_others", lambda *args: None)
    opened.save(3, snapshot(2.0), keep=True)
  assert left(tmp_path) == ["3" if renamed else "3.again", "3.before"]
  opened = store(tmp_path)
  assert float(opened.latest().arrays["shared/x"][0]) == 2.0
  assert left(tmp_path) == ["3"]


JUNK = [  # folders, then files
  *("0999", "\u0663", "x.before", "x.again", "9" * 23, "x.orbax-checkpoint-tmp", "y" * 250),
  *("17", "notes.txt", "9.orbax-checkpoint-tmp", "7.again", "5.before"),
]


def test_what_no_run_wrote_is_set_aside_and_nothing_of_it_lost(tmp_path):
  store(tmp_path).save(3, snapshot(1.0), keep=True)
  for name in JUNK[:7]:
    (tmp_path / "checkpoints" / name).mkdir()
  for name in JUNK[7:]:
    (tmp_path / "checkpoints" / name).write_text(name)
  (tmp_path / "checkpoints" / ".DS_Store").touch()
  notes = []
  opened = store(tmp_path, note=notes.append)
  assert float(opened.latest().arrays["shared/x"][0]) == 1.0
  assert left(tmp_path) == sorted([".DS_Store", "3", *(f"{name[:50]}.unusable" for name in JUNK)])
  assert len(notes) == len(JUNK) and all("is no checkpoint; set aside as " in x for x in notes)
  opened.save(17, snapshot(2.0), keep=False)
  assert float(store(tmp_path).latest().arrays["shared/x"][0]) == 2.0


def test_an_old_folder_of_a_step_that_lost_its_new_one_is_the_step_again(tmp_path):
  store(tmp_path).save(3, snapshot(1.0), keep=True)
  (tmp_path / "checkpoints" / "3").rename(tmp_path / "checkpoints" / "3.before")
  assert float(store(tmp_path).latest().arrays["shared/x"][0]) == 1.0
  assert left(tmp_path) == ["3"]


@pytest.mark.parametrize("moment", ["before", "in"])
def test_nothing_is_saved_where_the_lock_is_lost(tmp_path, monkeypatch, moment):
  held = [moment == "in"]

  def require_held():
    if not held[0]:
      raise ConfigError("lost")

  def taken(*arguments, **options):
    held[0] = False
    raise FileNotFoundError

  opened = store(tmp_path, require_held=require_held)
  monkeypatch.setattr(checkpoint.ocp, "save", taken)
  with pytest.raises(ConfigError, match="lost"):
    opened.save(3, snapshot(), keep=False)
  assert left(tmp_path) == []


def test_a_folder_that_became_read_only_is_one_line_before_orbax_begins(tmp_path, monkeypatch):
  def refuse(*arguments, **options):
    raise OSError(errno.EROFS, "Read-only file system")

  opened = store(tmp_path)
  monkeypatch.setattr(checkpoint.tempfile, "TemporaryFile", refuse)
  with pytest.raises(ConfigError, match=r"can't be written \(Read-only file system\): mend that"):
    opened.save(3, snapshot(), keep=False)
  assert left(tmp_path) == []


def test_what_may_not_be_read_is_no_damage(tmp_path, monkeypatch):
  opened = store(tmp_path)
  opened.save(3, snapshot(1.0), keep=False)

  def denied(*args):
    raise PermissionError(errno.EACCES, "denied")

  monkeypatch.setattr(opened, "_verified", denied)
  with pytest.raises(PermissionError):
    opened.latest()
  assert left(tmp_path) == ["3"]


def test_an_optimiser_state_is_filled_in_by_path():
  params = {"a": jnp.ones(3), "b": jnp.zeros((2, 2))}
  optimizer = optax.multi_transform(
    {"on": optax.adam(0.1), "off": optax.set_to_zero()}, {"a": "on", "b": "off"}
  )
  state = optimizer.init(params)
  _, state = optimizer.update(params, state, params)
  arrays = checkpoint.flatten({"opt_state": state})
  template = jax.eval_shape(optimizer.init, params)
  filled = checkpoint.fill(template, arrays, "opt_state")
  assert jax.tree.structure(filled) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, filled, state)


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({}, r"opt_state/a is absent: must be float32\(3,\)"),
    ({"opt_state/a": jnp.ones(4)}, r"opt_state/a is float32\(4,\): must be float32\(3,\)"),
    ({"opt_state/a": jnp.ones(3, int)}, r"opt_state/a is int32\(3,\): must be float32\(3,\)"),
  ],
)
def test_a_leaf_that_does_not_fit_is_refused_by_name(arrays, message):
  template = {"a": jax.ShapeDtypeStruct((3,), jnp.float32)}
  with pytest.raises(ValueError, match=message):
    checkpoint.fill(template, arrays, "opt_state")
