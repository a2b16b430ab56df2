"""One folder per checkpoint, named by its step; renames and removals that a kill can't break."""

import itertools
import pathlib
import shutil
from collections.abc import Callable, Collection

from fmlora_jax.distributed import hosts
from fmlora_jax.workdir import files

TEMPORARY = ".orbax-checkpoint-tmp"  # suffix of folders that orbax has not finished
AGAIN, BEFORE = ".again", ".before"  # suffixes of the new and old folder of a step saved twice


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
    return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdecimal())

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
    """Deletes unfinished checkpoints and completes a replacement that was interrupted."""
    hosts.gather("")
    if hosts.is_first():
      for before in sorted(self._folder.glob(f"*{BEFORE}")):
        step = int(before.name.removesuffix(BEFORE))
        if self.path(step).exists():
          self._drop(before)
        else:
          self._finish_replacement(step)
    for suffix, state in ((AGAIN, "verified"), (TEMPORARY, "finished")):
      for path in sorted(self._folder.glob(f"*{suffix}")):
        name = path.name.removesuffix(TEMPORARY)
        self._note(f"checkpoint {name} was not {state}: dropped")
        self._drop(path)
    hosts.gather("")

  def set_aside(self, step: int, reason: str) -> None:
    """Renames an unusable checkpoint, which is then no step any more."""
    targets = (self._folder / f"{step}.unusable{'-' * i}" for i in itertools.count())
    target = next(path for path in targets if not path.exists())
    hosts.gather("")  # all have seen the same names
    if hosts.is_first():
      self.path(step).rename(target)
    self._note(f"{reason}; set aside as {target.name}")
    hosts.gather("")

  def drop_all_but(self, steps: Collection[int]) -> None:
    """Deletes the folders of all other steps."""
    for step in set(self.steps()) - set(steps):
      self._drop(self.path(step))
    hosts.gather("")

  def _drop(self, path: pathlib.Path) -> None:
    if hosts.is_first():
      shutil.rmtree(path)
