"""What every file in fmlora_jax/methods must keep; a new method is tested by being there."""

import functools
import gc
import importlib
import json
import pathlib
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax import config as config_lib
from fmlora_jax import methods
from fmlora_jax.input.streaming import StreamingReader
from fmlora_jax.methods.common import base
from fmlora_jax.models import heads, vit
from fmlora_jax.train import mesh as mesh_lib
from fmlora_jax.train.evaluator import Evaluator, iterate_batches
from fmlora_jax.train.labels import label_leaves, partition
from fmlora_jax.train.step import TrainStep
from fmlora_jax.types import Adapters, SequenceSpec, Sizes, Variables
from fmlora_jax.workdir import checkpoint


def cases_where(trait):
  """Returns the mark of tests that only methods with `trait`, a field of Case, must pass."""
  found = [
    pytest.param(c.name, c.changes, id=str(c), marks=pytest.mark.tier(c.tier))
    for c in cases.ALL
    if getattr(c, trait)
  ]
  return pytest.mark.parametrize(("name", "changes"), found)


every_method = cases_where("name")

CASE_BY_CASE = True  # conftest.py puts the tests of a method together
MET: list[str] = []  # methods that were learned so far


@pytest.fixture
def learned(lab, name, changes):
  """The method that learned all tasks; programs of four methods at most are held: 2 GB of 14."""
  case = f"{name} {changes}"
  if case not in MET:
    MET.append(case)
    if len(MET) % 4 == 0:
      jax.clear_caches()
      gc.collect()
  return lab(name, method=changes)


def test_every_method_has_a_config_of_its_name_and_says_its_source():
  for name in methods.names():
    module = importlib.import_module(f"fmlora_jax.methods.{name}")
    assert issubclass(module.Config, config_lib.MethodConfig)
    assert module.Config().name == name
    assert "Source: " in module.__doc__
    assert methods.config_class(name) is module.Config


def test_no_method_asks_the_config_for_the_seed():
  """Runs of other seeds share the method: theirs is in the view."""
  files = pathlib.Path(methods.__file__).parent.rglob("*.py")
  assert not [file.name for file in files if re.search(r"(config|run)\.seed", file.read_text())]


@every_method
def test_a_method_learns_three_tasks(learned):
  for stage in learned.stages:
    assert np.isfinite(stage.losses).all()
    assert stage.losses[-1] < stage.losses[0]
  logits = learned.predictions(learned.variables, learned.images(), jitted=True)
  assert logits.shape == (8, 7) and logits.dtype == jnp.float32
  assert np.isfinite(logits).all()


@every_method
def test_every_fact_is_declared_and_of_its_kind(learned):
  declared = {fact.name: fact for fact in learned.method.reports}
  assert len(declared) == len(learned.method.reports)
  returned = set()
  for stage in learned.stages:
    for name, value in stage.facts.items():
      assert value is None or type(value) is declared[name].kind
      json.dumps(value)
      returned |= {name}
  # of some settings or tasks
  seldom = {"alignment_loss", "identity_alignment_loss", "mean_drift", "rank_scores"}
  seldom |= {"complexity_by_rank"}
  assert declared.keys() - returned <= seldom


def test_columns_of_the_report_are_fields_of_result_json():
  declared = {fact.column: fact.field for n in methods.names() for fact in methods.reports(n)}
  assert declared.pop(("rank", "modes")) == "ranks" and set(declared) == {None}


