"""Launch scripts with stand-ins for Python and gcloud: .venv, its repair, arguments, exit codes."""

import gzip
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
# a Python that is new enough and logs its arguments
STAND_IN = """#!/bin/sh
case "$1 $2" in
  -c*) exit 0 ;;
  "-m venv") rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
  "-m pip") test ! -e "$(dirname "$0")/../no_pip" || exit 1 ;;
esac
echo "$@" >> "$LOG"
"""


def stand_in(path, text=STAND_IN):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


@pytest.fixture
def launch(tmp_path):
  """Returns a function that runs a copy of local.sh in a folder with a space -> (done, log)."""
  root = tmp_path / "my copy"
  shutil.copytree(ROOT / "launch", root / "launch")
  shutil.copy(ROOT / "pyproject.toml", root)
  stand_in(tmp_path / "python")

  def run(*arguments, python=tmp_path / "python", script="local.sh", extras=""):
    log = tmp_path / "log"
    log.write_text("")
    env = os.environ | {"PYTHON": str(python), "LOG": str(log), "EXTRAS": extras}
    done = subprocess.run(
      ["bash", root / "launch" / script, *arguments],
      cwd=tmp_path,
      env=env,
      capture_output=True,
      text=True,
    )
    return done, log.read_text().splitlines()

  run.venv = root / ".venv"
  return run


def kinds(asked):
  return [line.split()[1] for line in asked]


def test_the_environment_is_made_once_from_any_folder(launch):
  done, asked = launch("--config=a b.py")
  assert done.returncode == 0, done.stderr
  assert kinds(asked) == ["venv", "pip", "fmlora_jax.main"]
  assert asked[1].endswith(f"-e {launch.venv.parent}")
  assert asked[2] == "-m fmlora_jax.main --config=a b.py"
  assert kinds(launch()[1]) == ["fmlora_jax.main"]


def test_a_changed_pyproject_installs_again_into_the_same_environment(launch):
  launch()
  with open(launch.venv.parent / "pyproject.toml", "a") as file:
    file.write("\n")
  assert kinds(launch()[1]) == [
    "pip",
    "pip",
    "fmlora_jax.main",
  ]  # .venv exists, packages are installed again


@pytest.mark.parametrize("broken", ["half made", "too old", "dangling"])
def test_a_broken_environment_is_made_again(launch, broken):
  launch()
  python = launch.venv / "bin" / "python"
  if broken == "half made":
    (launch.venv / "no_pip").touch()
    (launch.venv / "installed-core").unlink()
  elif broken == "too old":
    stand_in(python, "#!/bin/sh\nexit 1\n")
  else:
    python.unlink()
    python.symlink_to("/no/python")
  done, asked = launch()
  assert done.returncode == 0, done.stderr
  assert asked[0] == f"-m venv --clear {launch.venv}"
  assert kinds(asked)[1:] == ["pip", "fmlora_jax.main"]


@pytest.mark.parametrize("python", ["/bin/false", "/no/python"])
def test_an_old_python_is_refused_in_one_line(launch, python):
  done, asked = launch(python=python)
  assert (done.returncode, asked) == (2, [])
  assert done.stderr.startswith(f"error: PYTHON is '{python}': must be Python 3.11 or newer")
  assert len(done.stderr.splitlines()) == 1
  assert not launch.venv.exists()


@pytest.mark.parametrize(
  ("script", "extras", "said"),
  [
    ("local.sh", "cuda,gpu", "error: EXTRAS is 'cuda,gpu': must be such as cuda, tpu or photos"),
    ("processes.sh", "", "error: the first argument is '': must be the number of processes"),
    ("slurm.sh", "", "error: SLURM_SUBMIT_DIR is not set: start this with sbatch"),
  ],
)
def test_a_wrong_start_is_refused_in_one_line_before_anything_is_installed(
  launch, monkeypatch, script, extras, said
):
  monkeypatch.delenv("SLURM_SUBMIT_DIR", raising=False)
  done, asked = launch(script=script, extras=extras)
  assert (done.returncode, asked, len(done.stderr.splitlines())) == (2, [], 1)
  assert done.stderr.startswith(said) and not launch.venv.exists()


# runs --command in a shell and prints the other arguments
GCLOUD = """#!/bin/sh
for word in "$@"; do
  case "$word" in --command=*) command=${word#--command=} ;; *) echo "$word" ;; esac
done
sh -c "$command"
"""


