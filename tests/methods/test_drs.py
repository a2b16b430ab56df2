"""Rank selection: on a model that needs a known rank, within FM-LoRA, and on real digits."""

import dataclasses
import functools

import difficulty
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax import methods
from fmlora_jax.bench.workload import BenchSettings, Workload
from fmlora_jax.config import ConfigError
from fmlora_jax.experiment.setup import build_setup
from fmlora_jax.methods.fm_lora import drs
from fmlora_jax.models import vit
from fmlora_jax.models.weights import registry
from fmlora_jax.train import mesh
from fmlora_jax.train.rng import named_key
from fmlora_jax.types import NonFiniteError

RANKS = (1, 2, 4)
FAMILIES = tuple(difficulty.FAMILIES)


def logits_from_a_rank_on(params, fixed, mask, images):
  """A linear classifier of a picture's 16 fields that works at rank `fixed["needed"]` and above."""
  fields = images.reshape(len(images), 4, 4, 4, 4, 3).mean((2, 4)).reshape(len(images), -1)
  # the cores take part, so that they have gradients
  silent = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params["core"])) * 0.0
  return mask[fixed["needed"] - 1] * (fields @ params["head"]["kernel"].T + silent)


@pytest.fixture(scope="module")
def view(make_lab):
  """Three classes of noisy patterns."""
  return make_lab(method={"name": "linear_probe"}).view(1)


@pytest.fixture(scope="module")
def select(make_lab, view):
  """Returns the function (needed rank, settings of drs) -> facts."""

  @functools.cache
  def selection(**changes):
    drs_changes = {"epochs": 16} | changes
    optim = {"head_learning_rate": 0.1, "weight_decay": 0.0}
    config = make_lab(drs=drs_changes, optim=optim).config
    return drs.RankSelection(config, logits_from_a_rank_on)

  def select(needed, view=view, **changes):
    core = {"query": {"m": jnp.zeros((1, 4, 4)), "n": jnp.zeros((1, 4, 4))}}
    params = {"core": core, "head": {"kernel": jnp.zeros((3, 48))}}
    return selection(**changes).select(params, {"needed": jnp.int32(needed)}, view)

  return select


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("strategy", ["gumbel", "validation"])
def test_the_smallest_rank_that_does_is_selected(select, strategy, rank):
  facts = select(rank, strategy=strategy)
  assert facts["rank"] == rank
  assert len(facts["rank_scores"]) == len(facts["complexity_by_rank"]) == 3
  assert 0 <= facts["complexity_by_rank"][-1] < 0.5


def test_with_a_large_weight_the_complexity_alone_decides(select, view):
  """Of tasks that need a known rank: at smaller candidates their losses are those of guessing."""
  chosen = {}
  for needed in RANKS:
    facts = select(needed, strategy="gumbel", weight=1e4)
    nearest = np.argmin(np.abs(np.array(RANKS) / 4 - min(1, facts["complexity"])))
    assert facts["rank"] == RANKS[nearest]
    chosen[needed] = facts["rank"]
  assert chosen[1] < chosen[4]
  after_hard_ones = dataclasses.replace(view, earlier=[{"complexity": 9.0}])
  assert select(4, after_hard_ones, strategy="gumbel", weight=1e4)["rank"] == 1
  usual = dataclasses.replace(view, earlier=[{"complexity": 1.0}])
  assert select(4, usual, strategy="gumbel")["rank"] == 4  # where gains are clear they decide


def test_gumbel_scores_are_probabilities_and_the_largest_wins(select):
  facts = select(2, strategy="gumbel")
  np.testing.assert_allclose(sum(facts["rank_scores"]), 1.0, rtol=1e-5)
  assert RANKS[int(np.argmax(facts["rank_scores"]))] == facts["rank"]


def test_validation_takes_the_smallest_rank_within_the_tolerance(select):
  facts = select(2, strategy="validation", tolerance=2.0)
  losses = np.array(facts["rank_scores"])
  np.testing.assert_allclose(losses[0], np.log(3), rtol=1e-5)  # rank 1 only guesses
  assert losses[1] == losses[2] < 0.5
  assert facts["rank"] == 1
  np.testing.assert_allclose(facts["complexity_by_rank"], losses / np.log(3), rtol=1e-5)


def test_the_complexity_is_that_of_all_images_not_trained_on_yet(make_lab, view):
  evidence = drs.Evidence(
    losses=np.array([[1.0, 3.0], [2.0, 2.0]], np.float32), unseen=np.array([5.0], np.float32)
  )
  np.testing.assert_allclose(evidence.complexity(8), 3.0 / np.log(8), rtol=1e-6)
  np.testing.assert_allclose(evidence.complexities(8), [1.5 / np.log(8), 2.5 / np.log(8)], 1e-6)


