"""The paper's tables with our runs beside them, as data, Markdown and one HTML page."""

import base64
import dataclasses
import html.parser
import io
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from made_up import comparable, refusal, result, run_report, save
from matplotlib.image import imread

from fmlora_jax import methods
from fmlora_jax import tasks as benchmarks
from fmlora_jax.config.diff import leaves
from fmlora_jax.report import paper, paper_html, paper_markdown, runs

NAMES = {  # config.method.name -> the paper's row
  "finetune": "Fine-Tuning",
  "l2p": "L2P",
  "dualprompt": "DualPrompt",
  "coda_prompt": "CODA-Prompt",
  "hide_prompt": "HiDe-Prompt",
  "c_lora": "C-LoRA",
  "inflora": "InfLoRA",
  "sd_lora": "SD-LoRA",
  "fm_lora": "FM-LoRA",
}
VOID = {"meta", "img"}  # elements of HTML without an end


def lines_of(results, title="Table 1: ImageNet-R, N = 10"):
  (section,) = [s for s in paper.compare(results).sections if s.title == title]
  return section.lines


def line_of(results, method="FM-LoRA", **where):
  (line,) = [line for line in lines_of(results, **where) if line.method == method]
  return line


def cell(line, title):
  return paper.cells(line)[paper.HEADER.index(title)]


def numbers(table, method, column):
  found = next(t for t in paper.tables()["tables"] if t["name"] == table)
  return found["cells"][method][found["columns"].index(column)]


def flagged(key):
  """Returns the (row, column) of all cells that carry a flag of the paper."""
  return {
    (line.method, section.title.partition(": ")[2])
    for section in paper.compare([result()]).sections
    for line in section.lines
    if key in line.flags
  }


class Page(html.parser.HTMLParser):
  """Reads a page; fails on an end that fits no start."""

  def __init__(self, text):
    super().__init__()
    self.open, self.elements, self.texts = [], [], []
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append((self.open[-1] if self.open else "", data))

  def all(self, tag):
    return [attrs for name, attrs in self.elements if name == tag]


def page_of(results, notes=()):
  return Page(paper_html.page(paper.compare(results), notes))


def test_the_tables_have_all_rows_and_cells_of_the_paper():
  tables = {table["name"]: table for table in paper.tables()["tables"]}
  shapes = {name: (len(t["cells"]), len(t["columns"])) for name, t in tables.items()}
  assert shapes == {"Table 1": (10, 3), "Table 2": (10, 3), "Table 3": (6, 1)}
  cells = [cell for table in tables.values() for row in table["cells"].values() for cell in row]
  assert sum(cell is not None for cell in cells) == 65
  assert all(len(cell) == 4 for cell in cells if cell)
  for table in tables.values():
    assert {len(row) for row in table["cells"].values()} == {len(table["columns"])}


@pytest.mark.parametrize(
  ("table", "method", "column", "expected"),
  [
    ("Table 1", "Fine-Tuning", "imagenet_r_n5", [64.92, 0.87, 75.57, 0.50]),
    ("Table 1", "C-LoRA", "imagenet_r_n10", [71.89, 0.51, 76.16, 0.61]),
    ("Table 1", "FM-LoRA", "imagenet_r_n20", [76.47, 0.65, 80.97, 0.35]),
    ("Table 2", "L2P", "cub200_n10", [65.18, 2.49, 76.12, 1.27]),
    ("Table 2", "SD-LoRA", "domainnet_n5", [72.82, 0.37, 78.89, 0.72]),
    ("Table 2", "FM-LoRA without DMP", "cifar100_n10", [87.37, 0.41, 92.03, 0.29]),
    ("Table 3", "F-LoRA, 4th fixed rank", "imagenet_r_n10", [73.13, 0.82, 79.98, 0.77]),
  ],
)
def test_cells_hold_the_numbers_of_the_paper(table, method, column, expected):
  assert numbers(table, method, column) == expected


