"""--config=FILE[:VARIANT] and --config.FIELD=VALUE: from a command line to the config of a run."""

import ast
import collections
import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import re
import traceback
import types
from collections.abc import Iterable, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from fmlora_jax import methods
from fmlora_jax.cli import config_files
from fmlora_jax.config import FREE_FIELDS, Config, ConfigError, moved_field, raise_problems
from fmlora_jax.config.diff import differences, leaves, paths_to

Changes = Iterable[tuple[str, str]]  # (FIELD, VALUE) of --config.FIELD=VALUE

SUFFIX_LENGTH = 60  # of a folder's name; longer ones are hashed
# free fields that still tell runs apart: each is a path, of which the last name is shown
PATHS = ("tasks.data_dir", "tasks.task_file", "weights.path")


def shipped() -> dict[str, pathlib.Path]:
  """Returns the config files that come with the package, by name: in a clone those in configs/."""
  package = pathlib.Path(__file__).parents[1]
  folders = (package / "configs", package.parent / "configs")  # of a wheel, of a clone
  folder = next((folder for folder in folders if folder.is_dir()), folders[0])
  return {path.stem: path for path in sorted(folder.glob("*.py"))}


def config_path(text: str | None) -> pathlib.Path:
  """Returns the file that --config=FILE[:VARIANT] names.

  Raises:
    ConfigError: if it is not given or there is no such file.
  """
  if not (text or "").partition(":")[0]:
    raise ConfigError("--config is missing: name a config file, as in --config=digits")
  name = str(text).partition(":")[0]
  path, files = pathlib.Path(name).expanduser(), shipped()
  if path.suffix in (".py", ".json") and path.is_file():
    return path
  if name in files:
    return files[name]
  if os.path.exists(path):
    kind = "a folder" if path.is_dir() else "no config file"
    raise ConfigError(
      f"--config is {name!r}: is {kind}, must be a file .py with a function get_config, or the "
      "config.json of a run"
    )
  near = difflib.get_close_matches(path.stem, files, n=1)
  hint = f"; did you mean {near[0]!r}?" if near else ""
  raise ConfigError(
    f"--config is {name!r}: no such file; must be a file .py, config.json of a run, or one of "
    f"{', '.join(files)}{hint}"
  )


def load_values(text: str | None) -> ml_collections.ConfigDict:
  """Returns the values that the file of --config=FILE[:VARIANT] makes.

  Raises:
    ConfigError: if there is no such file or it fails.
  """
  path, (_, colon, variant) = config_path(text), str(text).partition(":")
  if path.suffix == ".json":
    if colon:
      raise ConfigError(f"--config is {text!r}: a config.json takes no :VARIANT; leave it out")
    return _read_json(path)
  return _run_file(path, f"--config={text}", [variant] if colon else [])


def _run_file(path: pathlib.Path, shown: str, arguments: list[str]) -> ml_collections.ConfigDict:
  """Returns what the get_config of a config file returns; the file is a program.

  Raises:
    ConfigError: if it fails in any way, with its name and line; `shown` begins the message.
  """
  module = types.ModuleType(f"config_{path.stem}")
  module.__file__ = str(path)
  try:
    text = path.read_bytes()
    if b"\0" in text:
      raise ConfigError(f"{path} is no UTF-8 text, such as a file in UTF-16; save it as UTF-8")
    exec(compile(text, str(path), "exec"), module.__dict__)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
      raise ConfigError(f"{path} has no function get_config, which must return the config")
    values = get_config(*arguments)
    if not isinstance(values, ml_collections.ConfigDict):
      raise ConfigError(
        f"get_config of {path} returns {type(values).__name__}: must return a ConfigDict, as "
        "fmlora_jax.cli.config_files.defaults(...) does"
      )
    values.to_dict()  # raises an error where a value is required and missing
    return values
  except ConfigError as error:
    raise ConfigError(f"{shown}: {error}") from error
  except (Exception, SystemExit, KeyboardInterrupt) as error:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    file, line = path, lines[-1] if lines else None
    if isinstance(error, SyntaxError):  # of this file, or of one that it imports
      file, line = error.filename or path, error.lineno
    where = f"{file}, line {line}" if line else str(file)
    message = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())[:300]
    raise ConfigError(f"{shown}: {type(error).__name__} in {where}: {message}") from error


