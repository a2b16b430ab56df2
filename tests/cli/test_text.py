import pytest

from fmlora_jax.cli.text import duration, printable


@pytest.mark.parametrize(
  ("seconds", "shown"),
  [(8.14, "8.1 s"), (59.99, "1:00 min"), (125.0, "2:05 min"), (3725.4, "1:02:05 h")],
)
def test_durations_are_easy_to_read(seconds, shown):
  assert duration(seconds) == shown


def test_a_name_becomes_one_line_without_control_characters():
  assert printable("a\x1b[31m\nb  \udcff c\t") == "a [31m b c"
