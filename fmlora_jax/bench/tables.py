"""Parts that the tables of the benchmarks share."""

import dataclasses
import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich import box
from rich.table import Table

from fmlora_jax.bench.workload import BenchSettings
from fmlora_jax.experiment.costs import Cost


def circumstances(setting: BenchSettings) -> dict[str, Any]:
  """Returns the settings, the device and the versions of a result."""
  kind = jax.devices()[0].device_kind
  return {
    "setting": dataclasses.asdict(setting),
    "device": f"{kind} ({jax.default_backend()}), {os.cpu_count()} CPU threads",
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
  }


def facts(cost: Cost, base: Cost) -> dict[str, float]:
  """Returns the cost of a program as results hold it, with its FLOPs over those of `base`."""
  return {
    "flops_per_image": cost.flops,
    "flops_per_image_as_written": cost.flops_as_written,
    "compile_seconds": cost.compile_seconds,
    "temp_bytes": cost.bytes["temp"],
    "ratio": cost.flops / base.flops,
    "ratio_as_written": cost.flops_as_written / base.flops_as_written,
  }


def empty(result: Mapping[str, Any], caption: str, columns: Sequence[str]) -> Table:
  """Returns a table without rows, titled with the settings."""
  table = Table(
    title=", ".join(f"{name} {value}" for name, value in result["setting"].items()),
    caption=caption,
    caption_justify="left",
    box=box.SIMPLE,
  )
  table.add_column("", no_wrap=True)
  for name in columns:
    table.add_column(name, justify="right", no_wrap=True)
  return table


def where(result: Mapping[str, Any]) -> str:
  """Returns the device and the versions in one line."""
  return f"{result['device']}, {versions(result['versions'])}"


def versions(packages: Mapping[str, str]) -> str:
  """Returns packages with their versions in one line."""
  return ", ".join(f"{name} {version}" for name, version in packages.items())
