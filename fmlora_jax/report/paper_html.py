"""The comparison with the paper as one HTML page without scripts or external files.

Pictures are embedded. Texts may come from other people's runs: they become the text of an element
or the value of an attribute, never markup.
"""

import base64
import functools
import io
import os
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from fmlora_jax.cli.text import printable
from fmlora_jax.report import paper, plots
from fmlora_jax.report.paper import Comparison, Line, Section
from fmlora_jax.workdir.files import write_atomically

ARXIV = "https://arxiv.org/abs/2504.08823"
GENERATOR = "fmlora_jax.report --paper"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # loads nothing, ever
STYLE = """
:root { color-scheme: light dark; --text: #1b1b1f; --dim: #5d5d68; --back: #fff; --line: #d9d9e0;
  --band: #eef4fb; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8ec; --dim: #a3a3b0; --back: #16161a;
  --line: #3a3a44; --band: #1d2938; --link: #7db7f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 78rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p, li, dd { max-width: 45rem; overflow-wrap: anywhere; }
a { color: var(--link); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
caption { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; }
thead th { border-bottom: 1px solid var(--line); vertical-align: bottom; }
thead th, td { font-weight: 400; } thead th { color: var(--dim); }
th:first-child { position: sticky; left: 0; min-width: 9rem; text-align: left; white-space: normal;
  background: var(--back); font-weight: 600; }
th small { display: block; color: var(--dim); font-weight: 400; }
td.text, th.text { text-align: left; white-space: normal; }
tr.none td, tr.none th { color: var(--dim); font-weight: 400; }
tr.run > * { background: var(--band); }
@media (max-width: 40rem) { table { font-size: .8rem; } th, td { padding: .3rem; }
  th:first-child { min-width: 6.5rem; } }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
figure { margin: 0; flex: 1 1 26rem; max-width: 37rem; }
img { width: 100%; height: auto; background: #fff; border-radius: 6px; padding: .4rem; }
figcaption { color: var(--dim); font-size: .875rem; overflow-wrap: anywhere; }
dt { font-weight: 600; } dd { margin: 0 0 .6rem; } :target { background: var(--band); }
"""


def write(comparison: Comparison, notes: Iterable[str], path: str | os.PathLike) -> None:
  """Writes the page atomically; replaces an older page of this program, and no other file.

  Raises:
    ValueError: if `path` does not end in .html, or is another file.
  """
  path = Path(path)
  if path.suffix != ".html":
    raise ValueError(f"--html is {str(path)!r}: must end in .html")
  if path.exists() and not _is_ours(path):
    raise ValueError(
      f"--html is {str(path)!r}: must not be a file of another program; name another"
    )
  write_atomically(path, page(comparison, notes))


def page(comparison: Comparison, notes: Iterable[str] = ()) -> str:
  """Returns the tables, pictures, flags and `notes` as one HTML document."""
  html = ET.Element("html", lang="en")
  _add_head(html)
  main = _add(_add(html, "body"), "main")
  _add(main, "h1", "FM-LoRA: the paper's tables and ours")
  _add(main, "p", comparison.summary)
  _add(_add(main, "p"), "a", "The paper: arXiv:2504.08823", href=ARXIV)
  for i, section in enumerate(comparison.sections):
    _add_section(main, section, f"section-{i + 1}")
  _add(main, "h2", "Flags")
  meanings = _add(main, "dl")
  for flag, text in comparison.flags.items():
    _add(meanings, "dt", flag, id=f"flag-{flag}")
    _add(meanings, "dd", text)
  _add_list(main, "Notes", comparison.notes)
  _add_list(main, "Not in the paper", comparison.others)
  _add_list(main, "Left out", notes)
  ET.indent(html)
  return f"<!DOCTYPE html>\n{ET.tostring(html, encoding='unicode', method='html')}\n"


def _is_ours(path: Path) -> bool:
  return path.is_file() and GENERATOR.encode() in path.read_bytes()[:1000]


