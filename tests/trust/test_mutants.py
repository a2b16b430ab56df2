"""Mutation scores: the tests catch nine of ten small bugs in the modules that runs rely on.

cosmic-ray makes the mutants; each stands alone in a copy of the tree, where the tests of its area
are passed until one fails.
"""

import ast
import concurrent.futures
import contextlib
import multiprocessing
import os
import pathlib
import re
import shlex
import shutil
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
AREAS = {  # modules -> tests, those first that see most
  "masks": (
    ["models/heads.py", "train/evaluator.py"],
    ["tests/models/test_heads.py", "tests/trust/test_counts.py", "tests/train/test_evaluator.py"],
  ),
  "metrics": (["train/metrics.py"], ["tests/train/test_metrics.py"]),
  "optimiser": (
    ["train/labels.py", "train/optimizer.py", "experiment/guards.py"],
    [
      "tests/train/test_labels.py",
      "tests/train/test_optimizer.py",
      "tests/experiment/test_guards.py",
    ],
  ),
  "resume": (
    ["workdir/checkpoint.py"],
    [
      "tests/workdir/test_checkpoint.py",
      "tests/trust/test_damaged_checkpoints.py",
      "tests/trust/test_config_on_resume.py",
    ],
  ),
  "digest": (["workdir/digest.py"], ["tests/workdir/test_digest.py"]),
}
# of the replacements of an operator one, and of comparisons those that move the bound or turn it
OPERATORS = re.compile(
  r"core/(NumberReplacer|AddNot|ExceptionReplacer|ZeroIterationForLoop|ReplaceBreakWithContinue"
  r"|Replace(TrueWithFalse|FalseWithTrue|AndWithOr|OrWithAnd)"
  r"|ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_Mul|Pow_Mul"
  r"|BitAnd_BitOr|BitOr_BitAnd|BitXor_BitOr|LShift_RShift|RShift_LShift)"
  r"|ReplaceUnaryOperator_(USub_UAdd|Delete_Not|Delete_Invert)"
  r"|ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Lt_GtE|LtE_Gt"
  r"|Gt_LtE|GtE_Lt|Is_IsNot|IsNot_Is|In_NotIn|NotIn_In))"
)
TIMEOUT_S = 300  # a mutant that takes longer than this is seen


def mutants(module: str) -> list:
  """Returns the mutants of a module that do something, and not just to an annotation."""
  from cosmic_ray.commands import init
  from cosmic_ray.work_db import use_db

  path = pathlib.Path("fmlora_jax", module)
  with contextlib.chdir(ROOT), use_db(":memory:") as work:
    init([path], work, {})
    found = [item.mutations[0] for item in work.work_items]
  source = (ROOT / path).read_text()
  hints = list(annotations(ast.parse(source)))
  return [
    mutant
    for mutant in found
    if OPERATORS.fullmatch(mutant.operator_name)
    and not any(first <= mutant.start_pos < last for first, last in hints)
    and not is_the_same(mutant, source.splitlines())
  ]


def is_the_same(mutant, lines: list[str]) -> bool:
  """Returns whether a mutant of a source is another text for the same.

  So are the second axis of a matrix for the last one, another mark of keyword-only parameters, and
  1e9 and 1 in float32.
  """
  line, column = mutant.start_pos
  before, after = lines[line - 1][:column], lines[line - 1][column:]
  is_axis = mutant.operator_name.endswith("USub_UAdd") and before.endswith(("axis=", "shape["))
  return is_axis or after.startswith(("*,", "1e9"))


def annotations(tree: ast.AST):
  """Yields (start, end) of every annotation, as (line, column)."""
  for node in ast.walk(tree):
    for name in ("annotation", "returns"):
      if hint := getattr(node, name, None):
        yield (hint.lineno, hint.col_offset), (hint.end_lineno, hint.end_col_offset)


def settle(folder: str) -> None:
  """Gives this process a copy of the tree of its own."""
  place = pathlib.Path(folder) / str(os.getpid())
  for name in ("fmlora_jax", "configs", "tests", "launch"):
    shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
  shutil.copy(ROOT / "pyproject.toml", place)
  os.chdir(place)
  os.environ["PYTHONPATH"] = str(place)


def verdict(mutant, tests: list[str]):
  """Returns what cosmic-ray says of a mutant, None for no mutant at all."""
  from cosmic_ray.mutating import mutate_and_test

  command = shlex.join([sys.executable, "-m", "pytest", "-x", "-q", *tests])
  return mutate_and_test([mutant] if mutant else [], command, TIMEOUT_S)


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
  context = multiprocessing.get_context("spawn")
  folder = str(tmp_path_factory.mktemp("trees"))
  with concurrent.futures.ProcessPoolExecutor(
    os.cpu_count(), context, initializer=settle, initargs=(folder,)
  ) as pool:
    yield pool


@pytest.mark.tier(3)
@pytest.mark.parametrize("area", AREAS)
def test_nine_of_ten_mutants_are_seen(workers, area):
  pytest.importorskip("cosmic_ray", reason=".venv/bin/pip install -e .[mutants]")
  modules, tests = AREAS[area]
  untouched = workers.submit(verdict, None, tests).result()
  assert not untouched.is_killed, untouched.output
  made = [mutant for module in modules for mutant in mutants(module)]
  survivors = []
  for mutant, result in zip(made, workers.map(verdict, made, [tests] * len(made)), strict=True):
    assert result.test_outcome, result.output
    if not result.is_killed:
      survivors.append(result.diff)
      print(f"{mutant.module_path} survives {mutant.operator_name}\n{result.diff}")
  seen = len(made) - len(survivors)
  print(f"{area}: {seen} of {len(made)} mutants seen, {100 * seen / len(made):.1f} %")
  assert made and seen >= 0.9 * len(made)