@every_method
def test_every_hook_can_be_called_alone(learned):
  """With variables at hand: no hook needs another one to have been called before."""
  stage, images = learned.stages[1], learned.images(4, task=1)
  method = type(learned.method)(learned.config, learned.backbone, learned.spec)
  frozen = method.freeze(learned.weights, stage.begun)
  variables = stage.begun.replace(frozen=frozen)

  @jax.jit  # one program, where hooks called one by one compile each of their operations
  def called(variables, images, task, key):
    trunk = method.trunk(variables)
    query = learned.backbone.apply(trunk, images)
    inputs = base.StepInputs(task=task, key=key, valid=jnp.ones(4, bool), query=query)
    features = method.read(trunk, images, method.adapters(variables, inputs))
    penalty = method.penalty(variables, inputs, features)
    return query, features, penalty, method.apply(variables, images, task, key).logits

  query, features, penalty, logits = called(
    variables, images, stage.view.arrays, stage.view.key("method")
  )
  assert features.shape == (4, 16) and penalty.shape == ()
  np.testing.assert_allclose(
    logits, method.head.layer.logits(variables.cur["head"], features), rtol=0, atol=1e-5
  )
  backbone, memory = jax.eval_shape(method.folded, learned.weights, stage.ended)
  assert jax.tree.structure(backbone) == jax.tree.structure(learned.weights)
  past = jax.eval_shape(method.past, learned.weights, stage.ended)
  assert jax.tree.structure(past) == jax.tree.structure(backbone)
  assert isinstance(jax.eval_shape(method.recall, memory, query), Adapters)
  folded = jax.eval_shape(method.fold, learned.weights, stage.ended)
  assert jax.eval_shape(method.features, folded, images).shape == (4, 16)


@every_method
def test_all_but_the_host_side_hooks_can_be_evaluated_by_shape(learned):
  method, stage = learned.method, learned.stages[1]
  images = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32)
  key = jax.random.key(0)
  fresh = jax.eval_shape(method.init, key, learned.weights)
  assert isinstance(fresh, Variables) and not fresh.frozen
  frozen = jax.eval_shape(method.freeze, learned.weights, stage.begun)
  variables = stage.begun.replace(frozen=frozen)
  output = jax.eval_shape(method.apply, variables, images, stage.view.arrays, key)
  assert (output.logits.shape, output.logits.dtype) == ((8, 3), jnp.float32)
  assert (output.penalty.shape, output.penalty.dtype) == ((), jnp.float32)
  folded = jax.eval_shape(method.fold, learned.weights, stage.ended)
  logits = jax.eval_shape(method.predict, folded, images)
  assert (logits.shape, logits.dtype) == ((8, 7), jnp.float32)


@every_method
def test_groups_keep_their_shapes_from_task_to_task(learned):
  def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

  first = learned.stages[0].begun
  for stage in learned.stages:
    for variables in (stage.begun, stage.ended):
      assert shapes(variables.shared) == shapes(first.shared)
      assert shapes(variables.mem) == shapes(first.mem)
      assert not variables.frozen  # it is a function of the others, never kept


@every_method
def test_training_moves_trained_leaves_and_no_frozen_leaf(learned, leaves, changed):
  for stage in learned.stages:
    before, after = ({"shared": v.shared, "cur": v.cur} for v in (stage.begun, stage.trained))
    labels = leaves_of(label_leaves(before, learned.method.rules(stage.view.index)))
    assert set(labels.values()) <= {*learned.method.groups, "frozen"}
    moved = changed(before, after)
    assert not {path for path in moved if labels[path] == "frozen"}
    # each trained leaf moves, but for one that a zero gradient and a zero value hold
    held = {path for path in labels if labels[path] != "frozen"} - moved
    assert not {path for path in held if leaves(before)[path].any()}
    assert moved


def leaves_of(labels):
  paths = jax.tree_util.tree_leaves_with_path(labels)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): label for path, label in paths}


@functools.cache
def initial_weights(sizes: Sizes):
  weights = jax.jit(vit.make_vit(sizes).init)(jax.random.key(0))
  return jax.tree.map(lambda leaf: np.array(leaf), weights)  # copies: nothing can move them


@every_method
def test_weights_and_the_past_of_other_tasks_stay_as_they_are(learned, leaves, name):
  keeps_old_rows = all(case.keeps_old_rows for case in cases.ALL if case.name == name)
  pristine = initial_weights(learned.backbone.sizes)
  jax.tree.map(np.testing.assert_array_equal, learned.weights, pristine)
  for stage in learned.stages:
    t = stage.view.index
    lo, hi = learned.spec.class_ranges[t]
    before, after = leaves(stage.before.mem), leaves(stage.ended.mem)
    for path, old in before.items():
      if path.startswith("head") and not keeps_old_rows:
        continue
      axis = {3: t, 7: slice(lo, hi)}.get(old.shape[0]) if path.startswith("head") else t
      old, new = old.copy(), after[path].copy()
      if path.startswith("head") or old.shape[0] == learned.spec.num_tasks:
        old[axis], new[axis] = 0, 0
        np.testing.assert_array_equal(new, old, err_msg=path)


