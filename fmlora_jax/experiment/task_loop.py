"""The task loop: each task is learned, measured and saved."""

from collections.abc import Iterator

from fmlora_jax.distributed import hosts, stop
from fmlora_jax.experiment import provenance
from fmlora_jax.experiment.clock import Clock
from fmlora_jax.experiment.guards import FrozenGuard
from fmlora_jax.experiment.session import Session
from fmlora_jax.experiment.setup import RunSetup
from fmlora_jax.input.loader import Prefetcher
from fmlora_jax.train import mesh as mesh_lib
from fmlora_jax.train.evaluator import TestSets
from fmlora_jax.train.labels import num_trained
from fmlora_jax.train.rng import named_key
from fmlora_jax.train.step import TrainState
from fmlora_jax.types import NonFiniteError, TaskView, Variables
from fmlora_jax.workdir.log import RunLog, TaskPlan


class TaskLearner:
  """Learns one task: the method's hooks, and the training steps between them.

  Args:
    setup: of the run.
    session: whose variables and progress it changes.
    log: of the run.
    clock: of the session.
  """

  def __init__(self, setup: RunSetup, session: Session, log: RunLog, clock: Clock):
    self._setup, self._session, self._log, self._clock = setup, session, log, clock
    self._guard = FrozenGuard(setup.weights, setup.method.rules)

  def begin(self, view: TaskView) -> TrainState:
    """Prepares the method for a task; returns the state at its start."""
    self._log.phase("preparing")
    self._session.progress.facts.append({})
    self._adopt(view, self._setup.method.begin_task(self._session.variables, view))
    return self._setup.trainer.init(self._session.variables, view.index)

  def train(self, state: TrainState, view: TaskView) -> Iterator[TrainState]:
    """Yields the state after each chunk of steps; logs each step.

    Raises:
      FrozenError: at the end, if training has changed a frozen array.
    """
    trainer, index, done = self._setup.trainer, view.index, int(state.step)
    before, batch_size = trainer.steps_before(index), self._setup.config.batch_size
    rules = self._setup.method.rules(index)
    self._session.progress.trained = num_trained(state.params, rules)
    self._guard.begin(index, state.params)
    self._log.phase("compiling, first steps")
    compiled = self._clock.seconds()["compile"]
    for state, stats, seconds in trainer.train(state, self._session.variables, view):  # noqa: B020
      num = len(stats["loss"])
      for i in range(num):
        values = {f"train/{name}": stats[name][i] for name in stats}
        self._log.scalars(index, before + done + i, values)
      done += num
      before_it, compiled = compiled, self._clock.seconds()["compile"]
      speed = num * batch_size / max(seconds - (compiled - before_it), 1e-9)
      self._log.progress(done, loss=float(stats["loss"][-1]), images_per_second=speed)
      yield state
    self.check(state)

  def check(self, state: TrainState) -> None:
    """Raises FrozenError if training has changed a frozen array."""
    self._guard.check(self._session.progress.task, state.params)

  def end(self, view: TaskView, state: TrainState) -> None:
    """Ends a task whose steps are done."""
    trained = self._session.variables.replace(**state.params)
    self._adopt(view, self._setup.method.end_task(trained, view))

  def _adopt(self, view: TaskView, learned: tuple[Variables, dict]) -> None:
    """Takes over what a hook returned."""
    (variables, facts), progress = learned, self._session.progress
    self._session.variables = mesh_lib.replicate_from_host0(variables, self._setup.mesh)
    progress.facts[view.index] |= facts
    progress.val_read |= self._setup.views.val_read