def test_no_number_of_the_paper_was_lost_on_the_way():
  sums = []  # of Acc, its std, AAA, its std, added up from the paper itself
  for table in paper.tables()["tables"]:
    cells = [cell for row in table["cells"].values() for cell in row if cell]
    sums.append(np.round(np.sum(cells, axis=0), 2).tolist())
  assert sums == [
    [2164.69, 14.34, 2325.80, 13.10],
    [2235.20, 16.23, 2449.43, 16.53],
    [374.33, 2.95, 400.73, 2.39],
  ]


def test_what_the_flags_say_of_the_paper_follows_from_its_numbers():
  copied = numbers("Table 2", "HiDe-Prompt", "cub200_n10")
  assert copied == numbers("Table 1", "HiDe-Prompt", "imagenet_r_n5")
  assert flagged("copied") == {("HiDe-Prompt", "CUB-200, N = 10")}
  doubtful, source = numbers("Table 2", "SD-LoRA", "domainnet_n5"), "imagenet_r_n20"
  assert doubtful[1::2] == numbers("Table 1", "SD-LoRA", source)[1::2]
  assert flagged("std") == {("SD-LoRA", "DomainNet, N = 5")}
  drs = numbers("Table 3", "F-LoRA + DRS", "imagenet_r_n10")
  assert drs == numbers("Table 1", "FM-LoRA", "imagenet_r_n10")
  assert flagged("dmp") == {("F-LoRA + DRS", "ImageNet-R, N = 10")}
  assert len(flagged("cil")) == 10
  assert len(flagged("quoted")) == 8 * 6


def test_where_fm_lora_is_below_or_close_to_sd_lora_is_flagged():
  for table in paper.tables()["tables"][:2]:
    for column in table["columns"]:
      ours = numbers(table["name"], "FM-LoRA", column)
      theirs = numbers(table["name"], "SD-LoRA", column)
      gains = [ours[i] - theirs[i] for i in (0, 2)]
      stds = [max(ours[i], theirs[i]) for i in (1, 3)]
      where = ("FM-LoRA", paper.tables()["columns"][column]["name"])
      assert (where in flagged("below")) == (max(gains) < 0)
      close = min(gains) > 0 and all(g < 2 * s for g, s in zip(gains, stds, strict=True))
      assert (where in flagged("close")) == close


def test_a_cell_holds_our_mean_deviation_and_difference_over_seeds():
  runs = [comparable(seed=s) for s in (1993, 1994, 1996)]
  accs, aaas = ([run[score] for run in runs] for score in ("acc", "aaa"))
  expected = [
    "FM-LoRA",
    "77.88 ± 0.21",
    f"{np.mean(accs):.2f} ± {np.std(accs, ddof=1):.2f}",
    f"{np.mean(accs) - 77.88:+.2f}",
    "82.59 ± 0.31",
    f"{np.mean(aaas):.2f} ± {np.std(aaas, ddof=1):.2f}",
    f"{np.mean(aaas) - 82.59:+.2f}",
    "close",
    "3",
    "augreg2_in21k_ft_in1k 5f3c5f3c",
    "imagenet_r/slice",
  ]
  assert paper.cells(line_of(runs)) == expected


def test_one_seed_has_no_deviation():
  run = comparable()
  assert cell(line_of([run]), "Acc ours") == f"{run['acc']:.2f} ± -"
  assert cell(line_of([run]), "seeds") == "1"


def test_a_lost_accuracy_has_no_difference():
  line = line_of([comparable(acc=None)])
  assert (cell(line, "Acc ours"), cell(line, "Acc diff")) == ("-", "-")
  assert cell(line, "AAA diff") != "-"


def test_what_was_not_run_says_so():
  line = line_of([comparable()], "SD-LoRA")
  assert paper.cells(line)[1:7] == [
    *("77.34 ± 0.35", "not run", "-", "82.04 ± 0.24", "not run", "-"),
  ]
  assert paper.cells(line)[7:] == ["quoted", "-", "-", "-"]


@pytest.mark.parametrize(("name", "row"), NAMES.items())
def test_each_method_has_its_row(name, row):
  lines = lines_of([comparable(name)])
  assert [line.method for line in lines if line.runs] == [row]