@every_method
def test_optimiser_state_exists_for_trained_leaves_only(learned):
  for stage in learned.stages:
    params = {"shared": stage.begun.shared, "cur": stage.begun.cur}
    labels = label_leaves(params, learned.method.rules(stage.view.index))
    trained, _ = partition(params, labels)
    size = sum(leaf.size for leaf in jax.tree.leaves(trained))
    state = [leaf.size for leaf in jax.tree.leaves(stage.state.opt_state) if leaf.ndim]
    assert sum(state) == 2 * size  # Adam's two moments
    counts = [leaf for leaf in jax.tree.leaves(stage.state.opt_state) if not leaf.ndim]
    assert all(int(count) == int(stage.state.step) for count in counts)


@every_method
def test_a_step_compiles_once_for_all_tasks_of_equal_rules_and_shapes(learned):
  def shapes(stage):
    return tuple(leaf.shape for leaf in jax.tree.leaves(stage.begun.cur))

  stages = learned.stages
  kinds = {(learned.method.rules(stage.view.index), shapes(stage)) for stage in stages}
  assert learned.setup.programs.num_compiled == len(kinds)
  if learned.config.method.name != "fm_lora":  # whose bases are frozen after task 1, at any rank
    assert len(kinds) == 1


@every_method
def test_a_prediction_does_not_depend_on_the_rest_of_the_batch(learned):
  """Alone, among others, in another order, beside padding: the same logits to rounding."""
  images = jnp.concatenate([learned.images(4, task=task) for task in range(3)])
  predictions = functools.partial(learned.predictions, learned.variables, jitted=True)
  whole = predictions(images)
  alone = jnp.concatenate([predictions(x[None]) for x in images])
  np.testing.assert_allclose(alone, whole, rtol=0, atol=1e-5)
  order = np.random.default_rng(0).permutation(12)
  mixed = predictions(images[order])
  np.testing.assert_allclose(mixed, whole[order], rtol=0, atol=1e-5)
  padded = jnp.concatenate([images[:8], jnp.full((4, *images.shape[1:]), 37.0)])
  np.testing.assert_allclose(predictions(padded)[:8], whole[:8], rtol=0, atol=1e-5)
  assert np.abs(np.diff(whole, axis=0)).max() > 1e-3  # images do differ


def counter(learned, batch_size):
  """Returns (bonus [C] on the logits, mask [C]) -> right answers on each task's test images."""
  method, setup, sequence = learned.method, learned.setup, learned.sequence
  indices = np.concatenate([task.test for task in sequence.tasks])
  tests = StreamingReader(sequence=sequence, indices=indices, put=setup.loader.shard_batch)
  sizes = [len(task.test) for task in sequence.tasks]

  class Biased(type(method)):
    def predict(self, model, images):
      return super().predict(model["folded"], images) + model["bonus"]

  biased = Biased(method.run, method.backbone, method.spec)
  evaluator = Evaluator(biased, setup.center)
  folded = jax.jit(method.fold)(learned.weights, learned.variables)

  def count(bonus=(0.0,) * 7, mask=(True,) * 7):
    model = {"folded": folded, "bonus": np.asarray(bonus, np.float32)}
    batches = iterate_batches(tests.read, sizes, batch_size, learned.replicate)
    return evaluator.correct(model, batches, np.tile(mask, (3, 1))).tolist()

  return count


@every_method
def test_counts_of_right_answers_depend_on_classes_seen_and_not_on_the_batch_size(learned):
  count = counter(learned, 64)
  plain = count()
  assert plain == counter(learned, 5)()
  assert sum(plain) > 0
  seen = np.arange(7) < 5
  masked = count(mask=seen)
  assert masked[2] == 0 < sum(masked)
  # never predicted, even if the logits of unseen classes are larger than all others
  large = np.where(seen, 0.0, 1e6)
  assert count(bonus=large, mask=seen) == masked
  assert count(bonus=large)[:2] == [0, 0]


