"""Whole runs on real digits with the tiny ViT: resumed equals uninterrupted, scenarios, results."""

import dataclasses
import io
import json
import re
import threading
import time

import cases
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fmlora_jax import config, methods, tasks
from fmlora_jax.distributed import memory
from fmlora_jax.experiment import clock, setup
from fmlora_jax.experiment.run import run
from fmlora_jax.input import resident
from fmlora_jax.report import notes, plots
from fmlora_jax.train.evaluator import Evaluator
from fmlora_jax.train.loop import NonFiniteError, Trainer
from fmlora_jax.workdir import checkpoint, files, lock, log, result_file

pytestmark = pytest.mark.usefixtures("tiny_vit")  # what runs load, whatever they name

SMALL = {
  "epochs": 1,
  "batch_size": 64,
  "compute_dtype": "float32",
  "tasks": {"num_tasks": 2},
  "weights": {"tag": "random"},
  "input": {"augmentation": "mild", "steps_per_dispatch": 3},
  "optim": {"head_learning_rate": 1e-2},
  "bases": {"max_rank": 4},
  "drs": {"strategy": "fixed", "rank": 2},
  "prompt": {"num_tokens": 2},
  "checkpoint": {"every_steps": 4},
}
# of runs that are stopped and resumed here: a config is traced once; test_main.py resumes one in a
# process of its own
CACHE = setup.SetupCache()
SAME = ("params_sha256", "accuracy", "acc", "aaa", "ranks", "interference", "params", "class_order")


def small(method="fm_lora", *, method_settings=None, **changes) -> config.Config:
  values = dict(SMALL)
  for group, value in changes.items():
    values[group] = values[group] | value if isinstance(values.get(group), dict) else value
  return methods.build_config(values | {"method": {"name": method} | (method_settings or {})})


def lines(workdir) -> list[str]:
  return (workdir / "metrics.jsonl").read_text().splitlines()


@pytest.fixture(scope="module", params=["fm_lora", "lora"])
def finished(request, tmp_path_factory):
  """(config, workdir, result) of a run that nothing stopped: two tasks of ten steps."""
  settings = small(request.param)
  workdir = tmp_path_factory.mktemp(request.param) / "run"
  return settings, workdir, run(settings, workdir, cache=CACHE)


# for what holds whatever is learned; trust/test_kills.py kills runs of other methods
of_one_method = pytest.mark.parametrize("finished", ["lora"], indirect=True)


class Killed(BaseException):
  """Not an error that anything may catch."""


def stop(settings, workdir, owner, name, calls):
  """Runs until `owner.name` returned for the calls-th time; returns how long until that call."""
  left, original = [calls], getattr(owner, name)
  began = time.monotonic()

  def then_die(self, *args, **kwargs):
    took.append(time.monotonic() - began)
    original(self, *args, **kwargs)
    left[0] -= 1
    if not left[0]:
      raise Killed

  took = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(owner, name, then_die)
    with pytest.raises(Killed):
      run(settings, workdir, cache=CACHE)
  return took[-1]


def assert_same_run(finished, workdir, result):
  _, whole, expected = finished
  for name in SAME:
    assert result.get(name) == expected.get(name), name
  assert lines(workdir) == lines(whole)


# saves are after steps 4 and 8, at the end of task 1, after steps 4 and 8 of task 2, at its end
STOPS = {"within task 1": 1, "after task 1": 3, "within task 2": 5, "after the last": 6}


@pytest.mark.parametrize(
  ("finished", "saves"),
  [
    pytest.param(method, saves, id=f"{method}-{stop}", marks=marks)
    for method, late in (("fm_lora", ("after task 1", "after the last")), ("lora", ()))
    for stop, saves in STOPS.items()
    for marks in [pytest.mark.tier(2) if stop in late else ()]
  ],
  indirect=["finished"],
)
def test_a_run_that_is_stopped_and_resumed_ends_bit_equal(finished, tmp_path, saves):
  """fm_lora within its tasks; at their ends, in tier 2, nothing is resumed that lora has not."""
  settings, workdir = finished[0], tmp_path / "run"
  before = stop(settings, workdir, checkpoint.CheckpointStore, "save", saves)
  assert not (workdir / "result.json").exists()
  began = time.monotonic()
  result = run(settings, workdir, cache=CACHE)
  took = before + time.monotonic() - began
  assert_same_run(finished, workdir, result)
  seconds = result["wall_seconds"]
  assert sum(seconds[kind] for kind in clock.KINDS) == pytest.approx(seconds["total"])
  assert seconds["total"] == pytest.approx(took, rel=0.03, abs=0.2)  # of both sessions