def test_the_number_of_tasks_and_the_benchmark_choose_the_table():
  for tasks in (5, 10, 20):
    assert line_of([comparable(tasks=tasks)], title=f"Table 1: ImageNet-R, N = {tasks}").runs
  for benchmark, title in (("cifar100", "CIFAR100"), ("cub200", "CUB-200")):
    run = comparable(benchmark=benchmark)
    assert line_of([run], title=f"Table 2: {title}, N = 10").runs == [run]
  run = comparable(benchmark="domainnet", tasks=5)
  assert line_of([run], title="Table 2: DomainNet, N = 5").runs == [run]


def test_fm_lora_without_prompt_has_its_own_row():
  lines = lines_of(
    [comparable(config={"method.prompt.num_tokens": 0, "method.drs.strategy": "gumbel"})]
  )
  assert [line.method for line in lines if line.runs] == ["FM-LoRA without DMP"]


def test_dynamic_ranks_stand_in_table_3_as_well_and_fixed_ranks_only_there():
  drs = comparable(config={"method.drs.strategy": "gumbel", "method.drs.rank": 16})
  fixed = [
    comparable(
      config={
        "method.drs.strategy": "fixed",
        "method.drs.rank": rank,
        "method.prompt.num_tokens": num,
      }
    )
    for rank, num in ((4, 10), (16, 10), (16, 0))
  ]
  lines = lines_of([drs, *fixed], title="Table 3: ImageNet-R, N = 10")
  assert [line.name for line in lines if line.runs] == [
    "F-LoRA + DRS",
    "F-LoRA, fixed rank (ours) drs.rank=4 prompt.num_tokens=10",
    "F-LoRA, fixed rank (ours) drs.rank=16 prompt.num_tokens=10",
    "F-LoRA, fixed rank (ours) drs.rank=16 prompt.num_tokens=0",
  ]
  assert [line.runs for line in lines_of([drs, *fixed]) if line.runs] == [[drs]]
  assert paper.compare([drs, *fixed]).others == []


def test_given_ranks_stand_with_the_dynamic_ones_and_are_named():
  given = comparable(config={"method.drs.strategy": "fixed", "method.drs.ranks": [32, 4, 8]})
  lines = [line for line in lines_of([given]) if line.runs]
  assert [line.name for line in lines] == ["FM-LoRA drs.ranks=(32,4,8)"]
  assert [label for groups in runs.group([given]).values() for label in groups] == [
    "fm_lora drs.ranks=(32,4,8)"
  ]


def test_the_splits_of_the_cells_are_those_of_the_benchmarks():
  for column in paper.tables()["columns"].values():
    names = benchmarks.val_splits(column["benchmark"])
    for kind, ids in column["splits"].items():
      for name in (split_id.removeprefix(f"{column['benchmark']}/") for split_id in ids):
        assert name in benchmarks.find(column["benchmark"]).SPLITS
        assert (name in names) == (kind == "with_val")


def test_no_run_is_compared_with_a_rank_that_is_not_known():
  fixed = comparable(config={"method.drs.strategy": "fixed", "method.drs.rank": 4})
  lines = lines_of([fixed], title="Table 3: ImageNet-R, N = 10")
  for line in lines[:4]:
    assert (cell(line, "Acc ours"), cell(line, "Acc diff"), line.flags) == ("-", "-", ("rank",))
  assert cell(lines[5], "Acc ours") == f"{fixed['acc']:.2f} ± -"
  assert lines[5].settings == "drs.rank=4 prompt.num_tokens=10"
  assert paper.compare([fixed]).summary.startswith("Of the paper's 65 cells 0 have")
  assert (cell(lines[5], "Acc paper"), cell(lines[5], "Acc diff")) == ("-", "-")


def test_other_settings_splits_and_weights_are_never_averaged():
  other = {"tag": "dinov2_base", "sha256": "ab" * 32}
  runs = [
    comparable(seed=1993),
    comparable(seed=1994),
    comparable(split_id="imagenet_r/slice80"),
    comparable(weights=other),
    comparable(config={"optim.learning_rate": 5e-3}),
  ]
  ours = [line for line in lines_of(runs) if line.method == "FM-LoRA"]
  assert [len(line.runs) for line in ours] == [2, 1, 1, 1]
  assert len({line.name for line in ours}) == 4
  assert [cell(line, "split") for line in ours][1] == "imagenet_r/slice80"
  assert [cell(line, "weights") for line in ours][2] == "dinov2_base abababab"
  assert "optim.learning_rate=0.005" in ours[3].settings


