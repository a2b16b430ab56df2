"""The comparison of runs and the pictures, from made-up results."""

import errno
import functools
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from made_up import refusal, result, run_report, save
from matplotlib.image import imread
from rich.console import Console

from fmlora_jax import methods
from fmlora_jax.config import FREE_FIELDS
from fmlora_jax.report import notes, plots, tables
from fmlora_jax.report.columns import modes_text
from fmlora_jax.report.runs import group, load, mean_std
from fmlora_jax.workdir import result_file

HEADER = tables.header({"fm_lora": [result()]})


def text_of(results, width=200, **options):
  console = Console(file=io.StringIO(), width=width, force_terminal=False, **options)
  tables.show(results, console)
  return console.file.getvalue()


def test_runs_that_differ_in_the_seed_only_are_one_row():
  runs = [
    result(seed=1993),
    result(seed=1994),
    result(seed=1993, config={"method.prompt.num_tokens": 0}),
  ]
  (groups,) = group(runs).values()
  assert {label: len(group) for label, group in groups.items()} == {
    "fm_lora prompt.num_tokens=10": 2,
    "fm_lora prompt.num_tokens=0": 1,
  }


def test_settings_that_change_no_number_do_not_split_a_row():
  free = {name: 1 for name in FREE_FIELDS if "." in name}
  runs = [result(), result(seed=1994, config=free), result(seed=1995)]
  runs[2]["config"]["eval_batch_size"] = 8
  (groups,) = group(runs).values()
  assert {label: len(group) for label, group in groups.items()} == {"fm_lora": 3}


def test_a_setting_newer_than_a_run_has_its_default_there():
  runs = [result(seed=1), result(seed=2, config={"tasks.test_from": "train"})]
  (groups,) = group([*runs, result(seed=3, config={"tasks.test_from": "val"})]).values()
  assert {label: len(runs) for label, runs in groups.items()} == {
    "fm_lora tasks.test_from=train": 2,
    "fm_lora tasks.test_from=val": 1,
  }


def test_accuracies_on_validation_images_have_their_own_table():
  val = {"tasks.evaluate_on": "val"}
  headings = list(group([result(), result(config=val)]))
  assert headings == ["domainnet (cil), 5 tasks", "domainnet (cil), 5 tasks, validation images"]


def test_another_method_needs_no_settings_in_its_label():
  runs = [result("l2p", config={"optim.learning_rate": 5e-3}), result("fm_lora")]
  (groups,) = group(runs).values()
  assert list(groups) == ["l2p", "fm_lora"]


def test_labels_state_settings_that_only_one_side_has():
  runs = [result(), result(config={"method.ranks": [4, 8], "optim.learning_rate": 5e-3})]
  (groups,) = group(runs).values()
  assert list(groups) == [
    "fm_lora ranks=None optim.learning_rate=0.001",
    "fm_lora ranks=(4,8) optim.learning_rate=0.005",
  ]


def test_equal_settings_with_other_weights_or_split_are_told_apart():
  other = {"tag": "augreg2", "sha256": "0f" * 32}
  (groups,) = group([result(), result(weights=other)]).values()
  assert list(groups) == ["fm_lora weights=augreg2:cdcdcdcd", "fm_lora weights=augreg2:0f0f0f0f"]
  (groups,) = group([result(), result(split_id="x")]).values()
  assert list(groups) == ["fm_lora split_id=domainnet/cil5", "fm_lora split_id=x"]


def test_other_benchmarks_and_numbers_of_tasks_get_their_own_table():
  runs = [result(), result(tasks=1, ranks=[8]), result(benchmark="cub200"), result(scenario="til")]
  assert list(group(runs)) == [
    "domainnet (cil), 5 tasks",
    "domainnet (cil), 1 task",
    "cub200 (cil), 5 tasks",
    "domainnet (til), 5 tasks",
  ]