def _read_json(path: pathlib.Path) -> ml_collections.ConfigDict:
  """Returns the config in config.json of a run, of any version."""
  try:
    values = json.loads(path.read_bytes(), object_pairs_hook=_distinct)
    if not isinstance(values, dict) or not isinstance(values.get("config"), dict):
      raise ConfigError("it has no group 'config'")
    if misplaced := sorted(values.keys() & {field.name for field in dataclasses.fields(Config)}):
      raise ConfigError(f"{misplaced[0]!r} stands beside the group 'config': move it into it")
    return config_files.to_config_dict(methods.build_config(values["config"]))
  except ConfigError as error:
    raise ConfigError(f"{path} is not the config.json of a run: {error}") from None
  except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
    raise ConfigError(f"{path} is not the config.json of a run ({error})") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns a JSON object as a dict; refuses a key that it has twice."""
  counts = collections.Counter(key for key, _ in pairs)
  if twice := [key for key, count in counts.items() if count > 1]:
    raise ConfigError(f"{twice[0]!r} is in it {counts[twice[0]]} times: must be there once")
  return dict(pairs)


def read_config(text: str | None, changes: Changes = (), shared: Changes = ()) -> Config:
  """Returns the config that --config=FILE[:VARIANT] and --config.FIELD=VALUE make.

  Args:
    changes: of this config.
    shared: changes for several methods, as of `change_config`; `changes` win.

  Raises:
    ConfigError: if the file is missing or fails, a field is unknown or a value invalid.
  """
  return change_config(load_values(text), changes, shared)


def load_config(file: str | pathlib.Path, **fields: Any) -> Config:
  """Returns the config of a file with other settings; for Python what --config is for a shell.

  Args:
    file: FILE[:VARIANT] as --config takes it, such as "digits" or "digits:tasks=2".
    fields: settings, groups as dicts: epochs=2, optim={"learning_rate": 1e-3}. The method is a name
      or, with its settings, a dict: method={"name": "lora", "rank": 8}.

  Raises:
    ConfigError: as `read_config`.
  """
  if not isinstance(file, (str, pathlib.Path)):
    raise ConfigError(f"file is {file!r:.60}: must be the name of a config file, such as 'digits'")
  file, method = str(file), fields.pop("method", {})
  method = {"name": method} if isinstance(method, str) else method
  if not isinstance(method, dict):
    raise ConfigError(f"config.method is {method!r}: must be a name, or a dict with name and more")
  if "name" in method:
    file = f"{file}{',' if ':' in file else ':'}method={method['name']}"
  values = load_values(file).to_dict()
  fields["method"] = {"name": values["method"]["name"], **method}
  return methods.build_config(config_files.merged(values, methods.upgrade_config(fields)))


def change_config(
  values: ml_collections.ConfigDict, changes: Changes = (), shared: Changes = ()
) -> Config:
  """Returns the config of a run with changes as --config.FIELD=VALUE gives them.

  Args:
    shared: changes for several methods; FM-LoRA's settings under their old names, which were once
      every run's, change nothing in other methods.

  Raises:
    ConfigError: if a field is unknown or a value invalid.
  """
  values = config_files.to_config_dict(methods.build_config(values.to_dict()))
  both = [pair for pair in shared if _applies(values, pair[0], moved_field(pair[0]))]
  set_fields(values, [(moved_field(field), text) for field, text in (*both, *changes)])
  return methods.build_config(values.to_dict())


def _applies(values: ml_collections.ConfigDict, old: str, new: str) -> bool:
  """Returns whether a field is more than a moved one that the method does not have."""
  return (
    old == new or not new.startswith("method.") or new.split(".")[1] in values.to_dict()["method"]
  )


def set_fields(values: ml_collections.ConfigDict, changes: Changes) -> None:
  """Sets fields to values that are given as text; a tuple's field that is given again is extended.

  Raises:
    ConfigError: if a field is unknown, a group, or its value of another type.
  """
  texts: dict[str, list[str]] = {}
  for field, text in changes:
    texts.setdefault(field, []).append(text)
  problems = []
  for field, given in texts.items():
    try:
      _set_field(values, field, given)
    except ConfigError as error:
      problems.append(str(error))
  raise_problems(problems)


def _set_field(values: ml_collections.ConfigDict, field: str, given: Sequence[str]) -> None:
  kind = _field_type(values, field)
  texts = map(_quoted, given) if kind is tuple else given
  argv = ["", *(f"--config.{field}={text}" for text in texts)]
  parsed = flags.FlagValues()
  config_flags.DEFINE_config_dict("config", values, flag_values=parsed, sys_argv=argv)
  try:
    parsed(argv)
  except (flags.Error, ValueError, TypeError, SyntaxError):
    allowed = "a tuple, such as (1, 2)" if kind is tuple else f"of type {kind.__name__}"
    raise ConfigError(f"--config.{field} is {given[-1]!r}: must be {allowed}") from None


def _quoted(text: str) -> str:
  """Returns a tuple's text such as "a,b" with quotes; unchanged if it has some, or is no list."""
  bare = text.strip()
  bare = bare[1:-1] if bare.startswith("(") and bare.endswith(")") else bare
  items = [item.strip() for item in bare.split(",")]
  if len(items) == 1 or not all(items) or set(bare) & set("()[]{}'\""):
    return text
  return repr(tuple(map(_literal, items)))


