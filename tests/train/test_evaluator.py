"""Evaluation costs one folded forward pass of the ViT per test image, by one program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmlora_jax import methods
from fmlora_jax.input import order
from fmlora_jax.methods.common import base
from fmlora_jax.models import vit
from fmlora_jax.train import evaluator as evaluate
from fmlora_jax.types import Batch, Examples, SequenceSpec

CLASSES, BATCH = 200, 4


def flops(function, *shapes):
  """Counted by XLA before its passes; nothing is computed."""
  return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


@pytest.mark.parametrize(("prompts", "most"), [(0, 1.001), (10, 1.06)])
def test_an_image_costs_one_folded_forward_pass(prompts, most):
  """Of ViT-B/16, and of the same network without prompt and adapters; 10 tokens more are 5 %."""
  config = methods.build_config({"prompt": {"num_tokens": prompts}})
  backbone = vit.make_vit(vit.architecture("vit_b16"), jnp.bfloat16)
  spec = SequenceSpec(
    scenario="cil", num_tasks=10, num_classes=CLASSES, class_ranges=((0, 20), (20, 40))
  )
  method = methods.make_method(config, backbone, spec)
  weights = jax.eval_shape(backbone.init, jax.random.key(0))
  model = jax.eval_shape(
    lambda weights: method.fold(weights, method.init(jax.random.key(0), weights)), weights
  )
  images = jax.ShapeDtypeStruct((BATCH, 224, 224, 3), jnp.bfloat16)

  def center(images, rows):  # what it costs is not the question here
    return Batch(images=images, labels=rows, valid=rows >= 0)

  owner = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
  masks = jax.ShapeDtypeStruct((10, CLASSES), bool)
  functions = {"predict": method.predict, "center": center}
  lowered = evaluate.count_correct.lower(model, images, owner, masks, **functions)
  counted = lowered.cost_analysis()["flops"]
  plain = jax.eval_shape(lambda weights: base.cast_kernels(weights, jnp.bfloat16), weights)
  assert 1 <= counted / flops(backbone.apply, plain, images) < most


@pytest.mark.parametrize("learned", [1, 2, 3])
def test_each_test_image_is_seen_once_in_full_batches_that_span_tasks(lab, learned):
  """Of 12, 18 and 12 test images; their sum fills batches of 8 but for the last one."""
  made = lab("fm_lora")
  made_tests = [task.test for task in made.sequence.tasks[:learned]]
  sizes = [len(test) for test in made_tests]
  records = np.concatenate(made_tests)
  seen = []

  def read(blocks):
    for rows in blocks:
      seen.append(rows)
      pixels, extents = made.sequence.source.decode(records[rows])
      labels = made.sequence.labels[records[rows]]
      yield Examples(images=pixels, sizes=extents, labels=labels, valid=rows >= 0), rows

  batches = list(evaluate.iterate_batches(read, sizes, 8, made.replicate))
  assert len(batches) == -(-sum(sizes) // 8)
  assert [row for rows in seen for row in rows if row >= 0] == list(range(sum(sizes)))
  assert all((rows >= 0).all() for rows in seen[:-1])
  owners = np.concatenate([np.asarray(owner) for _, owner in batches])[: sum(sizes)]
  np.testing.assert_array_equal(owners, np.repeat(np.arange(learned), sizes))
  np.testing.assert_array_equal(np.stack(seen), order.natural(sum(sizes), 8))


def test_one_program_serves_all_tasks_and_counts_what_the_logits_say(lab):
  made = lab("fm_lora")
  evaluator = evaluate.Evaluator(made.method, made.setup.center)
  masks = made.replicate(np.ones((3, made.spec.num_classes), bool))
  before = evaluate.count_correct._cache_size()
  for stage in made.stages:
    model = made.method.fold(made.weights, stage.ended)
    examples = made.replicate(
      Examples(
        images=np.zeros((8, 16, 16, 3), np.uint8),
        sizes=np.full((8, 2), 16, np.int32),
        labels=np.arange(8, dtype=np.int32) % 7,
        valid=np.arange(8) < 7,
      )
    )
    owner = made.replicate(np.zeros(8, np.int32))
    counts = evaluator.correct(model, [(examples, owner)], masks)
    assert counts.tolist() == [1, 0, 0]  # one image, seven labels, and padding
  assert evaluate.count_correct._cache_size() == before + 1


@pytest.mark.parametrize(("scenario", "after"), [("cil", [1, 2, 3]), ("dil", [2, 3, 3])])
def test_after_a_task_its_sets_are_measured_and_in_dil_the_next_one(make_lab, scenario, after):
  made = make_lab(method={"name": "linear_probe"})
  setup = made.setup
  tests = evaluate.TestSets(
    setup.loader, "test", made.method, made.weights, batch_size=8, center=setup.center,
    mesh=setup.mesh,
  )  # fmt: skip
  tests._spec = dataclasses.replace(made.spec, scenario=scenario)
  assert [tests.num_after(index) for index in range(3)] == after
