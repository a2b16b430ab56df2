"""FM-LoRA's acceptance properties; the numbers are those of its specification.

1, 2, 3, 9 hold for a method at work, 4 and 5 for its matrices; 6 is in test_contract.py, 7 and 8
are in test_drs.py and tests/models/test_rank_selector.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax import methods
from fmlora_jax.config import ConfigError
from fmlora_jax.methods.fm_lora import rank_checks
from fmlora_jax.models import heads, low_rank
from fmlora_jax.train.labels import label_leaves
from fmlora_jax.types import Adapters, LowRank


@pytest.fixture(scope="module")
def fm_lora(lab):
  """Ranks 4, 2, 2; with prompt tokens and orthonormal bases."""
  return lab()


@pytest.fixture(scope="module")
def raw(lab):
  """Bases as trained, no prompt, all six projections."""
  return lab(
    prompt={"num_tokens": 0},
    bases={
      "orthonormalise": "none",
      "targets": ("query", "key", "value", "out", "fc1", "fc2"),
    },
  )


@pytest.fixture(params=["fm_lora", "raw"])
def learned(request):
  return request.getfixturevalue(request.param)


def delta_of(learned, name, task, variables=None):
  """Returns dW of a task and target as it is kept: shared bases and the task's core."""
  variables = variables or learned.variables
  bases = variables.shared["bases"][name]
  return LowRank(a=bases["a"], b=bases["b"], core=variables.mem["cores"][name][task])


def relative_error(got, expected):
  return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def test_logits_of_a_fresh_task_are_bit_equal_to_those_before_it(learned):
  """Property 1, over all classes that both models have."""
  for before, stage in zip(learned.stages, learned.stages[1:], strict=False):
    images = learned.images(task=before.view.index)
    old = learned.predictions(before.ended, images)
    for lo, hi in learned.spec.class_ranges[: stage.view.index]:
      rows = {
        name: jnp.zeros_like(leaf).at[: hi - lo].set(before.ended.mem["head"][name][lo:hi])
        for name, leaf in stage.begun.cur["head"].items()
      }
      fresh = learned.training_logits(stage.begun, stage, images, rows)[:, : hi - lo]
      np.testing.assert_array_equal(fresh, old[:, lo:hi])
      assert np.abs(old[:, lo:hi]).max() > 0.01


def test_prompts_take_part_in_what_a_fresh_task_keeps(fm_lora):
  """So that property 1 says something of them: without them the logits are others."""
  stage = fm_lora.stages[1]
  images = fm_lora.images()
  without = stage.begun.replace(
    shared=stage.begun.shared | {"prompt": jnp.zeros_like(stage.begun.shared["prompt"])}
  )
  rows = fm_lora.stages[0].trained.cur["head"]
  logits = [fm_lora.training_logits(v, stage, images, rows) for v in (stage.begun, without)]
  assert np.abs(logits[0] - logits[1]).max() > 1e-3


def test_after_task_1_only_m_n_prompt_and_head_change(fm_lora, changed):
  """Property 2: bit for bit, with weight decay on; in training and over the whole task."""
  assert fm_lora.config.optim.weight_decay > 0
  head = {"cur/head/kernel", "cur/head/bias"}
  cores = {f"cur/core/{name}/{part}" for name in ("query", "value") for part in "mn"}
  bases = {f"shared/bases/{name}/{part}" for name in ("query", "value") for part in "ab"}
  for stage in fm_lora.stages:
    before, after = ({"shared": v.shared, "cur": v.cur} for v in (stage.begun, stage.trained))
    also = bases if stage.view.index == 0 else set()
    assert changed(before, after) == head | cores | {"shared/prompt"} | also
  for stage in fm_lora.stages[1:]:
    kept = {"cores": stage.before.mem["cores"], "bases": stage.before.shared["bases"]}
    now = {"cores": stage.ended.mem["cores"], "bases": stage.ended.shared["bases"]}
    assert changed(kept, now) == {"cores/query", "cores/value"}  # in the row of the task alone
    for name in ("query", "value"):
      others = np.delete(np.arange(3), stage.view.index)
      np.testing.assert_array_equal(kept["cores"][name][others], now["cores"][name][others])
      assert now["cores"][name][stage.view.index].any()


