"""Differences of rows to one row, seed by seed."""

import pytest
from made_up import result

from fmlora_jax.report import paired, tables


def row(method, *accs, first=1993, **changes):
  runs = [result(method, seed=first + i, **changes) for i in range(len(accs))]
  for run, acc in zip(runs, accs, strict=True):
    run["acc"], run["aaa"] = acc, acc + 1
  return runs


def cells(groups, name):
  place = tables.header(groups).index(name)
  return [texts[place][0] for texts in tables.rows(groups)]


def test_rows_stand_beside_fm_lora_seed_by_seed_wherever_it_stands():
  """The std is that of the differences: both rows vary by 10 points and their distance by 1."""
  groups = {"lora": row("lora", 60.0, 70.0, 81.0), "fm_lora": row("fm_lora", 62.0, 72.0, 82.0)}
  assert cells(groups, "Acc - fm_lora") == ["-1.67 ± 0.58", "-"]
  assert cells(groups, "AAA - fm_lora") == ["-1.67 ± 0.58", "-"]


def test_without_fm_lora_rows_stand_beside_the_first():
  groups = {"lora": row("lora", 60.0), "l2p": row("l2p", 58.5)}
  assert cells(groups, "Acc - lora") == ["-", "-1.50 ±    -"]


def test_of_two_rows_of_fm_lora_the_first_is_the_reference():
  groups = {"fm_lora a=1": row("fm_lora", 60.0), "fm_lora a=2": row("fm_lora", 61.0)}
  assert cells(groups, "Acc - fm_lora a=1") == ["-", "1.00 ±    -"]


def test_only_seeds_that_both_rows_have_once_are_pairs():
  others = row("l2p", 50.0, 99.0, 40.0, first=1992)  # 1992 to 1994
  others += row("l2p", 98.0, first=1993)  # twice
  groups = {"fm_lora": row("fm_lora", 60.0, 61.0), "l2p": others}
  assert paired.difference(others, groups["fm_lora"], "acc") == "-21.00 ±    -"


@pytest.mark.parametrize(
  "change", [{"split_id": "x"}, {"class_order": [*reversed(result()["class_order"])]}]
)
def test_runs_on_other_images_or_in_another_order_are_no_pair(change):
  others = row("l2p", 50.0, **change)
  groups = {"fm_lora": row("fm_lora", 60.0), "l2p": others}
  assert paired.reference(groups) is None
  assert not [name for name in tables.header(groups) if " - " in name]


def test_one_row_has_no_partner():
  assert paired.reference({"fm_lora": row("fm_lora", 60.0)}) is None
