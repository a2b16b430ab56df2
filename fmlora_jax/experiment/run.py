"""The experiment: tasks learned in order, every task seen so far measured after each one."""

import concurrent.futures
import dataclasses
import hashlib
import pathlib
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console

from fmlora_jax.config import OWN_FIELDS, Config, ConfigError
from fmlora_jax.distributed import hosts, stop
from fmlora_jax.experiment import guards, provenance
from fmlora_jax.experiment import result as results
from fmlora_jax.experiment.clock import Clock
from fmlora_jax.experiment.result import Progress
from fmlora_jax.experiment.setup import SetupCache
from fmlora_jax.input import resident, streaming
from fmlora_jax.input.prefetch import Prefetcher
from fmlora_jax.report import tables
from fmlora_jax.tasks import task_file
from fmlora_jax.train import mesh as mesh_lib
from fmlora_jax.train.evaluator import Evaluator, allowed_classes, iterate_batches
from fmlora_jax.train.labels import num_trained
from fmlora_jax.train.loop import Trainer
from fmlora_jax.train.rng import named_key
from fmlora_jax.train.step import TrainState
from fmlora_jax.types import NonFiniteError, Variables
from fmlora_jax.workdir import checkpoint, disk, lock
from fmlora_jax.workdir import log as writer

NUM_ALONE = 4  # test images that are also classified in a batch of their own, at the end


def run(
  config: Config,
  workdir: pathlib.Path,
  console: Console | None = None,
  workshop: SetupCache | None = None,
  began: float | None = None,
) -> dict[str, Any]:
  """Runs, resumes or re-reads the experiment in `workdir`; returns what result.json holds.

  Args:
    console: where to show what goes on; None takes the standard output.
    workshop: of several runs, which then share what they can; None is a run on its own.
    began: when the run's program began, by time.monotonic(); None is now.

  Raises:
    ConfigError: if a setting, a file or the workdir can't be used, in one line for the user; also
      if another process is at work in the workdir.
    NonFiniteError: if training diverges.
    Stopped: if the program was asked to stop; what was trained is saved.
    FrozenError: if training changes what it must leave alone.
  """
  hosts.run_on_first(lambda: checkpoint.check_folder(workdir))
  with Clock(time.monotonic() if began is None else began) as clock, lock.lock_on_first(workdir):
    return _run(config, workdir, console, workshop or SetupCache(), clock)


def _run(
  config: Config,
  workdir: pathlib.Path,
  console: Console | None,
  workshop: SetupCache,
  clock: Clock,
) -> dict[str, Any]:
  parts = workshop.parts(config, clock.kind)
  trainer, info = parts.trainer, parts.info
  method, sequence, mesh = trainer.method, trainer.sequence, trainer.mesh
  stream_json = task_file.dump_task_file(sequence)
  identity = {
    "config": dataclasses.asdict(config),
    "weights_sha256": info.sha256,
    "manifest_sha256": sequence.manifest_sha256,
    "stream_sha256": hashlib.sha256(stream_json.encode()).hexdigest(),
  }
  hosts.assert_same_on_all(identity | {"versions": provenance.versions()}, besides=OWN_FIELDS)
  is_first = hosts.is_first()
  finished = hosts.run_on_first(lambda: _claim(workdir, identity, stream_json))
  if not (workdir / task_file.FILE).exists():
    raise ConfigError(f"workdir {workdir} is not the first process's: must be a folder all share")
  with writer.open_run(workdir, console=console, writes=is_first) as log:
    log.note(f"devices    {provenance.devices(mesh)}")
    log.note(f"backbone   {info.tag}, sha256 {info.sha256}, {parts.sizes.depth} blocks")
    log.note(f"benchmark  {sequence.split_id}, manifest {sequence.manifest_sha256[:16]}")
    log.note(f"scenario   {sequence.scenario}, {len(sequence.tasks)} tasks, seed {config.seed}")
    log.note(f"input      {provenance.images(trainer)}")
    log.note(f"method     {config.method.name}, workdir {workdir}")
    log.note(f"passes     {provenance.passes(method.passes)}")
    for caveat in method.caveats:
      log.note(f"caveat     {caveat}")
    if finished:
      log.note("finished before; its result:")
      result = writer.read_result(workdir)
    else:
      store = checkpoint.CheckpointStore(
        workdir,
        mesh_lib.replicated(mesh),
        identity=identity,
        on_damage=config.checkpoint.on_damage,
        note=log.note,
      )
      experiment = Experiment(config, trainer, store, log, clock)
      experiment.learn()
      alone = experiment.batch_of_one()
      reached = experiment.progress, experiment.variables, experiment.n_test
      result = results.build_result(parts, *reached, alone=alone)
      if is_first:
        from fmlora_jax.report import plots  # matplotlib takes a second to import

        try:
          plots.write_plots(result, workdir)
        except Exception as error:  # pictures of what result.json says: no reason to lose that
          log.note(f"warning    no plots: {type(error).__name__}: {error}")
        result["wall_seconds"] = clock.seconds()
        writer.write_result(workdir, result)  # last: it says that the run is finished
    for line in tables.costs(result):
      log.note(line)
  return result


