"""No message advises to delete anything: what a user deletes may be the only copy."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
ADVICE = re.compile(r"\b(delete|remove|erase|unlink|rm) ", re.IGNORECASE)


def texts(tree):
  """Yields all strings of a module but docstrings."""
  docs = {
    id(node.body[0].value)
    for node in ast.walk(tree)
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
    and node.body
    and isinstance(node.body[0], ast.Expr)
  }
  for node in ast.walk(tree):
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
      yield node.value


def test_no_message_advises_to_delete():
  found, count = [], 0
  for path in sorted(ROOT.glob("fmlora_jax/**/*.py")):
    for text in texts(ast.parse(path.read_text())):
      count += 1
      if ADVICE.search(text):
        found.append(f"{path.name}: {text}")
  assert count > 1000 and not found
