"""Command lines: what they are parsed to, their help, and the list of all settings."""

import importlib
import subprocess
import sys

import pytest
from absl import flags as absl_flags

from fmlora_jax import __main__ as top
from fmlora_jax import __version__, methods, tasks
from fmlora_jax.cli import flags, listing, program
from fmlora_jax.config import Config, ConfigError
from fmlora_jax.config.field_docs import field_docs
from fmlora_jax.models.weights import registry


def values():
  """Returns the flags of a program that runs experiments."""
  made = absl_flags.FlagValues()
  flags.define_run(made)
  flags.define_shared(made)
  return made


def test_settings_of_the_config_are_set_apart():
  line = (
    "x --config digits --config.epochs 3 --config.a.b --noconfig.c word --config.d=e=f "
    "-config.g=1 --nodry_run -- --config.h=1"
  )
  arguments = flags.parse(values(), line.split())
  assert arguments.options.config == "digits" and not arguments.options.dry_run
  assert arguments.words == ("word", "--config.h=1")
  expected = [("epochs", "3"), ("a.b", "true"), ("c", "false"), ("d", "e=f"), ("g", "1")]
  assert list(arguments.changes) == expected
  with pytest.raises(ConfigError, match="unexpected argument 'word'"):
    arguments.refuse_words()


@pytest.mark.parametrize("words", [["--workdir", "--dry_run"], ["--workdir", "--config=digits"]])
def test_a_flag_takes_no_other_flag_for_its_value(words):
  with pytest.raises(ConfigError, match=f"--workdir has no value: .*, before {words[1]}"):
    flags.parse(values(), ["x", *words])
  assert flags.parse(values(), ["x", "--workdir", "-a"]).options.workdir == "-a"


def test_an_unknown_flag_is_refused_with_a_near_one():
  with pytest.raises(ConfigError, match="'workdr'. Did you mean: workdir"):
    flags.parse(values(), ["x", "--workdr=a"])


@pytest.mark.parametrize(
  ("line", "said"),
  [
    ("--epochs=2", "flag 'epochs'; a setting is given as --config.epochs$"),
    ("--learning_rate=2", "a setting is given as --config.optim.learning_rate"),
    ("--rank=2", "a setting is given as --config.method.rank$"),
    ("--method=lora", "as in --config=FILE:method=VALUE"),
    ("--config=a --config b", "--config is given 2 times: must be given once"),
    ("--workdir=a --workdir=a", "--workdir is given 2 times: must be given once"),
    ("--config", "Missing value for flag --config"),
  ],
)
def test_a_flag_that_is_given_wrongly_is_told_the_right_way(line, said):
  with pytest.raises(ConfigError, match=said):
    flags.parse(values(), ["x", *line.split()])


@pytest.mark.parametrize("command", top.COMMANDS)
def test_help_is_usage_examples_and_our_flags(command, capsys):
  module = importlib.import_module(top.COMMANDS[command])
  made = module.define_flags()
  flags.define_shared(made)
  program.print_help(module.__doc__, made)
  shown = capsys.readouterr().out
  assert f"Usage: fmlora_jax {command} " in shown and "\nExample" in shown
  assert all(f"  --{name}" in shown for name in made) and "--verbosity" not in shown
  assert max(map(len, shown.splitlines())) <= 100


def test_help_is_shown_without_jax_and_ends_with_code_0():
  code = (
    "import sys\nimport fmlora_jax.__main__ as top\nsys.argv = ['x', *{}]\n"
    "try:\n  top.main()\nfinally:\n  sys.stderr.write(str('jax' in sys.modules))"
  )
  for arguments in (["--help"], ["--version"], ["main", "--help"], ["bench.gpu", "--helpfull"]):
    command = [sys.executable, "-c", code.format(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "False")
    assert "Usage: " in done.stdout or done.stdout == f"fmlora_jax {__version__}\n"


@pytest.mark.parametrize("command", ["--help", "main --help", "main --list", "--list"])
def test_help_without_docstrings_is_one_line(command):
  line = [sys.executable, "-B", "-OO", "-m", "fmlora_jax", *command.split()]
  done = subprocess.run(line, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stdout, done.stderr) == (
    2,
    "",
    "error: Python's optimisation is 2: must be 0 or 1 for --help and --list, which print "
    "docstrings; unset PYTHONOPTIMIZE and leave out -OO\n",
  )


def test_the_list_names_methods_benchmarks_weights_and_every_setting():
  shown = listing.listing()
  for name in (*methods.names(), *tasks.benchmark_names(), *registry.WEIGHTS):
    assert f"\n  {'tfds:NAME' if name == 'tfds' else name} " in shown
  for method in methods.names():
    docs = [*field_docs(Config()), *field_docs(methods.config_class(method)(), "method")]
    for doc in docs:
      assert doc.doc, f"{doc.path} has no entry in its docstring's Attributes"
      assert doc.path == "method.name" or f"  {doc.path} ({doc.kind}) = {doc.default!r}\n" in shown