def test_a_row_holds_mean_and_deviation_over_seeds():
  runs = [result(seed=s) for s in (1993, 1994, 1995)]
  accs = [run["acc"] for run in runs]
  text = text_of(runs)
  row = next(line for line in text.splitlines() if line.startswith("fm_lora"))
  assert re.split(r"\s{2,}", row.strip())[:3] == [
    "fm_lora",
    "3",
    f"{np.mean(accs):.2f} ± {np.std(accs, ddof=1):.2f}",
  ]
  costs = ["1.23M", "346k", "0", "B", "1/1"]
  assert row.split()[-12:] == [*costs, "8", "8", "4", "4", "4", "13:32", "min"]


@pytest.mark.parametrize(
  ("values", "text"),
  [([1.0, 2.0], "1.50 ± 0.71"), ([1.0], "1.00 ±    -"), ([None], "-"), ([1.0, None], "-")],
)
def test_mean_and_deviation_as_text(values, text):
  assert mean_std(values) == text


def test_one_task_has_no_forgetting_in_the_table():
  (cells,) = tables.rows({"fm_lora": [result(tasks=1, ranks=[8])]})
  assert cells[HEADER.index("forgetting")] == ("-", False)
  assert cells[HEADER.index("rank")] == ("8", False)


def test_only_the_best_accuracy_is_marked_and_only_among_rivals():
  good, bad = result("fm_lora", lost=5), result("l2p", lost=20)
  (groups,) = group([bad, good]).values()
  marks = [[best for _, best in cells] for cells in tables.rows(groups)]
  assert [sum(row) for row in marks] == [0, 2]
  assert sum(best for _, best in tables.rows({"l2p": [bad]})[0]) == 0


def test_ranks_are_modes_over_seeds_and_long_lists_are_summed_up():
  runs = [result(ranks=r) for r in ([8, 4, 4, 4, 4], [8, 4, 4, 4, 8], [4, 4, 4, 4, 8])]
  (cells,) = tables.rows({"fm_lora": runs})
  assert cells[HEADER.index("rank")][0] == "8 4 4 4 8"
  (cells,) = tables.rows({"fm_lora": [result(tasks=20, ranks=[4] * 10 + [8] * 10)]})
  assert cells[HEADER.index("rank")][0] == "4..8, mean 6.0"
  groups = {"fm_lora": runs, "l2p": [result("l2p", ranks=None)]}
  assert [cells[tables.header(groups).index("rank")][0] for cells in tables.rows(groups)] == [
    "8 4 4 4 8",
    "-",
  ]
  assert "rank" not in tables.header({"l2p": groups["l2p"]})
  assert modes_text([[8, None]]) == "8 -"
  assert modes_text([[8, None] * 6, None]) == "8..8, mean 8.0"


def test_unfair_comparisons_are_warned_about():
  other = result("l2p", weights={"tag": "orig", "sha256": "0f" * 32}, epochs=5, split_id="x")
  (groups,) = group([result(), other]).values()
  lines = notes.warnings(groups)
  assert [line.split(" differ")[0] for line in lines] == ["weights", "split", "epochs"]
  assert lines[0] == "weights differ: augreg2 cdcdcdcd (fm_lora); orig 0f0f0f0f (l2p)"
  assert notes.warnings({"fm_lora": [result(), result(seed=1994)]}) == []


def test_heads_that_differ_are_warned_about():
  plain = {"head.kind": "linear", "head.start": "class_mean"}
  ours, theirs = (
    result(name, config=plain | {"head.alignment": {"epochs": epochs}})
    for name, epochs in (("fm_lora", 30), ("lora", 0))
  )
  (line,) = notes.warnings({"fm_lora": [ours], "lora": [theirs], "old": [result(config=plain)]})
  assert line == (
    "heads differ: linear from class_mean and aligned (fm_lora); linear from class_mean (lora, old)"
  )
  assert notes.warnings({"lora": [theirs], "old": [result(config=plain)]}) == []
  aligned = {"method.name": "hide_prompt", "method.alignment": {"epochs": 9}}  # not the head's
  assert notes.warnings({"fm_lora": [ours], "hide": [result(config=plain | aligned)]}) == []
  seen = result(config=plain | {"head.loss": "seen", "head.drift": "sdc"})
  (line,) = notes.warnings({"seen": [seen], "old": [result(config=plain)]})
  assert "linear from class_mean with sdc drift and loss over classes seen (seen)" in line