@pytest.mark.parametrize("strategy", ["gumbel", "validation"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_only_images_of_the_first_epoch_join_the_validation_images(select, strategy, epochs):
  facts = select(2, strategy=strategy, epochs=epochs)
  of_validation = np.isclose(facts["complexity"], np.mean(facts["complexity_by_rank"]), rtol=1e-5)
  assert of_validation == (epochs == 2)


def test_selection_is_the_same_each_time(select):
  assert select(2, strategy="gumbel") == select(2, strategy="gumbel")


@pytest.mark.parametrize("strategy", ["gumbel", "validation"])
def test_a_preliminary_training_that_diverges_is_refused(make_lab, strategy):
  made = make_lab(drs={"strategy": strategy}, optim={"learning_rate": 1e30})
  with pytest.raises(
    NonFiniteError, match="validation loss is nan in the rank selection of task 2"
  ):
    made.method.begin_task(made.variables, made.view(1))


@pytest.mark.parametrize("strategy", ["gumbel", "validation"])
def test_a_task_without_validation_images_is_refused_by_field(select, view, strategy):
  empty = dataclasses.replace(view, val_batches=None)
  with pytest.raises(ConfigError, match=r"method\.drs\.strategy .* task 2 has no .*drs\.ranks"):
    select(2, view=empty, strategy=strategy)


@pytest.mark.parametrize("strategy", ["gumbel", "validation"])
def test_the_selections_of_all_tasks_run_the_same_programs(make_lab, strategy):
  made = make_lab(drs={"strategy": strategy})
  selection, variables = made.method.selection, made.replicate(made.variables)
  for task in (1, 2):
    variables, _ = made.method.begin_task(variables, made.view(task))
  train = selection.train_drawn if strategy == "gumbel" else selection.train_all
  assert train._cache_size() == selection.validate_all._cache_size() == 1


@pytest.mark.parametrize("strategy", ["gumbel", "validation"])
def test_fm_lora_selects_and_keeps_nothing_of_the_preliminary_training(make_lab, changed, strategy):
  made = make_lab(drs={"strategy": strategy})
  variables, facts = made.method.begin_task(made.variables, made.view(0))
  assert facts["rank"] == 4  # task 1 takes r_max
  assert 0 < facts["complexity"] < 2
  made.variables, _ = made.method.end_task(variables, made.view(0))
  for task in (1, 2):
    begun, facts = made.method.begin_task(made.variables, made.view(task))
    assert facts["rank"] in RANKS
    assert 0 < facts["complexity"] < 2
    assert not changed(made.variables.shared, begun.shared)
    assert not changed(made.variables.mem, begun.mem)
    for core in begun.cur["core"].values():
      assert core["m"].shape == (2, facts["rank"], facts["rank"])
      assert not np.asarray(core["n"]).any()
    assert not any(np.asarray(leaf).any() for leaf in begun.cur["head"].values())


def test_the_selection_of_a_task_reads_no_other_tasks_images(make_lab):
  """What it is shown is a TaskView: the images of one task, and no test image among them."""
  made = make_lab(drs={"strategy": "validation"})
  seen = []
  decode = made.sequence.source.decode
  source = dataclasses.replace(
    made.sequence.source, decode=lambda rows: seen.extend(rows.tolist()) or decode(rows)
  )
  setup = made.setup.with_sequence(dataclasses.replace(made.sequence, source=source))
  made.method.begin_task(made.variables, setup.views.view(1))
  task = made.sequence.tasks[1]
  assert sorted(seen) == sorted([*task.train, *task.val])


@pytest.fixture(scope="module")
def digits_setup():
  """Of a pre-trained ViT on half of the digits as they are; what it compiles serves every seed."""
  config = methods.build_config(
    {
      "epochs": 4,
      "batch_size": 32,
      "eval_batch_size": 32,
      "compute_dtype": "float32",
      "input": {"augmentation": "mild"},
      "weights": {"tag": "micro_letters", "depth": 3},
      "optim": {"learning_rate": 5e-3, "head_learning_rate": 1e-2},
      "bases": {"max_rank": 8},
      "drs": {"candidate_ranks": (1, 2, 4, 8)},
      "prompt": {"num_tokens": 4},
    },
  )
  weights, sizes, info = registry.load(config.weights)
  sequence = difficulty.halves()
  return build_setup(
    config,
    methods.make_method(config, vit.make_vit(sizes), sequence.spec),
    sequence,
    jax.device_put(weights),
    sizes=sizes,
    normalisation=info.normalisation,
    mesh=mesh.make_mesh(),
  )


@pytest.fixture(scope="module")
def after_half_of_the_digits(digits_setup):
  """Returns the function seed -> (set-up, variables after task 1, its facts)."""

  @functools.cache
  def after(seed):
    setup = digits_setup.with_sequence(difficulty.halves(seed=seed), seed)
    method, trainer, view = setup.method, setup.trainer, setup.views.view(0)
    variables = method.init(named_key(setup.root, "init", task=0), setup.weights)
    variables, facts = method.begin_task(variables, view)
    *_, (last, stats, _) = trainer.train(trainer.init(variables, 0), variables, view)
    assert stats["loss"][-1] < 0.5
    variables, _ = method.end_task(variables.replace(**last.params), view)
    return setup, variables, facts

  return after


def second_view(setup, family, level, seed, first):
  return setup.with_sequence(difficulty.halves(family, level, seed)).views.view(1, [first])


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.tier(2)) for f in FAMILIES])
def test_ranks_rise_with_difficulty_on_real_digits(after_half_of_the_digits, family):
  """Five levels of each seed: Spearman's correlation of rank and complexity.

  Where the complexity only lowered a price of rank, it was 0.72 for rotation, 0.48 for overlap and
  0.33 for wrong labels.
  """
  selected = []
  for seed in (1, 2, 3):
    setup, variables, first = after_half_of_the_digits(seed)
    for level in difficulty.FAMILIES[family]:
      view = second_view(setup, family, level, seed, first)
      _, facts = setup.method.begin_task(variables, view)
      selected.append((facts["rank"], facts["complexity"]))
  ranks, complexities = zip(*selected, strict=True)
  assert difficulty.spearman(ranks, complexities) >= 0.8
  assert len(set(ranks)) >= 3
  easy = [rank for rank, complexity in selected if complexity < 0.1]
  assert sum(rank == 1 for rank in easy) >= 11 / 12 * len(easy)


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.tier(2)) for f in FAMILIES])
def test_other_validation_images_give_the_same_rank_in_nine_of_ten_cases(
  after_half_of_the_digits, family
):
  setup, variables, first = after_half_of_the_digits(1)
  same = []
  for level in difficulty.FAMILIES[family]:
    view = second_view(setup, family, level, 1, first)
    _, expected = setup.method.begin_task(variables, view)
    for draw in range(4):
      _, facts = setup.method.begin_task(variables, difficulty.resampled(view, 90, draw))
      same.append(facts["rank"] == expected["rank"])
  assert np.mean(same) >= 0.9