@every_method
def test_a_run_that_resumes_within_a_task_ends_bit_equal(learned, make_lab, changed, name, changes):
  """Variables and optimiser state as a checkpoint has them say all, to a method made anew."""
  stage, groups = learned.stages[1], ("shared", "cur", "mem")
  first = learned.trainer.train(learned.trainer.init(stage.begun, 1), stage.begun, stage.view)
  stopped, _, _ = next(first)
  assert 0 < int(stopped.step) < int(stage.state.step)
  kept = stage.begun.replace(**stopped.params)
  tree = {group: getattr(kept, group) for group in groups} | {"opt_state": stopped.opt_state}
  saved = {path: np.asarray(leaf) for path, leaf in checkpoint.flatten(tree).items()}
  step = np.asarray(stopped.step)
  first.close()

  made = make_lab(method={"name": name} | changes)
  restored = made.replicate({group: checkpoint.unflatten(saved, group) for group in groups})
  variables, view = Variables(frozen={}, **restored), made.view(1)
  state = jax.eval_shape(lambda v: made.trainer.init(v, 1), variables)
  state = state.replace(
    params={group: restored[group] for group in ("shared", "cur")},
    opt_state=checkpoint.fill(state.opt_state, saved, "opt_state"),
    step=step,
  )
  for state, _, _ in made.trainer.train(state, variables, view):  # noqa: B020
    last = state
  ended, _ = made.method.end_task(variables.replace(**last.params), view)
  for group in groups:
    assert not changed(getattr(ended, group), getattr(stage.ended, group))


@pytest.mark.tier(2)
@every_method
def test_padding_for_devices_that_do_not_divide_a_batch_changes_no_number(
  learned, make_lab, monkeypatch, leaves, name, changes
):
  """To rounding; two tasks, with all that a method does between them."""
  monkeypatch.setattr(mesh_lib, "padded_size", lambda size, mesh: size + 3)
  made = make_lab(method={"name": name} | changes)
  for stage, one in zip(made.learn(2), learned.stages, strict=False):
    assert len(next(stage.view.train_batches(0))[1]) == made.config.batch_size + 3
    np.testing.assert_allclose(stage.losses, one.losses, rtol=1e-4)
    for group in ("shared", "cur", "mem"):
      expected = leaves(getattr(one.ended, group))
      for path, leaf in leaves(getattr(stage.ended, group)).items():
        # a key's bias has no gradient but rounding, which Adam makes as large as any
        if leaf.dtype.kind == "f" and not path.endswith("key/dense/bias"):
          np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=1e-3, err_msg=path)


@cases_where("folds")
def test_the_folded_model_is_the_trained_one(learned):
  """Logits of the classes of the task just learned: unfolded, as in training, and folded."""
  for stage in learned.stages:
    lo, hi = learned.spec.class_ranges[stage.view.index]
    images = learned.images(task=stage.view.index)
    trained = learned.training_logits(stage.trained, stage, images)[:, : hi - lo]
    folded = learned.predictions(stage.ended, images, jitted=True)[:, lo:hi]
    np.testing.assert_allclose(folded, trained, rtol=0, atol=1e-4)
    fresh = learned.training_logits(stage.begun, stage, images)[:, : hi - lo]
    assert np.abs(fresh - trained).max() > 0.01


@cases_where("starts_at_nothing")
def test_a_fresh_task_changes_no_logit_of_the_model_so_far(learned, changes):
  """Bit for bit in float32: what a task adds starts from nothing, what it goes on with is kept."""
  del changes
  # what is carried on may be folded in one and stand beside the weights in the other
  tolerance = 1e-6 if learned.variables.shared else 0
  for before, stage in zip(learned.stages, learned.stages[1:], strict=False):
    lo, hi = learned.spec.class_ranges[before.view.index]
    images = learned.images()
    old = learned.predictions(before.ended, images)[:, lo:hi]
    rows = {
      name: jnp.zeros_like(leaf).at[: hi - lo].set(before.ended.mem["head"][name][lo:hi])
      for name, leaf in stage.begun.cur["head"].items()
    }
    fresh = learned.training_logits(stage.begun, stage, images, rows)[:, : hi - lo]
    np.testing.assert_allclose(fresh, old, rtol=0, atol=tolerance)
    assert np.abs(old).max() > 0.01