def test_the_same_seed_twice_is_warned_about():
  (line,) = notes.warnings({"fm_lora": [result(), result()]})
  assert line == "fm_lora has several runs of seed 1993: ± is not over seeds alone"


def test_a_result_that_is_not_that_of_its_config_is_left_out(tmp_path):
  own, other = result(), result(seed=1994)
  save(tmp_path / "a", own)
  save(tmp_path / "b", other)
  hashes = {"weights_sha256": own["weights"]["sha256"], "manifest_sha256": own["manifest_sha256"]}
  for folder in "ab":
    text = json.dumps({"config": own["config"], **hashes})
    (tmp_path / folder / "config.json").write_text(text)
  results, (note,) = load([tmp_path])
  assert [run["seed"] for run in results] == [1993]
  assert "b/result.json is the result of another run (config.seed: 1994 there, 1993 now" in note


def test_a_run_that_was_made_twice_counts_once(tmp_path):
  for name, hashed in (("a", "12"), ("b", "12"), ("c", "34")):
    save(tmp_path / name, result(params_sha256=hashed))
  results, (note,) = load([tmp_path])
  assert [run["params_sha256"] for run in results] == ["12", "34"]
  assert note == f"left out: {tmp_path / 'b'} repeats {tmp_path / 'a'}, with the same parameters"


def test_what_all_rows_share_of_the_protocol_is_said_once():
  card = dict.fromkeys(("old_image_bytes", "old_statistics_bytes", "validation_images"), 0)
  card |= {"task_identity_at_test": False, "validation_read_by_method": False}
  card |= {"measured_on": "test", "copies": None}
  one, two = (result(protocol=card | {"old_statistics_bytes": n}) for n in (0, 8))
  of_all, of_one, of_two = notes.protocols({"one": [one, one], "two": [two]})
  assert of_all.startswith("protocol of all rows: task not given at test time; head linear ")
  assert of_one == "protocol one: stored of old tasks 0 B of images, 0 B of statistics"
  assert of_two == "protocol two: stored of old tasks 0 B of images, 8 B of statistics"
  other = result(protocol=card, config={"head": {"kind": "lda", "start": "class_mean"}})
  assert notes.protocols({"one": [one], "other": [other]})[2].endswith("head lda from class_mean")
  (alone,) = notes.protocols({"one": [one]})
  assert alone.startswith("protocol one: stored of old tasks 0 B of images, ")
  assert notes.protocols({"old": [result(protocol=None)]}) == []


def test_what_a_method_keeps_and_computes_besides_has_its_columns():
  passes = {"train": 1, "test": 2, "between": 3}
  (cells,) = tables.rows({"hide": [result(passes=passes, statistics_bytes=61_440)]})
  assert cells[HEADER.index("statistics")][0] == "61.4 kB"
  assert cells[HEADER.index("passes")][0] == "1/2 +3"


def test_caveats_stand_below_the_table_once():
  odd = [result("hide", seed=seed, caveats=["the batch votes"]) for seed in (1, 2)]
  text = text_of([result(), *odd])
  assert text.count("warning: hide: the batch votes\n") == 1
  assert "> warning: hide: the batch votes" in tables.markdown([result(), *odd])
  both = [*odd, result("l2p", caveats=["the batch votes"])]
  assert text_of(both).count("warning: hide, l2p: the batch votes\n") == 1


