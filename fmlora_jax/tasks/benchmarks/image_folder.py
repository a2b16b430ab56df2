"""A folder of images: one folder per class, within splits or domains where the data have them."""

import collections
import dataclasses
import errno
import functools
import hashlib
import itertools
import logging
import os
import pathlib
import time
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8

from fmlora_jax.config import ConfigError, TasksConfig, raise_problems
from fmlora_jax.tasks import images
from fmlora_jax.tasks.sequence import TEST, TRAIN, VAL, DataSource, check_test_from

SPLIT_NAMES = {  # in any case of letters; not "eval", which means val or test
  **dict.fromkeys(("train", "training"), TRAIN),
  **dict.fromkeys(("val", "valid", "validation", "dev"), VAL),
  **dict.fromkeys(("test", "testing"), TEST),
}
LAYOUTS = (  # roles of the folders above an image, outermost first
  ("class",),
  ("split", "class"),
  ("domain", "class"),
  ("domain", "split", "class"),
  ("split", "domain", "class"),
)
MAX_DEPTH = max(map(len, LAYOUTS))
MAX_LISTED = 10  # names in one message
CHUNK = 4096  # files queued for the threads at a time, to limit memory
LINE_EVERY_S = 10.0  # while files are checked

_log = logging.getLogger(__name__)

RelativePath = tuple[str, ...]  # names of folders below data_dir and, for a file, its name


def make(config: TasksConfig, source_size: int) -> DataSource:
  """Returns the images of config.data_dir, after decoding each once as a check.

  Depth and names of splits, those in `SPLIT_NAMES`, tell the layout. Copies of one file are never
  in different splits, unless the folders put them there.

  Raises:
    ConfigError: if there is no such folder, its layout is none of `LAYOUTS`, a class is missing
      somewhere, or a file can't be decoded and config.broken_files is "refuse".
  """
  root = check_folder(config.data_dir)
  files, empty = _walk(root)
  layout = _layout(root, files)
  problems = []
  try:
    _refuse_gaps(root, files, empty)
  except ConfigError as error:
    problems.append(str(error))
  names = {role: sorted({path[i] for path in files}) for i, role in enumerate(layout)}
  check_test_from(config, {SPLIT_NAMES[name.casefold()] for name in names.get("split", ())})
  _log.info("checking %d files of %s: %s", len(files), root, _described(layout, files))
  reader = ImageReader(root=root, side=source_size, max_pixels=config.max_pixels)
  checked = _check(reader, files, skip=config.broken_files == "skip", problems=problems)
  _warn_of_black(root, [path for path, found in checked.items() if found.is_near_black])
  files = list(checked)
  ids = {role: _ids(files, layout.index(role), names[role]) for role in layout}
  codes = np.asarray([SPLIT_NAMES[name.casefold()] for name in names.get("split", ())], np.int8)
  contents = [found.content for found in checked.values()]
  first: dict[str, int] = {}  # record of each content
  group = np.asarray([first.setdefault(sha, i) for i, sha in enumerate(contents)])
  canvas = tuple(np.max([found.size for found in checked.values()], axis=0).tolist())
  return DataSource(
    name="image_folder",
    labels=ids["class"],
    class_names=tuple(names["class"]),
    canvas=canvas,
    decode=functools.partial(_decode, reader, files, contents, canvas),
    digest=_digest(checked),
    split=codes[ids["split"]] if "split" in ids else None,
    domains=ids.get("domain"),
    domain_names=tuple(names.get("domain", ())),
    group=group,
    shown=functools.partial(_shown, files),
    caveats=_caveats([path for path, found in checked.items() if found.has_pages]),
  )


def _ids(files: Sequence[RelativePath], level: int, names: Sequence[str]) -> Int[np.ndarray, " n"]:
  """Returns the index in `names` of each file's folder at a level."""
  number = {name: i for i, name in enumerate(names)}
  return np.asarray([number[path[level]] for path in files], np.int32)


