"""What is counted of compiled steps."""

import json

import pytest
from rich.console import Console

from fmlora_jax.bench import counts
from fmlora_jax.bench.workload import BenchSettings
from fmlora_jax.cli.methods_flag import parse_methods

MICRO = BenchSettings(architecture="micro", batch=2, rank=4, prompts=3)


@pytest.mark.tier(2)
def test_a_run_compiles_one_step_for_task_1_and_one_for_each_rank_after_it():
  """In tier 2: methods/test_fm_lora.py counts the programs of a run."""
  assert counts.count_programs((8, 4, 8, 4, 8)) == 3


def test_methods_are_counted_in_one_table(capsys):
  chosen = parse_methods("linear_probe,lora:rank=97,lora:mode=sequential:rank=4,finetune")
  result = counts.count_methods(MICRO, chosen)
  assert json.loads(json.dumps(result)) == result
  counted = result["methods"]
  assert list(counted) == ["linear_probe", "lora:mode=sequential:rank=4", "finetune"]
  (problem,) = result["left_out"].values()
  assert problem.startswith("config.method.rank is 97: must be at most 96")
  ratios = [counted[label]["task_2"]["ratio"] for label in counted]
  assert ratios[0] == pytest.approx(1, abs=0.02)  # the head alone has a gradient
  assert 1.9 < ratios[1] < 2.3 and 2.8 < ratios[2] < 3.5
  for rows in counted.values():
    assert rows["task_2"] == rows["task_20"]  # one program
  head = 10 * 96 + 10
  # 6 blocks of width 96, query and value: 2 factors of rank 4
  expected = [head, head + 6 * 2 * 2 * 96 * 4]
  assert [counted[label]["task_2"]["trained"] for label in list(counted)[:2]] == expected
  Console(width=110).print(counts.methods_table(result))
  shown = capsys.readouterr().out
  for text in ("x at task 20", "lora:mode=sequential:rank=4", f"{expected[1]:,}", "plain forward"):
    assert text in shown
  assert "left out: lora:rank=97: config.method.rank is 97" in shown