def test_the_tasks_of_each_seed_stand_below_the_table():
  of_seed = {1993: ["4, 2", "7, 6"], 1994: ["2, 1", "a\nb" + "c" * 90]}
  runs = [
    result(name, seed, tasks=2, ranks=None, task_names=of_seed[seed])
    for name in ("lora", "l2p")
    for seed in of_seed
  ]
  text = text_of(runs)
  assert text.count("\ntasks of seed 1993: 4, 2; 7, 6\n") == 1
  assert f"\ntasks of seed 1994: 2, 1; a b{'c' * 16}...{'c' * 18}\n" in text
  assert "> tasks of seed 1993: 4, 2; 7, 6" in tables.markdown(runs)
  assert notes.tasks({"lora": [result(tasks=12, ranks=None)]}) == [
    "tasks of seed 1993: " + "; ".join(f"task {i}" for i in range(9)) + "; ...; task 11"
  ]


def test_costs_are_three_lines():
  assert notes.costs(result(tasks=2)) == [
    "parameters 346k trained in the last task, 1.23M stored beside the backbone; added by each "
    "task: 12.3k 12.3k",
    "stored     no image, no statistics of the data (rehearsal-free); forward passes 1/1",
    "time       13:32 min: import 2.1 s, train 13:20 min, other 10.2 s",
  ]
  passes = {"train": 2, "test": 2, "between": 1}
  line = notes.costs(result(passes=passes, statistics_bytes=2_500_000))[1]
  assert line == "stored     no image, 2.5 MB of statistics of the data; forward passes 2/2 +1"


def test_plain_text_is_never_cut():
  runs = [result(), result(config={"method.prompt.num_tokens": 0}), result("l2p", ranks=None)]
  assert text_of(runs, width=40) == text_of(runs, width=200)
  assert "…" not in text_of(runs, width=40)


@pytest.mark.parametrize("width", [30, 60, 80, 100])
def test_a_narrow_terminal_gets_several_tables_and_loses_nothing(width):
  console = Console(file=io.StringIO(), width=width, force_terminal=True)
  tables.show(
    [result(seed=s) for s in (1, 2)] + [result(config={"method.prompt.num_tokens": 0})], console
  )
  text = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())
  assert "…" not in text
  for word in ("fm_lora prompt.num_tokens=10", "Acc", "wall time", "13:32 min"):
    assert word in text
  assert len(re.findall(r"^run ", text, re.MULTILINE)) >= 2


def test_markdown_is_a_table_with_the_best_in_bold():
  text = tables.markdown([result("fm_lora", lost=5), result("l2p", lost=20)], ["left out: x"])
  lines = text.splitlines()
  assert lines[0] == "### domainnet (cil), 5 tasks"
  assert lines[2].split(" | ")[1:3] == ["seeds", "Acc"]
  assert {line.count("|") for line in lines[2:6]} == {len(HEADER) + 3}  # with the differences
  assert lines[4].count("**") == 4
  assert lines[-1] == "> left out: x"


def test_a_folder_is_searched_and_what_is_left_out_is_said(tmp_path):
  save(tmp_path / "a" / "one", result())
  save(tmp_path / "b", result(seed=1994))
  save(tmp_path / "broken", result(finished=False))
  (tmp_path / "wip").mkdir()
  (tmp_path / "wip" / "metrics.jsonl").touch()
  results, left_out = load([tmp_path, tmp_path / "b" / "result.json", tmp_path / "b"])
  assert sorted(run["seed"] for run in results) == [1993, 1994]  # each run once
  assert [note.split(": ")[0] for note in left_out] == ["left out"] * 2
  assert "broken/result.json: not the result of a finished run" in left_out[0]
  assert "wip is not finished" in left_out[1]


