"""Text for people: durations, and names without control characters."""

from collections.abc import Sequence


def printable(text: str) -> str:
  """Returns one line without control characters, lone surrogates and repeated blanks."""
  return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def shortened(text: str, most: int) -> str:
  """Returns the text as `printable`, without its middle if it has more than `most` characters."""
  text = printable(text)
  half = (most - 3) // 2
  return text if len(text) <= most else f"{text[: most - 3 - half]}...{text[-half:]}"


def task_list(names: Sequence[str]) -> str:
  """Returns "4, 2; 7, 6; ...; 9, 1": the first names of tasks, and the last, in order."""
  shown = [shortened(name, 40) for name in names]
  return "; ".join([*shown[:9], "...", shown[-1]] if len(shown) > 10 else shown)


def duration(seconds: float) -> str:
  """Returns "8.1 s", "2:05 min" or "1:02:05 h"."""
  if seconds < 59.95:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes}:{rest:02d} min"
  return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"