def test_the_backbone_that_is_trained_on_is_the_same_at_the_end_of_a_task(fm_lora, changed):
  """Property 2 for the folded backbone, which is a function of the variables."""
  for stage in fm_lora.stages:
    start, end = (fm_lora.method.freeze(fm_lora.weights, v) for v in (stage.begun, stage.trained))
    if stage.view.index:
      assert not changed(start, end)
    later = fm_lora.method.freeze(fm_lora.weights, stage.ended)
    kernels = {
      f"backbone/block_{i}/attention/{name}/dense/kernel"
      for i in range(2)
      for name in ("query", "value")
    }
    assert changed(start, later) == kernels


def test_the_folded_model_is_the_sum_of_the_deltas_of_all_tasks(learned):
  """Property 3: the pre-trained weights beside one low-rank delta per task, nothing folded."""
  variables, targets = learned.variables, learned.config.method.bases.targets
  images = learned.images(task=2)
  cores = {name: variables.mem["cores"][name] for name in targets}
  bases = variables.shared["bases"]
  deltas = {}
  for name in targets:
    # ranks side by side: A = [A A A], core = diag(C_1, C_2, C_3), B = [B B B]
    core = jax.vmap(lambda *blocks: jax.scipy.linalg.block_diag(*blocks))(*cores[name])
    a, b = (jnp.concatenate([bases[name][part]] * 3, axis=-1) for part in "ab")
    deltas[name] = LowRank(a=a, b=b, core=core)
  adapted = Adapters(deltas=deltas, prompt=variables.shared.get("prompt"))
  features = learned.features(images, adapted)
  unfolded = features @ variables.mem["head"]["kernel"].T + variables.mem["head"]["bias"]
  folded = learned.predictions(variables, images)
  np.testing.assert_allclose(folded, unfolded, rtol=0, atol=1e-4)
  plain = learned.features(images, adapted.replace(deltas={}))
  assert np.abs(plain - features).max() > 0.01


def test_a_delta_lies_in_the_span_of_the_leading_columns_of_its_bases(learned):
  """Property 4, Eq. (3-4), with r_i < r_max from task 2 on."""
  for task, rank in enumerate((4, 2, 2)):
    assert learned.stages[task].facts["rank"] == rank
    for name in learned.config.method.bases.targets:
      delta = delta_of(learned, name, task)
      dense = np.asarray(low_rank.dense(delta))
      assert np.abs(dense).max() > 1e-5
      for layer in range(2):
        for matrix, base in ((dense[layer], delta.a[layer]), (dense[layer].T, delta.b[layer])):
          q, _ = np.linalg.qr(np.asarray(base)[:, :rank])
          assert np.linalg.norm(matrix - q @ (q.T @ matrix)) <= 1e-5 * np.linalg.norm(matrix)
          if task:  # one column fewer does not span it
            q = q[:, :-1]
            assert np.linalg.norm(matrix - q @ (q.T @ matrix)) > 1e-3 * np.linalg.norm(matrix)


def test_a_kept_delta_is_that_of_the_trained_m_and_n(learned):
  """Eq. (1-2): dW_i = A M_i N_i^T B^T with the leading r_i columns, for tasks 2 and 3."""
  for task in (1, 2):
    trained = learned.stages[task].trained
    for name in learned.config.method.bases.targets:
      m, n = (np.asarray(trained.cur["core"][name][part]) for part in "mn")
      a, b = (np.asarray(trained.shared["bases"][name][part])[..., :2] for part in "ab")
      expected = a @ m @ np.swapaxes(n, -1, -2) @ np.swapaxes(b, -1, -2)
      kept = low_rank.dense(delta_of(learned, name, task))
      assert relative_error(kept, expected) <= 1e-5


def test_the_past_is_one_core_between_the_bases(learned):
  """Eq. (8-9): W_t = W_0 + A (Σ M_i N_iᵀ) Bᵀ, the same as the sum of the tasks' changes."""
  variables = learned.variables
  groups = {"shared": variables.shared, "cur": {}, "mem": variables.mem}
  past = learned.method.flora.apply(groups, method="past")
  for name, delta in past.items():
    assert delta.core.shape == (2, 4, 4)  # however many tasks
    each = [low_rank.dense(delta_of(learned, name, task)) for task in range(3)]
    np.testing.assert_allclose(low_rank.dense(delta), sum(each), atol=1e-6)
  folded = learned.method.past(learned.weights, variables)
  for layer in range(2):
    kernel = folded[f"block_{layer}"]["attention"]["query"]["dense"]["kernel"]
    before = learned.weights[f"block_{layer}"]["attention"]["query"]["dense"]["kernel"]
    change = sum(np.asarray(low_rank.dense(delta_of(learned, "query", t)))[layer] for t in range(3))
    np.testing.assert_allclose(kernel, before + change, atol=1e-6)