@of_one_method
def test_a_run_replays_the_stream_of_another(finished, tmp_path):
  _, workdir, expected = finished
  settings = small("linear_probe", seed=7, tasks={"task_file": str(workdir / "task_file.json")})
  result = run(settings, tmp_path / "run")
  assert (tmp_path / "run" / "task_file.json").read_text() == (
    workdir / "task_file.json"
  ).read_text()
  for name in ("class_order", "n_test", "manifest_sha256", "split_id"):
    assert result.get(name) == expected.get(name), name


@of_one_method
@pytest.mark.parametrize("call", ["write_plots", "write_result"])
def test_a_kill_between_the_last_task_and_the_result_does_no_harm(
  finished, tmp_path, monkeypatch, call
):
  settings, workdir = finished[0], tmp_path / "run"

  def kill(*_):
    raise Killed

  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(plots if call == "write_plots" else result_file, call, kill)
    run(settings, workdir, cache=CACHE)
  assert not (workdir / "result.json").exists()
  assert_same_run(finished, workdir, run(settings, workdir, cache=CACHE))
  assert (workdir / "plots" / "accuracy_matrix.png").exists()


@of_one_method
def test_a_picture_that_can_not_be_drawn_costs_no_result(finished, tmp_path, monkeypatch, capsys):
  def fail(*_):
    raise RuntimeError("no font")

  monkeypatch.setattr(plots, "write_plots", fail)
  result = run(finished[0], tmp_path / "run", cache=CACHE)
  assert "warning    no plots: RuntimeError: no font" in capsys.readouterr().out
  assert_same_run(finished, tmp_path / "run", result)


def test_what_a_selection_read_is_known_after_a_resume(tmp_path):
  """The session that reads validation images is killed within the task."""
  settings = small(drs={"strategy": "gumbel", "candidate_ranks": (1, 2), "selector_steps": 2})
  with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
    save = checkpoint.CheckpointStore.save

    def save_and_die(self, step, *args, keep, **kwargs):
      save(self, step, *args, keep=keep, **kwargs)
      if step > 10 and not keep:
        raise Killed

    patch.setattr(checkpoint.CheckpointStore, "save", save_and_die)
    run(settings, tmp_path / "run", cache=CACHE)
  result = run(settings, tmp_path / "run", cache=CACHE)
  assert result["protocol"]["validation_read_by_method"]
  assert len(result["protocol"]["code"]) == 1  # nobody changed it meanwhile


def test_images_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, monkeypatch):
  monkeypatch.setattr(memory, "host_memory", lambda: 2000)
  message = r"images of digits, .* the host has 0\.00 GiB for them; set it to auto or stream"
  with pytest.raises(config.ConfigError, match=message):
    run(small(input={"mode": "resident"}), tmp_path / "run")
  assert not (tmp_path / "run").exists()


class Decoder:
  """Decodes for a run, and remembers which records in which thread.

  Attributes:
    refused: records that can't be decoded.
  """

  def __init__(self, monkeypatch):
    self.threads: dict[int, str] = {}
    self.refused: set[int] = set()
    make = tasks.make

    def watched(*args, **kwargs):
      self.sequence = make(*args, **kwargs)
      source = dataclasses.replace(self.sequence.source, decode=self.decode)
      return dataclasses.replace(self.sequence, source=source)

    monkeypatch.setattr(tasks, "make", watched)

  def decode(self, rows):
    for row in rows.tolist():
      assert row not in self.threads, "decoded twice"
      if row in self.refused:
        raise config.ConfigError(f"record {row} can't be used")
      self.threads[row] = threading.current_thread().name
    return self.sequence.source.decode(rows)

  def has_all(self, *parts) -> bool:
    return all(row in self.threads for part in parts for row in part.tolist())


