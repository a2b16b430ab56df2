"""NaN or infinity in an input, a weight or a gradient ends the run at that very step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax import methods
from fmlora_jax.experiment.run import run
from fmlora_jax.train import mesh
from fmlora_jax.train.step import TrainStep
from fmlora_jax.types import NonFiniteError
from fmlora_jax.workdir import checkpoint

KINDS = ("input", "weight", "gradient")
NUM_STEPS = 6  # of a task of the lab with three epochs


@jax.custom_vjp
def spoil_gradient(leaf, bad):
  """Returns the leaf as it is; its gradient gets `bad` added."""
  del bad
  return leaf


spoil_gradient.defvjp(
  lambda leaf, bad: (leaf, bad), lambda bad, gradient: (gradient + bad, jnp.zeros_like(bad))
)


def spoil_first(tree, bad, spoil=jnp.add):
  """Returns the tree with one number of its first leaf spoiled."""
  leaves, structure = jax.tree.flatten(tree)
  leaves[0] = spoil(leaves[0], jnp.zeros_like(leaves[0]).ravel().at[0].set(bad).reshape(
    leaves[0].shape
  ))  # fmt: skip
  return jax.tree.unflatten(structure, leaves)


@pytest.fixture(scope="module")
def spoiled(make_lab):
  """Returns the function (kind, step, value) -> (error, steps done before, states that came out).

  What is spoiled and when is data to one compiled step; a step of -1 spoils nothing.
  """
  made = make_lab(method={"name": "lora", "rank": 2}, epochs=3, input={"steps_per_dispatch": 4})
  step = TrainStep.step

  def spoiled_step(self, state, fixed, batch):
    plan = fixed.mem["plan"]
    now = {kind: jnp.where(state.step == plan[kind], plan["value"], 0.0) for kind in KINDS}
    batch = batch.replace(images=batch.images.at[0, 0, 0, 0].add(now["input"]))
    state = state.replace(params=spoil_first(state.params, now["weight"]))
    return step(self, state, fixed.replace(mem=fixed.mem | {"plan": now["gradient"]}), batch)

  class Spoiled(type(made.method)):
    def apply(self, variables, *arguments):
      cur = spoil_first(variables.cur, variables.mem["plan"], spoil_gradient)
      return super().apply(variables.replace(cur=cur), *arguments)

  made.setup.programs.method = Spoiled(made.config, made.backbone, made.spec)
  view = made.view(0)
  variables, _ = made.method.begin_task(made.variables, view)

  def train(kind, at, value):
    plan = {each: jnp.int32(at if each == kind else -1) for each in KINDS}
    planned = variables.replace(mem=variables.mem | {"plan": plan | {"value": jnp.float32(value)}})
    states, done = [], 0
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(TrainStep, "step", spoiled_step)
      try:
        for state, stats, _ in made.trainer.train(made.trainer.init(variables, 0), planned, view):
          states.append(jax.tree.map(np.asarray, state))
          done += len(stats["loss"])
      except NonFiniteError as error:
        return str(error), done, states
    return None, done, states

  return train


def test_a_number_that_is_not_finite_stops_at_its_step_and_is_never_handed_out(spoiled):
  error, done, states = spoiled("input", -1, np.nan)
  assert (error, done) == (None, NUM_STEPS)
  rng, stopped, bad_states = np.random.default_rng(0), 0, 0
  for i in range(20):
    kind, at = KINDS[i % 3], int(rng.integers(NUM_STEPS))
    error, done, states = spoiled(kind, at, [np.nan, np.inf, -np.inf][i // 3 % 3])
    stopped += error is not None and f"at task 1 of 3, step {at + 1}: must be finite" in error
    bad_states += sum(
      not np.isfinite(leaf).all() for state in states for leaf in jax.tree.leaves(state)
    )
    assert done <= at
  print(f"{stopped}/20 injections stopped at their step, {bad_states} bad states handed out")
  assert (stopped, bad_states) == (20, 0)


def test_an_update_that_overflows_a_parameter_is_not_applied(make_lab):
  """Loss and gradient are finite, so nothing else would tell before the next step."""
  made = make_lab(
    method={"name": "linear_probe"}, optim={"name": "sgd", "head_learning_rate": 3e38}
  )
  norm = jax.tree.map(lambda leaf: 100 * leaf, made.weights["norm"])
  made.trainer.weights = made.weights | {"norm": norm}
  view = made.view(0)
  variables, _ = made.method.begin_task(made.variables, view)
  with pytest.raises(NonFiniteError) as error:
    next(made.trainer.train(made.trainer.init(variables, 0), variables, view))
  assert str(error.value).startswith("a trained parameter is not finite (loss is 0.69314")
  assert "at task 1 of 3, step 1: must be finite" in str(error.value)


def test_no_checkpoint_holds_what_is_not_finite(tiny_vit, tmp_path, monkeypatch):
  step = TrainStep.step

  def spoiled_step(self, state, fixed, batch):
    now = (fixed.task.index == 1) & (state.step == 2)
    return step(self, state, fixed, batch.replace(images=jnp.where(now, jnp.nan, batch.images)))

  monkeypatch.setattr(TrainStep, "step", spoiled_step)
  settings = methods.build_config(
    {
      "epochs": 1,
      "batch_size": 256,
      "compute_dtype": "float32",
      "method": {"name": "linear_probe"},
      "tasks": {"num_tasks": 2},
      "weights": {"tag": "random"},
      "checkpoint": {"every_steps": 1},
    },
  )
  with pytest.raises(NonFiniteError, match="at task 2 of 2, step 3: must be finite"):
    run(settings, tmp_path / "run")
  folders = [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir()]
  steps = sorted(int(path.name) for path in folders)
  identity = json.loads((tmp_path / "run" / "config.json").read_text())
  store = checkpoint.CheckpointStore(
    tmp_path / "run", mesh.replicated(mesh.make_mesh()), identity=identity
  )
  arrays = store.latest().arrays
  assert int(arrays["step"]) == 2 and steps[-1] == steps[0] + 2
  assert all(np.isfinite(leaf).all() for leaf in arrays.values())
