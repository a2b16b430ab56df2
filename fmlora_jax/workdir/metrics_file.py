"""`metrics.jsonl` between sessions: cut to the checkpoint from which a run goes on, and compared.

A checkpoint has the size and the hash of the file, which is on the disk before the checkpoint is.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from fmlora_jax.workdir.files import explain_failure, fsync_parent, write_atomically

METRICS = "metrics.jsonl"


def sync(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns bytes, lines and sha256 of the file once all of it is on the disk."""
  data, path = b"", workdir / METRICS
  if path.exists():
    with explain_failure(path, 0), open(path, "rb") as file:
      os.fsync(file.fileno())
      fsync_parent(path)
      data = file.read()
  return {"bytes": len(data), "lines": data.count(b"\n"), "sha256": _sha256(data)}


def truncate(
  workdir: pathlib.Path, task: int, step: int, saved: Mapping[str, Any] | None = None
) -> str:
  """Drops all lines at or after (task, step), so that a resumed run logs nothing twice.

  A last line that a crash cut off goes too, and so do the lines of the end of `task`, which come
  again.

  Args:
    saved: what `sync` returned before the checkpoint was written; none of older checkpoints.

  Returns:
    A line about what the file has lost since; it is then kept under another name as it was found.
    Empty if it has lost nothing.
  """
  path = workdir / METRICS
  data = path.read_bytes() if path.exists() else b""
  lines = data.decode(errors="replace").splitlines(keepends=True)
  earlier = [line for line in lines if _is_before(line, task, step)]
  loss = ""
  if saved and _sha256(data[: saved["bytes"]]) != saved["sha256"]:
    loss = _explain_loss(path, data, saved["lines"], len(earlier))
  if data:
    write_atomically(path, "".join(earlier))
  return loss


def _explain_loss(path: pathlib.Path, data: bytes, before: int, now: int) -> str:
  what = f"{before - now} of {before} lines are missing" if now < before else "lines were changed"
  kept = ""
  if data:
    name = f"{path.name}.{_sha256(data)[:8]}.unusable"
    write_atomically(path.with_name(name), data)
    kept = f"; the file as it was found is {name}"
  return (
    f"warning    {path} is not what it was at the checkpoint, {what}: the curves of this run have "
    f"holes, its accuracies and parameters do not{kept}"
  )


def _sha256(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()


def _is_before(line: str, task: int, step: int) -> bool:
  """Returns whether a line is whole, and of an earlier task or an earlier training step."""
  try:
    record = json.loads(line)
    if not line.endswith("\n") or record["task"] > task:
      return False
    is_step = record["name"].startswith("train/") and record["step"] < step
    return record["task"] < task or is_step
  except (ValueError, KeyError, TypeError):
    return False
