"""What is timed, in turns, as JSON and as a table."""

import dataclasses
import json
from unittest import mock

import pytest
from rich.console import Console

from fmlora_jax.bench import speed
from fmlora_jax.bench.workload import BenchSettings
from fmlora_jax.models import vit

MICRO = BenchSettings(architecture="micro", batch=2, rank=4, prompts=3)


@pytest.fixture(autouse=True, scope="module")
def three_blocks():
  """The ViT has three blocks in place of six, which take half the time to compile."""
  sizes = dataclasses.replace(vit.architecture("micro"), depth=3)
  with mock.patch.object(vit, "architecture", lambda name: sizes):
    yield


def test_the_result_is_json_and_a_table(monkeypatch, capsys):
  monkeypatch.setattr(speed, "TURN_SECONDS", 0)
  result = speed.measure(MICRO, repeats=2) | {"programs_of_10_tasks": 5}
  assert json.loads(json.dumps(result)) == result
  assert result["setting"]["rank"] == 4
  least = result["floor"]
  assert least["ratio"] > 2 and least["kept_bytes"] > 0
  assert least["step_seconds"]["step"] == pytest.approx(
    least["flops_per_image"]["step"] * MICRO.batch / least["product_flops_per_second"]
  )
  fields = {"flops_per_image", "ratio", "compile_seconds", "step_seconds", "images_per_second"}
  for name in ("forward", "task_2", "task_20"):
    facts = result[name]
    assert fields | {"temp_bytes", "mfu"} <= set(facts)
    assert len(facts["all_step_seconds"]) == 2
    assert facts["images_per_second"] == pytest.approx(MICRO.batch / facts["step_seconds"])
    assert facts["flops_over_floor"] > 1
    kind = "forward" if name == "forward" else "step"
    assert facts["seconds_over_floor"] == facts["step_seconds"] / least["step_seconds"][kind]
    assert facts["mfu"] is None  # of a CPU no peak is known
  assert result["forward"]["ratio"] == 1
  result["peers"] = {
    "variants": ["peft"],
    "peft": result["task_2"] | {"ours_over_theirs": 0.5},
    "device": "cpu",
    "versions": {"torch": "2"},
    "notes": ["timm is left out: no such module"],
  }
  Console(width=140).print(speed.speed_table(result))
  shown = capsys.readouterr().out
  for text in (
    "step at task 20 of 20",
    "HF + PEFT",
    "0.50",
    "floor of a step",
    "compile 5 training steps",
  ):
    assert text in shown


def test_runners_take_turns():
  log = []

  def runner(name, seconds):
    def run(steps):
      log.append((name, steps))
      return seconds * steps

    return run

  seconds = speed.take_turns({"a": runner("a", 0.1), "b": runner("b", 2.0)}, repeats=2)
  assert seconds == {"a": pytest.approx([0.1, 0.1]), "b": [2.0, 2.0]}
  assert log[4:] == [("a", 5), ("b", 1)] * 2