def test_a_task_stores_two_r_squared_numbers_for_each_projection(fm_lora):
  """Eq. (10), beside bases and prompt that are stored once."""
  counted = fm_lora.method.stored([stage.facts for stage in fm_lora.stages])
  assert counted["per_task"] == [2 * rank**2 * 2 * 2 for rank in (4, 2, 2)]  # layers, targets
  assert counted["shared"] == 2 * 2 * (16 + 16) * 4 + 3 * 16


def test_the_loss_is_the_cross_entropy_of_the_classes_of_the_task(make_lab):
  """Eq. (14-15): of W·f(x) + b over the task's classes alone, the mean over its images."""
  made = make_lab(input={"augmentation": "none"}, drs={"strategy": "fixed", "rank": 2})
  view = made.view(1)
  variables, _ = made.method.begin_task(made.variables, view)
  rows = jax.random.normal(jax.random.key(3), variables.cur["head"]["kernel"].shape)
  variables = variables.update(cur={"head": variables.cur["head"] | {"kernel": rows}})
  batch = view.center(*next(iter(view.train_batches(0))))
  prompt = Adapters(deltas={}, prompt=variables.shared["prompt"])  # dW = 0 at the start
  features = np.asarray(made.backbone.apply(made.weights, batch.images, prompt))
  lo, hi = made.spec.class_ranges[1]
  logits = (features @ np.asarray(rows).T + np.asarray(variables.cur["head"]["bias"]))[:, : hi - lo]
  chosen = logits[np.arange(len(logits)), np.clip(np.asarray(batch.labels) - lo, 0, hi - lo - 1)]
  losses = np.log(np.exp(logits).sum(1)) - chosen
  expected = losses[np.asarray(batch.valid)].mean()
  _, stats, _ = next(made.trainer.train(made.trainer.init(variables, 1), variables, view))
  np.testing.assert_allclose(stats["loss"][0], expected, rtol=1e-4)


def test_orthonormalising_after_task_1_keeps_its_delta(fm_lora):
  """Property 5: A and B orthonormal, dW_1 as trained, singular values sorted."""
  first = fm_lora.stages[0]
  for name in ("query", "value"):
    m, n = (first.trained.cur["core"][name][part] for part in "mn")
    bases = first.trained.shared["bases"][name]
    trained = LowRank(a=bases["a"], b=bases["b"], core=m @ jnp.swapaxes(n, -1, -2))
    kept = delta_of(fm_lora, name, 0, first.ended)
    assert relative_error(low_rank.dense(kept), low_rank.dense(trained)) <= 1e-5
    assert relative_error(kept.a, trained.a) > 0.1
    eye = np.broadcast_to(np.eye(4), (2, 4, 4))
    for base in (kept.a, kept.b):
      np.testing.assert_allclose(jnp.swapaxes(base, -1, -2) @ base, eye, atol=1e-5)
    values = np.diagonal(kept.core, axis1=-2, axis2=-1)
    np.testing.assert_array_equal(kept.core, values[..., None] * np.eye(4))
    assert (np.diff(values, axis=-1) <= 0).all() and (values > 0).all()


def test_without_orthonormalising_bases_stay_as_trained(raw, changed):
  first = raw.stages[0]
  assert not changed(first.trained.shared, first.ended.shared)


def test_the_logged_interference_is_that_of_the_dense_deltas(learned):
  """Property 4, Eq. (5-7): the mean over targets of the cosines, also with bases as trained."""
  cosines = []
  for name in learned.config.method.bases.targets:
    dense = [np.asarray(low_rank.dense(delta_of(learned, name, task))) for task in range(3)]
    inner = np.array([[np.sum(x * y) for y in dense] for x in dense])
    norm = np.sqrt(np.diagonal(inner))
    cosines.append(inner / np.outer(norm, norm))
  logged = np.array(learned.stages[2].facts["interference"])
  np.testing.assert_allclose(logged, np.mean(cosines, axis=0), atol=1e-5)
  np.testing.assert_allclose(np.diagonal(logged), 1, atol=1e-5)
  assert 1e-4 < np.abs(logged[0, 1]) < 1