def _described(layout: tuple[str, ...], files: Sequence[RelativePath]) -> str:
  """Returns a text like "layout split/class/*, splits test (40), train (160), 2 classes 'a', 'b'".

  Classes are in the order of their names as text, which is torchvision's; this is said where names
  are numbers.
  """
  described = f"layout {'/'.join(layout)}/*"
  for i, role in enumerate(layout):
    counts = collections.Counter(path[i] for path in files)
    if role == "class":
      described += f", {len(counts)} classes {_listed([(name,) for name in sorted(counts)])}"
      if all(name.isdecimal() for name in counts) and sorted(counts) != sorted(counts, key=int):
        described += " (numbers, in the order of text, as torchvision has them)"
    else:
      described += f", {role}s " + ", ".join(f"{name} ({counts[name]})" for name in sorted(counts))
  return described


def _refusal(root: pathlib.Path, reason: str) -> ConfigError:
  return ConfigError(f"config.tasks.data_dir is {str(root)!r}: {reason}")


def _listed(paths: Sequence[RelativePath]) -> str:
  more = f" and {len(paths) - MAX_LISTED} more" if len(paths) > MAX_LISTED else ""
  return ", ".join(repr("/".join(path)) for path in paths[:MAX_LISTED]) + more


def check_folder(data_dir: str | None) -> pathlib.Path:
  """Returns the folder with the images.

  Raises:
    ConfigError: if there is none.
  """
  if not data_dir:
    raise ConfigError(
      f"config.tasks.data_dir is {data_dir!r}: must be the folder with the images, as in "
      "--config.tasks.data_dir=/data/photos"
    )
  root = pathlib.Path(data_dir).expanduser()
  if not root.is_dir():
    raise _refusal(root, "is a file, must be a folder" if root.exists() else "no such folder")
  return root


def _walk(root: pathlib.Path) -> tuple[list[RelativePath], list[RelativePath]]:
  """Returns the image files, by their extensions, and the empty folders; both sorted."""
  known = images.extensions()
  files, empty, ignored = [], [], collections.Counter()
  pending: list[RelativePath] = [()]
  while pending:
    path = pending.pop()
    folders, others = _entries(root, path)
    image_names = [name for name in others if os.path.splitext(name)[1].lower() in known]
    ignored.update(os.path.splitext(name)[1] or name for name in {*others} - {*image_names})
    if not folders and not image_names:
      empty.append(path)
    files += ((*path, name) for name in image_names)
    pending += ((*path, name) for name in folders)
  if ignored:
    count, kinds = sum(ignored.values()), ", ".join(sorted(ignored)[:MAX_LISTED])
    _log.warning("%s: ignored %d files that are no images: %s", root, count, kinds)
  if not files:
    raise _refusal(root, "holds no image")
  return sorted(files), sorted(empty)


def _entries(root: pathlib.Path, path: RelativePath) -> tuple[list[str], list[str]]:
  """Returns the names of folders and of files in a folder, without hidden ones."""
  if len(path) > MAX_DEPTH:
    raise _refusal(root, f"folder {_listed([path])} is too deep, or links back; {_wanted()}")
  _refuse_loop(root, path)
  try:
    with os.scandir(root.joinpath(*path)) as entries:
      visible = [e for e in entries if not e.name.startswith(".") and e.name != "__MACOSX"]
      folders = [e.name for e in visible if _is_folder(root, path, e)]
      return folders, sorted({e.name for e in visible} - {*folders})
  except OSError as error:
    raise _refusal(root, f"folder {_listed([path])} can't be read: {error.strerror}") from None


def _is_folder(root: pathlib.Path, path: RelativePath, entry: os.DirEntry) -> bool:
  try:
    return entry.is_dir()
  except OSError as error:
    if error.errno != errno.ELOOP:
      raise
    shown = _listed([(*path, entry.name)])
    reason = f"{shown} is a symbolic link that leads to itself: must lead to an image or a folder"
    raise _refusal(root, f"{reason}; it must lead to a file or folder") from None


