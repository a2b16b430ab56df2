"""Compares finished runs side by side, as mean ± std over seeds.

python -m fmlora_jax.report RUN... [--markdown] [--plot=FILE.png]
python -m fmlora_jax.report --paper RUN... [--html=FILE.html] [--plot=FILE.png]

RUN is a run's folder, its result.json, or a folder that holds runs at any depth. Runs that differ
in the seed only are one row; runs of another benchmark or number of tasks get their own table.
With --paper they stand beside the numbers of the FM-LoRA paper, as Markdown and as one HTML page.
"""

from collections.abc import Iterable, Sequence

from absl import flags
from rich.console import Console

from fmlora_jax.cli import program
from fmlora_jax.config import ConfigError
from fmlora_jax.report import paper, tables
from fmlora_jax.report.runs import RunResult, group, load


def _report_on_paper(results: Iterable[RunResult], notes: Iterable[str], html: str | None) -> None:
  comparison = paper.compare(results)
  if html:
    from fmlora_jax.report import paper_html  # draws, as below

    paper_html.write(comparison, notes, html)
  tables.line(Console(), paper.markdown(comparison, notes))


def main(argv: Sequence[str]) -> None:
  """Reports on the runs in argv[1:].

  Raises:
    ConfigError: if they can't be read, or a flag can't be.
  """
  try:
    _report(argv[1:], flags.FLAGS)
  except (ValueError, OSError) as error:
    raise ConfigError(str(error)) from error


def _report(paths: Sequence[str], options: flags.FlagValues) -> None:
  if not paths:
    raise ValueError("no RUN given; python -m fmlora_jax.report RUN... (--help says more)")
  if options.plot and not options.plot.endswith(".png"):
    raise ValueError(f"--plot is {options.plot!r}: must end in .png")
  if options.html and not options.paper:
    raise ValueError(f"--html is {options.html!r}: needs --paper; no other report has a page")
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


if __name__ == "__main__":
  program.drop_flags(*program.OF_RUNS)
  flags.adopt_module_key_flags(program)
  flags.DEFINE_bool("markdown", False, "Print Markdown instead of a table.")
  flags.DEFINE_string("plot", None, "PNG file for the accuracy over tasks of all groups.")
  flags.DEFINE_bool("paper", False, "Print the paper's tables with these runs, as Markdown.")
  flags.DEFINE_string("html", None, "With --paper: HTML file for the tables with pictures.")
  program.start(main, program.parse_flags)