@of_one_method
def test_what_is_needed_next_is_decoded_while_a_task_is_trained(finished, tmp_path, monkeypatch):
  decoder, train, waited = Decoder(monkeypatch), Trainer.train, []

  def slowly(self, state, variables, view):
    yield from train(self, state, variables, view)
    now, following = decoder.sequence.tasks[view.index], decoder.sequence.tasks[-1]
    deadline = time.monotonic() + 30
    while not decoder.has_all(now.test, following.train, following.val):
      assert time.monotonic() < deadline, "not decoded before the training ended"
      time.sleep(0.01)
    waited.append(view.index)

  monkeypatch.setattr(Trainer, "train", slowly)
  assert_same_run(finished, tmp_path / "run", run(finished[0], tmp_path / "run"))
  assert waited == [0, 1]
  first, second = decoder.sequence.tasks
  main = threading.current_thread().name
  assert {decoder.threads[row] for row in [*first.train, *first.val]} == {main}
  ahead = [*first.test, *second.train, *second.val, *second.test]
  assert {decoder.threads[row] for row in ahead} == {"prefetch_0"}


@of_one_method
@pytest.mark.parametrize("part", ["train", "test"])
def test_an_image_that_can_not_be_decoded_ahead_stops_the_run_at_its_task(
  finished, tmp_path, monkeypatch, part
):
  settings, workdir = finished[0], tmp_path / "run"
  with monkeypatch.context() as patch:
    decoder = Decoder(patch)
    sequence = tasks.make(settings.tasks, seed=settings.seed, source_size=16)
    broken = int(getattr(sequence.tasks[1], part)[-1])
    decoder.refused.add(broken)
    with pytest.raises(config.ConfigError, match=f"^record {broken} can't be used$"):
      run(settings, workdir)
  assert not [thread for thread in threading.enumerate() if "prefetch" in thread.name]
  steps = {json.loads(line)["step"] for line in lines(workdir)}
  assert max(steps) == (9 if part == "train" else 19)  # of ten steps a task
  assert_same_run(finished, workdir, run(settings, workdir, cache=CACHE))


def streamed(settings, **changes):
  """Returns the settings with streamed images."""
  return dataclasses.replace(
    settings, input=dataclasses.replace(settings.input, mode="stream", **changes)
  )


@of_one_method
def test_a_streamed_run_is_bit_equal_and_holds_no_task(finished, tmp_path, monkeypatch, capsys):
  loaded, load = set(), resident.load_examples

  def recorded(sequence, indices, capacity):
    loaded.add(capacity)
    return load(sequence, indices, capacity)

  monkeypatch.setattr(resident, "load_examples", recorded)
  result = run(streamed(finished[0]), tmp_path / "run", cache=CACHE)
  assert_same_run(finished, tmp_path / "run", result)
  assert loaded == {3 * 64, 256}  # steps of a dispatch, a batch of test images
  assert result["input"] == {"mode": "stream", "workers": 0}
  assert finished[2]["input"] == {"mode": "resident", "workers": 0}
  assert "\ninput      stream, threads\n" in capsys.readouterr().out


@of_one_method
@pytest.mark.parametrize("first", ["resident", "stream"])
def test_a_streamed_run_resumes_within_a_task_whatever_it_was_before(finished, tmp_path, first):
  settings, workdir = finished[0], tmp_path / "run"
  before = settings if first == "resident" else streamed(settings)
  stop(before, workdir, checkpoint.CheckpointStore, "save", 1)
  assert_same_run(finished, workdir, run(streamed(settings), workdir, cache=CACHE))


@pytest.mark.tier(2)  # the test above streams a run of lora
def test_what_does_not_fit_is_streamed_and_hooks_see_the_same(tmp_path, monkeypatch, capsys):
  """The rank selector, and both ways to look at class means; in a domain-incremental run."""
  settings = small(
    "fm_lora",
    batch_size=256,
    drs={"strategy": "gumbel", "candidate_ranks": (1, 2), "selector_steps": 3},
    head={"start": "class_mean", "kind": "class_mean"},
    tasks={"benchmark": "digits_dil", "scenario": "dil", "num_tasks": 2},
  )
  whole = tmp_path / "resident"
  finished = settings, whole, run(settings, whole, cache=CACHE)
  assert "\ninput      resident, 0.00 GiB on the device\n" in capsys.readouterr().out
  monkeypatch.setattr(memory, "host_memory", lambda: 2000)
  result = run(settings, tmp_path / "stream", cache=CACHE)
  assert_same_run(finished, tmp_path / "stream", result)
  assert result["complexity"] == finished[2]["complexity"] and result["complexity"][1] > 0
  assert result["input"]["mode"] == "stream"
  assert "\ninput      stream, threads\n" in capsys.readouterr().out