def test_a_folder_that_can_not_be_read_is_said(tmp_path, monkeypatch):
  for name in ("open", "closed"):
    save(tmp_path / name, result(seed=len(name)))
  scan = os.scandir

  def guarded(path):
    if str(path).endswith("closed"):
      raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return scan(path)

  monkeypatch.setattr(os, "scandir", guarded)
  results, notes = load([tmp_path])
  assert [run["seed"] for run in results] == [4]
  assert notes == [f"left out: {tmp_path / 'closed'} can't be read (Permission denied)"]
  with pytest.raises(ValueError, match="closed can't be read"):
    load([tmp_path / "closed"])


def test_a_result_that_may_not_be_read_is_not_said_to_be_damaged(tmp_path, monkeypatch):
  save(tmp_path / "run", result())

  def refuse(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied")

  monkeypatch.setattr(pathlib.Path, "read_text", refuse)
  with pytest.raises(ValueError, match=r"result\.json: can't be read \(Permission denied\); allow"):
    load([tmp_path])


def test_paths_without_a_result_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"no result.json in this folder or below"):
    load([tmp_path])
  with pytest.raises(ValueError, match=r"nowhere: no such file or folder"):
    load([tmp_path / "nowhere"])
  for name in "ab":
    save(tmp_path / name, result(finished=False))
  with pytest.raises(ValueError, match=r"no readable result.json: left out: .*a/result.json"):
    load([tmp_path])


def test_an_unreadable_result_that_is_named_is_left_out_beside_others(tmp_path):
  save(tmp_path / "good", result())
  save(tmp_path / "bad", result() | {"acc": 100.0})
  (good,), (note,) = load([tmp_path / "bad", tmp_path / "good"])
  assert good["acc"] == result()["acc"]
  assert note.startswith(f"left out: {tmp_path / 'bad' / 'result.json'}: acc is 100.0: must be ")
  with pytest.raises(ValueError, match=r"^.*bad/result.json: acc is 100.0"):
    load([tmp_path / "bad"])


def test_the_command_prints_a_table_markdown_and_a_picture(tmp_path):
  save(tmp_path / "run", result())
  table = run_report(tmp_path)
  assert (table.returncode, table.stderr) == (0, "")
  assert "fm_lora" in table.stdout
  assert "\x1b" not in table.stdout
  done = run_report(tmp_path / "run", "--markdown", f"--plot={tmp_path / 'x.png'}")
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout.startswith("### domainnet (cil), 5 tasks\n\n| run | seeds | Acc |")
  assert imread(tmp_path / "x.png").size


def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
  save(tmp_path / "run", result())
  done = run_report(tmp_path / "nowhere")
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == f"error: {tmp_path / 'nowhere'}: no such file or folder\n"
  assert "no RUN given" in refusal()
  assert "must end in .png" in refusal(tmp_path, plot="x.pdf")
  assert "in a folder that exists, /no does not" in refusal(tmp_path, plot="/no/x.png")


def test_a_picture_of_nothing_is_refused():
  with pytest.raises(ValueError, match=r"panels\['digits'\]\['lora'\] is \[\]: must have a run"):
    plots.plot_accuracy_over_tasks({"digits": {"lora": []}}, "none.png")
  with pytest.raises(ValueError, match="panels is {}"):
    plots.plot_accuracy_over_tasks({}, "x.png")


def test_pictures_need_no_pyplot():
  code = "import sys, fmlora_jax.report.__main__; assert 'matplotlib.pyplot' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("tasks", [1, 5, 30])
def test_a_run_with_everything_gets_all_pictures(tmp_path, tasks):
  cosines = np.cos(np.subtract.outer(np.arange(tasks), np.arange(tasks)))
  everything = result(
    tasks=tasks, ranks=[8] * tasks, complexity=[None, *[0.5] * (tasks - 1)], interference=cosines
  )
  result_file.write_result(tmp_path, everything)
  paths = plots.write_plots(result_file.read_result(tmp_path), tmp_path)
  names = ["accuracy_matrix", "accuracy_over_tasks", "ranks", "interference"]
  assert paths == [tmp_path / "plots" / f"{name}.png" for name in names]
  for path in paths:
    assert imread(path)[..., :3].std() > 0.01  # not a blank page