@every_method
def test_rows_of_other_tasks_get_exactly_no_gradient(learned):
  """Neither those kept in mem nor the padding slots of the current ones."""
  stage = learned.stages[2]  # 2 classes of at most 3
  view, variables = stage.view, stage.trained
  frozen = learned.method.freeze(learned.weights, variables)
  batch = learned.batch(task=2)

  @jax.jit
  def grad(head_rows, mem_head):
    def loss(head_rows, mem_head):
      now = variables.replace(
        frozen=frozen,
        cur=variables.cur | {"head": head_rows},
        mem=variables.mem | {"head": mem_head},
      )
      output = learned.method.apply(now, batch.images, view.arrays, view.key("method"))
      losses = heads.local_losses(output.logits, batch.labels, view.arrays)
      return heads.weighted_mean(losses, batch.valid) + output.penalty

    return jax.grad(loss, argnums=(0, 1))(head_rows, mem_head)

  own, others = grad(variables.cur["head"], variables.mem["head"])
  assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(others))
  assert not any(np.asarray(leaf)[2:].any() for leaf in jax.tree.leaves(own))
  assert all(np.asarray(leaf)[:2].any() for leaf in jax.tree.leaves(own))


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_stored_parameters_are_those_of_the_formula(case):
  settings = {"method": {"name": case.name} | case.changes | case.full_size}
  config = methods.build_config(settings)
  spec = SequenceSpec(
    scenario="cil", num_tasks=3, num_classes=6, class_ranges=((0, 2), (2, 4), (4, 6))
  )
  method = methods.make_method(config, vit.make_vit(Sizes()), spec)
  found = method.stored(cases.FACTS)
  advice = f"tests/cases.py has no entry: add Case(name={case.name!r}, stored=...), and work out"
  assert case.stored is not None, (
    f"{advice} by hand what three tasks store; the method says {found}"
  )
  assert found == case.stored


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_stored_parameters_are_those_that_the_variables_hold(lab, case):
  """Shared leaves as they are; mem holds what grows, at the largest size a task may have."""
  learned = lab(case.name, method=case.changes)
  stored = learned.method.stored([stage.facts for stage in learned.stages])
  kept = learned.variables.mem[case.kept_in_mem] if case.kept_in_mem else {}
  shared = sum(leaf.size for leaf in jax.tree.leaves((learned.variables.shared, kept)))
  assert stored["shared"] == shared
  assert len(stored["per_task"]) == 3


@every_method
def test_domains_share_one_head_which_is_carried_over(make_lab, name, changes):
  made = make_lab("dil", ((0, 3),) * 2, method={"name": name} | changes)
  assert made.spec.shares_classes
  views = [made.view(task) for task in range(2)]
  variables, _ = made.method.begin_task(made.variables, views[0])
  head = jax.tree.map(lambda leaf: leaf + 1.5, variables.cur["head"])  # as if trained
  variables, _ = made.method.end_task(
    variables.replace(cur=variables.cur | {"head": head}), views[0]
  )
  variables, _ = made.method.begin_task(variables, views[1])
  jax.tree.map(np.testing.assert_array_equal, variables.cur["head"], head)
  jax.tree.map(np.testing.assert_array_equal, variables.mem["head"], head)


def test_a_stepper_refuses_a_method_whose_rules_miss_a_leaf(make_lab):
  made = make_lab(method={"name": "linear_probe"})
  variables, _ = made.method.begin_task(made.variables, made.view(0))
  with pytest.raises(ValueError, match="no rule matches leaf 'cur/head/"):
    TrainStep(made.method, made.config, (("cur/head/kernel", "head"),)).init(variables)
  dead = (("cur/head/.*", "head"), ("shared/bases/.*", "adapter"))
  with pytest.raises(ValueError, match="rules that match no leaf"):
    TrainStep(made.method, made.config, dead).init(variables)