class TaskLoop:
  """Learns, measures and saves the tasks of a run that are left.

  Args:
    setup: of the run.
    session: to restore and save it.
    tests: that measure it.
    log: of the run.
    clock: of the session.
  """

  def __init__(self, setup: RunSetup, session: Session, tests: TestSets, log: RunLog, clock: Clock):
    self._setup, self._session, self._tests, self._log = setup, session, tests, log
    self._clock, self._prefetcher = clock, Prefetcher()
    self._learner = TaskLearner(setup, session, log, clock)
    self._num_tasks = len(setup.sequence.tasks)
    self._unsaved: tuple[Variables, TrainState] | None = None  # trained since the last checkpoint

  def run(self) -> None:
    """Learns all tasks that are left.

    Raises:
      Stopped: if the program was asked to stop; what was trained is saved.
    """
    trainer = self._setup.trainer
    with self._prefetcher, stop.awaited():
      state = self._restore()
      self._session.require_free_space(self._num_tasks)
      progress, done = self._session.progress, int(state.step) if state else 0
      done += trainer.steps_before(progress.task)
      self._log.truncate(progress.task, done, progress.logged)
      for index in range(progress.task, self._num_tasks):
        stop.check()
        progress.task = index
        try:
          self._learn_task(index, state)
        except stop.Stopped:
          self._save_within_task()
          raise
        except NonFiniteError as error:
          self._log.not_finite(error.details)
          raise
        state = self._unsaved = None
        self._save(trainer.steps_before(index + 1))

  def _restore(self) -> TrainState | None:
    """Restores or begins the run; returns the state within the task in which it goes on."""
    with self._clock.kind("checkpoint"):
      state = self._session.restore(self._setup.trainer.init)
    progress = self._session.progress
    self._clock.add(progress.seconds)
    self._record("devices", provenance.devices(self._setup.mesh))
    self._record("code", provenance.code())
    if not self._session.variables.mem:
      self._begin()
    elif state is None:
      self._log.note(f"resumed after task {progress.task} of {self._num_tasks}")
    else:
      self._log.note(f"resumed in task {progress.task + 1}, step {int(state.step)}")
    return state

  def _record(self, name: str, now: str) -> None:
    """Appends the devices or the code of this session to their history where they have changed."""
    history = getattr(self._session.progress, name)
    if history and history[-1] != now:
      before = history[-1]
      self._log.note(f"{name:10} changed (before: {before}): results may differ in the last bits")
    if history[-1:] != [now]:
      history.append(now)

  def _begin(self) -> None:
    """Begins a run with fresh variables."""
    setup, progress = self._setup, self._session.progress
    key = named_key(setup.root, "init", task=0)
    # replicated, as later tasks' and restored ones are: no program compiles once more for them
    variables = mesh_lib.replicate_from_host0(setup.method.init(key, setup.weights), setup.mesh)
    self._session.variables = variables
    if setup.sequence.spec.scenario == "dil":  # the first task has no task before it to help
      with self._clock.kind("eval"):
        counts = self._tests.count_correct(variables, 0, self._num_tasks)
        progress.baseline = [None, *counts[1:]]
      progress.ahead = [None]

  def _learn_task(self, index: int, state: TrainState | None) -> None:
    """Learns and measures one task.

    Args:
      state: where the task goes on; None at its start.
    """
    trainer, every = self._setup.trainer, self._setup.config.checkpoint.every_steps
    self._log.task_started(self._plan(index))
    with self._clock.kind("data"):
      view = self._setup.views.view(index, self._session.progress.facts[:index])
    tests = self._tests.prefetch(index, self._prefetcher)
    if index + 1 < self._num_tasks:
      self._setup.loader.prefetch(index + 1, self._prefetcher)
    with self._clock.kind("train"):
      state = self._learner.begin(view) if state is None else state
      for state in self._learner.train(state, view):  # noqa: B020
        self._unsaved, done = (self._session.variables.replace(**state.params), state), state.step
        if every and done % every == 0 and done < trainer.num_steps(index):
          self._save_within_task()
      self._learner.end(view, state)
    if tests:
      with self._clock.kind("data"):
        tests.result()
    self._log.phase("testing")
    with self._clock.kind("eval"):
      self._measure(index)

  def _plan(self, index: int) -> TaskPlan:
    task, config = self._setup.sequence.tasks[index], self._setup.config
    return TaskPlan(
      index=index,
      num_tasks=self._num_tasks,
      name=task.name,
      num_classes=task.hi - task.lo,
      num_train=len(task.train),
      epochs=config.epochs,
      steps_per_epoch=self._setup.trainer.steps_per_epoch(index),
      batch_size=config.batch_size,
    )

  def _measure(self, index: int) -> None:
    """Fills row `index` of the accuracy matrix, and logs it."""
    progress, sizes = self._session.progress, self._tests.sizes
    counts = self._tests.count_correct(self._session.variables, index, self._tests.num_after(index))
    progress.correct.append(counts[: index + 1])
    progress.ahead += counts[index + 1 :]
    matrix, facts = progress.matrix(sizes), progress.facts[index]
    shown = {name: value for name, value in facts.items() if isinstance(value, (int, float))}
    names = [task.name for task in self._setup.sequence.tasks]
    self._log.task_ended(matrix, sizes, shown, names)
    values = {f"test/task_{i + 1}": matrix[index, i] for i in range(index + 1)}
    values |= {f"method/{name}": value for name, value in shown.items()}
    self._log.scalars(index, self._setup.trainer.steps_before(index + 1) - 1, values)

  def _save_within_task(self) -> None:
    """Saves the last step that was trained; hooks after the steps are repeated on resume."""
    if self._unsaved:
      self._session.variables, state = self._unsaved
      self._learner.check(state)
      before = self._setup.trainer.steps_before(self._session.progress.task)
      self._save(before + int(state.step), state)
      self._unsaved = None

  def _save(self, step: int, state: TrainState | None = None) -> None:
    with self._clock.kind("checkpoint"):
      self._session.progress.logged = hosts.run_on_first(self._log.sync)
      self._session.save(step, self._clock.seconds(), state)
