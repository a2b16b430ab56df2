"""The comparison with the paper as GitHub's Markdown."""

import html
import re
from collections.abc import Iterable

from fmlora_jax.cli.text import printable
from fmlora_jax.report import paper
from fmlora_jax.report.paper import Comparison


def markdown(comparison: Comparison, notes: Iterable[str] = ()) -> str:
  """Returns the tables, the meanings of the flags and the `notes`."""
  parts = ["## FM-LoRA: the paper's tables and ours", comparison.summary]
  for section in comparison.sections:
    rows = [paper.HEADER, *map(paper.cells, section.lines)]
    lines = [f"| {' | '.join(map(_escape, row))} |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * 6 + "---|---:|---|---|")
    parts += [f"### {_escape(section.title)}", "\n".join(lines)]
  parts += ["### Flags", _list(f"`{k}`: {_escape(text)}" for k, text in comparison.flags.items())]
  for title, lines in (("Notes", comparison.notes), ("Not in the paper", comparison.others)):
    parts += [f"### {title}", _list(map(_escape, lines))] if lines else []
  parts += [f"> {_escape(line)}" for line in notes]
  return "\n\n".join(parts)


def _escape(text: str) -> str:
  """Returns the text so that Markdown shows it as it is, also in a table's cell."""
  return re.sub(r"([\\`*\[\]|~])", r"\\\1", html.escape(printable(text), quote=False))


def _list(lines: Iterable[str]) -> str:
  return "\n".join(f"- {line}" for line in lines)
