"""READMEs: size, links, tables, and every command and block of Python in them."""

import ast
import dataclasses
import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest
import yaml
from PIL import Image

import fmlora_jax
from fmlora_jax import methods, tasks
from fmlora_jax.cli import config_flag, methods_flag
from fmlora_jax.cli import flags as flags_lib
from fmlora_jax.experiment import comparison
from fmlora_jax.tasks import task_file
from fmlora_jax.workdir.identity import IDENTITY
from fmlora_jax.workdir.log import METRICS
from fmlora_jax.workdir.result_file import RESULT

ROOT = pathlib.Path(__file__).parents[1]
READMES = [ROOT / "README.md", *sorted(ROOT.glob("[a-z]*/**/README.md"))]
METHODS = ROOT / "fmlora_jax" / "methods" / "README.md"
MICRO = ROOT / "fmlora_jax" / "models" / "weights" / "micro_letters.safetensors"
WORDS = {  # what a reader puts in place of a word in capitals
  "DIR": "data",
  "FILE": str(MICRO),
  "FOLDER_OF_IDX_GZ": "idx",
  "HEAD": "lda",
  "METHOD": "lora",
  "NAME": "name",
  "SEED": "1993",
  "ZONE": "zone",
}
OTHERS = ("source", "pip", ".venv/bin/pip", "docker", "apt-get", "hf", "kubectl")  # not ours
# settings that make a run short; the last of two flags counts
SHORT_RUN = ("--config.epochs=1", "--config.weights.depth=1", "--config.tasks.num_tasks=2")
SHORT = {
  "fmlora_jax.main": SHORT_RUN,
  "fmlora_jax.compare": (*SHORT_RUN, "--seeds=1993", "--methods=linear_probe,lora"),
  "fmlora_jax.pretrain": (
    *("--config.pool=64", "--config.num_val=20", "--config.steps=2"),
    *("--config.warmup_steps=1", "--config.batch_size=16"),
  ),
  "fmlora_jax.bench": ("--methods=lora", "--architecture=micro", "--batch=2", "--tasks=2"),
}
OWN_IMAGES = (
  *("--config.tasks.data_dir=photos", "--config.input.image_size=32"),
  *("--config.input.source_size=32", "--config.weights.tag=micro_letters"),
)


def fenced(readme, language):
  """Returns the blocks of a language in a README."""
  return re.findall(rf"^```{language}\n(.*?)^```$", readme.read_text(), re.MULTILINE | re.DOTALL)


def commands(readme):
  """Returns the commands in a README as lists of words: lines of its blocks, and spans of code."""
  blocks = "".join(fenced(readme, "shell")).replace("\\\n", " ")
  prose = re.sub(r"^```.*?^```$", "", readme.read_text(), flags=re.MULTILINE | re.DOTALL)
  spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
  starts = ("python ", "launch/", "sbatch ", "hf ", "pip ", "kubectl ", "EXTRAS=", "TPU=")
  lines = [s for s in spans if s.startswith(starts) and " " in s and "..." not in s]
  lines += [f"python -m fmlora_jax.main {s}" for s in spans if s.startswith("--config=configs/")]
  names = "|".join(WORDS)
  return [
    [re.sub(rf"\b({names})\b(?!=)", lambda m: WORDS[m[0]], word) for word in words]
    for line in [*blocks.splitlines(), *lines]
    if (words := shlex.split(line, comments=True))
  ]


def target(words):
  """Returns the Python module, script or program that a command starts, and its arguments."""
  while re.match(r"[A-Z]+=", words[0]):
    words = words[1:]
  match words:
    case ["python", "-m", module, *arguments]:
      return module, arguments
    case ["python", script, *arguments]:
      return script, arguments
    case ["fmlora_jax", command, *arguments]:
      return f"fmlora_jax.{command}", arguments
    case ["launch/local.sh" | "launch/tpu_pod.sh", *arguments]:
      return "fmlora_jax.main", arguments
    case ["launch/processes.sh", _, *arguments] | ["sbatch", "launch/slurm.sh", *arguments]:
      return "fmlora_jax.main", arguments
    case _:
      return words[0], words[1:]


ALL = {shlex.join(words): words for readme in READMES for words in commands(readme)}


