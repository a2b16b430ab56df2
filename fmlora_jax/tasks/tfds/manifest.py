"""Manifest of prepared data: facts of their first use, which must hold ever after."""

import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fmlora_jax.config import ConfigError
from fmlora_jax.tasks.sequence import SPLIT_CODES
from fmlora_jax.tasks.splits import SplitCodes
from fmlora_jax.tasks.tfds.index import RecordIndex, SplitFiles, first_change, from_npz, to_npz

_log = logging.getLogger(__name__)


class Manifest:
  """The facts about one builder's data, in files beside them.

  `.fmlora_manifest_<builder>_<version>.json` holds of each published split in use the number of
  records, the histogram of labels and the sha256 of its index; of each split rule in use the
  numbers of images and a sha256. `.fmlora_index_<builder>_<version>_<split>.npz` is the index
  itself; without it, or if it does not fit its sha256, it is made again.

  Args:
    root: folder of the data.
    builder, version: as TFDS names them.
  """

  def __init__(self, root: pathlib.Path, builder: str, version: str):
    self._root, self._builder = root, builder
    self._stem = f"{builder.replace('/', '-')}_{version}"
    self._path = root / f".fmlora_manifest_{self._stem}.json"
    empty = {"builder": builder, "version": version, "splits": {}, "split_rules": {}}
    self._facts = self._read() if self._path.exists() else empty

  def index(
    self, split: str, files: SplitFiles, num_classes: int, make_index: Callable[[], RecordIndex]
  ) -> RecordIndex:
    """Returns the index of a published split: the stored one, or a new one, which is stored.

    Raises:
      ConfigError: if the data are not those of their first use.
    """
    facts, shards = self._facts["splits"].get(split), _stamps(files.paths)
    index_path = self._root / f".fmlora_index_{self._stem}_{split}.npz"
    stored = from_npz(index_path)
    if not (facts and stored and stored.digests() == facts["sha256"]):
      stored = None
    if stored and facts["shards"] == shards:
      return stored
    index = make_index()
    digests = index.digests()
    # the earliest manifests have no digest of contents
    if facts and any(digests[name] != digest for name, digest in facts["sha256"].items()):
      raise ConfigError(
        f"{files.split} in {str(self._root)!r} has other labels, images or order than when first "
        f"used ({first_change(files, stored, index)}): prepare it again, or move "
        f"{self._path.name} there away if this was meant"
      )
    self._facts["splits"][split] = {
      "num": len(index.labels),
      "histogram": np.bincount(index.labels, minlength=num_classes).tolist(),
      "sha256": digests,
      "shards": shards,
    }
    self._write(index_path, to_npz(index))
    self._write_facts()
    return index

  def pin(self, rule: str, codes: SplitCodes) -> None:
    """Stores the result of a split rule, or checks that it has not changed.

    Raises:
      ConfigError: if it has.
    """
    facts: dict[str, Any] = {
      split: int(np.sum(codes == code)) for split, code in SPLIT_CODES.items()
    }
    facts["sha256"] = hashlib.sha256(codes.astype(np.int8).tobytes()).hexdigest()
    stored = self._facts["split_rules"].setdefault(rule, facts)
    if stored is facts:
      self._write_facts()
    elif stored != facts:
      raise ConfigError(
        f"config.tasks.split is {rule!r}: its split of {self._builder} has changed; "
        f"{self._path.name} in {str(self._root)!r} says {stored}, now it is {facts}; move that "
        "file away if this was meant"
      )

  def _read(self) -> dict[str, Any]:
    try:
      facts = json.loads(self._path.read_text())
      rules = facts.get("split_rules", facts.pop("cuts", {}))  # earlier versions called them cuts
      return {**facts, "splits": dict(facts["splits"]), "split_rules": dict(rules)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
      raise ConfigError(f"{self._path} can't be read ({error}): move it away") from None

  def _write_facts(self) -> None:
    self._write(self._path, json.dumps(self._facts, indent=1, sort_keys=True).encode())

  def _write(self, path: pathlib.Path, content: bytes) -> None:
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
      draft.write_bytes(content)
      os.replace(draft, path)
    except OSError as error:
      _log.warning("%s: can't be written (%s); the next run makes the index again", path, error)


def _stamps(paths: Sequence[pathlib.Path]) -> dict[str, list[int]]:
  """Returns size in bytes and time of change of each file; copied files are indexed again."""
  return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
