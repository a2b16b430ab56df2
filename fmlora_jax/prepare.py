"""Downloads a benchmark and builds it with TFDS, once, in the form that `main` reads.

python -m fmlora_jax.prepare NAME [--data_dir=DIR] [--archives=DIR] [--domains=A,B] [--dry_run]

NAME is imagenet_r, cifar100, cub200, domainnet or tfds:NAME for any set of TFDS. Building needs
TensorFlow, reading does not. The same command again goes on where it was stopped: what is built is
left alone, what is downloaded is not downloaded again.
"""

import dataclasses
import importlib.util
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Sequence

import tensorflow_datasets as tfds
from absl import app, flags

from fmlora_jax import tasks
from fmlora_jax.cli import program
from fmlora_jax.config import ConfigError, TasksConfig
from fmlora_jax.tasks.tfds import prepared

# not in TFDS's own wheel
CHECKSUMS = pathlib.Path(prepared.__file__).with_name("domainnet_checksums.tsv")
ROOM = 3  # an archive, what it unpacks to, and what is built from that
NEEDED = {"tensorflow": "tensorflow-cpu", "cv2": "opencv-python-headless"}  # module -> package

UrlInfo = tfds.download.checksums.UrlInfo

_log = logging.getLogger("fmlora_jax.prepare")  # as __main__ it has another name

