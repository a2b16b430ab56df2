"""Frozen arrays keep every bit, and a bug that changes one ends the run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmlora_jax import methods
from fmlora_jax.experiment import guards, run
from fmlora_jax.experiment.setup import SetupCache
from fmlora_jax.experiment.task_loop import TaskLearner
from fmlora_jax.models import heads
from fmlora_jax.train.labels import label_leaves
from fmlora_jax.train.loop import Trainer
from fmlora_jax.train.step import TrainPrograms, TrainState, TrainStep
from fmlora_jax.types import FrozenError, Variables
from fmlora_jax.workdir import checkpoint

pytestmark = pytest.mark.usefixtures("tiny_vit")  # what runs load, whatever they name

SMALL = {
  "epochs": 1,
  "batch_size": 64,  # four steps a task: no gradient reaches the bases in the first two
  "eval_batch_size": 128,
  "compute_dtype": "float32",
  "tasks": {"num_tasks": 5},
  "weights": {"tag": "random"},
  "optim": {"weight_decay": 0.1},
  "bases": {"max_rank": 2},
  "drs": {"strategy": "fixed", "rank": 2},
  "prompt": {"num_tokens": 1},
}


CACHE = SetupCache()  # for runs of unchanged programs


def small(**changes):
  return methods.build_config(SMALL | {"method": {"name": "fm_lora"}} | changes)


def test_the_bases_of_task_1_and_the_weights_are_the_same_bits_at_the_end(tmp_path, monkeypatch):
  seen, save = [], checkpoint.CheckpointStore.save

  def saved(self, step, snapshot, **options):
    bases = {k: np.asarray(v) for k, v in snapshot.arrays.items() if "bases" in k}
    seen.append(bases)
    return save(self, step, snapshot, **options)

  digests, check = [], guards.FrozenGuard.check

  def checked(self, index, params):
    check(self, index, params)
    digests.append(self._digest_weights())

  monkeypatch.setattr(checkpoint.CheckpointStore, "save", saved)
  monkeypatch.setattr(guards.FrozenGuard, "check", checked)
  run.run(small(), tmp_path / "run", cache=CACHE)
  first, *later = seen
  assert len(first) == 4 and len(later) == 4  # A and B of query and value
  changed = sum(
    later_task[name].tobytes() != leaf.tobytes()
    for later_task in later
    for name, leaf in first.items()
  )
  changed_weights = sum(each != digests[0] for each in digests)
  print(f"{changed} of {len(first)} bases and {changed_weights} weights changed in 5 tasks")
  assert changed == changed_weights == 0 and len(digests) == 5


def naive_step(optimizer_of):
  """Returns a `TrainStep.step` that differentiates and updates every leaf, frozen ones too."""

  def step(self, state, fixed, batch):
    labels = label_leaves(state.params, self.rules)
    trains = jax.tree.map(lambda label: label != "frozen", labels)
    optimizer = optimizer_of(trains)

    def loss_fn(params):
      variables = Variables(frozen=fixed.frozen, mem=fixed.mem, **params)
      output = self.method.apply(variables, batch.images, fixed.task, fixed.root, batch.valid)
      losses = heads.local_losses(output.logits, batch.labels, fixed.task)
      return heads.weighted_mean(losses, batch.valid)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    stats = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    opt_state = optimizer.init(state.params)
    updates, _ = optimizer.update(grads, opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params=params, opt_state=state.opt_state, step=state.step + 1), stats

  return step


def zeroed(trains):
  """AdamW of gradients that are zero where a leaf is frozen: its decay still moves the leaf."""

  def zero(updates, state, params=None):
    del params
    kept = jax.tree.map(lambda g, train: g if train else jnp.zeros_like(g), updates, trains)
    return kept, state

  init = optax.GradientTransformation(lambda params: optax.EmptyState(), zero)
  return optax.chain(init, optax.adamw(0.01, weight_decay=0.1))


def inject(patch, bug):
  """Puts one bug into the code; each is one that such code has had."""
  if bug == "optax.masked leaves the gradient of frozen leaves as their update":
    patch.setattr(TrainStep, "step", naive_step(lambda t: optax.masked(optax.adamw(0.01), t)))
  elif bug == "weight decay moves leaves whose gradient is zero":
    patch.setattr(TrainStep, "step", naive_step(zeroed))
  elif bug == "nothing stops the gradient of frozen leaves":
    patch.setattr(TrainStep, "step", naive_step(lambda _: optax.adam(0.01)))
  elif bug == "the rules of task 1 serve all tasks":
    made, first = TrainPrograms.train_step, []

    def of_task_1(self, rules):
      first.append(rules)
      return made(self, first[0])

    patch.setattr(TrainPrograms, "train_step", of_task_1)
  elif bug == "a hook between tasks writes the weights":
    adopt = TaskLearner._adopt

    def written(self, view, learned):
      norm = view.weights["norm"]
      view.weights["norm"] = norm | {"bias": norm["bias"].at[3].add(1e-7)}
      adopt(self, view, learned)

    patch.setattr(TaskLearner, "_adopt", written)
  elif bug == "one bit of a frozen basis flips":
    train = Trainer.train

    def flipped(*args):
      for state, *rest in train(*args):
        bases = state.params["shared"]["bases"]["query"]
        bits = jax.lax.bitcast_convert_type(bases["a"], jnp.uint32)
        bits = bits.at[0, 0, 0].apply(lambda x: x ^ 1)
        bases["a"] = jax.lax.bitcast_convert_type(bits, jnp.float32)
        yield state, *rest

    patch.setattr(Trainer, "train", flipped)


BUGS = {  # the leaf that is named, and the task in which it is caught
  "optax.masked leaves the gradient of frozen leaves as their update": ("shared/bases/", 2),
  "weight decay moves leaves whose gradient is zero": ("shared/bases/", 2),
  "nothing stops the gradient of frozen leaves": ("shared/bases/", 2),
  "the rules of task 1 serve all tasks": ("shared/bases/", 2),
  "a hook between tasks writes the weights": ("weights/norm/bias", 1),
  "one bit of a frozen basis flips": ("shared/bases/query/a", 2),
}


# a naive step is compiled for each of these; what finds the moved leaf is the same for all
NAIVE = [bug for bug in BUGS if bug.startswith(("optax", "weight decay", "nothing"))]


@pytest.mark.parametrize(
  "bugs",
  [
    [NAIVE[1], *(bug for bug in BUGS if bug not in NAIVE)],
    pytest.param([NAIVE[0], NAIVE[2]], marks=pytest.mark.tier(2)),
  ],
  ids=["one of each kind", "other naive steps"],
)
def test_every_bug_that_moves_what_is_frozen_is_caught_at_the_next_checkpoint(
  tmp_path, monkeypatch, bugs
):
  caught = 0
  for i, bug in enumerate(bugs):
    leaf, task = BUGS[bug]
    with monkeypatch.context() as patch:
      inject(patch, bug)
      with pytest.raises(FrozenError) as error:
        cache = CACHE if bug.startswith("one bit") else None
        run.run(small(), tmp_path / str(i), cache=cache)
    message = str(error.value)
    assert message.startswith(leaf) and f"has changed in task {task}" in message, (bug, message)
    saved = [p for p in (tmp_path / str(i) / "checkpoints").glob("*") if p.name.isdigit()]
    assert len(saved) == task - 1, bug  # the ends of the tasks before
    caught += 1
  print(f"{caught}/{len(bugs)} injected bugs caught at the next checkpoint")
