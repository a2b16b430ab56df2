"""Kernels by the device time they take, from JAX's profiler."""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax


def trace(run: Callable[[], Any], top: int = 10) -> dict[str, Any]:
  """Returns the kernels that took most of the device's time while `run` ran.

  Returns:
    busy_seconds of all kernels, on a CPU summed over its threads, and "top": name, share of them
    and number of calls of each.
  """
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      run()
    (file,) = pathlib.Path(folder).glob("**/*.xplane.pb")
    spent, calls = read(jax.profiler.ProfileData.from_file(str(file)))
  total = sum(spent.values())
  return {
    "busy_seconds": total * 1e-9,
    "top": [
      {"name": name, "share": nanoseconds / total, "calls": calls[name]}
      for name, nanoseconds in spent.most_common(top)
    ],
  }


def read(data: Any) -> tuple[collections.Counter, collections.Counter]:
  """Returns the nanoseconds and the calls of each kernel; numbers at the end of names are dropped.

  A GPU's kernels are events of its streams, a TPU's of its line "XLA Ops", a CPU's of XLA's
  threads, where a name with "::" is an event that contains others.
  """
  spent, calls = collections.Counter(), collections.Counter()
  devices = [plane for plane in data.planes if plane.name.startswith("/device:")]
  wanted = r"Stream|XLA Ops" if devices else r"tf_XLA"
  for plane in devices or data.planes:
    for line in plane.lines:
      if not re.match(wanted, line.name):
        continue
      for event in line.events:
        if "::" in event.name and not devices:
          continue
        name = re.sub(r"[._]\d+$", "", event.name)
        spent[name] += event.duration_ns
        calls[name] += 1
  return spent, calls
