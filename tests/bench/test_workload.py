"""Steps on small ViTs at any task: one program, what is folded in, shapes without values."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from fmlora_jax.bench.workload import BenchSettings, Workload
from fmlora_jax.cli.methods_flag import Choice, parse_methods
from fmlora_jax.models import vit

MICRO = BenchSettings(architecture="micro", batch=2, rank=4, prompts=3)


@pytest.fixture(autouse=True, scope="module")
def three_blocks():
  """The ViT has three blocks in place of six, which take half the time to compile."""
  sizes = dataclasses.replace(vit.architecture("micro"), depth=3)
  with mock.patch.object(vit, "architecture", lambda name: sizes):
    yield


def arguments(workload, params, task):
  return workload.arguments(params, workload.variables(params, task), task)


def test_task_20_runs_the_program_of_task_2():
  workload = Workload(MICRO)
  params = workload.weights()
  early, late = (
    jax.jit(workload.train_step(task).step).lower(*arguments(workload, params, task))
    for task in (1, 19)
  )
  assert early.as_text() == late.as_text()


def test_the_past_that_a_late_step_trains_on_is_folded_in():
  workload = Workload(MICRO)
  params = workload.weights()
  kernels = [
    arguments(workload, params, task)[1].frozen["backbone"]["block_0"]["attention"]["query"][
      "dense"
    ]["kernel"]
    for task in (0, 1, 2)
  ]
  assert jnp.array_equal(kernels[0], params["block_0"]["attention"]["query"]["dense"]["kernel"])
  assert not jnp.array_equal(kernels[0], kernels[1])
  assert not jnp.array_equal(kernels[1], kernels[2])


@pytest.mark.parametrize("text", ["fm_lora", "lora", "lora:mode=sequential", "finetune"])
def test_shapes_are_those_of_a_task_behind_others(text):
  (choice,) = parse_methods(text)
  workload = Workload(MICRO, choice)
  params = workload.weights()
  real = arguments(workload, params, 2)

  def shapes(tree):
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]

  assert shapes(workload.shapes(params, 2)) == shapes(real)
  assert jax.tree.structure(workload.shapes(params, 2)) == jax.tree.structure(real)


def test_a_method_may_look_at_images_before_its_shapes_are_known():
  """Here the head's rows start at class means; a decomposition on the host would do too."""
  workload = Workload(MICRO, Choice("lora", (("head.start", "class_mean"),)))
  params = workload.weights()
  variables = workload.begin(params, workload.method.init(workload.setup.root, params), 1)
  seen = variables.cur["head"]["kernel"][:2]  # rows of the two classes that have an image
  assert jnp.isfinite(seen).all() and jnp.abs(seen).max() > 0.1
  state, _, batch = workload.shapes(params, 1)
  assert isinstance(batch.images, jax.ShapeDtypeStruct)
  assert state.params["cur"]["head"]["kernel"].shape == variables.cur["head"]["kernel"].shape
