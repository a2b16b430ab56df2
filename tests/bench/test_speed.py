"""What is timed, in turns, as JSON and as a table."""

import json

import pytest
from rich.console import Console

from fmlora_jax.bench import speed
from fmlora_jax.bench.lab import Setting

MICRO = Setting(architecture="micro", batch=2, rank=4, prompts=3)


def test_the_result_is_json_and_a_table(monkeypatch, capsys):
  monkeypatch.setattr(speed, "count_programs", lambda: 5)
  monkeypatch.setattr(speed, "TURN_SECONDS", 0)
  result = speed.measure(MICRO, repeats=2)
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
  Console(width=110).print(speed.table(result))
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

  seconds = speed.take_turns({"a": runner("a", 0.1), "b": runner("b", 2.0)}, repeats=2)
  assert seconds == {"a": pytest.approx([0.1, 0.1]), "b": [2.0, 2.0]}
  assert log[4:] == [("a", 5), ("b", 1)] * 2