@pytest.mark.parametrize(
  ("changes", "flags"),
  [
    ({}, []),
    ({"split_id": "imagenet_r/slice80"}, ["split"]),
    ({"config": {"method.drs.ranks": []}}, []),
    ({"config": {"method.drs.ranks": [32, 4]}}, ["given"]),
    ({"weights": {"tag": "dinov2_base", "sha256": "ab"}}, ["weights"]),
    ({"config": {"weights.depth": 6}}, ["weights"]),
    ({"config": {"weights.depth": None, "input.image_size": 224}}, []),
    ({"config": {"input.image_size": 112}}, ["weights"]),
    ({"normalisation": "half"}, ["pixels"]),
    ({"augmentation": "mild"}, ["pixels"]),
    ({"epochs": 5}, ["schedule"]),
    ({"batch_size": 64, "epochs": 1}, ["schedule"]),
    ({"config": {"tasks.order": "natural"}}, ["order"]),
    ({"config": {"head.kind": "cosine"}}, ["head"]),
    ({"config": {"head.start": "class_mean"}}, ["head"]),
    ({"config": {"head.alignment": {"epochs": 30}}}, ["head"]),
    ({"config": {"head.alignment": {"epochs": 0}}}, []),
    ({"config": {"head.loss": "seen"}}, ["head"]),
    ({"config": {"optim.later_lr_scale": 0.3}}, ["schedule"]),
    ({"config": {"optim.later_lr_scale": 1.0, "head.loss": "task"}}, []),
    ({"normalisation": "half", "split_id": "x"}, ["pixels", "split"]),
  ],
)
def test_what_differs_from_the_protocol_of_the_table_is_flagged(changes, flags):
  comparison = paper.compare([comparable(**changes)])
  line = line_of([comparable(**changes)])
  assert list(line.flags) == ["close", *flags]
  assert set(flags) <= comparison.flags.keys()
  assert "weights" in comparison.flags or "weights" not in flags


def test_the_same_seed_twice_is_flagged():
  assert "twice" in line_of([comparable(), comparable()]).flags
  assert "twice" not in line_of([comparable(), comparable(seed=1994)]).flags


def test_only_flags_in_use_are_explained():
  explained = paper.compare([comparable()]).flags
  used = {
    flag
    for section in paper.compare([comparable()]).sections
    for line in section.lines
    for flag in line.flags
  }
  assert explained.keys() == used
  assert "split" not in used


@pytest.mark.parametrize(
  ("run", "name"),
  [
    (comparable(benchmark="digits", tasks=5), "digits (cil), 5 tasks: fm_lora, seed 1993"),
    (comparable(tasks=7), "imagenet_r (cil), 7 tasks: fm_lora, seed 1993"),
    (comparable(scenario="dil"), "imagenet_r (dil), 10 tasks: fm_lora, seed 1993"),
    (comparable(scenario="til"), "imagenet_r (til), 10 tasks: fm_lora, seed 1993"),
    (comparable("lora"), "imagenet_r (cil), 10 tasks: lora, seed 1993"),
    (
      comparable(config={"tasks.evaluate_on": "val"}),
      "imagenet_r (cil), 10 tasks, validation images: fm_lora, seed 1993",
    ),
    (
      comparable(tasks=5, config={"method.drs.strategy": "fixed"}),
      "imagenet_r (cil), 5 tasks: fm_lora, seed 1993",
    ),
  ],
)
def test_runs_that_fit_no_cell_are_named(run, name):
  comparison = paper.compare([run, comparable("l2p", seed=7)])
  assert comparison.others == [name]
  placed = [line.runs for section in comparison.sections for line in section.lines if line.runs]
  assert [len(runs) for runs in placed] == [1]
  assert f"- {name}" in paper_markdown.markdown(comparison).splitlines()