def _literal(text: str) -> Any:
  """Returns the number that a text is; the text if it is none."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _field_type(values: ml_collections.ConfigDict, field: str) -> type:
  """Returns the type of a field such as "optim.name"; refuses what is not a field."""
  *groups, name = field.split(".")
  if field in ("method", "method.name"):
    raise ConfigError(
      f"--config.{field}: a method is named by the file's variant, --config=FILE:method=NAME, as "
      f"it decides about other settings; NAME is one of {', '.join(methods.names())}"
    )
  group = values
  for i, part in enumerate((*groups, name)):
    if not isinstance(group, ml_collections.ConfigDict) or part not in group:
      known = list(group) if isinstance(group, ml_collections.ConfigDict) else []
      paths = [path for path, _ in leaves(values.to_dict()) if path != "method.name"]
      hint = _field_hint(part, known, paths, in_method=i == 1 and groups[0] == "method")
      raise ConfigError(f"--config.{field}: {part!r} is not a field{hint}")
    parent, group = group, group[part]
  if isinstance(group, ml_collections.ConfigDict):
    raise ConfigError(
      f"--config.{field}: {name!r} is a group of fields; set one, such as "
      f"--config.{field}.{next(iter(group))}"
    )
  return parent.get_type(name)


def _field_hint(part: str, known: list[str], paths: list[str], *, in_method: bool) -> str:
  """Returns what may have been meant.

  Args:
    part: that is no field.
    known: fields of its group.
    paths: of all fields.
    in_method: whether the group is the method's.
  """
  if part in methods.names():
    return f"; settings of a method are --config.method.FIELD, with --config=FILE:method={part}"
  elsewhere = paths_to(part, paths)
  if elsewhere and not in_method:
    return f"; did you mean --config.{' or --config.'.join(elsewhere)}?"
  if near := difflib.get_close_matches(part, known, n=1):
    return f"; did you mean {near[0]!r}?"
  if in_method:
    owners = [
      name
      for name in methods.names()
      if part in {field.name for field in dataclasses.fields(methods.config_class(name))}
    ]
    if owners:
      return f" of this method; {', '.join(owners)} has it: --config=FILE:method={owners[0]}"
  return f"; fields are {', '.join(known)}" if known else ""


def workdir_name(text: str, config: Config) -> str:
  """Returns the name of the default workdir of a run: file, method, seed, and what differs.

  The differences are the variant and the settings that are not the file's, as far as they change
  the run; a long text is hashed. A run that is started from a config.json has no file to differ
  from: all its settings are hashed.
  """
  path, variant = config_path(text), text.partition(":")[2]
  now, before, stem = dataclasses.asdict(config), {}, config.tasks.benchmark
  if path.suffix != ".json":
    before = dataclasses.asdict(change_config(load_values(text)))
    stem = path.stem
  changed = [(field, value) for field, _, value in differences(before, now)]
  seed = "" if config.seeds else str(config.seed)
  parts = (stem, config.method.name, seed, describe_changes(variant, changed))
  return _as_name("-".join(filter(None, parts)))


def describe_changes(variant: str, changes: Iterable[tuple[str, Any]]) -> str:
  """Returns what a folder's name says of changed settings, such as "tasks=2-epochs=3".

  Method and seed are left out, as a name has them anyway, and so are fields that do not change a
  run.
  """
  parts = [part for part in sorted(variant.split(",")) if part and not part.startswith("method=")]
  for field, value in sorted(changes):
    if field in PATHS:
      value = pathlib.Path(str(value)).name
    elif field in FREE_FIELDS or field in ("seed", "method.name"):
      continue
    parts.append(re.sub(r"[()'\"\s]", "", f"{field}={value}"))
  text = _as_name("-".join(parts))
  return text if len(text) <= SUFFIX_LENGTH else _hash("-".join(parts))


def _as_name(text: str) -> str:
  """Returns a text in which "-" replaces what does not belong in a folder's name."""
  return re.sub(r"[^\w=.+-]+", "-", text).strip("-")


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:8]
