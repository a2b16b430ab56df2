"""Which run a workdir belongs to."""

import json

import pytest

from fmlora_jax.cli import outputs
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


def test_a_workdir_is_not_in_the_folder_of_a_run(tmp_path):
  identity.claim_workdir(tmp_path / "run", IDENTITY)
  (tmp_path / "run" / "checkpoints").mkdir()
  with pytest.raises(ConfigError, match=f"is in the folder of a run, {tmp_path / 'run'}: choose"):
    identity.check_folder(tmp_path / "run" / "checkpoints" / "7" / "new")


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
    "weights_sha256 (of the weights): 'ab' there, None now",
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


@pytest.mark.parametrize(
  "text",
  [
    *('{"config": ', "", "[]", "5", "null", "{}", "[" * 100_000, "\udcff"),
    *('{"config": 5}', '{"config": {}}', '{"config": [], "weights_sha256": "ab"}'),
    *('{"config": {"optim": 5}, "weights_sha256": "ab"}',),
  ],
)
def test_a_damaged_config_is_refused_in_one_line_and_left_alone(tmp_path, text):
  (tmp_path / "config.json").write_text(text, errors="surrogateescape")
  before = (tmp_path / "config.json").read_bytes()
  message = r"config\.json can't be read \(.*\): must be as the run wrote it; put back a copy"
  with pytest.raises(ConfigError, match=message) as error:
    identity.claim_workdir(tmp_path, IDENTITY)
  assert "\n" not in str(error.value) and (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json", "checkpoints", "plots"])
def test_a_folder_in_the_place_of_a_file_is_refused_and_the_reverse(tmp_path, name):
  identity.claim_workdir(tmp_path / "run", IDENTITY)
  path, kind = tmp_path / "run" / name, "file" if "." in name else "folder"
  path.mkdir() if kind == "file" else path.touch()
  with pytest.raises(ConfigError, match=f"{name} is no {kind}: must be one; move it away"):
    identity.check_folder(tmp_path / "run")


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
  assert identity.changes(*old_and_new(*files_read)) == [
    "task_file_sha256 (of the tasks): '12' there, '34' now"
  ]


@pytest.mark.parametrize("name", ["checkpoints", "plots/x.png", "checkpoints/20/state", "events/a"])
def test_a_link_below_a_workdir_is_refused(tmp_path, name):
  identity.claim_workdir(tmp_path / "run", IDENTITY)
  link = tmp_path / "run" / name
  link.parent.mkdir(parents=True, exist_ok=True)
  link.symlink_to(tmp_path)
  with pytest.raises(ConfigError, match=f"holds the link '{name}': must hold plain files"):
    identity.claim_workdir(tmp_path / "run", IDENTITY)


def test_a_finished_run_may_be_where_nothing_can_be_written(tmp_path, monkeypatch):
  identity.claim_workdir(tmp_path, IDENTITY)
  monkeypatch.setattr(outputs, "_write_error", lambda folder: f"{folder} can't be written (why)")
  with pytest.raises(ConfigError, match=r"must be writable, .* can't be written \(why\)"):
    identity.check_folder(tmp_path)
  (tmp_path / "result.json").touch()
  assert identity.check_folder(tmp_path)


def test_the_result_of_another_run_is_refused(tmp_path):
  now = IDENTITY | {"n_test": [4, 5]}
  result = now | {"weights": {"sha256": "ab"}}
  identity.require_result(tmp_path, result, now)
  for name, value in (("weights", {"sha256": "cd"}), ("n_test", [4, 6]), ("config", {"seed": 2})):
    with pytest.raises(ConfigError, match="is the result of another run .*: must be this run's"):
      identity.require_result(tmp_path, result | {name: value}, now)