def test_the_raw_interference_of_each_target_is_that_of_the_dense_deltas(learned):
  """Eq. (5)."""
  logged = learned.stages[2].facts["interference_by_target"]
  for name, found in zip(learned.config.method.bases.targets, logged, strict=True):
    dense = [np.asarray(low_rank.dense(delta_of(learned, name, task))) for task in range(3)]
    inner = np.array([[np.sum(x * y) for y in dense] for x in dense])
    np.testing.assert_allclose(found, inner, rtol=1e-3, atol=1e-5 * np.abs(inner).max())


def test_interference_with_orthonormal_bases_is_that_of_the_cores(fm_lora, raw):
  def by_cores(learned, name):
    cores = np.asarray(learned.variables.mem["cores"][name])
    return np.einsum("tlrs,ulrs->tu", cores, cores)

  def by_definition(learned, name):
    bases = learned.variables.shared["bases"][name]
    return low_rank.interference(learned.variables.mem["cores"][name], bases["a"], bases["b"])

  for name in ("query", "value"):
    np.testing.assert_allclose(
      by_cores(fm_lora, name), by_definition(fm_lora, name), rtol=1e-3, atol=1e-6
    )
    assert relative_error(by_cores(raw, name), by_definition(raw, name)) > 0.01


def test_a_step_compiles_once_per_rank_and_once_for_task_1(fm_lora, make_lab):
  """Property 9: ranks 4 | 2, 1, 2; task 1 trains the bases too, so it has a program of its own."""
  made = make_lab(ranges=tuple((i, i + 1) for i in range(4)), epochs=1)
  counts = []
  for index, rank in enumerate((4, 2, 1, 2)):
    view = made.view(index)
    variables, _ = made.method.begin_task(made.variables, view)
    variables = variables.replace(cur=variables.cur | {"core": fresh_core(rank)})
    for state, _, _ in made.trainer.train(made.trainer.init(variables, index), variables, view):
      last = state
    made.variables, _ = made.method.end_task(variables.replace(**last.params), view)
    counts.append(made.setup.programs.num_compiled)
  assert counts == [1, 2, 3, 3]
  assert fm_lora.setup.programs.num_compiled == 2  # ranks 4 | 2, 2


def fresh_core(rank):
  eye = jnp.broadcast_to(jnp.eye(rank), (2, rank, rank))
  return {name: {"m": eye, "n": jnp.zeros((2, rank, rank))} for name in ("query", "value")}


def test_a_smaller_rank_has_smaller_matrices_in_training(fm_lora):
  for stage, rank in zip(fm_lora.stages, (4, 2, 2), strict=True):
    for leaf in jax.tree.leaves(stage.begun.cur["core"]):
      assert leaf.shape == (2, rank, rank)


def test_bases_are_trained_in_task_1_only_and_the_prompt_in_every_task(fm_lora, raw):
  for task in range(3):
    variables = fm_lora.stages[task].begun
    params = {"shared": variables.shared, "cur": variables.cur}
    labels = label_leaves(params, fm_lora.method.rules(task))
    first = "" if task else "first_"
    assert labels["shared"]["prompt"] == f"{first}prompt"
    sides = {"a": "frozen", "b": "frozen"} if task else {"a": "a", "b": "b"}
    assert labels["shared"]["bases"]["value"] == sides
    assert labels["cur"]["core"]["value"] == {"m": f"{first}core_m", "n": f"{first}core"}
  groups = fm_lora.method.groups
  assert not groups["core_m"].decays and not groups["first_core_m"].decays  # M starts at I
  assert "prompt" not in raw.variables.shared


