"""Decodes image files of any format to RGB and resizes them to one shorter side."""

import concurrent.futures
import contextlib
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Int, Shaped, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

# no pictures, or decoded by a program outside of Pillow
NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
MAX_ASPECT = 2  # longer images are cropped at the centre
_PILLOW = threading.Lock()


class BrokenImage(ValueError):
  """An unusable file; the message is the reason, without the file's name."""


def extensions() -> frozenset[str]:
  """Returns the file extensions that count as images, such as ".png", in lower case."""
  known = Image.registered_extensions().items()
  # MPO, of stereo cameras, is opened as JPEG.
  return frozenset(e for e, f in known if (f in Image.OPEN or f == "MPO") and f not in NOT_IMAGES)


@contextlib.contextmanager
def pillow_unlimited() -> Iterator[None]:
  """Lifts Pillow's limit on pixels, in place of which `read` has its own; one context at a time.

  Silences Pillow's warnings too, mostly about odd metadata; a failure to decode still raises.
  """
  with _PILLOW, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    Image.init()  # all formats, not the five usual ones
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
      yield
    finally:
      Image.MAX_IMAGE_PIXELS = limit


@contextlib.contextmanager
def threads() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
  """Yields threads within `pillow_unlimited`; an error or Ctrl-C cancels pending work."""
  with pillow_unlimited(), concurrent.futures.ThreadPoolExecutor() as pool:
    try:
      yield pool
    finally:
      pool.shutdown(cancel_futures=True)


def on_canvases(
  count: int, canvas: tuple[int, int], pixels: Callable[[int], UInt8[np.ndarray, "h w 3"]]
) -> tuple[UInt8[np.ndarray, "k H W 3"], Int[np.ndarray, "k 2"]]:
  """Returns pixels(0), ... pixels(count-1) in the upper left corners of canvases, and their sizes.

  Args:
    canvas: (height, width) that each image fits into.
    pixels: called in `threads`.
  """
  canvases, sizes = np.zeros((count, *canvas, 3), np.uint8), np.zeros((count, 2), np.int32)

  def put(index):
    image = pixels(index)
    height, width = sizes[index] = image.shape[:2]
    canvases[index, :height, :width] = image

  with threads() as pool:
    list(pool.map(put, range(count)))
  return canvases, sizes


def read(path: str | os.PathLike, max_pixels: int) -> Image.Image:
  """Returns the image in RGB, fully decoded and upright; call within `pillow_unlimited`.

  Of several frames the first is taken.

  Raises:
    BrokenImage: if it can't be decoded, or has more than `max_pixels`, before any is decoded.
  """
  with _opened(path, max_pixels) as image:
    return to_rgb(ImageOps.exif_transpose(image))


def decode(file: io.BytesIO, max_pixels: int) -> Image.Image:
  """Returns the image of a file in memory, not turned upright, as in the published codes."""
  with _opened(file, max_pixels) as image:
    return to_rgb(image)


def image_size(file: io.BytesIO, max_pixels: int) -> tuple[int, int]:
  """Returns (width, height) in pixels from the header of a file; raises as `decode`."""
  with _opened(file, max_pixels) as image:
    return image.size


@contextlib.contextmanager
def _opened(file: str | os.PathLike | io.BytesIO, max_pixels: int) -> Iterator[Image.Image]:
  """Yields an image that is not decoded yet; turns every error into a BrokenImage."""
  try:
    if not isinstance(file, io.BytesIO):
      if not os.path.isfile(file):  # a pipe would block for ever
        raise BrokenImage("not a file, or a link to nothing")
      if os.path.getsize(file) == 0:
        raise BrokenImage("the file is empty")
    formats = [name for name in Image.OPEN if name not in NOT_IMAGES]
    with Image.open(file, formats=formats) as image:
      if image.width * image.height > max_pixels:
        raise BrokenImage(
          f"{image.width} x {image.height} is more than config.tasks.max_pixels, {max_pixels}"
        )
      yield image
  except BrokenImage:
    raise
  except UnidentifiedImageError:
    raise BrokenImage("not an image that Pillow can open") from None
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
