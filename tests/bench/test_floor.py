"""The FLOPs of ViT-B/16's step beside the least possible, and what chips can do."""

import dataclasses

import jax
import pytest

from fmlora_jax.bench import floor
from fmlora_jax.bench.workload import BenchSettings, Workload


def lowered(setting, task):
  """The step and the plain forward of abstract arrays: nothing is computed."""
  workload = Workload(setting)
  params = jax.eval_shape(workload.backbone.init, jax.random.key(0))

  def arguments(params):
    # without the tasks between
    variables = workload.begin(params, workload.variables(params, 0), task)
    return workload.arguments(params, variables, task)

  shapes = jax.eval_shape(arguments, params)
  step = jax.jit(workload.train_step(task).step).lower(*shapes)
  return step, jax.jit(workload.backbone.apply).lower(params, shapes[-1].images)


@pytest.mark.parametrize(
  ("prompts", "most"), [(10, 2.15), pytest.param(0, 2.03, marks=pytest.mark.tier(2))]
)
def test_a_step_of_vit_b16_costs_little_more_than_twice_the_forward(prompts, most):
  setting = BenchSettings(batch=2, prompts=prompts)
  flops = [program.cost_analysis()["flops"] / 2 for program in lowered(setting, task=1)]
  assert flops[0] / flops[1] < most
  least = floor.flops(setting)
  assert least["step"] < flops[0] < 1.01 * least["step"]
  assert least["forward"] < flops[1] < 1.01 * least["forward"]


@pytest.mark.tier(2)
def test_xla_adds_nothing_to_the_step_of_vit_b16():
  """In tier 2: the test above counts the program that XLA is given."""
  step, forward = lowered(BenchSettings(batch=2), task=1)
  flops = [program.compile().cost_analysis()["flops"] for program in (step, forward)]
  assert flops[0] / flops[1] < 2.15


def test_the_peak_is_known_of_some_chips_in_bfloat16():
  assert floor.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
  assert floor.peak_flops("TPU v5 lite", "bfloat16") == 197e12
  assert floor.peak_flops("TPU v5", "bfloat16") == 459e12
  assert floor.peak_flops("NVIDIA H100 80GB HBM3", "float32") is None
  assert floor.peak_flops("cpu", "bfloat16") is None


def test_what_the_backward_pass_must_find_is_counted_by_hand():
  # 16 patches, class token, 3 prompts; 10 widths and 6 x 2 ranks in 5 blocks, 3 widths in the last
  setting = BenchSettings(architecture="micro", batch=2, rank=4, prompts=3)
  assert floor.residual_bytes(setting) == 2 * 20 * (5 * (10 * 96 + 6 * 2 * 4) + 3 * 96) * 4
  assert floor.residual_bytes(dataclasses.replace(setting, dtype="bfloat16")) == 2 * 20 * 5328 * 2


def test_the_least_time_is_that_of_the_products():
  setting = BenchSettings(batch=3)
  assert floor.seconds(setting, 1e12)["step"] == 3 * floor.flops(setting)["step"] / 1e12
