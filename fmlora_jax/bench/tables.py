"""What the tables of the benchmark share."""

import dataclasses
import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich import box
from rich.table import Table

from fmlora_jax.bench.lab import BenchSettings


def circumstances(setting: BenchSettings) -> dict[str, Any]:
  """Returns what every result says of its making."""
  kind = jax.devices()[0].device_kind
  return {
    "setting": dataclasses.asdict(setting),
    "device": f"{kind} ({jax.default_backend()}), {os.cpu_count()} CPU threads",
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
  }


def with_ratios(facts: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the facts of a program with its FLOPs over those of the plain forward."""
  ratios = {
    kind.replace("flops_per_image", "ratio"): facts[kind] / base[kind]
    for kind in ("flops_per_image", "flops_per_image_as_written")
  }
  return dict(facts) | ratios


def empty(result: Mapping[str, Any], caption: str, columns: Sequence[str]) -> Table:
  """Returns a table without rows under the setting."""
  shown = Table(
    title=", ".join(f"{name} {value}" for name, value in result["setting"].items()),
    caption=caption,
    caption_justify="left",
    box=box.SIMPLE,
  )
  shown.add_column("", no_wrap=True)
  for name in columns:
    shown.add_column(name, justify="right", no_wrap=True)
  return shown


def where(result: Mapping[str, Any]) -> str:
  """Returns the line that says what ran it."""
  return f"{result['device']}, {versions(result['versions'])}"


def versions(packages: Mapping[str, str]) -> str:
  """Returns packages with their versions in one line."""
  return ", ".join(f"{name} {version}" for name, version in packages.items())