def _refuse_loop(root: pathlib.Path, path: RelativePath) -> None:
  """Refuses a folder that is, by a symbolic link, one of those that it is in."""
  places = [os.path.realpath(root.joinpath(*path[:depth])) for depth in range(len(path) + 1)]
  if places[-1] in places[:-1]:
    shown, above = _listed([path]), places[-1]
    reason = f"folder {shown} links back to {above!r}, in which it is: must hold images"
    raise _refusal(root, f"{reason}; it must lead elsewhere")


def _wanted() -> str:
  return f"must be laid out as one of {', '.join('/'.join(roles) + '/*' for roles in LAYOUTS)}"


def _layout(root: pathlib.Path, files: Sequence[RelativePath]) -> tuple[str, ...]:
  """Returns the one of `LAYOUTS` that fits all files."""
  by_depth = {len(path) - 1: path for path in reversed(files)}
  if len(by_depth) > 1:
    raise _refusal(
      root, f"images at different depths, {_listed([*by_depth.values()])}; {_wanted()}"
    )
  (depth,) = by_depth
  levels = [{path[i] for path in files} for i in range(depth)]
  splits = [{name for name in names if name.casefold() in SPLIT_NAMES} for names in levels]

  def fits(roles):
    if len(roles) != depth:
      return False
    if roles == ("class",):  # a class may be called "train", but not all of them
      return splits[0] != levels[0]
    return all(
      role == "class" or split_names == (names if role == "split" else set())
      for role, names, split_names in zip(roles, levels, splits, strict=True)
    )

  fitting = [roles for roles in LAYOUTS if fits(roles)]
  if len(fitting) != 1:
    folders = " / ".join(_listed([(name,) for name in sorted(names)]) for names in levels)
    raise _refusal(
      root,
      f"found folders {folders or 'none, but images such as ' + _listed(files[:1])}; {_wanted()}, "
      f"where split is one of {', '.join(SPLIT_NAMES)}, and domain is none of these",
    )
  (roles,) = fitting
  for names in levels:
    _refuse_alike(root, names)
  if "split" in roles:
    _refuse_twice(root, splits[roles.index("split")])
  return roles


def _refuse_twice(root: pathlib.Path, names: set[str]) -> None:
  for code in {TRAIN, VAL, TEST}:
    same = sorted(name for name in names if SPLIT_NAMES[name.casefold()] == code)
    if len(same) > 1:
      raise _refusal(
        root,
        f"folders {_listed([(name,) for name in same])} mean the same split: must be one folder; "
        "merge or rename them",
      )


def _refuse_alike(root: pathlib.Path, names: set[str]) -> None:
  """Refuses folders whose names differ in their Unicode form alone, as of two operating systems."""
  first: dict[str, str] = {}
  for name in sorted(names):
    other = first.setdefault(unicodedata.normalize("NFC", name), name)
    if other != name:
      raise _refusal(
        root,
        f"folders {other!a} and {name!a} have one name, {name!r}, in two Unicode forms: must be "
        "one folder; merge or rename them",
      )


