"""The benchmark's counts on small ViTs, the FLOPs of ViT-B/16's step, and the way to the peer."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from fmlora_jax import bench, bench_peer
from fmlora_jax.bench import Setting
from fmlora_jax.models import vit

MICRO = Setting(architecture="micro", batch=2, rank=4, prompts=3)


def weights(setting):
  return jax.jit(vit.make(setting.sizes).init)(jax.random.key(0))


@pytest.fixture(scope="module")
def base_weights():
  return weights(Setting())


@pytest.mark.parametrize(("prompts", "most"), [(10, 2.17), (0, 2.04)])
def test_a_step_of_vit_b16_costs_little_more_than_twice_the_forward(base_weights, prompts, most):
  setting = Setting(batch=1, prompts=prompts)
  step = bench.training_step(setting, base_weights, task=1)
  forward = bench.plain_forward(setting, base_weights)
  for kind in ("flops_per_image", "flops_per_image_as_written"):
    assert step.facts[kind] / forward.facts[kind] < most
  least = bench.floor(setting)
  for program, name in ((step, "step"), (forward, "forward")):
    assert least[name] < program.facts["flops_per_image_as_written"] < 1.04 * least[name]


def test_task_20_costs_what_task_2_costs():
  params = weights(MICRO)
  early, late = (bench.training_step(MICRO, params, task=task) for task in (1, 19))
  for kind in ("flops_per_image", "flops_per_image_as_written", "temp_bytes"):
    assert early.facts[kind] == late.facts[kind]


def test_the_past_that_a_late_step_trains_on_is_folded_in():
  spec, config = bench.sequence_spec(), MICRO.config()
  params = weights(MICRO)
  method = bench.methods.make(config, vit.make(MICRO.sizes), spec)
  frozen = [
    method.freeze(params, bench.variables_at(method, spec, params, task))["backbone"]
    for task in (0, 1, 2)
  ]
  first, second, third = (b["block_0"]["attention"]["query"]["dense"]["kernel"] for b in frozen)
  assert jnp.array_equal(first, params["block_0"]["attention"]["query"]["dense"]["kernel"])
  assert not jnp.array_equal(first, second)
  assert not jnp.array_equal(second, third)


def test_a_run_compiles_one_step_for_task_1_and_one_for_each_rank_after_it():
  assert bench.count_programs((8, 4, 8, 4, 8)) == 3


def test_the_result_is_json_and_a_table(monkeypatch, capsys):
  monkeypatch.setattr(bench, "count_programs", lambda: 5)
  monkeypatch.setattr(bench, "TURN_SECONDS", 0)
  result = bench.measure(MICRO, repeats=2)
  assert json.loads(json.dumps(result)) == result
  assert result["setting"]["rank"] == 4
  assert result["programs_of_10_tasks"] == 5
  assert result["floor_ratio"] > 2
  fields = {"flops_per_image", "ratio", "compile_seconds", "step_seconds", "images_per_second"}
  for name in ("forward", "task_2", "task_20"):
    facts = result[name]
    assert fields | {"temp_bytes", "mfu"} <= set(facts)
    assert len(facts["all_step_seconds"]) == 2
    assert facts["images_per_second"] == pytest.approx(MICRO.batch / facts["step_seconds"])
    assert facts["mfu"] is None  # of a CPU no peak is known
  assert result["forward"]["ratio"] == 1
  result["peers"] = {
    "variants": ["eager"],
    "eager": result["task_2"] | {"ours_over_theirs": 0.5},
    "device": "cpu",
    "versions": {"torch": "2"},
    "notes": ["torch.compile does not work here"],
  }
  bench.Console(width=110).print(bench.table(result))
  shown = capsys.readouterr().out
  for text in ("step at task 20 of 20", "HF + PEFT, eager", "0.50", "compile 5 training steps"):
    assert text in shown


def test_runners_take_turns():
  log = []

  def runner(name, seconds):
    def run(steps):
      log.append((name, steps))
      return seconds * steps

    return run

  seconds = bench.take_turns({"a": runner("a", 0.1), "b": runner("b", 2.0)}, repeats=2)
  assert seconds == {"a": pytest.approx([0.1, 0.1]), "b": [2.0, 2.0]}
  assert log[4:] == [("a", 5), ("b", 1)] * 2


def test_the_peak_is_known_of_some_chips_in_bfloat16():
  assert bench.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
  assert bench.peak_flops("TPU v5 lite", "bfloat16") == 197e12
  assert bench.peak_flops("TPU v5", "bfloat16") == 459e12
  assert bench.peak_flops("NVIDIA H100 80GB HBM3", "float32") is None
  assert bench.peak_flops("cpu", "bfloat16") is None


def test_a_peer_that_does_not_start_is_one_message():
  with pytest.raises(ValueError, match="ended with code 1; --peers needs torch"):
    bench.Peer(MICRO, "false")


def test_pytorch_is_imported_for_the_peer_only():
  assert bench_peer.make_step
  assert not {"torch", "transformers", "peft"} & set(sys.modules)