_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "Folder to build in; default: what main takes without tasks.data_dir."
)
_ARCHIVES = flags.DEFINE_string(
  "archives", None, "Folder with archives that are there already, under their published names."
)
_UNVERIFIED = flags.DEFINE_bool(
  "unverified", False, "Take files of --archives whose sha256 is not the published one."
)
_DOMAINS = flags.DEFINE_list("domains", [], "Of domainnet: only these.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say what would be done, and do nothing.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownloadFile:
  """One file that a builder asks for; `local` where it need not be downloaded."""

  url: str
  info: UrlInfo
  local: pathlib.Path | None

  def found(self, *, unverified: bool) -> UrlInfo:
    """Returns the facts that TFDS shall check the file by: the published, or what a file has.

    Raises:
      ConfigError: if a local file is not the published one, unless it may be `unverified`.
    """
    if self.local is None:
      return self.info
    _log.info("  checking %s", self.local)
    found = tfds.download.checksums.compute_url_info(self.local)
    if found != self.info and not unverified:
      raise ConfigError(
        f"--archives: {self.local} has {int(found.size)} bytes and sha256 {found.checksum}, "
        f"published are {int(self.info.size)} and {self.info.checksum}: get it again from "
        f"{self.url}, or say --unverified if it is meant to differ"
      )
    return found


def builder_names(benchmark: str, domains: Sequence[str] = ()) -> list[str]:
  """Returns the TFDS builders that a benchmark reads.

  Raises:
    ConfigError: if there is no such benchmark, it needs no building, or has no such domain.
  """
  module = tasks.find(benchmark)
  tasks.check_names(benchmark, "DOMAINS", domains, "--domains has")
  if benchmark.startswith("tfds:"):
    return [benchmark.removeprefix("tfds:")]
  if not hasattr(module, "BUILDERS"):
    raise ConfigError(f"NAME is {benchmark!r}: it needs no preparation; run main at once")
  return [name for name in module.BUILDERS if not domains or name.split("/")[1] in domains]


def wanted(builder: tfds.core.DatasetBuilder, archives: pathlib.Path | None) -> list[DownloadFile]:
  """Returns what a builder will ask for, as far as published checksums name it."""
  files = {}
  for url, info in url_infos(builder).items():
    local = archives / info.filename if archives else None
    file = DownloadFile(url=url, info=info, local=local if local and local.is_file() else None)
    files.setdefault(info.filename, file)  # some are listed again under a second address
  return list(files.values())


def url_infos(builder: tfds.core.DatasetBuilder) -> dict[str, UrlInfo]:
  """Returns what is published of each file that `builder` may download."""
  if builder.name != "domainnet":
    return dict(builder.url_infos or {})
  domain = builder.builder_config.name
  infos = tfds.download.checksums.load_url_infos(CHECKSUMS)
  own = (f"{domain}.zip", f"{domain}_train.txt", f"{domain}_test.txt")
  return {url: info for url, info in infos.items() if info.filename in own}


def missing_packages(builders: Sequence[str]) -> list[str]:
  """Returns the packages that building needs and that are not installed."""
  modules = ["tensorflow", *(["cv2"] if "caltech_birds2011" in builders else [])]
  return [NEEDED[name] for name in modules if importlib.util.find_spec(name) is None]


def describe(name: str, files: Sequence[DownloadFile]) -> None:
  """Says where each file comes from."""
  _log.info("%s: to be built from", name)
  for file in files:
    place = file.local or file.url
    _log.info("  %-28s %10s  %s", file.info.filename, _size(file.info.size), place)
  if not files:
    _log.info("  what TFDS says (its size is not known beforehand)")


def build(
  builder: tfds.core.DatasetBuilder, infos: dict[str, UrlInfo], archives: pathlib.Path | None
) -> None:
  """Downloads, checks and builds; leaves nothing half-built under the final name.

  Raises:
    ConfigError: if a download fails, its sha256 is not the published one, or it can't be built.
  """
  type(builder).url_infos = url_infos(builder) | infos  # domainnet's are not in TFDS's wheel
  config = tfds.download.DownloadConfig(manual_dir=archives)
  try:
    builder.download_and_prepare(download_config=config)
  except Exception as error:  # TFDS, TensorFlow and what downloads raise nearly anything
    reason = " ".join(str(error).split())[:300]
    raise ConfigError(
      f"{builder.info.full_name} could not be built ({type(error).__name__}: {reason}); the same "
      "command goes on from here; if the site is down, get the files elsewhere and say "
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
) -> None:
  """Builds what is not built yet, then looks at all records once, which writes the manifests."""
  names = builder_names(benchmark, domains)
  root = prepared.data_root(data_dir)
  _log.info("%s: into %s", benchmark, root)
  open_ones = {}
  for name in names:
    builder = prepared.get_builder(name, root, benchmark)
    if builder.info.splits:
      _log.info("%s %s: built already", name, builder.version)
    else:
      open_ones[name] = builder, wanted(builder, archives)
      describe(name, open_ones[name][1])
  _check_room(root, [file for _, files in open_ones.values() for file in files])
  if dry_run:
    return
  if open_ones and (packages := missing_packages(list(open_ones))):
    raise ConfigError(
      f"building needs {' and '.join(packages)}, training does not: "
      f"{sys.executable} -m pip install {' '.join(packages)}; then the same command again"
    )
  for builder, files in open_ones.values():
    build(builder, {file.url: file.found(unverified=unverified) for file in files}, archives)
  config = TasksConfig(benchmark=benchmark, data_dir=str(root), num_tasks=1, domains=tuple(domains))
  made = tasks.make(config, seed=0, source_size=1)
  counts = ", ".join(
    f"{len(getattr(made.tasks[0], part))} {part}" for part in ("train", "val", "test")
  )
  _log.info("ready: %s, %d classes, %s", made.split_id, made.num_classes, counts)


def _check_room(root: pathlib.Path, files: Sequence[DownloadFile]) -> None:
  needed = ROOM * sum(file.info.size for file in files)
  there = root
  while not there.exists():
    there = there.parent
  free = shutil.disk_usage(there).free
  to_get = sum(file.info.size for file in files if not file.local)
  if files:
    sizes = map(_size, (to_get, needed, free))
    _log.info("to download %s, room needed about %s, free %s", *sizes)
  if needed > free:
    raise ConfigError(
      f"--data_dir is {str(root)!r}: {_size(free)} are free there, about {_size(needed)} are "
      "needed; choose another folder, or make room"
    )


def _size(num_bytes: int) -> str:
  for unit in ("B", "KiB", "MiB"):
    if num_bytes < 1024:
      return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
    num_bytes /= 1024
  return f"{num_bytes:.2f} GiB"


def main(argv: Sequence[str]) -> None:
  if len(argv) != 2:
    raise app.UsageError(
      "name one benchmark: python -m fmlora_jax.prepare NAME [--data_dir=DIR] (--help says more)"
    )
  archives = pathlib.Path(_ARCHIVES.value).expanduser() if _ARCHIVES.value else None
  if archives and not archives.is_dir():
    raise ConfigError(f"--archives is {_ARCHIVES.value!r}: no such folder")
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  prepare(
    argv[1],
    data_dir=_DATA_DIR.value,
    archives=archives,
    domains=_DOMAINS.value,
    unverified=_UNVERIFIED.value,
    dry_run=_DRY_RUN.value,
  )


if __name__ == "__main__":
  program.drop_flags(*program.OF_RUNS)
  flags.adopt_module_key_flags(program)
  program.start(main, program.parse_flags)