def test_all_seeds_of_a_run_that_fits_no_cell_are_named():
  comparison = paper.compare([comparable("lora", seed=s) for s in (3, 4)])
  assert comparison.others == ["imagenet_r (cil), 10 tasks: lora, seeds 3, 4"]


def test_the_summary_counts_the_cells_that_were_run():
  assert paper.compare([comparable("l2p")]).summary.startswith("Of the paper's 65 cells 1 have")
  several = [comparable(), comparable(split_id="x"), comparable("lora")]  # Tables 1 and 3
  assert paper.compare(several).summary.startswith("Of the paper's 65 cells 2 have")


def test_markdown_has_a_table_for_each_column_of_the_paper():
  text = paper_markdown.markdown(paper.compare([comparable()]), ["left out: x"])
  assert len(re.findall(r"^### Table", text, re.MULTILINE)) == 7
  rows = [line for line in text.splitlines() if line.startswith("|")]
  assert {row.count("|") for row in rows} == {len(paper.HEADER) + 1}
  assert len([row for row in rows if row.startswith("|---")]) == 7
  assert len(rows) == 7 * 2 + 6 * 10 + 6
  assert "- `copied`: " in text
  assert text.endswith("> left out: x")


def test_names_can_not_break_markdown():
  text = paper_markdown.markdown(
    paper.compare([result(benchmark="<b>|x\n| `[y](z)` \x1b \ud800")]), ["a\nb"]
  )
  assert r"- &lt;b&gt;\|x \| \`\[y\](z)\` (cil), 5 tasks: fm_lora, seed 1993" in text.splitlines()
  assert text.endswith("> a b")
  text.encode()


def test_the_page_is_whole_and_loads_nothing():
  page = page_of([comparable(), comparable("finetune"), comparable(split_id="x")], ["left out: y"])
  tags = {tag for tag, _ in page.elements}
  assert not tags & {"script", "link", "iframe", "object", "embed"}
  for tag, attrs in page.elements:
    assert not any(name.startswith("on") for name in attrs)
    for name in {"src", "srcset", "href", "action", "data"} & attrs.keys():
      assert attrs[name].startswith(("data:image/png;base64,", "#")) or (
        (tag, attrs[name]) == ("a", paper_html.ARXIV)
      )
  (style,) = [text for tag, text in page.texts if tag == "style"]
  assert "url(" not in style
  assert "@import" not in style
  assert [meta["content"] for meta in page.all("meta") if "http-equiv" in meta] == [
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
  ]
  assert "left out: y" in [text for _, text in page.texts]


def test_the_page_shows_what_markdown_shows():
  runs = [comparable(), comparable(seed=1994), comparable("l2p", split_id="x")]
  comparison = paper.compare(runs)
  text = " ".join(" ".join(t for _, t in page_of(runs).texts).split())
  lines = [line for section in comparison.sections for line in section.lines]
  for line in lines:
    assert " ".join(paper.cells(line)) in text
  for meaning in (comparison.summary, *comparison.flags.values(), *comparison.notes):
    assert meaning in text


def test_the_page_can_be_read_without_eyes():
  page = page_of([comparable(), comparable("finetune")])
  headers = [th["scope"] for th in page.all("th")]
  assert headers.count("col") == 7 * len(paper.HEADER)
  assert headers.count("row") == 6 * 10 + 6
  assert len(page.all("caption")) == len(page.all("table")) == 7
  assert page.all("html") == [{"lang": "en"}]
  ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
  assert len(set(ids)) == len(ids)
  links = {a["href"][1:] for a in page.all("a") if a["href"].startswith("#")}
  regions = {div["aria-labelledby"] for div in page.all("div") if div.get("role") == "region"}
  assert len(regions) == 7
  assert links | regions <= set(ids)


