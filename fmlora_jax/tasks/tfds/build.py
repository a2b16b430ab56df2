"""Benchmarks built with TFDS: downloads, their checks, and the build."""

import dataclasses
import importlib.util
import logging
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import cast

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums

from fmlora_jax import tasks
from fmlora_jax.config import ConfigError, TasksConfig, raise_problems
from fmlora_jax.tasks.tfds import prepared

# missing in the wheel of TFDS
CHECKSUMS = pathlib.Path(__file__).with_name("domainnet_checksums.tsv")
SPACE_FACTOR = 3  # an archive, its unpacked files, and the set that is built from them
BUILD_PACKAGES = {
  "tensorflow": "tensorflow-cpu",
  "cv2": "opencv-python-headless",
}  # module -> package

UrlInfo = checksums.UrlInfo

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownloadFile:
  """One file that a builder asks for; `local` if it need not be downloaded."""

  url: str
  info: UrlInfo
  local: pathlib.Path | None

  def checked_info(self, *, unverified: bool) -> UrlInfo:
    """Returns size and hash that TFDS verifies: the published ones, or those of a local file.

    Raises:
      ConfigError: if a local file is not the published one, unless `unverified`.
    """
    if self.local is None:
      return self.info
    _log.info("  checking %s", self.local)
    info = checksums.compute_url_info(self.local)
    if info != self.info and not unverified:
      raise ConfigError(
        f"--archives: {self.local} has {int(info.size)} bytes and sha256 {info.checksum}, "
        f"published are {int(self.info.size)} and {self.info.checksum}: download it again from "
        f"{self.url}, or pass --unverified to accept it"
      )
    return info


def builder_names(benchmark: str, domains: Sequence[str] = ()) -> list[str]:
  """Returns the names of the TFDS builders that a benchmark reads.

  Raises:
    ConfigError: if the benchmark is unknown, needs no building, or has no such domain.
  """
  module = tasks.find(benchmark, "NAME")
  tasks.check_names(benchmark, "DOMAINS", domains, "--domains has")
  if benchmark.startswith("tfds:"):
    return [benchmark.removeprefix("tfds:")]
  if not hasattr(module, "BUILDERS"):
    raise ConfigError(f"NAME is {benchmark!r}: it needs no preparation; run main right away")
  return [name for name in module.BUILDERS if not domains or name.split("/")[1] in domains]


def required_files(
  builder: tfds.core.DatasetBuilder, archives: pathlib.Path | None
) -> list[DownloadFile]:
  """Returns the files that a builder downloads, as far as published checksums name them."""
  files = {}
  for url, info in url_infos(builder).items():
    local = archives / str(info.filename) if archives else None
    file = DownloadFile(url=url, info=info, local=local if local and local.is_file() else None)
    files.setdefault(info.filename, file)  # some are listed under two addresses
  return list(files.values())


def url_infos(builder: tfds.core.DatasetBuilder) -> dict[str, UrlInfo]:
  """Returns the published size and hash of each file that `builder` may download."""
  if builder.name != "domainnet":
    return dict(builder.url_infos or {})
  domain = cast(tfds.core.BuilderConfig, builder.builder_config).name
  infos = checksums.load_url_infos(CHECKSUMS)
  names = (f"{domain}.zip", f"{domain}_train.txt", f"{domain}_test.txt")
  return {url: info for url, info in infos.items() if info.filename in names}


def missing_packages(builders: Sequence[str]) -> list[str]:
  """Returns the packages that building needs and that are missing."""
  modules = ["tensorflow", *(["cv2"] if "caltech_birds2011" in builders else [])]
  return [BUILD_PACKAGES[name] for name in modules if importlib.util.find_spec(name) is None]


def describe(name: str, files: Sequence[DownloadFile]) -> None:
  """Logs the source of each file."""
  _log.info("%s: to be built from", name)
  for file in files:
    source = file.local or file.url
    _log.info("  %-28s %10s  %s", file.info.filename, _size(file.info.size), source)
  if not files:
    _log.info("  files that TFDS names (of unknown size)")


def build(
  builder: tfds.core.DatasetBuilder, infos: dict[str, UrlInfo], archives: pathlib.Path | None
) -> None:
  """Downloads, verifies and builds; the final folder appears when it is complete.

  Raises:
    ConfigError: if a download fails, its sha256 is not the published one, or the build fails.
  """
  type(builder).url_infos = url_infos(builder) | infos  # TFDS's wheel lacks those of domainnet
  config = tfds.download.DownloadConfig(manual_dir=archives)
  try:
    builder.download_and_prepare(download_config=config)
  except Exception as error:  # TFDS, TensorFlow and downloads raise nearly anything
    reason = " ".join(str(error).split())[:300]
    raise ConfigError(
      f"{builder.info.full_name} could not be built ({type(error).__name__}: {reason}); the same "
      "command continues from here; if the site is down, get the files elsewhere and pass "
      "--archives=FOLDER"
    ) from error


def prepare(
  benchmark: str,
  *,
  data_dir: str | None,
  archives: pathlib.Path | None,
  domains: Sequence[str] = (),
  unverified: bool = False,
  dry_run: bool = False,
  problems: Sequence[str] = (),
) -> None:
  """Builds the sets that are missing, then reads all records once, which writes the manifests.

  Args:
    problems: found before, to be said with those of the build.

  Raises:
    ConfigError: if the benchmark or a domain is unknown, the disk is too small, or as `build`.
  """
  names = builder_names(benchmark, domains)
  root = prepared.data_root(data_dir)
  _log.info("%s: into %s", benchmark, root)
  missing = {}
  for name in names:
    builder = prepared.get_builder(name, root, benchmark)
    if builder.info.splits:
      _log.info("%s %s: built already", name, builder.version)
    else:
      missing[name] = builder, required_files(builder, archives)
      describe(name, missing[name][1])
  _check_space(root, [file for _, files in missing.values() for file in files])
  if dry_run:
    return
  if missing and (packages := missing_packages(list(missing))):
    problems = [
      *problems,
      f"building needs {' and '.join(packages)}, training does not: run "
      f"{sys.executable} -m pip install {' '.join(packages)}, then the same command again",
    ]
  raise_problems(problems)
  for builder, files in missing.values():
    build(builder, {file.url: file.checked_info(unverified=unverified) for file in files}, archives)
  config = TasksConfig(benchmark=benchmark, data_dir=str(root), num_tasks=1, domains=tuple(domains))
  made = tasks.make(config, seed=0, source_size=1)
  counts = ", ".join(
    f"{len(getattr(made.tasks[0], part))} {part}" for part in ("train", "val", "test")
  )
  _log.info("ready: %s, %d classes, %s", made.split_id, made.num_classes, counts)


def _check_space(root: pathlib.Path, files: Sequence[DownloadFile]) -> None:
  needed = SPACE_FACTOR * sum(file.info.size for file in files)
  existing = next(folder for folder in (root, *root.parents) if folder.exists())
  free = shutil.disk_usage(existing).free
  to_get = sum(file.info.size for file in files if not file.local)
  if files:
    sizes = map(_size, (to_get, needed, free))
    _log.info("to download %s, disk space needed about %s, free %s", *sizes)
  if needed > free:
    raise ConfigError(
      f"--data_dir is {str(root)!r}: {_size(free)} are free there, about {_size(needed)} are "
      "needed; choose another folder, or free some space"
    )


def _size(num_bytes: float) -> str:
  for unit in ("B", "KiB", "MiB"):
    if num_bytes < 1024:
      return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
    num_bytes /= 1024
  return f"{num_bytes:.2f} GiB"
