"""Text for people: durations, and names without control characters."""


def printable(text: str) -> str:
  """Returns one line without control characters, lone surrogates and repeated blanks."""
  return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def duration(seconds: float) -> str:
  """Returns "8.1 s", "2:05 min" or "1:02:05 h"."""
  if seconds < 59.95:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes}:{rest:02d} min"
  return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"