def _add_head(html: ET.Element) -> None:
  head = _add(html, "head")
  _add(head, "meta", charset="utf-8")
  _add(head, "meta", name="generator", content=GENERATOR)
  _add(head, "meta", http_equiv="Content-Security-Policy", content=POLICY)
  _add(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
  _add(head, "title", "FM-LoRA: the paper's tables and ours")
  _add(head, "style").text = STYLE


def _add_section(main: ET.Element, section: Section, name: str) -> None:
  _add(main, "h2", section.title, id=name)
  frame = _add(main, "div", class_="scroll", role="region", tabindex="0", aria_labelledby=name)
  table = _add(frame, "table")
  _add(table, "caption", section.title)
  header = _add(_add(table, "thead"), "tr")
  for title in paper.HEADER:
    _add(header, "th", title, scope="col", class_=_kind(title))
  body = _add(table, "tbody")
  for line in section.lines:
    _add_line(body, line)
  if any(line.runs for line in section.lines):
    _add_pictures(_add(main, "div", class_="pictures"), section)


def _add_line(body: ET.Element, line: Line) -> None:
  row = _add(body, "tr", class_="run" if line.runs else "none")
  _add(_add(row, "th", line.method, scope="row"), "small", line.settings)
  for title, text in list(zip(paper.HEADER, paper.cells(line), strict=True))[1:]:
    cell = _add(row, "td", class_=_kind(title))
    if title == "flags" and line.flags:
      for flag in line.flags:
        _add(cell, "a", flag, href=f"#flag-{flag}").tail = " "
    else:
      cell.text = printable(text)


def _add_pictures(frame: ET.Element, section: Section) -> None:
  """Adds the curves of all our lines in one picture, and the matrix of each line's first seed."""
  ours = [line for line in section.lines if line.runs]
  curves = {section.title: {line.name: line.runs for line in ours}}
  ends = "; ".join(
    f"{line.name}: {plots.accuracy_over_tasks(line.runs).mean(axis=0)[-1]:.1f} %" for line in ours
  )
  _add_picture(
    frame,
    functools.partial(plots.plot_accuracy_over_tasks, curves),
    alt=f"Accuracy on all tasks so far, after each task. At the end {ends}.",
    caption="Accuracy on all tasks so far; band: ± one standard deviation over seeds.",
  )
  for line in ours:
    run = min(line.runs, key=lambda run: run["seed"])
    learned = [100 * row[i] for i, row in enumerate(run["accuracy"])]
    _add_picture(
      frame,
      functools.partial(plots.plot_accuracy_matrix, run),
      alt=f"Accuracy on each task (column) after each task (row) of {line.name}, seed "
      f"{run['seed']}: {min(learned):.1f} to {max(learned):.1f} % right after learning a task, "
      f"{run['acc']:.1f} % over all at the end.",
      caption=f"{line.name}, seed {run['seed']}",
    )


def _add_picture(
  frame: ET.Element, draw: Callable[[IO[bytes]], None], *, alt: str, caption: str
) -> None:
  figure = _add(frame, "figure")
  draw(file := io.BytesIO())
  data = base64.b64encode(file.getvalue()).decode()
  _add(figure, "img", src=f"data:image/png;base64,{data}", alt=printable(alt))
  _add(figure, "figcaption", caption)


def _add_list(main: ET.Element, title: str, lines: Iterable[str]) -> None:
  items = [*lines]
  if items:
    _add(main, "h2", title)
    bullets = _add(main, "ul")
    for item in items:
      _add(bullets, "li", item)


def _kind(title: str) -> str:
  return "text" if title in ("weights", "split", "flags") else "number"


def _add(parent: ET.Element, tag: str, text: str = "", /, **attributes: str) -> ET.Element:
  """Appends an element; `class_` becomes class, `aria_x` aria-x."""
  names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
  element = ET.SubElement(parent, tag, names)
  element.text = printable(text)
  return element
