"""Compares finished runs side by side, as mean ± std over seeds.

Usage: fmlora_jax report RUN... [--markdown] [--plot=FILE.png] [--share=FILE.zip]
       fmlora_jax report --paper RUN... [--html=FILE.html] [--plot=FILE.png]

RUN is a run's folder, its result.json, or a folder with runs at any depth. Runs that differ in the
seed only are one row; each benchmark and number of tasks has a table of its own. With --paper the
runs stand beside the numbers of the FM-LoRA paper, as Markdown and as one HTML page.

Examples:
  fmlora_jax report runs
  fmlora_jax report runs/digits-lora-1993 runs/digits-fm_lora-1993 --markdown --plot=runs.png
"""

import pathlib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import flags

from fmlora_jax.cli import outputs, program
from fmlora_jax.cli.flags import Arguments
from fmlora_jax.config import ConfigError


def define_flags() -> flags.FlagValues:
  """Returns the program's flags."""
  values = flags.FlagValues()
  text = "Print Markdown instead of a table."
  flags.DEFINE_bool("markdown", False, text, flag_values=values)
  text = "PNG file to draw the accuracy over tasks into."
  flags.DEFINE_string("plot", None, text, flag_values=values)
  text = "Print the paper's tables beside these runs, as Markdown."
  flags.DEFINE_bool("paper", False, text, flag_values=values)
  text = "With --paper: HTML file for tables and pictures."
  flags.DEFINE_string("html", None, text, flag_values=values)
  text = "ZIP file to pack the finished runs into, without host name and paths of this machine."
  flags.DEFINE_string("share", None, text, flag_values=values)
  return values


def main(arguments: Arguments) -> None:
  """Reports on the runs that the command line names.

  Raises:
    ConfigError: if a run is unreadable or a flag invalid.
  """
  try:
    report(arguments.words, arguments.options)
  except (ValueError, OSError) as error:
    raise ConfigError(str(error)) from error


def report(paths: Sequence[str], options: types.SimpleNamespace) -> None:
  """Prints and writes what the flags ask for.

  Raises:
    ValueError: if a run is unreadable or a flag invalid.
  """
  if not paths:
    raise ValueError("no RUN given: name a run's folder, as in fmlora_jax report runs")
  if options.plot is not None:
    outputs.require_file("--plot", options.plot, ".png", mark=b"Matplotlib")
  if options.html is not None and not options.paper:
    raise ValueError(f"--html is {options.html!r}: needs --paper; no other report has a page")
  if options.html is not None:
    outputs.require_file("--html", options.html, ".html")
  if options.share is not None:
    outputs.require_new_file("--share", options.share, ".zip")
  from rich.console import Console

  from fmlora_jax.report import share, tables
  from fmlora_jax.report.runs import group, load

  results, notes = load(paths)
  if options.paper:
    _report_on_paper(results, notes, options.html)
  elif options.markdown:
    tables.line(Console(), tables.markdown(results, notes))
  else:
    tables.show(results, Console(), notes)
  if options.plot:
    from fmlora_jax.report import plots  # matplotlib takes a second to import

    plots.plot_accuracy_over_tasks(group(results), options.plot)
  if options.share:
    runs = share.pack(paths, pathlib.Path(options.share).expanduser())
    program.write_lines([f"packed {len(runs)} runs into {options.share}"])


def _report_on_paper(
  results: Iterable[Mapping[str, Any]], notes: Iterable[str], html: str | None
) -> None:
  from rich.console import Console

  from fmlora_jax.report import paper, paper_markdown, tables

  comparison = paper.compare(results)
  if html:
    from fmlora_jax.report import paper_html  # imports matplotlib, as above

    paper_html.write(comparison, notes, html)
  tables.line(Console(), paper_markdown.markdown(comparison, notes))


if __name__ == "__main__":
  with program.running(__doc__, define_flags()) as arguments:
    main(arguments)
