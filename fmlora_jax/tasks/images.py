"""Decodes image files of any format to RGB and resizes them to one shorter side."""

import concurrent.futures
import contextlib
import functools
import hashlib
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
from jaxtyping import Int, Shaped, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

# no pictures, or decoded by a program outside of Pillow
NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
PHOTOS = {".heic", ".heif", ".hif"}  # images, whether the package that reads them is there or not
PHOTO_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
PAGED = {"GIF", "PNG", "TIFF", "WEBP"}  # formats whose further frames are images of their own
NEAR_BLACK = 16  # 4095 of 65535, in bytes
MAX_ASPECT = 2  # longer images are cropped at the centre
_PILLOW = threading.Lock()


class BrokenImage(ValueError):
  """An unusable file; the message is the reason, without the file's name."""


def extensions() -> frozenset[str]:
  """Returns the file extensions that count as images, such as ".png", in lower case."""
  known = Image.registered_extensions().items()
  # MPO, of stereo cameras, is opened as JPEG.
  opened = {e for e, f in known if (f in Image.OPEN or f == "MPO") and f not in NOT_IMAGES}
  return frozenset(opened | PHOTOS)


@functools.cache
def _add_photos() -> None:
  """Adds the formats of phones to Pillow's, if the package for them is installed."""
  with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()


@contextlib.contextmanager
def pillow_limited(max_pixels: int) -> Iterator[None]:
  """Refuses images of more pixels everywhere in Pillow; one context at a time.

  Icons hold images that Pillow decodes when it opens the icon, so only its own limit is early
  enough. Silences Pillow's warnings too, mostly about odd metadata; a failure to decode raises.
  """
  with _PILLOW, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    Image.init()  # all formats, not the five usual ones
    _add_photos()
    # Pillow warns at the limit and raises an error at twice as many
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, cast(int, max_pixels / 2)
    try:
      yield
    finally:
      Image.MAX_IMAGE_PIXELS = limit


@contextlib.contextmanager
def threads(max_pixels: int) -> Iterator[concurrent.futures.ThreadPoolExecutor]:
  """Yields threads within `pillow_limited`; an error or Ctrl-C cancels pending work."""
  with pillow_limited(max_pixels), concurrent.futures.ThreadPoolExecutor() as pool:
    try:
      yield pool
    finally:
      pool.shutdown(cancel_futures=True)


def on_canvases(
  count: int,
  canvas: tuple[int, int],
  pixels: Callable[[int], UInt8[np.ndarray, "h w 3"]],
  max_pixels: int,
) -> tuple[UInt8[np.ndarray, "k H W 3"], Int[np.ndarray, "k 2"]]:
  """Returns pixels(0), ... pixels(count-1) in the upper left corners of canvases, and their sizes.

  Args:
    canvas: (height, width) that each image fits into.
    pixels: called in `threads`.
    max_pixels: of an image before it is resized.
  """
  canvases, sizes = np.zeros((count, *canvas, 3), np.uint8), np.zeros((count, 2), np.int32)

  def put(index):
    image = pixels(index)
    height, width = sizes[index] = image.shape[:2]
    canvases[index, :height, :width] = image

  with threads(max_pixels) as pool:
    list(pool.map(put, range(count)))
  return canvases, sizes


def read(path: str | os.PathLike) -> tuple[Image.Image, str, bool]:
  """Returns (image in RGB, decoded and upright; sha256 hex of its file; whether it has pages).

  Call within `pillow_limited`. Of several pages or frames the first is taken.

  Raises:
    BrokenImage: if it can't be decoded, or has too many pixels, before any is decoded.
  """
  with _errors_named(), _open_file(path) as file:
    with _opened(file) as image:
      rgb = to_rgb(ImageOps.exif_transpose(image))
      has_pages = _has_pages(image)
    # unbuffered: libtiff moves the position behind the buffer's back
    with open(file.fileno(), "rb", buffering=0, closefd=False) as content:
      content.seek(0)
      return rgb, hashlib.file_digest(content, "sha256").hexdigest(), has_pages


def _has_pages(image: Image.Image) -> bool:
  """Returns whether a file has a second frame; moves to it."""
  if image.format not in PAGED:
    return False
  try:
    image.seek(1)
  except EOFError:
    return False
  except Exception:  # a second frame that is damaged, of which decoders raise nearly anything
    return True
  return True