def _refuse_gaps(
  root: pathlib.Path, files: Sequence[RelativePath], empty: Sequence[RelativePath]
) -> None:
  filled = {path[:-1] for path in files}
  levels = [sorted(set(level)) for level in zip(*filled, strict=True)]
  gaps = sorted({*empty, *(path for path in itertools.product(*levels) if path not in filled)})
  if gaps:
    raise _refusal(
      root,
      f"no image in folder {_listed(gaps)}: each class needs some in every split and domain; "
      "add them, or move the class out of all of them",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
  """A file that was decoded: (height, width) after resizing, sha256 hex of the file, its look."""

  size: tuple[int, int]
  content: str
  is_near_black: bool
  has_pages: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageReader:
  """Reads the files below `root`, resized to a shorter side of `side` pixels."""

  root: pathlib.Path
  side: int
  max_pixels: int

  def check(self, path: RelativePath) -> Checked | images.BrokenImage:
    """Returns the facts about a file, or its fault."""
    try:
      image, content, has_pages = images.read(self.root.joinpath(*path))
      (width, height), _ = images.resized_size(image.size, self.side)
      dark = images.is_near_black(image)
      return Checked(size=(height, width), content=content, is_near_black=dark, has_pages=has_pages)
    except images.BrokenImage as error:
      return error

  def pixels(self, path: RelativePath, content: str) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the resized image; refuses a file whose sha256 hex is not `content`."""
    image, now, _ = images.read(self.root.joinpath(*path))
    if now != content:
      raise images.BrokenImage("it holds something else than at the start of the run")
    return np.asarray(images.resize_shorter_side(image, self.side))


def _check(
  reader: ImageReader, files: Sequence[RelativePath], *, skip: bool, problems: Sequence[str]
) -> dict[RelativePath, Checked]:
  """Returns the files that can be decoded, with the results of `ImageReader.check`.

  Args:
    problems: found before, to be said with those of the files.

  Raises:
    ConfigError: if there are such problems, or a file can't be used that is not to be skipped.
  """
  good, bad, line_due = {}, {}, time.monotonic() + LINE_EVERY_S
  with images.threads(reader.max_pixels) as pool:
    chunks = (files[lo : lo + CHUNK] for lo in range(0, len(files), CHUNK))
    results = itertools.chain.from_iterable(pool.map(reader.check, chunk) for chunk in chunks)
    for path, result in zip(files, results, strict=True):
      (bad if isinstance(result, images.BrokenImage) else good)[path] = result
      if time.monotonic() >= line_due:
        line_due += LINE_EVERY_S
        _log.info("  %d of %d files checked", len(good) + len(bad), len(files))
  if bad:
    reasons = [f"  {_listed([path])}: {error}" for path, error in bad.items()]
    if len(reasons) > MAX_LISTED:
      reasons[MAX_LISTED:] = [f"  and {len(reasons) - MAX_LISTED} more"]
    count = f"{len(bad)} of {len(files)} images can't be used"
    if not (skip and good):
      fix = "repair or move them away" + (", or set config.tasks.broken_files to skip" * (not skip))
      refusal = _refusal(reader.root, "\n".join([f"{count}; {fix}:", *reasons]))
      raise_problems([*problems, str(refusal)])
    _log.warning("%s: %s, skipped:\n%s", reader.root, count, "\n".join(reasons))
  raise_problems(problems)
  return good


def _warn_of_black(root: pathlib.Path, paths: Sequence[RelativePath]) -> None:
  if paths:
    _log.warning(
      "%s: %d images are near black, no value is above %d of 255, such as %s: if their files hold "
      "10 or 12 bits in 16, multiply the values by 64 or 16",
      *(root, len(paths), images.NEAR_BLACK, _listed(paths[:1])),
    )


def _caveats(paths: Sequence[RelativePath]) -> tuple[str, ...]:
  """Returns what a reader must know of images of several pages, if there are any."""
  if not paths:
    return ()
  count = f"{len(paths)} image files have several pages or frames, such as {_listed(paths[:1])}"
  return (f"{count}: the first is taken, the others are left out",)


def _digest(checked: dict[RelativePath, Checked]) -> str:
  """Returns a sha256 over paths, which hold the class names, and contents."""
  lines = (f"{'/'.join(path)}\0{found.content}\n" for path, found in checked.items())
  return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()


def _shown(files: Sequence[RelativePath], record: int) -> str:
  return "/".join(files[record])


def _decode(
  reader: ImageReader,
  files: Sequence[RelativePath],
  contents: Sequence[str],
  canvas: tuple[int, int],
  rows: Int[np.ndarray, " k"],
) -> tuple[UInt8[np.ndarray, "k h w 3"], Int[np.ndarray, "k 2"]]:
  """Returns the records `rows` of `files` on canvases, and their sizes."""

  def pixels(index):
    row = int(rows[index])
    try:
      return reader.pixels(files[row], contents[row])
    except images.BrokenImage as error:
      raise _refusal(
        reader.root,
        f"{_listed([files[row]])} has changed: {error}; put the file back, or start a new run",
      ) from error

  return images.on_canvases(len(rows), canvas, pixels, reader.max_pixels)