def parsed(module, arguments):
  """Returns the options of a program, as it parses its command line."""
  is_package = (ROOT / module.replace(".", "/")).is_dir()
  program = importlib.import_module(f"{module}.__main__" if is_package else module)
  values = program.define_flags()
  flags_lib.define_shared(values)
  return flags_lib.parse(values, [module, *arguments])


def value_of(arguments, flag, default=None):
  found = [a.partition("=")[2] for a in arguments if a.startswith(f"--{flag}=")]
  return found[-1] if found else default


@pytest.mark.parametrize("line", ALL)
def test_a_command_names_what_exists(line, tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  module, arguments = target(ALL[line])
  if module.startswith("fmlora_jax."):
    check_program(module, arguments, tmp_path)
  elif module == "launch/test.sh":
    for path in (a for a in arguments if a.startswith("tests")):
      assert (ROOT / path).exists()
  elif module.startswith("launch/"):
    assert (ROOT / module).is_file()
  else:
    assert module in OTHERS
    for path in (a for a in arguments if a.startswith(("launch/", "fmlora_jax/"))):
      assert (ROOT / path).is_file()


def check_program(module, arguments, folder):
  """Checks that the program has all flags and that the config builds."""
  options, words, changes, _ = dataclasses.astuple(parsed(module, arguments))
  if module == "fmlora_jax.main" and not options.list:
    if not options.config.endswith("config.json"):  # of a run to come
      config_flag.read_config(options.config, changes)
  elif module == "fmlora_jax.compare":
    choices = methods_flag.parse_methods(options.methods)
    seeds = [int(seed) for seed in options.seeds]
    planned = comparison.plan(options.config, changes, choices, seeds[:1], folder)
    assert not any(run.problem for run in planned)
  elif module == "fmlora_jax.bench":
    methods_flag.parse_methods(options.methods or "all")
  elif module == "fmlora_jax.prepare":
    tasks.find(words[0])
  elif module == "fmlora_jax.pretrain":
    config_flag.load_values(options.config)


def short(module, arguments):
  """Returns a command of ours as it can be run here in seconds; None where it cannot."""
  if module == "fmlora_jax.main" and "image_folder" in value_of(arguments, "config", ""):
    others = [a for a in arguments if not a.startswith("--config.weights.")]
    arguments = in_place(others, (*OWN_IMAGES, f"--config.weights.path={MICRO}"))
  benchmark = pathlib.Path(value_of(arguments, "config", "digits").partition(":")[0]).stem
  runs_here = benchmark in ("digits", "digits_dil", "image_folder", "config", "pretrain_letters")
  if not module.startswith("fmlora_jax.") or not runs_here:
    return None
  if module == "fmlora_jax.bench.gpu" or "--peers" in arguments:
    return None  # needs a GPU, or PyTorch
  if module == "fmlora_jax.prepare" and "--dry_run" not in arguments:
    return None  # downloads
  if "--list" in arguments:
    return [sys.executable, "-m", module, *arguments]
  if module in ("fmlora_jax.main", "fmlora_jax.compare") and not value_of(arguments, "workdir"):
    arguments = [*arguments, f"--workdir=runs/{zlib.crc32(' '.join(arguments).encode()):x}"]
  flags = SHORT.get(module, ())
  if value_of(arguments, "config.drs.ranks"):  # there is one for each of the config's tasks
    flags = [flag for flag in flags if not flag.startswith("--config.tasks.num_tasks=")]
  return [sys.executable, "-m", module, *in_place(arguments, flags)]


def in_place(arguments, flags):
  """Returns arguments with `flags` in place of those of their names: a flag is given once."""
  names = {flag.partition("=")[0] for flag in flags}
  return [*(a for a in arguments if a.partition("=")[0] not in names), *flags]


def make_photos(folder):
  """Writes a folder of images: ten classes of noise on different greys."""
  rng = np.random.default_rng(0)
  for label in range(10):
    (folder / f"class {label}").mkdir(parents=True)
    for i in range(12):
      pixels = rng.integers(0, 100, (32, 32, 3), np.uint8) + np.uint8(15 * label)
      Image.fromarray(pixels).save(folder / f"class {label}" / f"{i}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder to run commands in, with the repository's config files and images of one's own."""
  folder = tmp_path_factory.mktemp("place")
  (folder / "configs").symlink_to(ROOT / "configs")
  make_photos(folder / "photos")
  return folder


def run_in(place, command):
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr


@pytest.mark.tier(2)
def test_commands_run_in_their_order(place):
  seen = set()
  for line, words in ALL.items():
    command = short(*target(words))
    if command and tuple(command) not in seen:
      print(line)
      seen.add(tuple(command))
      run_in(place, command)
  assert len(seen) > 12


def test_the_files_of_a_run_have_these_names():
  text = (ROOT / "configs" / "README.md").read_text()
  named = re.findall(r"^\| `(\w+\.jsonl?)`", text, re.MULTILINE)
  assert sorted(named) == sorted([IDENTITY, METRICS, RESULT, task_file.FILE])


def test_the_method_of_the_readme_learns(lab, tmp_path, monkeypatch):
  (block,) = fenced(METHODS, "python")
  (tmp_path / "value_lora.py").write_text(block)
  monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
  learned = lab("value_lora")
  assert all(stage.losses[-1] < stage.losses[0] for stage in learned.stages)
  stored = learned.method.stored([stage.facts for stage in learned.stages])
  assert stored["shared"] == sum(leaf.size for leaf in jax.tree.leaves(learned.variables.shared))


@pytest.mark.tier(2)
def test_blocks_of_python_run(place):
  blocks = [block for readme in READMES for block in fenced(readme, "python")]
  assert blocks
  for block in blocks:
    run_in(place, [sys.executable, "-c", block.replace("epochs=10", "epochs=1")])
  assert (place / "lora.png").is_file()


def test_the_first_readme_is_short_and_starts_with_two_commands():
  text = READMES[0].read_text()
  assert len(text.splitlines()) <= 150
  assert len(text.split()) <= 1500
  first = fenced(READMES[0], "shell")[0]
  assert "launch/local.sh --config=configs/digits.py" in first and "launch/test.sh" in first


def anchors(readme):
  """Returns the names that GitHub gives to the headings of a README."""
  headings = re.findall(r"^#+ (.*)$", readme.read_text(), re.MULTILINE)
  return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(readme):
  for link in re.findall(r"(?:\]\(|src=\")([^)\"]+)", readme.read_text()):
    path, _, anchor = link.partition("#")
    if not path.startswith("https://"):
      file = (readme.parent / path).resolve() if path else readme
      assert file.exists(), link
      assert not anchor or anchor in anchors(file), link


@pytest.mark.parametrize("readme", [READMES[0], METHODS], ids=["first", "methods"])
def test_every_method_has_a_line(readme):
  rows = re.findall(r"^\| `(\w+)`", readme.read_text(), re.MULTILINE)
  assert sorted(set(rows) & set(methods.names())) == sorted(methods.names())


def test_every_equation_names_functions_and_a_test_that_exist():
  row = r"^\| Eq\. \((\d+)(?:-(\d+))?\)[^|]*\|([^|]*)\| `([^|]*)` \|"
  rows = re.findall(row, METHODS.read_text(), re.MULTILINE)
  covered = [n for first, last, *_ in rows for n in range(int(first), int(last or first) + 1)]
  assert covered == list(range(1, 16))
  for *_, functions, named in rows:
    assert all((ROOT / test).is_file() for test in named.split("`, `"))
    path, *names = re.findall(r"`([^`]+)`", functions)
    tree = ast.parse((ROOT / "fmlora_jax" / path).read_text())
    defined = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    assert names and set(names) <= defined, path


def test_every_file_of_trust_proves_a_promise():
  text = (ROOT / "tests" / "README.md").read_text()
  promises = re.findall(r"^\|.*\| `(test_\w+\.py)` \|$", text, re.MULTILINE)
  assert set(promises) == {path.name for path in (ROOT / "tests" / "trust").glob("test_*.py")}


def test_the_software_is_cited_by_its_version():
  card = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert (card["title"], card["version"]) == ("fmlora_jax", fmlora_jax.__version__)
  (paper,) = card["references"]
  first = READMES[0].read_text()
  assert paper["doi"] in first and paper["title"].removeprefix("FM-LoRA: ") in first
  assert all(author["family-names"] in first for author in paper["authors"])
