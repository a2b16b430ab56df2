"""--list: methods, benchmarks, config files, weights, and every setting."""

import ast
import inspect
import pathlib
import textwrap
import types
from collections.abc import Iterable, Iterator

from fmlora_jax import methods, tasks
from fmlora_jax.cli import config_flag
from fmlora_jax.config import Config
from fmlora_jax.config.field_docs import FieldDoc, field_docs
from fmlora_jax.models.weights import published

WIDTH = 100


def listing() -> str:
  """Returns all that --config, --methods and --config.FIELD can name, with a line for each."""
  return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
  yield "Methods (config.method.name):"
  yield from _table((name, _summary(methods.find(name))) for name in methods.names())
  yield "\nBenchmarks (config.tasks.benchmark):"
  yield from _table(
    ("tfds:NAME" if name == "tfds" else name, _summary(tasks.find(_benchmark(name))))
    for name in tasks.benchmark_names()
  )
  yield "\nConfig files (--config=NAME):"
  yield from _table((name, _file_summary(path)) for name, path in config_flag.shipped().items())
  yield "\nWeights (config.weights.tag):"
  yield from _table((tag, _weights(entry)) for tag, entry in published.WEIGHTS.items())
  yield "\nSettings of every method (--config.FIELD=VALUE), their types and defaults:"
  yield from _settings(doc for doc in field_docs(Config()) if doc.path != "method.name")
  for name in methods.names():
    settings = field_docs(methods.config_class(name)(), "method")
    if named := [doc for doc in settings if doc.path != "method.name"]:
      yield f"\nSettings of {name}:"
      yield from _settings(named)


def _benchmark(name: str) -> str:
  return "tfds:any" if name == "tfds" else name


def _summary(module: types.ModuleType) -> str:
  return inspect.cleandoc(str(module.__doc__)).splitlines()[0]


def _file_summary(path: pathlib.Path) -> str:
  return str(ast.get_docstring(ast.parse(path.read_text()))).splitlines()[0]


def _weights(entry: published.Checkpoint) -> str:
  if not entry.files:
    return "any architecture; random numbers"
  file = entry.files[0]
  return f"{entry.architecture}; {file.repository or file.bucket or 'ships with fmlora_jax'}"


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
  rows = list(rows)
  width = max(len(name) for name, _ in rows)
  return [f"  {name:{width}}  {text}" for name, text in rows]


def _settings(docs: Iterable[FieldDoc]) -> Iterator[str]:
  for doc in docs:
    yield f"  {doc.path} ({doc.kind}) = {doc.default!r}"
    yield textwrap.fill(doc.doc, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