def test_every_picture_is_a_png_with_words():
  runs = [comparable(), comparable(seed=1992), comparable("finetune", lost=20)]
  images = page_of(runs).all("img")
  assert len(images) == (1 + 2) + (1 + 1)  # curves and matrices of Table 1, then of Table 3
  for image in images:
    data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
    assert imread(io.BytesIO(data))[..., :3].std() > 0.01  # not a blank page
  assert f"Fine-Tuning: {runs[2]['acc']:.1f} %" in images[0]["alt"]
  assert f"{np.mean([runs[0]['acc'], runs[1]['acc']]):.1f} %" in images[0]["alt"]
  assert "FM-LoRA, seed 1992" in images[2]["alt"]
  assert f"{runs[1]['acc']:.1f} % over all at the end" in images[2]["alt"]


def test_a_page_without_any_run_of_the_paper_has_no_picture():
  assert page_of([result("lora")]).all("img") == []


def test_names_can_not_break_the_page():
  evil = '<script>alert("1")</script>&amp;\x00\ud800'
  runs = [
    comparable(benchmark=evil),
    comparable(split_id=evil, weights={"tag": evil, "sha256": evil}),
    comparable(config={f"optim.{evil}": evil}),
  ]
  page = page_of(runs, [evil])
  shown = '<script>alert("1")</script>&amp;'
  assert page.all("script") == []
  assert sum(shown in text for tag, text in page.texts if tag == "td") == 4  # in Tables 1 and 3
  assert sum(shown in text for tag, text in page.texts if tag == "li") == 2
  assert any(shown in image["alt"] for image in page.all("img"))
  paper_html.page(paper.compare(runs), [evil]).encode()


def test_the_command_prints_markdown_and_writes_the_page(tmp_path):
  save(tmp_path / "runs" / "a", comparable())
  save(tmp_path / "runs" / "b", result())
  (tmp_path / "runs" / "wip").mkdir()
  (tmp_path / "runs" / "wip" / "metrics.jsonl").touch()
  target = tmp_path / "paper.html"
  target.write_text(paper_html.page(paper.compare([])), encoding="utf-8")  # ours: it is replaced
  done = run_report("--paper", tmp_path / "runs", f"--html={target}")
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout.startswith("## FM-LoRA: the paper's tables and ours\n\nOf the paper's 65")
  assert "domainnet (cil), 5 tasks" not in done.stdout  # it is in Table 2
  for text in (done.stdout, target.read_text(encoding="utf-8")):
    assert "wip is not finished; the same command resumes it" in text
    assert "imagenet_r/slice" in text
  Page(target.read_text(encoding="utf-8"))
  assert sorted(path.name for path in tmp_path.iterdir()) == ["paper.html", "runs"]


def test_a_page_replaces_no_file_of_others(tmp_path):
  save(tmp_path / "run", comparable())
  (tmp_path / "mine.html").write_text("<p>my own page</p>", encoding="utf-8")
  (tmp_path / "folder.html").mkdir()
  for name, message in (
    ("x.pdf", "must end in .html"),
    ("mine.html", "must not be a file of another program"),
    ("folder.html", "must be a file or new"),
    ("no/x.html", "in a folder that exists"),
  ):
    assert message in refusal(tmp_path / "run", paper=True, html=str(tmp_path / name))
  assert "needs --paper" in refusal(tmp_path / "run", html=str(tmp_path / "x.html"))
  assert (tmp_path / "mine.html").read_text(encoding="utf-8") == "<p>my own page</p>"
  assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.html", "mine.html", "run"]


def test_every_setting_in_a_rule_is_one_of_the_config():
  config = dataclasses.asdict(methods.build_config({"method": {"name": "fm_lora"}}))
  names = {f"config.{name}" for name, _ in leaves(config)}
  rules = [*paper.tables()["rows"].values(), *paper.tables()["protocol"].values()]
  paths = {path for rule in rules for kind in ("is", "is_not") for path in rule.get(kind, ())}
  assert {path for path in paths if path.startswith("config.")} <= names
  assert {f"config.{name}" for rule in rules for name in rule.get("shown", ())} <= names


def test_the_tables_are_part_of_the_package():
  root = Path(paper.__file__).parents[1]
  project = tomllib.loads((root.parent / "pyproject.toml").read_text(encoding="utf-8"))
  patterns = project["tool"]["setuptools"]["package-data"]["fmlora_jax"]
  assert root / "report" / "paper_tables.json" in {
    path for pattern in patterns for path in root.glob(pattern)
  }
