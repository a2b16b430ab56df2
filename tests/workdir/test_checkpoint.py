import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmlora_jax.config import ConfigError
from fmlora_jax.train import mesh
from fmlora_jax.workdir import checkpoint, log
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
  monkeypatch.setattr(opened, "_drop", lambda path: None)  # killed before it
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
    with pytest.raises(checkpoint.DamagedError, match=r"checkpoints/3\.again can't be used"):
      opened.save(3, snapshot(2.0), keep=True)
  notes = []
  opened = store(tmp_path, note=notes.append)
  assert float(opened.latest().arrays["shared/x"][0]) == 1.0
  assert left(tmp_path) == ["3"] and notes == ["checkpoint 3.again was not verified: dropped"]


@pytest.mark.parametrize("renamed", [False, True])
def test_a_kill_while_a_step_is_exchanged_does_no_harm(tmp_path, monkeypatch, renamed):
  opened = store(tmp_path)
  opened.save(3, snapshot(1.0), keep=False)
  with monkeypatch.context() as patch:
    if renamed:
      patch.setattr(opened, "_drop", lambda path: None)
    else:
      patch.setattr(opened, "_finish_exchange", lambda step: None)
      patch.setattr(opened, "_drop_others", lambda *args: None)
    opened.save(3, snapshot(2.0), keep=True)
  assert left(tmp_path) == ["3" if renamed else "3.again", "3.before"]
  opened = store(tmp_path)
  assert float(opened.latest().arrays["shared/x"][0]) == 2.0
  assert left(tmp_path) == ["3"]


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


def test_a_new_folder_is_claimed_and_claimed_again(tmp_path):
  workdir = tmp_path / "deep" / "run"
  checkpoint.claim_workdir(workdir, IDENTITY)
  assert json.loads((workdir / "config.json").read_text()) == IDENTITY
  checkpoint.claim_workdir(workdir, IDENTITY)
  assert [path.name for path in workdir.iterdir()] == ["config.json"]
  written = (workdir / "config.json").read_text()
  checkpoint.claim_workdir(tmp_path / "other", dict(reversed(IDENTITY.items())))
  assert (tmp_path / "other" / "config.json").read_text() == written
  (tmp_path / "empty").mkdir()
  checkpoint.claim_workdir(tmp_path / "empty", IDENTITY)


def test_tuples_are_the_lists_that_json_makes_of_them(tmp_path):
  checkpoint.claim_workdir(tmp_path / "run", {"config": {"ranks": (1, 2)}})
  checkpoint.claim_workdir(tmp_path / "run", {"config": {"ranks": (1, 2)}})


def test_another_run_is_refused_with_every_difference(tmp_path):
  workdir = tmp_path / "run"
  checkpoint.claim_workdir(workdir, IDENTITY)
  before = (workdir / "config.json").read_text()
  other = {"config": {"seed": 2, "optim": {"learning_rate": 0.2, "clip_norm": 1.0}}}
  with pytest.raises(ConfigError) as error:
    checkpoint.claim_workdir(workdir, other)
  for difference in (
    "config.seed: 1 there, 2 now",
    "config.optim.learning_rate: 0.1 there, 0.2 now",
    "config.optim.clip_norm: None there, 1.0 now",
    "weights_sha256: 'ab' there, None now",
  ):
    assert difference in str(error.value)
  assert (workdir / "config.json").read_text() == before


def test_free_fields_may_differ_and_others_may_not(tmp_path):
  def identity(free, batch_size):
    return {
      "config": {
        "batch_size": batch_size,
        "eval_batch_size": free,
        "checkpoint": {"every_steps": free},
        "input": {"steps_per_dispatch": free},
        "tasks": {"data_dir": f"/{free}"},
        "weights": {"path": f"/{free}"},
      }
    }

  checkpoint.claim_workdir(tmp_path / "run", identity(1, 4))
  checkpoint.claim_workdir(tmp_path / "run", identity(10, 4))
  with pytest.raises(ConfigError, match=r"\(config\.batch_size: 4 there, 40 now\)"):
    checkpoint.claim_workdir(tmp_path / "run", identity(10, 40))


def test_a_folder_from_before_there_was_a_free_field_is_its_runs_still(tmp_path):
  checkpoint.claim_workdir(tmp_path / "run", {"config": {"seed": 1}})
  checkpoint.claim_workdir(tmp_path / "run", {"config": {"seed": 1, "mesh": {"fsdp": 2}}})
  with pytest.raises(ConfigError, match=r"\(config\.method\.drs\.rank: None there, 2 now\)"):
    checkpoint.claim_workdir(tmp_path / "run", {"config": {"seed": 1, "drs": {"rank": 2}}})


def test_a_kill_while_a_folder_is_claimed_does_no_harm(tmp_path, monkeypatch):
  def kill(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(log.os, "replace", kill)
    checkpoint.claim_workdir(tmp_path / "run", IDENTITY)
  assert [path.name for path in (tmp_path / "run").iterdir()] != ["config.json"]
  monkeypatch.setattr(log.os, "getpid", lambda: 1)  # of another process
  checkpoint.claim_workdir(tmp_path / "run", IDENTITY)
  assert json.loads((tmp_path / "run" / "config.json").read_text()) == IDENTITY


def test_a_folder_that_no_run_made_is_refused_untouched(tmp_path):
  (tmp_path / "photo.jpg").write_text("mine")
  with pytest.raises(ConfigError, match=r"holds photo\.jpg but no config\.json: must be new"):
    checkpoint.claim_workdir(tmp_path, IDENTITY)
  assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("photo.jpg", "mine")]
  for name in ("notes", "a", "z"):
    (tmp_path / name).mkdir()
  with pytest.raises(ConfigError, match=r"holds a, notes, photo\.jpg but no config\.json"):
    checkpoint.check_folder(tmp_path)


def test_a_damaged_config_is_refused_in_one_line(tmp_path):
  (tmp_path / "config.json").write_text('{"config": ')
  with pytest.raises(ConfigError, match=r"config\.json can't be read .*choose another --workdir"):
    checkpoint.claim_workdir(tmp_path, IDENTITY)