def _claim(workdir: pathlib.Path, identity: dict[str, Any], stream_json: str) -> bool:
  """Makes the workdir this run's; returns whether the run has finished there."""
  lock.refuse_links(workdir, workdir.glob("*"))
  checkpoint.claim_workdir(workdir, identity)
  writer.replace(workdir / task_file.FILE, stream_json)
  return (workdir / writer.RESULT).exists()


def _agree_on(snapshot: checkpoint.Snapshot | None) -> None:
  """Refuses checkpoints that are not the same in all processes."""
  mend = "--workdir must be a folder that all share"
  hosts.assert_same_on_all({"checkpoint.step": snapshot and snapshot.record["step"]}, mend=mend)
  if snapshot:
    found = {name: snapshot.record[name] for name in ("progress", "digests")}
    hosts.assert_same_on_all({"checkpoint": found}, mend=mend)


class Experiment:
  """A run under way: variables, progress, and the way from one task to the next."""

  def __init__(
    self,
    config: Config,
    trainer: Trainer,
    store: checkpoint.CheckpointStore,
    log: writer.RunLog,
    clock: Clock,
  ):
    self.config, self.trainer, self.store, self.log = config, trainer, store, log
    self.method, self.sequence = trainer.method, trainer.sequence
    self.evaluator = Evaluator(self.method, trainer.center)
    measured = [getattr(task, config.tasks.evaluate_on) for task in self.sequence.tasks]
    self.n_test = np.asarray([len(indices) for indices in measured])
    self._tests = self._measured_images(np.concatenate(measured))
    self._clock, self._ahead = clock, Prefetcher()
    self._fold = jax.jit(self.method.fold)
    self._frozen = guards.FrozenGuard(trainer)
    self.progress = Progress()
    self.variables = None
    self._unsaved: tuple[Variables, TrainState] | None = None  # trained since the last checkpoint

  def learn(self) -> None:
    """Learns all tasks that are left.

    Raises:
      Stopped: if the program was asked to stop; what was trained is saved.
    """
    with self._ahead, stop.awaited():
      state = self._restore()
      self._require_room()
      self.log.truncate(
        self.progress.task, self._steps_before(self.progress.task) + self._step(state)
      )
      for index in range(self.progress.task, len(self.sequence.tasks)):
        stop.check()
        self.progress.task = index
        try:
          self._learn_task(index, state)
        except stop.Stopped:
          self._save_within_task()
          raise
        except NonFiniteError as error:
          self.log.not_finite(error.details)
          raise
        state = None
        self._save(self._steps_before(index + 1), keep=True)

  def _learn_task(self, index, state):
    task, config = self.sequence.tasks[index], self.config
    steps = self.trainer.steps_per_epoch(index)
    plan = writer.TaskPlan(
      index=index,
      num_tasks=len(self.sequence.tasks),
      name=task.name,
      num_classes=task.hi - task.lo,
      num_train=len(task.train),
      epochs=config.epochs,
      steps_per_epoch=steps,
      batch_size=config.batch_size,
    )
    self.log.task_started(plan)
    with self._clock.kind("data"):
      view = self.trainer.view(index)
    tests = self._decode_ahead(index)
    with self._clock.kind("train"):
      if state is None:
        self.log.phase("preparing")
        self.variables, facts = self._shared_out(self.method.begin_task(self.variables, view))
        self.progress.facts.append(facts)
        self.progress.val_read |= self.trainer.val_read
        state = self.trainer.init(self.variables, index)
      self._count_trained(index)
      self._frozen.begin(index, state.params)
      state = self._train(state, view)
      self._frozen.check(index, state.params)
      self.variables = self.variables.replace(**state.params)
      self.variables, facts = self._shared_out(self.method.end_task(self.variables, view))
      self.progress.facts[index] |= facts
      self.progress.val_read |= self.trainer.val_read
    self.progress.training = False
    if tests:
      with self._clock.kind("data"):
        tests.result()
    with self._clock.kind("eval"):
      self.log.phase("testing")
      self._evaluate(index)
    self._log_task(index)

  def _shared_out(self, learned):
    variables, facts = learned
    return self.trainer.share_out(variables), facts

  def _train(self, state, view):
    before, steps = self._steps_before(view.index), self.trainer.steps_per_epoch(view.index)
    every, done = self.config.checkpoint.every_steps, int(state.step)
    for state, stats, seconds in self.trainer.train(state, self.variables, view):  # noqa: B020
      num = len(stats["loss"])
      for i in range(num):
        values = {f"train/{name}": stats[name][i] for name in stats}
        self.log.scalars(view.index, before + done + i, values)
      done += num
      speed = num * self.config.batch_size / seconds
      self.log.progress(done, loss=float(stats["loss"][-1]), images_per_second=speed)
      self._unsaved = self.variables.replace(**state.params), state
      if every and done % every == 0 and done < steps * self.config.epochs:
        self._save_within_task()
    return state

  def _decode_ahead(self, index: int) -> concurrent.futures.Future | None:
    """Has decoded, while task `index` is trained, what measures it, and then the next task.

    Returns:
      What is done when the former is; None where images are streamed.
    """
    if self.trainer.streams:
      return None
    num_images = sum(self.n_test[: self._num_tests(index)])
    tests = self._ahead.submit(self._kept.decode, self._tests.indices[:num_images])
    if index + 1 < len(self.sequence.tasks):
      self.trainer.load_ahead(index + 1, self._ahead)
    return tests

  def _num_tests(self, index: int) -> int:
    """Returns how many tasks' images are classified after task `index`: in dil one more."""
    spec = self.sequence.spec
    return index + 1 + (spec.scenario == "dil" and index + 1 < spec.num_tasks)

  def _evaluate(self, index):
    counts = self._correct(index, self._num_tests(index))
    self.progress.correct.append(counts[: index + 1])
    self.progress.ahead += counts[index + 1 :]

  def _correct(self, learned: int, num_tests: int) -> list[int]:
    """Returns right answers on the first test sets, of a model that learned tasks 0..learned."""
    model = self._fold(self.trainer.weights, self.variables)
    counts = self._count(model, learned, self._tests, self.n_test[:num_tests])
    return counts[:num_tests].tolist()

  def batch_of_one(self) -> dict[str, int]:
    """Returns right answers on a few test images: all in one batch, and each in one of its own.

    At the end of the run; warns where they differ.
    """
    last, sets = len(self.sequence.tasks) - 1, np.repeat(np.arange(len(self.n_test)), self.n_test)
    picked = np.unique(np.linspace(0, len(sets) - 1, NUM_ALONE).astype(int))

    def right(places):
      tests = dataclasses.replace(self._tests, indices=self._tests.indices[places])
      sizes = np.bincount(sets[places], minlength=len(self.n_test))
      return int(self._count(model, last, tests, sizes).sum())

    with self._clock.kind("eval"):
      model = self._fold(self.trainer.weights, self.variables)
      together, alone = right(picked), sum(right(place) for place in picked[:, None])
    found = {"images": len(picked), "right_together": together, "right_alone": alone}
    if together != alone:
      self.log.note(f"warning    predictions depend on the batch they are in: {found}")
    return found

  def _count(
    self, model, learned: int, tests: streaming.StreamingReader, sizes: np.ndarray
  ) -> np.ndarray:
    """Returns right answers of the model that learned tasks 0..learned.

    Args:
      model: folded.
      sizes: of the images the first sizes[0] are of test set 0, and so on.
    """
    masks = allowed_classes(self.sequence.spec, learned)
    batches = iterate_batches(tests.read, sizes, self.config.eval_batch_size, self.trainer.put)
    return self.evaluator.correct(model, batches, self.trainer.put(masks))

  def _measured_images(self, records: np.ndarray) -> streaming.StreamingReader:
    """Returns what reads the images that fill the matrix; decoded once unless all is streamed."""
    sequence, workers = self.sequence, self.config.input.workers
    if not self.trainer.streams:
      sequence, workers = resident.cache_decoded(sequence, np.sort(records)), 0
      self._kept = sequence.source.decode
    put, share = self.trainer.assemble, self.trainer.share
    return streaming.StreamingReader(
      sequence=sequence, indices=records, put=put, share=share, workers=workers
    )

  def _restore(self):
    """Takes up the newest checkpoint; returns the state of the task it lies in, if it does."""
    with self._clock.kind("checkpoint"):
      snapshot = self.store.latest()
    _agree_on(snapshot)
    found = snapshot.record["progress"] if snapshot else {}
    for name, value in found.items():
      setattr(self.progress, name, value)
    self._add_session("devices", provenance.devices(self.trainer.mesh))
    self._add_session("code", provenance.code())
    if snapshot is None:
      self._fresh()
      return None
    self._clock.add(self.progress.seconds)
    progress, arrays = self.progress, snapshot.arrays
    groups = {name: checkpoint.unflatten(arrays, name) for name in ("shared", "cur", "mem")}
    self.variables = Variables(frozen={}, **groups)
    if not progress.training:
      progress.task += 1
      self.log.note(f"resumed after task {progress.task} of {len(self.sequence.tasks)}")
      return None
    template = jax.eval_shape(lambda v: self.trainer.init(v, progress.task), self.variables)
    opt_state = checkpoint.fill(template.opt_state, arrays, "opt_state")
    state = template.replace(
      params={"shared": groups["shared"], "cur": groups["cur"]},
      opt_state=opt_state,
      step=arrays["step"],
    )
    self.log.note(f"resumed in task {progress.task + 1}, step {int(state.step)}")
    return state

  def _add_session(self, name, now):
    """Adds what this session computes on, or with, to the history; says where it has changed."""
    before = getattr(self.progress, name)
    if before and before[-1] != now:
      self.log.note(f"{name:10} changed from {before[-1]}: from here on the last bits may differ")
    if before[-1:] != [now]:
      before.append(now)

  def _fresh(self):
    key = named_key(self.trainer.root, "init", task=0)
    # on all devices, as later tasks' and restored ones are: no program compiles once more for them
    self.variables = self.trainer.share_out(self.method.init(key, self.trainer.weights))
    spec = self.sequence.spec
    if spec.scenario == "dil":  # the first task has nothing before it that could help
      with self._clock.kind("eval"):
        self.progress.baseline = [None, *self._correct(0, spec.num_tasks)[1:]]
      self.progress.ahead = [None]

  def _save_within_task(self):
    """Saves what was trained since the last checkpoint; what came after the steps is done again."""
    if self._unsaved:
      self.progress.training = True
      self.variables, state = self._unsaved
      step = self._steps_before(self.progress.task) + int(state.step)
      self._save(step, keep=False, state=state)

  def _save(self, step, *, keep, state=None):
    groups = {name: getattr(self.variables, name) for name in ("shared", "cur", "mem")}
    if state is not None:
      groups |= {"opt_state": state.opt_state, "step": state.step}
      self._frozen.check(self.progress.task, state.params)
    arrays = checkpoint.flatten(groups)
    guards.require_finite(arrays, f"at the end of step {step} of the run")
    with self._clock.kind("checkpoint"):
      self.progress.seconds = self._clock.seconds()
      record = {"progress": dataclasses.asdict(self.progress)}
      snapshot = checkpoint.Snapshot(arrays=arrays, record=record)
      self.store.save(step, snapshot, keep=keep)
    self._unsaved = None

  def _require_room(self):
    """Refuses to begin where a checkpoint for each task that is left, and one more, can't lie."""
    groups = self.variables.shared, self.variables.cur, self.variables.mem
    left = len(self.sequence.tasks) - self.progress.task
    need = (left + 1) * checkpoint.num_bytes(groups)
    hosts.run_on_first(
      lambda: disk.require_room(self.store.folder, need, f"checkpoints of {left} tasks")
    )

  def _steps_before(self, index):
    return self.config.epochs * sum(self.trainer.steps_per_epoch(i) for i in range(index))

  def _step(self, state):
    return 0 if state is None else int(state.step)

  def _count_trained(self, index):
    params = {"shared": self.variables.shared, "cur": self.variables.cur}
    self.progress.trained = num_trained(params, self.method.rules(index))

  def _log_task(self, index):
    matrix = self.progress.matrix(self.n_test)
    facts = self.progress.facts[index]
    shown = {name: value for name, value in facts.items() if isinstance(value, (int, float))}
    self.log.task_ended(matrix, self.n_test, shown)
    values = {f"test/task_{i + 1}": matrix[index, i] for i in range(index + 1)}
    values |= {f"method/{name}": value for name, value in shown.items()}
    self.log.scalars(index, self._steps_before(index + 1) - 1, values)