def test_lora_s_start_is_no_change_and_trains_every_factor_but_a_at_once(make_lab):
  made = make_lab(bases={"zero": "b"}, method={"core": {"alpha": 8.0}})
  variables, _ = made.method.begin_task(made.variables, made.view(0))
  for name, core in variables.cur["core"].items():
    np.testing.assert_array_equal(core["m"], core["n"])
    assert not np.asarray(variables.shared["bases"][name]["b"]).any()
    assert np.asarray(variables.shared["bases"][name]["a"]).all()
  flora = made.method.flora
  deltas = flora.apply({"shared": variables.shared, "cur": variables.cur, "mem": variables.mem})
  np.testing.assert_allclose(deltas["query"].core[0], 2.0 * np.eye(4), rtol=1e-6)  # alpha / r


def test_bases_from_the_gradient_are_its_leading_singular_vectors(make_lab):
  made = make_lab(bases={"init": "gradient", "targets": ("query", "fc1")})
  view = made.view(0)
  variables, _ = made.method.begin_task(made.variables, view)
  sums = made.method.head.class_sums(made.method.fold(made.weights, made.variables), view)
  rows = heads.imprint({"kernel": jnp.zeros((2, 16))}, *sums, view.arrays)

  def loss(changes):  # of all training images in one batch each
    total = 0.0
    for batch in view.train_batches(0):
      images, labels, valid = dataclasses.astuple(view.center(*batch))
      features = made.backbone.apply(low_rank.add(made.weights, changes), images)
      losses = heads.local_losses(heads.linear(rows, features), labels, view.arrays)
      total += jnp.sum(losses * valid)
    return total

  sizes = made.backbone.sizes
  for name in ("query", "fc1"):
    gradient = jax.grad(loss)({name: jnp.zeros((2, *sizes.projection(name)))})[name]
    u, s, vt = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
    assert (s[:, 0] > 1e-6).all()
    for side, vectors in (("a", u[..., :1]), ("b", np.swapaxes(vt[:, :1], 1, 2))):
      base = np.asarray(variables.shared["bases"][name][side])
      inner = np.einsum("ldr,ldr->lr", base[..., :1], vectors)
      np.testing.assert_allclose(np.abs(inner), np.ones_like(inner), atol=1e-3)
      gram = np.einsum("ldr,lds->lrs", base, base)
      np.testing.assert_allclose(gram, np.broadcast_to(np.eye(4), gram.shape), atol=1e-4)


def test_free_columns_are_those_that_earlier_tasks_use_least(make_lab):
  made = make_lab(bases={"columns": "free", "max_rank": 4}, drs={"strategy": "fixed", "rank": 1})
  cores = np.zeros((3, 2, 4, 4), np.float32)
  cores[0] = np.diag([4.0, 3.0, 2.0, 1.0])  # the last column is the least used
  cores[1, :, 3, 2] = 5.0  # then a task used row 3 and column 2
  stacks = dict.fromkeys(("query", "value"), jnp.asarray(cores))
  groups = {"shared": made.variables.shared, "mem": {"cores": stacks}}
  core = made.method.flora.new_core(1)
  core = {name: {"m": c["m"], "n": c["n"] + 7.0} for name, c in core.items()}
  groups["cur"] = {"core": core}
  delta = made.method.flora.apply(groups)["query"]
  bases = made.variables.shared["bases"]["query"]
  np.testing.assert_array_equal(delta.a, bases["a"][..., 2:3])
  np.testing.assert_array_equal(delta.b, bases["b"][..., 3:4])
  _, changed = made.method.flora.apply(groups, 2, False, method="commit", mutable=["mem"])
  kept = np.zeros((2, 4, 4))
  kept[:, 2, 3] = 7.0
  np.testing.assert_array_equal(changed["mem"]["cores"]["query"][2], kept)