@pytest.mark.tier(2)
def test_a_task_from_an_old_distribution_gets_a_smaller_rank_than_a_distant_one(
  after_half_of_the_digits,
):
  setup, variables, first = after_half_of_the_digits(1)
  facts = {}
  for level in (0, 90):
    view = second_view(setup, "rotation", level, 1, first)
    _, facts[level] = setup.method.begin_task(variables, view)
  assert facts[0]["rank"] < facts[90]["rank"]


def test_the_selection_costs_at_most_1_3_epochs_of_training():
  """Of ViT-B/16 at the smallest rank, where there are 7 training images for one of validation."""
  lab = Workload(BenchSettings(batch=2, rank=4))
  selection = lab.method.selection

  def shapes(weights):
    variables = lab.begin(weights, lab.variables(weights, 0), 1)
    state, fixed, batch = lab.arguments(weights, variables, 1)
    square = jnp.zeros((12, 32, 32))
    core = {name: {"m": square, "n": square} for name in variables.cur["core"]}
    params = {"core": core, "head": variables.cur["head"]}
    probe = drs.Probe(params, selection.optimizer.init(params))
    context = drs.Context(fixed=variables.shared | fixed.frozen, task=fixed.task)
    return (state, fixed, batch), probe, context, drs.stacked(4, params)

  weights = jax.eval_shape(lab.backbone.init, jax.random.key(0))
  arguments, probe, context, stacked = jax.eval_shape(shapes, weights)
  nothing, rows = jnp.zeros(4), jnp.arange(2)
  alpha = selection.selector.init({}, nothing, method="probabilities")
  seen = arguments[-1], rows  # a batch as it is
  programs = {
    "step": jax.jit(lab.train_step(1).step).lower(*arguments),
    "draw": selection.train_drawn.lower(
      probe,
      alpha,
      nothing,
      context,
      *seen,
      jax.random.key(0),
      augment=lambda batch, rows, key: batch,
    ),
    "validate": selection.validate_all.lower(
      stacked, selection.masks, context, *seen, center=lambda batch, rows: batch
    ),
  }
  flops = {name: program.cost_analysis()["flops"] for name, program in programs.items()}
  epochs = (flops["draw"] + flops["validate"] / 7) / flops["step"]
  assert 1 < epochs < 1.3
