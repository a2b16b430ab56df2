"""The command line: what a wrong setting answers, and whole runs, killed ones too."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import processes
import pytest
from PIL import Image

from fmlora_jax import config, main
from fmlora_jax.cli import config_flag, errors, program
from fmlora_jax.cli import flags as flags_lib
from fmlora_jax.cli.text import duration
from fmlora_jax.distributed import hosts, memory, stop
from fmlora_jax.experiment import clock
from fmlora_jax.experiment.run import _checked, run
from fmlora_jax.types import FrozenError, NonFiniteError
from fmlora_jax.workdir import result_file

ROOT = pathlib.Path(__file__).parents[1]
GIB = memory.host_memory() / 2**30
PROBE = {  # a small run of linear_probe
  "epochs": 1,
  "batch_size": 32,
  "weights": {"tag": "random", "architecture": "micro", "depth": 1},
  "input": {"normalisation": "half", "image_size": 16, "steps_per_dispatch": 1},
  "tasks": {"num_tasks": 2},
  "checkpoint": {"every_steps": 4},
}
SMALL = PROBE | {"drs": {"strategy": "fixed", "rank": 8}}  # of fm_lora


def command(*arguments, config="configs/digits.py"):
  return [sys.executable, "-m", "fmlora_jax.main", f"--config={config}", *arguments]


def settings(changes: dict, path: str = "--config") -> list[str]:
  """Returns the flags of nested settings."""
  flags = []
  for name, value in changes.items():
    place = f"{path}.{name}"
    flags += settings(value, place) if isinstance(value, dict) else [f"{place}={value}"]
  return flags


def call(arguments, cwd=ROOT, **environment):
  env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
  return subprocess.run(arguments, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


REFUSED = {
  "a typo in a field": (
    ["--config=configs/digits.py", "--config.optim.learning_rat=1"],
    r"--config.optim.learning_rat: 'learning_rat' is not a field; did you mean 'learning_rate'?",
  ),
  "a typo in a group": (
    ["--config=configs/digits.py", "--config.optm.learning_rate=1"],
    "'optm' is not a field; did you mean 'optim'?",
  ),
  "a field like no other": (
    ["--config=configs/digits.py", "--config.optim.warmth=1"],
    "--config.optim.warmth: 'warmth' is not a field",
  ),
  "a field of a field": (
    ["--config=configs/digits.py", "--config.epochs.most=1"],
    "--config.epochs.most: 'most' is not a field",
  ),
  "a field of another method": (
    ["--config=configs/digits.py", "--config.method.mode=sequential"],
    "--config.method.mode: 'mode' is not a field of this method; lora has it: --config=FILE:",
  ),
  "a typo in a flag": (["--confg=configs/digits.py"], "flag 'confg'. Did you mean: config"),
  "no config": ([], "--config is missing: name a config file, as in --config=digits"),
  "no such config": (["--config=configs/nope.py"], "--config is 'configs/nope.py': no such file"),
  "a word too many": (["--config=configs/digits.py", "epochs=3"], "unexpected argument 'epochs=3'"),
  "a typo in a config's name": (["--config=digit"], "no such file; must be a file .py"),
  "no number": (
    ["--config=configs/digits.py", "--config.epochs=abc"],
    "--config.epochs is 'abc': must be of type int",
  ),
  "a group": (
    ["--config=digits", "--config.optim=3"],
    "--config.optim: 'optim' is a group of field",
  ),
  "a value out of range": (
    ["--config=configs/digits.py", "--config.epochs=0"],
    "config.epochs is 0: must be >= 1",
  ),
  "ranks out of order": (
    ["--config=configs/digits.py", "--config.drs.candidate_ranks=(8,4)"],
    "config.method.drs.candidate_ranks is (8, 4): must be ascending integers >= 1",
  ),
  "no such method": (
    ["--config=configs/digits.py:method=lorra"],
    "config.method.name is 'lorra': must be one of ",
  ),
  "a typo in a variant": (
    ["--config=configs/digits.py:metod=lora"],
    "config variant 'metod=lora': the key must be one of method, tasks",
  ),
  "a variant that is no number": (
    ["--config=configs/digits.py:tasks=x"],
    "--config=configs/digits.py:tasks=x: config variant 'tasks=x': tasks must be a whole number",
  ),
  "a bucket for a workdir": (
    ["--config=configs/digits.py", "--workdir=gs://bucket/run"],
    "--workdir is 'gs://bucket/run': must be a local or mounted folder, buckets are not supported",
  ),
  "an empty workdir": (
    ["--config=configs/digits.py", "--workdir="],
    "--workdir is '': must be a folder, or be left out for one in runs/",
  ),
  "a seed beside seeds": (
    ["--config=configs/digits.py", "--config.seed=3", "--config.seeds=3,4"],
    "config.seed is 3: must be left out where seeds are given",
  ),
  "tasks that classes can't be cut into": (
    ["--config=configs/digits.py", "--config.tasks.num_tasks=3"],
    "config.tasks.num_tasks is 3: must divide the 10 classes of digits",
  ),
}


def parse(*arguments) -> flags_lib.Arguments:
  """Returns what main makes of a command line."""
  values = main.define_flags()
  flags_lib.define_shared(values)
  return flags_lib.parse(values, ["main", *arguments])


@pytest.mark.parametrize("case", REFUSED)
def test_an_invalid_command_is_refused_in_one_line(monkeypatch, tmp_path, case):
  arguments, message = REFUSED[case]
  monkeypatch.chdir(tmp_path)
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  with pytest.raises(config.ConfigError) as error:
    main.main(parse(*arguments))
  assert message in errors.explain(error.value) and "\n" not in errors.explain(error.value)
  assert not (tmp_path / "gs:").exists()


def test_a_refused_command_ends_with_code_2():
  for arguments in (["--config=digits", "--config.epochs=0"], ["--confg=digits"]):
    done = call([sys.executable, "-m", "fmlora_jax", "main", *arguments])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
  ("error", "shown"),
  [
    (config.ConfigError("config.epochs is 0:\n must be >= 1"), "config.epochs is 0: must be >= 1"),
    (NonFiniteError("loss is nan"), "loss is nan"),
    (FrozenError("shared/a has changed"), "shared/a has changed"),
  ],
)
def test_an_error_that_a_user_can_fix_is_one_line(guarded, capsys, error, shown):
  with pytest.raises(SystemExit) as stopped:
    guarded(error)
  assert stopped.value.code == 2
  line = capsys.readouterr().err
  assert line.startswith(f"error: {shown}") and line.count("\n") == 1 and "--debug" not in line
  with pytest.raises(type(error)):
    guarded(error, debug=True)


@pytest.mark.parametrize(
  ("error", "code", "start"),
  [
    (KeyError("x"), 1, "internal error: KeyError: 'x' (traceback in "),
    (RuntimeError("INTERNAL:\nx"), 1, "internal error: RuntimeError: INTERNAL: x (traceback in "),
    (ValueError("shapes differ"), 2, "shapes differ (traceback in "),  # may be the user's or ours
    (FileNotFoundError("no such file"), 2, "no such file (traceback in "),
  ],
)
def test_what_may_be_a_bug_is_one_line_that_names_the_file_with_its_traceback(
  guarded, capsys, tmp_path, error, code, start
):
  (tmp_path / "config.json").touch()  # a run's workdir
  with pytest.raises(SystemExit) as stopped:
    guarded(error, workdir=str(tmp_path))
  assert stopped.value.code == code
  line = capsys.readouterr().err
  assert line.startswith(f"error: {start}") and line.count("\n") == 1 and "--debug" in line
  (file,) = tmp_path.glob("error-*.txt")
  assert str(file) in line and "Traceback" in file.read_text()
  with pytest.raises(type(error)):
    guarded(error, debug=True)


def test_a_bug_leaves_no_file_in_a_folder_that_is_no_run_s(guarded, capsys, tmp_path):
  with pytest.raises(SystemExit):
    guarded(KeyError("x"), workdir=str(tmp_path))
  assert not list(tmp_path.iterdir())
  path = pathlib.Path(capsys.readouterr().err.split("traceback in ")[1].split(";")[0])
  assert "Traceback" in path.read_text()
  path.unlink()


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_says_how_to_go_on(guarded, capsys, name, code):
  with pytest.raises(SystemExit) as stopped:
    guarded(stop.Stopped(signal.Signals[name]))
  assert stopped.value.code == code
  assert capsys.readouterr().err == f"stopped by {name}; the same command resumes\n"


def test_a_full_table_of_files_is_not_out_of_memory():
  text = "RESOURCE_EXHAUSTED: Error writing: Too many open files [os_error_code='24']"
  with pytest.raises(ValueError, match="Too many open files"), errors.out_of_memory_explained(512):
    raise ValueError(text)


@pytest.mark.parametrize(
  ("settings", "workdir", "message"),
  [
    ("digits", "run", "config is 'digits': must be a Config"),
    (config.Config(seeds=(1, 2)), "run", r"config.seeds is \(1, 2\): must be \(\), as this is one"),
    (config.Config(), None, "workdir is None: must be the path of a folder"),
    (config.Config(), "", "workdir is '': must be"),
  ],
)
def test_python_calls_with_wrong_values_are_refused(settings, workdir, message):
  with pytest.raises(config.ConfigError, match=message):
    _checked(settings, workdir)


@pytest.mark.parametrize(
  "error",
  [
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no 9 GiB\nlong table"),
    jax.errors.JaxRuntimeError("INTERNAL: Error dispatching: Out of memory allocating 9 bytes."),
    MemoryError(),
  ],
)
def test_without_memory_the_settings_that_take_it_are_named(error):
  with pytest.raises(config.ConfigError) as named, errors.out_of_memory_explained(512):
    raise error
  assert str(named.value) == (
    f"config.batch_size is 512: out of memory, the machine has {GIB:.1f} GiB; lower it, "
    "config.eval_batch_size or config.input.source_size, or set config.input.mode=stream "
    f"({str(error).partition(chr(10))[0]})"
  )


def test_a_workdir_is_where_the_program_was_started(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  for given, expected in ((None, "runs/name"), ("mine", "mine"), ("../x", "../x")):
    assert program.resolve_workdir(given, lambda: "name") == tmp_path / expected


@pytest.fixture
def guarded():
  """Returns a function that guards a call which raises its argument."""

  def call(error, **options):
    def fail():
      raise error

    with errors.guard(**options):
      fail()

  return call


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  """(workdir, result) of the small run in this process."""
  workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
  return workdir, run(config_of(SMALL), workdir)


def config_of(changes: dict) -> config.Config:
  """Returns what the command line makes of configs/digits.py and `changes`."""
  return config_flag.load_config("digits", **changes)


@pytest.fixture
def run_main(monkeypatch, tmp_path):
  """Returns main in this process, in an empty folder, as a function of settings and flags."""

  def call(changes, *flags, file="digits"):
    monkeypatch.chdir(tmp_path)
    main.main(parse(f"--config={file}", *settings(changes), *flags))

  return call


def test_several_seeds_are_one_table_and_an_estimate_leaves_nothing(run_main, tmp_path, capsys):
  small = PROBE | {"seeds": (3, 4)}
  probe, workdir = "digits:method=linear_probe", tmp_path / "run"
  run_main(small, "--estimate", file=probe)
  assert "for 2 seeds; each (train" in capsys.readouterr().out
  run_main(small, "--dry_run", f"--workdir={workdir}", file=probe)
  assert f"seed       4, workdir {workdir}/4: would start\n" in capsys.readouterr().out
  assert not list(tmp_path.iterdir())
  run_main(small, f"--workdir={workdir}", file=probe)
  assert "\nlinear_probe       2 " in capsys.readouterr().out
  assert sorted(path.name for path in workdir.iterdir()) == [".lock", "3", "4", "seeds.json"]


def test_a_run_starts_from_the_config_of_another_and_a_dry_run_says_what_it_would_do(
  uninterrupted, run_main, tmp_path, capsys
):
  whole, _ = uninterrupted
  file, here = whole / "config.json", f"--workdir={whole}"
  for changes, options, said in (
    ({}, [here], f"seed       1993, workdir {whole}: would print its result\n"),
    (
      {"epochs": 3},
      [here],
      "would be refused, the folder belongs to another run (config.epochs: 1 ",
    ),
    ({"seed": 2}, ["--workdir=new"], f"seed       2, workdir {tmp_path}/new: would start\n"),
  ):
    run_main(changes, *options, "--dry_run", file=file)
    shown = capsys.readouterr().out
    assert said in shown and "method     fm_lora, " in shown
  assert not list(tmp_path.iterdir())
  assert config_flag.read_config(str(file)) == config_of(SMALL)


@pytest.mark.tier(2)  # test_run.py stops runs in one process
def test_a_killed_run_resumes_and_ends_bit_equal(uninterrupted, run_main, tmp_path, capsys):
  whole, expected = uninterrupted
  workdir = tmp_path / "run"
  arguments = command(*settings(SMALL), f"--workdir={workdir}")
  process = subprocess.Popen(
    arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
  )
  metrics, began = workdir / "metrics.jsonl", time.monotonic()
  # two lines a step: steps 5 and 6 are logged, the last checkpoint is of step 4
  while process.poll() is None and time.monotonic() - began < 240:
    if metrics.exists() and len(metrics.read_text().splitlines()) >= 12:
      break
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL, "finished before it was killed"
  assert not (workdir / "result.json").exists()

  done = call(arguments)
  assert done.returncode == 0, done.stderr
  assert "resumed in task 1, step" in done.stdout
  result = json.loads((workdir / "result.json").read_text())
  for field in ("params_sha256", "accuracy", "acc", "ranks", "interference"):
    assert result[field] == expected[field]
  assert metrics.read_text() == (whole / "metrics.jsonl").read_text()

  run_main(SMALL, f"--workdir={workdir}")
  shown = capsys.readouterr().out
  assert "finished before" in shown and f"{result['acc']:.2f}" in shown
  assert metrics.read_text() == (whole / "metrics.jsonl").read_text()

  rate = expected["config"]["optim"]["learning_rate"]
  with pytest.raises(
    config.ConfigError, match=f"config.optim.learning_rate: {rate} there, 0.5 now"
  ):
    run_main(SMALL | {"optim": {"learning_rate": 0.5}}, f"--workdir={workdir}")


def test_a_run_from_the_command_line_says_what_it_does_and_writes_its_result(tmp_path):
  began = time.time()
  done = call(
    command(
      *settings(PROBE | {"head": {}}),
      config=f"{ROOT}/configs/digits.py:method=linear_probe,head=plain",
    ),
    cwd=tmp_path,
  )
  assert done.returncode == 0, done.stderr
  assert not done.stderr
  for start in ("devices    1 x", "backbone   random", "benchmark  digits", "scenario   cil, 2"):
    assert start in done.stdout
  # 2 tasks of 5 classes, width 96; the rows start at the means of their classes
  costs = "485 trained in the last task, 970 stored beside the backbone; added by each task: 0 0"
  assert f"parameters {costs}\nstored     no image, no statistics of the data" in done.stdout
  (workdir,) = (tmp_path / "runs").iterdir()  # without --workdir
  assert workdir.name.startswith("digits-linear_probe-1993-")  # and a hash of the settings
  result = json.loads((workdir / "result.json").read_text())
  assert set(result_file.FIELDS) == set(result)
  assert f"{result['acc']:.2f}" in done.stdout
  assert done.stdout.endswith(f"\nin {workdir}\n")
  seconds = result["wall_seconds"]
  took = (workdir / "result.json").stat().st_mtime - began
  assert seconds["total"] == pytest.approx(took, rel=0.03, abs=0.3)  # Python's own start is outside
  assert all(seconds[kind] > 0 for kind in clock.KINDS)
  assert f"\ntime       {duration(seconds['total'])}: import " in done.stdout


@pytest.mark.tier(2)  # cli/test_output.py closes outputs, report/test_report.py has the backend
def test_a_run_without_a_reader_and_with_the_backend_of_a_notebook_ends_with_its_result(tmp_path):
  arguments = command(
    *settings(PROBE), "--workdir=run", config=f"{ROOT}/configs/digits.py:method=linear_probe"
  )
  env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
  env["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  with subprocess.Popen(arguments, cwd=tmp_path, env=env, **pipes) as process:
    assert process.stdout.readline().startswith("devices")
    process.stdout.close()  # as head -1 does
    assert process.stderr.read() == ""
  assert process.returncode == 0
  assert result_file.read_result(tmp_path / "run")["finished"]
  assert (tmp_path / "run" / "plots" / "accuracy_matrix.png").stat().st_size > 1000


def test_a_folder_of_images_is_described_before_it_is_checked(
  run_main, tmp_path, monkeypatch, capsys
):
  for split in ("Train", "Test"):
    for i, label in enumerate(("ant", "bee")):
      (tmp_path / "data" / split / label).mkdir(parents=True)
      for j in range(3):
        shade = Image.new("RGB", (16, 16), (100 * i, 20 * j, 99))
        shade.save(tmp_path / "data" / split / label / f"{j}.png")
  small = PROBE | {"tasks": {"num_tasks": 1, "data_dir": tmp_path / "data"}, "batch_size": 2}
  arguments = command(
    *settings(small), "--workdir=~/run", config="configs/image_folder.py:method=linear_probe"
  )
  done = call(arguments, HOME=str(tmp_path))
  assert done.returncode == 0, done.stderr
  first, second, third, *_ = done.stdout.splitlines()
  assert first == (
    f"checking 12 files of {tmp_path / 'data'}: layout split/class/*, splits Test (6), Train (6), "
    "2 classes 'ant', 'bee'"
  )
  assert second.endswith(
    "0 validation and 4 test images are copies of training images, 2 test images of validation "
    "images, such as Test/ant/0.png is Train/ant/0.png: move them out of one side, or the "
    "accuracies are too good"
  ), second
  assert third.startswith("devices")
  assert (tmp_path / "run" / "result.json").exists()  # ~ is the home
  moved = (tmp_path / "data").rename(tmp_path / "moved")
  small["tasks"]["data_dir"] = str(moved)
  monkeypatch.setenv("HOME", str(tmp_path))
  run_main(small, "--workdir=~/run", file="image_folder:method=linear_probe")
  assert "finished before" in capsys.readouterr().out


@pytest.mark.tier(2)  # distributed/test_hosts.py has what two processes tell each other
def test_two_processes_of_which_one_is_killed_resume_as_one(uninterrupted, tmp_path, capsys):
  """The numbers are those of one device, whatever decoded, trained and stored what."""
  whole, expected = uninterrupted
  workdir = tmp_path / "run"
  streamed = command(*settings(SMALL), f"--workdir={workdir}", "--config.input.mode=stream")
  first, second = processes.start(streamed, processes.environment(2))
  metrics, began = workdir / "metrics.jsonl", time.monotonic()
  while second.poll() is None and time.monotonic() - began < 240:
    if metrics.exists() and len(metrics.read_text().splitlines()) >= 12:
      break
    time.sleep(0.002)
  second.kill()
  killed = time.monotonic()
  (code, shown, errors), (_, quiet, _) = processes.ended([first, second])
  assert time.monotonic() - killed < 30
  assert code == hosts.PEER_LOST and "devices    2 x cpu (cpu), 2 processes" in shown
  assert errors.startswith("error: process 1 exited early") and errors.count("\n") == 1
  assert not [line for line in quiet.splitlines() if "Gloo" not in line]
  assert not (workdir / "result.json").exists()

  result = run(config_of(SMALL), workdir)
  shown, two = capsys.readouterr().out, "2 x cpu (cpu), 2 processes"
  assert "devices    1 x cpu (cpu)\n" in shown and "resumed in task 1, step" in shown
  assert f"devices    changed (before: {two}): results may differ in the last bits\n" in shown
  assert result["devices"] == [two, "1 x cpu (cpu)"]
  assert expected["devices"] == ["1 x cpu (cpu)"]
  assert result["accuracy"] == expected["accuracy"]
  assert result["accuracy"][1][1] > 0.25  # five classes
  losses = []
  for path in (workdir, whole):
    logged = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    losses.append([line["value"] for line in logged if line["name"] == "train/loss"])
  np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_cache_that_can_not_be_made_is_one_line(tmp_path, monkeypatch, caplog):
  (tmp_path / "file").touch()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  updates = []
  values = {"jax_compilation_cache_dir": None}
  stand_in = types.SimpleNamespace(values=values, update=lambda *change: updates.append(change))
  monkeypatch.setattr(jax, "config", stand_in)
  program.enable_compilation_cache()
  assert f"{tmp_path / 'file' / 'fmlora_jax' / 'xla'} can't be made (Not a dir" in caplog.text
  assert not updates