@pytest.mark.parametrize("columns", ["leading", "free"])
def test_a_task_s_delta_is_kept_as_it_was_trained_whatever_its_columns(make_lab, columns):
  made = make_lab(bases={"columns": columns}, drs={"strategy": "fixed", "rank": 2})
  rng = np.random.default_rng(0)
  cores = {name: jnp.asarray(rng.normal(size=(3, 2, 4, 4)), jnp.float32).at[2].set(0)
           for name in ("query", "value")}  # fmt: skip
  core = {name: {"m": jnp.asarray(rng.normal(size=(2, 2, 2)), jnp.float32),
                 "n": jnp.asarray(rng.normal(size=(2, 2, 2)), jnp.float32)}
          for name in ("query", "value")}  # fmt: skip
  groups = {"shared": made.variables.shared, "mem": {"cores": cores}, "cur": {"core": core}}
  trained = made.method.flora.apply(groups)
  _, changed = made.method.flora.apply(groups, 2, False, method="commit", mutable=["mem"])
  for name, delta in trained.items():
    kept = LowRank(**made.variables.shared["bases"][name], core=changed["mem"]["cores"][name][2])
    np.testing.assert_allclose(low_rank.dense(kept), low_rank.dense(delta), atol=1e-5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"bases": {"columns": "free", "orthonormalise": "none"}},
      r"config\.method\.bases\.columns is 'free': must be leading, or orthonormalise svd",
    ),
    (
      {"drs": {"strategy": "gumbel", "candidate_ranks": (2, 8)}},
      r"config\.method\.drs\.candidate_ranks is \(2, 8\): must be at most .*bases\.max_rank = 4",
    ),
    (
      {"drs": {"strategy": "fixed", "rank": 5}},
      r"config\.method\.drs\.rank is 5: must be at most config\.method\.bases\.max_rank = 4",
    ),
    (
      {"drs": {"ranks": (4, 2)}},
      r"config\.method\.drs\.ranks is \(4, 2\): must have one rank for each of the 3 tasks",
    ),
    ({"drs": {"ranks": (4, 5, 1)}}, r"drs\.ranks is \(4, 5, 1\): must be at most .*max_rank = 4"),
    ({"drs": {"ranks": (2, 2, 1)}}, r"drs\.ranks is \(2, 2, 1\): must begin with .*max_rank = 4"),
    ({"drs": {"ranks": (4, 0, 1)}}, r"drs\.ranks is \(4, 0, 1\): must be integers >= 1"),
    (
      {"bases": {"max_rank": 17}},
      r"config\.method\.bases\.max_rank is 17: must be at most 16, .* 'query'",
    ),
  ],
)
def test_settings_that_do_not_fit_are_refused_by_field(make_lab, changes, message):
  with pytest.raises(ConfigError, match=message):
    make_lab(**changes)


@pytest.mark.parametrize("strategy", ["gumbel", "fixed"])
def test_given_ranks_are_replayed_without_validation_images(make_lab, strategy):
  made = make_lab(drs={"ranks": (4, 1, 3), "strategy": strategy})
  spec = dataclasses.replace(made.spec, has_val=False)
  method, variables = methods.make_method(made.config, made.backbone, spec), made.variables
  for task, rank in enumerate((4, 1, 3)):
    view = dataclasses.replace(made.view(task), val_batches=None)
    variables, facts = method.begin_task(variables, view)
    assert (facts["rank"], facts["complexity"]) == (rank, None)
    assert {core["m"].shape[1:] for core in variables.cur["core"].values()} == {(rank, rank)}
    variables, _ = method.end_task(variables, view)


@pytest.mark.parametrize(
  ("tasks", "val_splits", "advice"),
  [
    ({"split": "slice80"}, ("slice", "x"), "set config.tasks.split=slice or config.tasks.split=x;"),
    ({"val_fraction": 0.0}, (), "set config.tasks.val_fraction > 0, or"),
    ({"val_fraction": 0.1}, (), "add images;"),
    ({"split": "slice80", "task_file": "f"}, ("slice",), "set config.tasks.task_file to that"),
  ],
)
def test_the_refusal_without_validation_images_names_what_helps(lab, tasks, val_splits, advice):
  config = lab().config
  config = dataclasses.replace(config, tasks=dataclasses.replace(config.tasks, **tasks))
  assert f"no validation images: {advice}" in rank_checks.without_val(config, "a task", val_splits)


@pytest.mark.parametrize("strategy", ["gumbel", "validation"])
def test_rank_selection_needs_validation_images_and_a_fixed_rank_does_not(lab, strategy):
  made = lab()
  spec = dataclasses.replace(made.spec, has_val=False)
  methods.make_method(made.config, made.backbone, spec)
  selecting = dataclasses.replace(made.config.method.drs, strategy=strategy)
  settings = dataclasses.replace(made.config.method, drs=selecting)
  with pytest.raises(
    ConfigError, match=f"config.method.drs.strategy is '{strategy}' and a task has no val"
  ):
    methods.make_method(dataclasses.replace(made.config, method=settings), made.backbone, spec)
