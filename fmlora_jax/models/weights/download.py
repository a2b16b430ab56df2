"""Downloads of weight files: from the Hugging Face Hub, into its cache, or from a bucket."""

import contextlib
import functools
import importlib.util
import logging
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath

CONNECT_S = 10  # to the Hub; without this try its library retries for half a minute

_log = logging.getLogger(__name__)


class FetchError(Exception):
  """A failed download; the message is the reason in one line."""


def has_hub() -> bool:
  """Returns whether huggingface_hub is installed."""
  return importlib.util.find_spec("huggingface_hub") is not None


def is_cached(repository: str, name: str, revision: str | None) -> bool:
  """Returns whether a file is in the cache of huggingface_hub, whole."""
  if not has_hub():
    return False
  import huggingface_hub

  cached = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
  return isinstance(cached, str)


def from_hub(repository: str, name: str, revision: str | None) -> pathlib.Path:
  """Returns a file in the cache of huggingface_hub; downloads it if it is not there.

  The environment variable HF_HUB_OFFLINE=1 forbids downloads. Only whole files enter the cache.

  Raises:
    FetchError: if huggingface_hub is not installed or the download fails.
  """
  try:
    import huggingface_hub
  except ImportError:
    raise FetchError("pip install huggingface_hub to download it") from None
  cached = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
  if isinstance(cached, str):
    return pathlib.Path(cached)
  ask = functools.partial(huggingface_hub.hf_hub_download, repository, name, revision=revision)
  try:
    huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=CONNECT_S)
    size = ask(dry_run=True).file_size or 0
    _log.info("downloading %s of %s, %.0f MB, once", name, repository, size / 1e6)
    return pathlib.Path(ask())
  except Exception as error:  # network, Hub and disk raise errors of many types
    raise FetchError(f"the download failed: {_line(error.__cause__ or error)}") from None


@contextlib.contextmanager
def from_bucket(url: str) -> Iterator[pathlib.Path]:
  """Yields a local copy of gs://BUCKET/FILE, deleted afterwards, as the original may change.

  Raises:
    FetchError: if it can't be read: no gcsfs, no credentials, no such file.
  """
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder, url.rpartition("/")[2])
    try:
      with epath.Path(url).open("rb") as source, copy.open("wb") as target:
        shutil.copyfileobj(source, target)
    except Exception as error:  # as above
      raise FetchError(_line(error)) from None
    yield copy


def _line(error: BaseException) -> str:
  return " ".join(str(error).split()) or type(error).__name__
