"""A setting that is changed on resume is refused or accepted as its kind says."""

import dataclasses
import json

import jax
import pytest

from fmlora_jax import methods
from fmlora_jax.config import FREE_FIELDS, Config, ConfigError
from fmlora_jax.config.diff import leaves
from fmlora_jax.experiment import preflight, provenance
from fmlora_jax.workdir import identity as identity_lib


def flipped(value):
  """Returns another value that a run might have had there."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, (int, float)):
    return value + 1
  if isinstance(value, (tuple, list)):
    return [*value, *value, 1]
  return "another" if value is None else f"{value} another"


@pytest.mark.tier(2)
@pytest.mark.parametrize("method", methods.names())
def test_every_setting_is_free_or_of_the_identity(tmp_path, method):
  """The method's own too."""
  settings = Config(method=methods.config_class(method)(name=method))
  identity = {"config": json.loads(json.dumps(dataclasses.asdict(settings)))}
  identity |= {"weights_sha256": "ab", "manifest_sha256": "cd", "task_file_sha256": "ef"}
  identity_lib.claim_workdir(tmp_path / "run", identity)
  as_said = total = 0
  for field, value in leaves(identity):
    other = json.loads(json.dumps(identity))
    *groups, name = field.split(".")
    place = other
    for group in groups:
      place = place[group]
    other_method = "finetune" if value != "finetune" else "lora"
    place[name] = other_method if field == "config.method.name" else flipped(value)
    named = field + identity_lib.HASHED.get(field, "")
    expected = f"({named}: {value!r} there, {place[name]!r} now)"
    try:
      identity_lib.claim_workdir(tmp_path / "run", other)
      taken, said = True, ""
    except ConfigError as error:
      taken, said = False, str(error)
    free = field.removeprefix("config.") in FREE_FIELDS
    as_said += taken if free else expected in said
    total += 1
  print(f"{method}: {as_said}/{total} settings as their class says")
  assert as_said == total


def test_every_free_field_is_a_field():
  assert set(FREE_FIELDS) <= {name for name, _ in leaves(dataclasses.asdict(Config()))}


def test_a_field_that_came_later_has_its_default_or_is_refused(tmp_path):
  now = {"config": json.loads(json.dumps(dataclasses.asdict(methods.build_config({}))))}
  before = json.loads(json.dumps(now))
  del before["config"]["optim"]["clip_norm"], before["config"]["method"]["drs"]["weight"]
  identity_lib.claim_workdir(tmp_path / "run", before)
  identity_lib.claim_workdir(tmp_path / "run", now)
  now["config"]["method"]["drs"]["weight"] = 0.5
  with pytest.raises(ConfigError, match=r"\(config\.method\.drs\.weight: None there, 0\.5 now\)"):
    identity_lib.claim_workdir(tmp_path / "run", now)


def test_a_setting_that_is_changed_to_its_default_is_refused(tmp_path):
  now = {"config": json.loads(json.dumps(dataclasses.asdict(Config())))}
  before = json.loads(json.dumps(now))
  before["config"]["epochs"] += 1
  identity_lib.claim_workdir(tmp_path / "run", before)
  with pytest.raises(ConfigError, match=r"\(config\.epochs: 31 there, 30 now\)"):
    identity_lib.claim_workdir(tmp_path / "run", now)


@pytest.mark.parametrize("name", provenance.environment())
def test_an_environment_that_decides_about_numbers_cannot_change_on_resume(tmp_path, name):
  run, usual = tmp_path / "run", provenance.environment()
  identity_lib.claim_workdir(run, {"config": {}, "environment": usual})
  other = usual | {name: flipped(usual[name])}
  with pytest.raises(ConfigError, match=f"environment.{name}: .* there, .* now.*undo the change"):
    identity_lib.claim_workdir(run, {"config": {}, "environment": other})


def test_a_workdir_from_before_the_environment_was_recorded_resumes_and_records_it(tmp_path):
  run, usual = tmp_path / "run", provenance.environment()
  identity_lib.claim_workdir(run, {"config": {}})
  assert identity_lib.changes({"config": {}}, {"config": {}, "environment": usual}) == []
  identity_lib.claim_workdir(run, {"config": {}, "environment": usual})
  with pytest.raises(ConfigError, match="environment.JAX_RANDOM_SEED_OFFSET: 0 there, 1 now"):
    now = {"config": {}, "environment": usual | {"JAX_RANDOM_SEED_OFFSET": 1}}
    identity_lib.claim_workdir(run, now)


def test_float64_is_refused():
  message = "JAX_ENABLE_X64 is True: must be False, .*; unset it"
  with jax.enable_x64(True), pytest.raises(ConfigError, match=message):
    preflight.check(Config(), 1 << 40)