def decode(file: io.BytesIO) -> Image.Image:
  """Returns the image of a file in memory, not turned upright, as in the published codes."""
  with _errors_named(), _opened(file) as image:
    return to_rgb(image)


def image_size(file: io.BytesIO) -> tuple[int, int]:
  """Returns (width, height) in pixels from the header of a file; raises as `decode`."""
  with _errors_named(), _opened(file) as image:
    return image.size


def _open_file(path: str | os.PathLike) -> io.BufferedReader:
  if not os.path.isfile(path):  # a pipe would block for ever
    raise BrokenImage("not a file, or a link to nothing")
  if os.path.getsize(path) == 0:
    raise BrokenImage("the file is empty")
  return open(path, "rb")


def _opened(file: io.BufferedReader | io.BytesIO) -> Image.Image:
  """Returns an image that is not decoded yet, unless its format is decoded when it is opened."""
  head = file.read(12)
  try:
    return Image.open(file, formats=[name for name in Image.OPEN if name not in NOT_IMAGES])
  except UnidentifiedImageError:
    if head[4:8] == b"ftyp" and head[8:] in PHOTO_BRANDS and "HEIF" not in Image.OPEN:
      raise BrokenImage("a HEIC photo: run pip install 'fmlora_jax[photos]' to read it") from None
    raise BrokenImage("not an image that Pillow can open") from None


@contextlib.contextmanager
def _errors_named() -> Iterator[None]:
  """Turns every error of Pillow and of the file system into a BrokenImage."""
  try:
    yield
  except BrokenImage:
    raise
  except Image.DecompressionBombError:
    most = int(2 * (Image.MAX_IMAGE_PIXELS or 0))
    raise BrokenImage(f"it has more pixels than config.tasks.max_pixels, {most}") from None
  except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    raise BrokenImage(reason) from error


def to_rgb(image: Image.Image) -> Image.Image:
  """Returns the image in mode RGB: as Pillow's `convert`, except for modes that it clips.

  Transparency is dropped, as in the published codes: the colours below it show. 16 bits are scaled
  by 1/257, 32-bit integers too if they fit 16 bits. Floats are taken as 0..1 if none is above 1,
  else as 0..255.

  Raises:
    BrokenImage: if a number is outside of these ranges, or not finite.
  """
  if image.mode.startswith("I") or image.mode == "F":
    return Image.fromarray(_to_bytes(np.asarray(image))).convert("RGB")
  if image.mode in ("P", "PA"):  # palettes may hold transparency, which RGB would warn about
    image = image.convert("RGBA")
  return image.convert("RGB")


def _to_bytes(values: Shaped[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
  lo, hi = values.min(), values.max()
  if not (np.isfinite(lo) and np.isfinite(hi)):
    raise BrokenImage("pixels that are not finite numbers")
  if values.dtype.kind == "f":
    largest, scale = 255.0, 255.0 if hi <= 1 else 1.0
  else:
    largest, scale = 65535, 1 / 257
  if lo < 0 or hi > largest:
    raise BrokenImage(f"pixels in {lo:g}..{hi:g}, must be in 0..{largest:g}")
  return np.rint(values * scale).astype(np.uint8)


def is_near_black(image: Image.Image) -> bool:
  """Returns whether no value of an RGB image is above that of 12 bits stored in 16 bits."""
  return max(hi for _, hi in cast(tuple, image.getextrema())) <= NEAR_BLACK


def resized_size(
  size: tuple[int, int], side: int
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
  """Returns (width, height) after `resize_shorter_side`, and the box of the image that it keeps."""
  shorter = min(size)
  width, height = (min(length, MAX_ASPECT * shorter) for length in size)
  left, top = (size[0] - width) // 2, (size[1] - height) // 2
  box = (left, top, left + width, top + height)
  return (side * width // shorter, side * height // shorter), box


def resize_shorter_side(image: Image.Image, side: int) -> Image.Image:
  """Returns the image with a shorter side of `side` pixels, bicubic with antialias.

  The longer side is in proportion, truncated as in torchvision. An image longer than `MAX_ASPECT`
  times its shorter side is cropped at the centre first. Small images are enlarged.
  """
  size, box = resized_size(image.size, side)
  return image.resize(size, Image.Resampling.BICUBIC, box=box)