def test_every_host_of_a_tpu_pod_gets_the_arguments_as_they_are(launch, tmp_path):
  stand_in(tmp_path / "bin" / "gcloud", GCLOUD)
  log, root = tmp_path / "log", launch.venv.parent
  env = os.environ | {
    "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    "PYTHON": str(tmp_path / "python"),
    "LOG": str(log),
    "TPU": "pod",
    "ZONE": "here",
    "REPOSITORY": str(root),
  }
  script = root / "launch" / "tpu_pod.sh"
  arguments = [script, "--config=a b.py", "--config.drs.candidate_ranks=(4,8)"]
  done = subprocess.run(arguments, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [
    *("compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=here", "--worker=all")
  ]
  last = log.read_text().splitlines()[-1]
  assert last == "-m fmlora_jax.main --config=a b.py --config.drs.candidate_ranks=(4,8)"
  unnamed = subprocess.run(arguments, env=env | {"TPU": ""}, capture_output=True, text=True)
  assert unnamed.returncode and unnamed.stderr.startswith("error: TPU is '', ZONE is 'here'")


def test_local_processes_meet_and_the_worst_exit_code_is_theirs(launch, tmp_path):
  launch()
  stand_in(
    launch.venv / "bin" / "python",
    """#!/bin/sh
case "$1" in
  -c*) case "$2" in *socket*) echo 4711 ;; esac; exit 0 ;;
esac
echo "$JAX_PROCESS_ID/$JAX_NUM_PROCESSES $JAX_COORDINATOR_ADDRESS $*" >> "$LOG"
exit $JAX_PROCESS_ID
""",
  )
  log = tmp_path / "log"
  env = os.environ | {"LOG": str(log), "EXTRAS": ""}
  script = launch.venv.parent / "launch" / "processes.sh"
  log.write_text("")
  done = subprocess.run([script, "2", "--config=a b.py"], env=env, capture_output=True, text=True)
  assert done.returncode == 1, done.stderr
  assert sorted(log.read_text().splitlines()) == [
    f"{index}/2 127.0.0.1:4711 -m fmlora_jax.main --config=a b.py" for index in (0, 1)
  ]
  wrong = subprocess.run([script, "--config=a b.py"], env=env, capture_output=True, text=True)
  assert wrong.returncode == 2 and "must be the number of processes" in wrong.stderr


def test_the_manifest_for_gke_names_one_service_and_as_many_processes_as_pods():
  service, job = yaml.safe_load_all((ROOT / "launch" / "gke.yaml").read_text())
  pod = job["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  variables = {entry["name"]: entry.get("value") for entry in container["env"]}
  first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
  assert variables["JAX_COORDINATOR_ADDRESS"].partition(":")[0] == first
  assert pod["subdomain"] == service["metadata"]["name"]
  assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
  counts = {job["spec"]["completions"], job["spec"]["parallelism"]}
  assert counts == {int(variables["JAX_NUM_PROCESSES"])}


def test_fashion_mnist_becomes_a_folder_of_images(tmp_path):
  rng = np.random.RandomState(0)
  images = {
    name: rng.randint(256, size=(30, 28, 28)).astype(np.uint8) for name in ("train", "t10k")
  }
  labels = np.arange(30, dtype=np.uint8) % 10
  for name, pixels in images.items():
    for kind, header, values in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
      path = tmp_path / f"{name}-{kind}-ubyte.gz"
      path.write_bytes(gzip.compress(bytes(header) + values.tobytes()))
  script = [sys.executable, ROOT / "launch" / "fashion_mnist.py"]
  command = [*script, tmp_path / "none", tmp_path / "out"]
  missing = subprocess.run(command, capture_output=True, text=True, check=False)
  assert missing.returncode == 1 and "none/train-images-idx3-ubyte.gz: no such" in missing.stderr
  subprocess.run([*script, tmp_path, tmp_path / "out", "2", "1"], check=True)
  for arguments, said in (
    ([tmp_path, tmp_path / "out"], "out: must be a new folder"),
    ([tmp_path, tmp_path / "new", "2,1"], "the counts are ['2,1']: must be whole numbers"),
    ([tmp_path / "cut", tmp_path / "new"], "no whole IDX file in gzip; get it with"),
  ):
    whole = (tmp_path / "train-images-idx3-ubyte.gz").read_bytes()
    (tmp_path / "cut").mkdir(exist_ok=True)
    (tmp_path / "cut" / "train-images-idx3-ubyte.gz").write_bytes(whole[:-9])
    refused = subprocess.run([*script, *arguments], capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and said in refused.stderr
    assert refused.stderr.count("\n") == 1 and not (tmp_path / "new").exists()
  found = sorted(str(path.relative_to(tmp_path / "out")) for path in tmp_path.glob("out/*/*/*"))
  assert len(found) == 30 and {"train/bag/00008.png", "train/bag/00018.png"} < set(found)
  bag = np.asarray(Image.open(tmp_path / "out" / "test" / "bag" / "00008.png"))
  np.testing.assert_array_equal(bag, images["t10k"][8])