@of_one_method
def test_what_was_logged_after_the_last_checkpoint_is_logged_once(finished, tmp_path):
  """Stopped after step 7 of task 1, which is logged; the checkpoint is of step 4."""
  settings, workdir = finished[0], tmp_path / "run"
  stop(settings, workdir, log.RunLog, "progress", 3)
  steps = [json.loads(line)["step"] for line in lines(workdir)]
  assert max(steps) == 6
  with open(workdir / "metrics.jsonl", "a") as file:
    file.write('{"task": 0, "st')  # a line that was being written
  assert_same_run(finished, workdir, run(settings, workdir, cache=CACHE))
  keys = [(line["task"], line["step"], line["name"]) for line in map(json.loads, lines(workdir))]
  assert len(set(keys)) == len(keys)


@of_one_method
def test_a_run_may_be_stopped_twice_and_resumed_with_other_free_settings(finished, tmp_path):
  settings, workdir = finished[0], tmp_path / "run"
  stop(settings, workdir, checkpoint.CheckpointStore, "save", 2)
  free = dataclasses.replace(
    settings,
    eval_batch_size=32,
    input=dataclasses.replace(settings.input, steps_per_dispatch=32),
    checkpoint=dataclasses.replace(settings.checkpoint, every_steps=3),
  )
  stop(free, workdir, checkpoint.CheckpointStore, "save", 2)
  assert_same_run(finished, workdir, run(free, workdir, cache=CACHE))


@of_one_method
def test_a_resumed_run_does_not_learn_a_finished_task_again(finished, tmp_path, monkeypatch):
  settings, workdir = finished[0], tmp_path / "run"
  stop(settings, workdir, checkpoint.CheckpointStore, "save", 3)
  seen = []
  train = Trainer.train

  def recorded(self, state, variables, view):
    seen.append((view.index, int(state.step)))
    return train(self, state, variables, view)

  monkeypatch.setattr(Trainer, "train", recorded)
  run(settings, workdir, cache=CACHE)
  assert seen == [(1, 0)]


def test_a_finished_run_gives_its_result_again_and_trains_nothing(finished, monkeypatch, capsys):
  settings, workdir, expected = finished

  def refuse(*args):
    raise AssertionError("trained again")

  monkeypatch.setattr(Trainer, "train", refuse)
  before = (workdir / "result.json").read_bytes()
  assert run(settings, workdir)["params_sha256"] == expected["params_sha256"]
  assert "finished before" in capsys.readouterr().out
  assert (workdir / "result.json").read_bytes() == before


def test_another_config_is_refused_with_the_difference(finished):
  settings, workdir, _ = finished

  def files():  # but for who was there last
    found = [path for path in workdir.iterdir() if path.is_file() and path.name != lock.FILE]
    return {path: path.read_bytes() for path in found}

  before = files()
  with pytest.raises(config.ConfigError, match=r"config\.epochs: 1 there, 2 now"):
    run(dataclasses.replace(settings, epochs=2), workdir)
  assert files() == before


