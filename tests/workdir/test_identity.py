"""Which run a workdir belongs to."""

import json

import pytest

from fmlora_jax.config import ConfigError
from fmlora_jax.workdir import files, identity

IDENTITY = {"config": {"seed": 1, "optim": {"learning_rate": 0.1}}, "weights_sha256": "ab"}


def test_a_new_folder_is_claimed_and_claimed_again(tmp_path):
  workdir = tmp_path / "deep" / "run"
  identity.claim_workdir(workdir, IDENTITY)
  assert json.loads((workdir / "config.json").read_text()) == IDENTITY
  identity.claim_workdir(workdir, IDENTITY)
  assert [path.name for path in workdir.iterdir()] == ["config.json"]
  written = (workdir / "config.json").read_text()
  identity.claim_workdir(tmp_path / "other", dict(reversed(IDENTITY.items())))
  assert (tmp_path / "other" / "config.json").read_text() == written
  (tmp_path / "empty").mkdir()
  identity.claim_workdir(tmp_path / "empty", IDENTITY)


def test_tuples_are_the_lists_that_json_makes_of_them(tmp_path):
  identity.claim_workdir(tmp_path / "run", {"config": {"ranks": (1, 2)}})
  identity.claim_workdir(tmp_path / "run", {"config": {"ranks": (1, 2)}})


def test_another_run_is_refused_with_every_difference(tmp_path):
  workdir = tmp_path / "run"
  identity.claim_workdir(workdir, IDENTITY)
  before = (workdir / "config.json").read_text()
  other = {"config": {"seed": 2, "optim": {"learning_rate": 0.2, "clip_norm": 1.0}}}
  with pytest.raises(ConfigError) as error:
    identity.claim_workdir(workdir, other)
  for difference in (
    "config.seed: 1 there, 2 now",
    "config.optim.learning_rate: 0.1 there, 0.2 now",
    "config.optim.clip_norm: None there, 1.0 now",
    "weights_sha256: 'ab' there, None now",
  ):
    assert difference in str(error.value)
  assert (workdir / "config.json").read_text() == before


def test_free_fields_may_differ_and_others_may_not(tmp_path):
  def made(free, batch_size):
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

  identity.claim_workdir(tmp_path / "run", made(1, 4))
  identity.claim_workdir(tmp_path / "run", made(10, 4))
  with pytest.raises(ConfigError, match=r"\(config\.batch_size: 4 there, 40 now\)"):
    identity.claim_workdir(tmp_path / "run", made(10, 40))


def test_a_folder_from_before_there_was_a_free_field_is_its_runs_still(tmp_path):
  identity.claim_workdir(tmp_path / "run", {"config": {"seed": 1}})
  identity.claim_workdir(tmp_path / "run", {"config": {"seed": 1, "mesh": {"fsdp": 2}}})
  with pytest.raises(ConfigError, match=r"\(config\.drs\.rank: None there, 2 now\)"):
    identity.claim_workdir(tmp_path / "run", {"config": {"seed": 1, "drs": {"rank": 2}}})


def test_a_kill_while_a_folder_is_claimed_does_no_harm(tmp_path, monkeypatch):
  def kill(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(files.os, "replace", kill)
    identity.claim_workdir(tmp_path / "run", IDENTITY)
  assert [path.name for path in (tmp_path / "run").iterdir()] != ["config.json"]
  monkeypatch.setattr(files.os, "getpid", lambda: 1)  # of another process
  identity.claim_workdir(tmp_path / "run", IDENTITY)
  assert json.loads((tmp_path / "run" / "config.json").read_text()) == IDENTITY


def test_a_folder_that_no_run_made_is_refused_untouched(tmp_path):
  (tmp_path / "photo.jpg").write_text("mine")
  with pytest.raises(ConfigError, match=r"holds photo\.jpg but no config\.json: must be new"):
    identity.claim_workdir(tmp_path, IDENTITY)
  assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("photo.jpg", "mine")]
  for name in ("notes", "a", "z"):
    (tmp_path / name).mkdir()
  with pytest.raises(ConfigError, match=r"holds a, notes, photo\.jpg but no config\.json"):
    identity.check_folder(tmp_path)


def test_a_damaged_config_is_refused_in_one_line(tmp_path):
  (tmp_path / "config.json").write_text('{"config": ')
  with pytest.raises(ConfigError, match=r"config\.json can't be read .*choose another --workdir"):
    identity.claim_workdir(tmp_path, IDENTITY)


def old_and_new(old_file=None, new_file=None):
  """Returns an identity as version 1 wrote it, and the same run's as it is written now."""
  old = {"config": {"seed": 1, "tasks": {"stream": old_file}}, "stream_sha256": "12"}
  return old, {"config": {"seed": 1, "tasks": {"task_file": new_file}}, "task_file_sha256": "34"}


def test_a_folder_of_an_earlier_version_is_its_runs_still(tmp_path):
  old, new = old_and_new()
  identity.claim_workdir(tmp_path / "run", old)
  identity.claim_workdir(tmp_path / "run", new)
  with pytest.raises(ConfigError, match=r"\(config\.seed: 1 there, 2 now\)"):
    identity.claim_workdir(tmp_path / "run", new | {"config": new["config"] | {"seed": 2}})


@pytest.mark.parametrize("files_read", [("a", "a"), (None, "a"), ("a", None)], ids=str)
def test_tasks_from_a_file_are_not_taken_for_those_of_an_earlier_version(files_read):
  assert identity.changes(*old_and_new(*files_read)) == ["task_file_sha256: '12' there, '34' now"]


def test_a_link_in_a_workdir_is_refused(tmp_path):
  identity.claim_workdir(tmp_path / "run", IDENTITY)
  (tmp_path / "run" / "checkpoints").symlink_to(tmp_path)
  with pytest.raises(ConfigError, match="holds the link 'checkpoints': must hold plain files"):
    identity.claim_workdir(tmp_path / "run", IDENTITY)
