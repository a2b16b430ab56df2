"""One folder per checkpoint, named by its step; renames and removals that a kill can't break."""

import itertools
import pathlib
import re
import shutil
from collections.abc import Callable, Collection

from fmlora_jax.cli.text import printable
from fmlora_jax.distributed import hosts
from fmlora_jax.workdir import files

TEMPORARY = ".orbax-checkpoint-tmp"  # suffix of folders that orbax has not finished
AGAIN, BEFORE = ".again", ".before"  # suffixes of the new and old folder of a step saved twice
UNUSABLE = ".unusable"  # suffix of what is set aside, perhaps with hyphens
STEP = re.compile(r"0|[1-9][0-9]{0,14}")


class StepFolders:
  """The folders of all checkpoints; all processes call each method, the first one alone writes.

  Args:
    folder: that holds them; made if need be.
    note: shows a line.
  """

  def __init__(self, folder: pathlib.Path, note: Callable[[str], None]):
    folder.mkdir(parents=True, exist_ok=True)
    self._folder, self._note = folder, note

  def path(self, step: int) -> pathlib.Path:
    return self._folder / str(step)

  def new_path(self, step: int) -> pathlib.Path:
    """Returns a free path at which the step can be written."""
    path = self.path(step)
    return path.with_name(f"{step}{AGAIN}") if path.exists() else path

  def steps(self) -> list[int]:
    """Returns the steps that have a folder, ascending."""
    return sorted(int(path.name) for path in self._folder.iterdir() if _is_of_step(path, ""))

  def replace(self, step: int, new: pathlib.Path) -> None:
    """Gives a step the folder `new` in place of its old one, if it has one."""
    if new != self.path(step) and hosts.is_first():
      self.path(step).rename(self._folder / f"{step}{BEFORE}")
      self._finish_replacement(step)

  def _finish_replacement(self, step: int) -> None:
    """Names the new folder and drops the old one; in the first process."""
    path = self.path(step)
    path.with_name(f"{step}{AGAIN}").rename(path)
    files.fsync_parent(path)
    self._drop(path.with_name(f"{step}{BEFORE}"))

  def clean_up(self) -> None:
    """Deletes unfinished checkpoints and completes a replacement that was interrupted.

    What no run wrote is set aside.
    """
    hosts.gather("")
    if hosts.is_first():
      for before in self._ending_in(BEFORE):
        path, again = (before.with_suffix(suffix) for suffix in ("", AGAIN))
        if path.exists():
          self._drop(before)
        elif again.exists():
          self._finish_replacement(int(path.name))
        else:
          before.rename(path)
    for suffix, state in ((AGAIN, "verified"), (TEMPORARY, "finished")):
      for path in self._ending_in(suffix):
        name = path.name.removesuffix(TEMPORARY)
        self._note(f"checkpoint {name} was not {state}: dropped")
        self._drop(path)
    if hosts.is_first():
      for path in sorted(self._folder.iterdir()):
        is_known = UNUSABLE in path.name or path.name.startswith(".")
        if not (is_known or _is_of_step(path, "")):
          self._rename(path, f"{printable(str(path))} is no checkpoint")
    hosts.gather("")

  def set_aside(self, step: int, reason: str) -> None:
    """Renames an unusable checkpoint, which is then no step any more."""
    hosts.gather("")
    if hosts.is_first():
      self._rename(self.path(step), reason)
    hosts.gather("")

  def _ending_in(self, suffix: str) -> list[pathlib.Path]:
    return sorted(path for path in self._folder.iterdir() if _is_of_step(path, suffix))

  def _rename(self, path: pathlib.Path, reason: str) -> None:
    names = (f"{path.name[:50]}{UNUSABLE}{'-' * i}" for i in itertools.count())
    target = next(target for target in map(self._folder.joinpath, names) if not target.exists())
    path.rename(target)
    self._note(f"{reason}; set aside as {printable(target.name)}")

  def drop_all_but(self, steps: Collection[int]) -> None:
    """Deletes the folders of all other steps."""
    for step in set(self.steps()) - set(steps):
      self._drop(self.path(step))
    hosts.gather("")

  def _drop(self, path: pathlib.Path) -> None:
    if hosts.is_first():
      shutil.rmtree(path)


def _is_of_step(path: pathlib.Path, suffix: str) -> bool:
  """Returns whether this is a folder that is named by a step and then `suffix`."""
  name = path.name.removesuffix(suffix)
  if suffix == TEMPORARY:  # orbax's, also of a step that is saved again
    name = name.removesuffix(AGAIN)
  return path.name.endswith(suffix) and bool(STEP.fullmatch(name)) and path.is_dir()