def test_settings_that_change_no_number_may_change(finished):
  settings, workdir, expected = finished
  free = dataclasses.replace(settings, eval_batch_size=64)
  assert run(free, workdir)["acc"] == expected["acc"]


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
  (tmp_path / "thesis.txt").write_text("precious")
  with pytest.raises(config.ConfigError, match=r"holds thesis\.txt but no config\.json"):
    run(small(), tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def fields_of(method):
  """Returns the fields of a result: those of all, and those that the method declares."""
  return {*result_file.FIELDS, *(fact.field for fact in methods.reports(method) if fact.field)}


def test_the_result_has_every_field_and_is_the_one_on_disk(finished):
  settings, workdir, result = finished
  assert fields_of(settings.method.name) == set(result)
  on_disk = json.loads((workdir / "result.json").read_text())
  assert on_disk == json.loads(json.dumps(files.jsonable(result, "result")))
  assert on_disk["finished"] is True and on_disk["scenario"] == "cil"
  assert on_disk["weights"] == {"tag": "tiny", "sha256": "ab" * 32}
  assert on_disk["seed"] == settings.seed and on_disk["config"]["epochs"] == 1
  assert sorted(on_disk["class_order"]) == list(range(10))
  assert set(on_disk["wall_seconds"]) == {*clock.KINDS, "total"}
  assert all(seconds >= 0 for seconds in on_disk["wall_seconds"].values())
  assert set(on_disk["versions"]) >= {"jax", "flax", "optax", "python"}
  assert (workdir / "plots" / "accuracy_matrix.png").stat().st_size > 1000


def test_the_accuracies_are_those_of_the_matrix(finished):
  settings, _, result = finished
  matrix, n_test = np.array(result["accuracy"], float), np.array(result["n_test"])
  sequence = tasks.make(settings.tasks, seed=settings.seed, source_size=16)
  assert n_test.tolist() == [len(task.test) for task in sequence.tasks]
  assert result["manifest_sha256"] == sequence.manifest_sha256
  assert np.isnan(matrix[0, 1]) and result["accuracy"][0][1] is None
  np.testing.assert_allclose(matrix[1] * n_test, np.rint(matrix[1] * n_test), atol=1e-9)
  assert result["acc"] == pytest.approx(100 * matrix[1] @ n_test / n_test.sum())
  assert result["forgetting"] == pytest.approx(100 * (matrix[0, 0] - matrix[1, 0]))
  assert result["fwt"] is None  # no image of an unseen class can be right
  assert matrix[0, 0] > 0.25 and matrix[1, 1] > 0.25  # five classes


def test_the_parameters_of_a_result_are_those_of_the_formula(finished):
  settings, _, result = finished
  params, head = result["params"], 10 * 17
  backbone = 16 * 16 * 12 * 2 + 16 * (4 + 3 + 2) * 2 + 2 * 16 + 4 * 16  # kernels, vectors of blocks
  if settings.method.name == "fm_lora":
    shared, per_task = 2 * 2 * (16 + 16) * 4 + 2 * 16, [2 * 2 * 2 * rank**2 for rank in (4, 2)]
    trained = per_task[1] + 2 * 16  # M and N of rank 2, prompt
    assert result["ranks"] == [4, 2]
  else:
    shared, per_task = 0, [2 * 2 * (16 + 16) * 16] * 2
    trained = per_task[1]
  assert params["stored_per_task"] == per_task
  assert params["stored_total"] == shared + sum(per_task) + head
  assert params["trained"] == trained + 5 * 17
  assert params["backbone"] > backbone
  assert result["statistics_bytes"] == 0


def test_metrics_tell_loss_and_norm_of_each_step_and_the_accuracies_of_each_task(finished):
  _, workdir, result = finished
  logged = [json.loads(line) for line in lines(workdir)]
  losses = [(line["task"], line["step"]) for line in logged if line["name"] == "train/loss"]
  assert losses == [(step // 10, step) for step in range(20)]
  assert sum(line["name"] == "train/grad_norm" for line in logged) == 20
  tests = {(x["task"], x["name"]): x["value"] for x in logged if x["name"].startswith("test/")}
  accuracy = result["accuracy"]
  assert tests == {
    (0, "test/task_1"): accuracy[0][0],
    (1, "test/task_1"): accuracy[1][0],
    (1, "test/task_2"): accuracy[1][1],
  }


def test_a_loss_that_is_not_finite_stops_with_task_and_step(tmp_path):
  settings = small(optim={"learning_rate": 1e30})
  with pytest.raises(NonFiniteError, match=r"task 1 of 2, step 2: must be finite"):
    run(settings, tmp_path / "run")
  assert not (tmp_path / "run" / "result.json").exists()
  found = json.loads((tmp_path / "run" / "non_finite.json").read_text())
  assert (found["task"], found["step"], len(set(found["images"]))) == (1, 2, 64)
  losses, norms = found["last_steps"]["loss"], found["last_steps"]["grad_norm"]
  assert len(losses) == len(norms) == 2 and float(losses[0]) < 10 and norms[1] == "nan"


def test_domains_come_one_by_one_and_transfer_forward_is_measured(tmp_path, monkeypatch):
  counts, correct = [], Evaluator.correct

  def recorded(self, *args):
    counts.append(correct(self, *args).tolist())
    return np.array(counts[-1])

  monkeypatch.setattr(Evaluator, "correct", recorded)
  domains = {"benchmark": "digits_dil", "scenario": "dil"}
  result = run(small("linear_probe", tasks=domains), tmp_path / "run")
  assert result["scenario"] == "dil" and result["class_order"] == list(range(10))
  assert set(result["task_names"]) < {"plain", "inverted", "rotated", "noisy"}
  n = result["n_test"][1]
  assert result["n_test"] == [n, n]
  untrained, first, second = counts
  assert untrained[1] == pytest.approx(n / 10, rel=0.1)  # rows of zeros: every image is a 0
  assert result["fwt"] == pytest.approx(100 * (first[1] - untrained[1]) / n)
  assert result["accuracy"] == [[first[0] / n, None], [second[0] / n, second[1] / n]]


def test_the_task_is_known_at_test_time_in_til_only(tmp_path):
  cil = run(small("linear_probe"), tmp_path / "cil")
  til = run(small("linear_probe", tasks={"scenario": "til"}), tmp_path / "til")
  assert til["params_sha256"] == cil["params_sha256"]
  assert til["accuracy"][0][0] == cil["accuracy"][0][0]
  assert til["accuracy"][1][0] > cil["accuracy"][1][0]
  assert til["accuracy"][1][1] > cil["accuracy"][1][1]
  assert til["accuracy"][1][0] == til["accuracy"][0][0]  # a frozen ViT and a head of its own


def test_own_photos_are_named_wherever_a_run_shows_them(tmp_path):
  rng = np.random.default_rng(0)
  for name in ("train/2", "train/10", "val/2", "val/10"):
    (tmp_path / "photos" / name).mkdir(parents=True)
    for i in range(6):
      pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
      Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
  Image.fromarray(pixels).save(tmp_path / "photos" / "val/2" / "of both classes.png")
  console = Console(file=io.StringIO(), width=80)
  photos = {"benchmark": "image_folder", "data_dir": str(tmp_path / "photos"), "order": "natural"}
  result = run(small("linear_probe", tasks=photos), tmp_path / "run", console)
  text = console.file.getvalue()
  assert (result["class_names"], result["class_ranges"]) == (("10", "2"), ((0, 1), (1, 2)))
  assert result["task_names"] == ["10", "2"]
  assert "tasks      10; 2\n" in text and "task 1/2 (10): 1 classes" in text
  assert re.search(r"\n +1  10 .*\n +2  2 ", text)  # rows of the matrix
  alone, drawn = result["caveats"]
  assert alone.startswith("2 of 2 tasks have one class") and f"caveat     {alone}\n" in text
  assert "config.tasks.test_from to val" in drawn and f"caveat     {drawn}\n" in text
  assert result["protocol"]["copies"]["in_two_classes"] == 1
  assert "images in two classes 1" in notes.protocols({"own": [result]})[0]


@pytest.mark.parametrize(
  "kind", [pytest.param("cosine", marks=pytest.mark.tier(2)), "class_mean", "lda"]
)
def test_other_heads_learn_and_say_what_they_keep(tmp_path, kind):
  """The cosine head in tier 2: methods/common/test_base.py trains it."""
  result = run(small("linear_probe", head={"kind": kind}), tmp_path / "run")
  assert result["accuracy"][0][0] > 0.25  # five classes
  means = 10 * 17  # and counts
  statistics = {"class_mean": means, "lda": means + 16 * 16 + 1}.get(kind, 0)
  assert result["statistics_bytes"] == 4 * statistics


def test_hyper_parameters_are_chosen_on_validation_images(tmp_path, monkeypatch):
  decoded = set()
  make = tasks.make

  def recording(*args, **kwargs):
    sequence = make(*args, **kwargs)
    decode = sequence.source.decode

    def noted(rows):
      decoded.update(rows.tolist())
      return decode(rows)

    return dataclasses.replace(sequence, source=dataclasses.replace(sequence.source, decode=noted))

  monkeypatch.setattr(tasks, "make", recording)
  settings = small("linear_probe", tasks={"evaluate_on": "val"})
  result = run(settings, tmp_path / "run")
  sequence = make(settings.tasks, seed=settings.seed, source_size=16)
  assert result["n_test"] == [len(task.val) for task in sequence.tasks]
  assert not decoded & {row for task in sequence.tasks for row in task.test.tolist()}
  assert decoded >= set(sequence.tasks[1].val.tolist())


OTHERS = [
  pytest.param(case, marks=() if case.name in ("dualprompt", "inflora") else pytest.mark.tier(2))
  for case in cases.ALL
  if case.name not in ("fm_lora", "lora", "linear_probe")
]


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_every_other_method_runs_end_to_end(tmp_path, case):
  """Most in tier 2: methods/test_contract.py trains, resumes and tests each."""
  settings = small(case.name, method_settings=case.changes, optim={"learning_rate": 1e-4})
  result = run(settings, tmp_path / "run")
  assert fields_of(case.name) == set(result) and result["method"] == case.name