@pytest.mark.parametrize("tasks", [5, 20])
def test_pictures_show_the_names_of_tasks(monkeypatch, tasks):
  drawn = []
  monkeypatch.setattr(plots, "_write", lambda figure, path: drawn.append(figure.axes[0]))
  names = [f"n{i:04} ... n0212 (100 classes)" for i in range(tasks)]
  run = result(tasks=tasks, ranks=None, task_names=names)
  plots.plot_accuracy_matrix(run, "a.png")
  plots.plot_accuracy_over_tasks({"one": {"": [run]}}, "b.png")
  plots.plot_accuracy_over_tasks({"two": {"": [run, {**run, "task_names": names[::-1]}]}}, "c.png")
  matrix, one, two = drawn
  labels = [f"{i + 1}: n{i:04} ... n0212 (100 classes)" for i in range(tasks)]
  assert [label.get_text() for label in matrix.get_yticklabels()] == labels
  below = [label.get_text() for label in matrix.get_xticklabels()]
  assert below == (labels if tasks == 5 else [str(i + 1) for i in range(tasks)])
  assert (labels == [label.get_text() for label in one.get_xticklabels()]) == (tasks == 5)
  assert not any("n0" in label.get_text() for label in two.get_xticklabels())


def test_a_picture_replaces_a_link_and_never_what_it_leads_to(tmp_path):
  (tmp_path / "plots").mkdir()
  (tmp_path / "mine.png").write_text("mine")
  (tmp_path / "plots" / "accuracy_matrix.png").symlink_to(tmp_path / "mine.png")
  path, _ = plots.write_plots(result("l2p", ranks=None), tmp_path)
  assert (tmp_path / "mine.png").read_text() == "mine"
  assert not path.is_symlink() and imread(path).size
  assert len(list(path.parent.iterdir())) == 2  # and no draft


def test_a_run_without_ranks_gets_the_pictures_that_it_can(tmp_path):
  paths = plots.write_plots(result("l2p", ranks=None), tmp_path)
  assert [path.stem for path in paths] == ["accuracy_matrix", "accuracy_over_tasks"]


def test_the_drawn_curve_is_the_pooled_accuracy():
  runs = [result(seed=1993), result(seed=1994)]
  curves = plots.accuracy_over_tasks(json.loads(json.dumps(runs)))
  assert curves.shape == (2, 5)
  np.testing.assert_allclose(curves[:, -1], [run["acc"] for run in runs])
  np.testing.assert_allclose(curves.mean(axis=1), [run["aaa"] for run in runs])


@pytest.mark.parametrize("name", [r"\$5 or $\broken{$", "a\0\n\ud800"])
def test_any_name_can_stand_in_a_picture(name):
  names = [name] * 5
  costly = result(task_names=names, benchmark=names[0], complexity=[None, 0.1, 0.2, 0.3, 0.4])
  reports = {fact.field: fact for fact in methods.reports("fm_lora")}
  facts = {field: reports[field] for field in ("ranks", "complexity")}
  by_task = functools.partial(plots.plot_by_task, facts=facts)
  for draw in (plots.plot_accuracy_matrix, by_task):
    draw(costly, path=(picture := io.BytesIO()))
    assert imread(io.BytesIO(picture.getvalue())).size
  groups = {names[0]: [costly], "other": [costly]}
  plots.plot_accuracy_over_tasks({names[0]: groups}, picture := io.BytesIO())
  assert imread(io.BytesIO(picture.getvalue())).size


def test_pictures_do_not_depend_on_the_backend_of_a_notebook(monkeypatch, tmp_path):
  monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
  save(tmp_path / "run", result())
  done = run_report(tmp_path / "run", f"--plot={tmp_path / 'a.png'}")
  assert (done.returncode, done.stderr) == (0, "")
  assert (tmp_path / "a.png").stat().st_size > 1000
