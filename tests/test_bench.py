"""The benchmark's counts on small ViTs, the FLOPs of ViT-B/16's step, and the way to the peer."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from fmlora_jax import bench, bench_peer
from fmlora_jax.bench import Lab, Setting
from fmlora_jax.models import vit
from fmlora_jax.settings import Choice, parse_methods

MICRO = Setting(architecture="micro", batch=2, rank=4, prompts=3)


def weights(setting):
  return jax.jit(vit.make(setting.sizes).init)(jax.random.key(0))


def lowered(setting, task):
  """The step and the plain forward of abstract arrays: nothing is computed."""
  lab = Lab(setting)
  params = jax.eval_shape(lab.backbone.init, jax.random.key(0))

  def arguments(params):
    variables = lab.begin(params, lab.variables(params, 0), task)  # without the tasks between
    return lab.arguments(params, variables, task)

  shapes = jax.eval_shape(arguments, params)
  step = jax.jit(lab.stepper(task).step).lower(*shapes)
  return step, jax.jit(lab.backbone.apply).lower(params, shapes[-1].images)


@pytest.mark.parametrize(("prompts", "most"), [(10, 2.17), (0, 2.03)])
def test_a_step_of_vit_b16_costs_little_more_than_twice_the_forward(prompts, most):
  setting = Setting(batch=2, prompts=prompts)
  flops = [program.cost_analysis()["flops"] / 2 for program in lowered(setting, task=1)]
  assert flops[0] / flops[1] < most
  least = bench.floor(setting)
  assert least["step"] < flops[0] < 1.02 * least["step"]
  assert least["forward"] < flops[1] < 1.01 * least["forward"]


def test_xla_adds_nothing_to_the_step_of_vit_b16():
  step, forward = lowered(Setting(batch=2), task=1)
  flops = [program.compile().cost_analysis()["flops"] for program in (step, forward)]
  assert flops[0] / flops[1] < 2.17


def test_task_20_runs_the_program_of_task_2():
  lab, params = Lab(MICRO), weights(MICRO)
  early, late = (
    jax.jit(lab.stepper(task).step).lower(*lab.arguments(params, lab.variables(params, task), task))
    for task in (1, 19)
  )
  assert early.as_text() == late.as_text()


def test_the_past_that_a_late_step_trains_on_is_folded_in():
  lab, params = Lab(MICRO), weights(MICRO)
  kernels = [
    lab.arguments(params, lab.variables(params, task), task)[1].frozen["backbone"]["block_0"][
      "attention"
    ]["query"]["dense"]["kernel"]
    for task in (0, 1, 2)
  ]
  assert jnp.array_equal(kernels[0], params["block_0"]["attention"]["query"]["dense"]["kernel"])
  assert not jnp.array_equal(kernels[0], kernels[1])
  assert not jnp.array_equal(kernels[1], kernels[2])


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


@pytest.mark.parametrize("text", ["fm_lora", "lora", "lora:mode=sequential", "finetune"])
def test_shapes_are_those_of_a_task_behind_others(text):
  (choice,) = parse_methods(text)
  lab, params = Lab(MICRO, choice), weights(MICRO)
  real = lab.arguments(params, lab.variables(params, 2), 2)

  def shapes(tree):
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]

  assert shapes(lab.shapes(params, 2)) == shapes(real)
  assert jax.tree.structure(lab.shapes(params, 2)) == jax.tree.structure(real)


def test_a_method_may_look_at_images_before_its_shapes_are_known():
  """Here the head's rows start at class means; a decomposition on the host would do too."""
  lab, params = Lab(MICRO, Choice("lora", (("head.start", "class_mean"),))), weights(MICRO)
  variables = lab.begin(params, lab.method.init(jax.random.key(0), params), 1)
  seen = variables.cur["head"]["kernel"][:2]  # rows of the two classes that have an image
  assert jnp.isfinite(seen).all() and jnp.abs(seen).max() > 0.1
  state, _, batch = lab.shapes(params, 1)
  assert isinstance(batch.images, jax.ShapeDtypeStruct)
  assert state.params["cur"]["head"]["kernel"].shape == variables.cur["head"]["kernel"].shape


def test_methods_are_counted_in_one_table(capsys):
  chosen = parse_methods("linear_probe,lora:rank=97,lora:mode=sequential:rank=4,finetune")
  result = bench.count_methods(MICRO, chosen)
  assert json.loads(json.dumps(result)) == result
  counted = result["methods"]
  assert list(counted) == ["linear_probe", "lora:mode=sequential:rank=4", "finetune"]
  (problem,) = result["left_out"].values()
  assert problem.startswith("config.method.rank is 97: must be at most 96")
  ratios = [counted[label]["task_2"]["ratio"] for label in counted]
  assert ratios[0] == pytest.approx(1, abs=0.02)  # the head alone has a gradient
  assert 1.9 < ratios[1] < 2.3 and 2.8 < ratios[2] < 3.3
  for rows in counted.values():
    assert rows["task_2"] == rows["task_20"]  # one program
  head = 10 * 96 + 10
  # 6 blocks of width 96, query and value: 2 factors of rank 4
  expected = [head, head + 6 * 2 * 2 * 96 * 4]
  assert [counted[label]["task_2"]["trained"] for label in list(counted)[:2]] == expected
  bench.Console(width=110).print(bench.methods_table(result))
  shown = capsys.readouterr().out
  for text in ("x at task 20", "lora:mode=sequential:rank=4", f"{expected[1]:,}", "plain forward"):
    assert text in shown
  assert "left out: lora:rank=97: config.method.rank is 97" in shown


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
    bench_peer.Peer({}, "false")


def test_pytorch_is_imported_for_the_peer_only():
  assert bench_peer.make_step
  assert not {"torch", "transformers", "peft"} & set(sys.modules)
