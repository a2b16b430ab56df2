"""Rendered Latin letters: small grey images to pre-train on without a download.

The faces are those that matplotlib installs. A letter is cropped to its ink, so upper and lower
case of one shape (c and C) are one class. No digit is ever drawn.
"""

import functools
import itertools
import pathlib
import string
from typing import cast

import matplotlib
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont

SIDE = 32  # pixels of an image
COARSE = 8  # pixels of a coarse image before it is enlarged to SIDE
CANVAS = 48  # pixels of a bent letter, before it is averaged down
MESH_CELLS = 3  # cells of the bending mesh along a side of the canvas
GLYPH_SIZE = 48  # pixels of an em
STROKES = 4  # an outline is thickened by 0..STROKES-1 pixels of a glyph on each side

_STEPS = np.linspace(0, CANVAS, MESH_CELLS + 1, dtype=int).tolist()
GRID = np.stack(np.meshgrid(_STEPS, _STEPS), -1)  # [row, column, (x, y)]: the corners of CELLS
CELLS = [
  (left, top, right, bottom)
  for top, bottom in itertools.pairwise(_STEPS)
  for left, right in itertools.pairwise(_STEPS)
]

# alphabets among STIXGeneral's mathematical signs: first code point of A..Z, a..z
ALPHABETS = {
  "bold-script": 0x1D4D0,
  "sans": 0x1D5A0,
  "sans-bold": 0x1D5D4,
  "sans-italic": 0x1D608,
  "sans-bold-italic": 0x1D63C,
  "mono": 0x1D670,
}

# all faces of matplotlib with a whole Latin alphabet; cmsy, cmex, STIXSiz*, *Display have none
FACES = (
  *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
  *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
  *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
  *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
  *(f"STIXGeneral:{alphabet}" for alphabet in ALPHABETS),
  *("cmr10", "cmb10", "cmmi10", "cmss10", "cmti10", "cmtt10"),
)

_MERGED = ("cC", "kK", "oO", "pP", "sS", "uU", "vV", "wW", "xX", "zZ", "lI")
CLASSES: tuple[str, ...] = (
  *_MERGED,
  *(letter for letter in string.ascii_letters if letter not in "".join(_MERGED)),
)


def pool(
  count: int, *, faces: tuple[str, ...], seed: tuple[int, ...], coarse: float, quarter_turns: float
) -> tuple[UInt8[np.ndarray, "n 32 32"], Int[np.ndarray, " n"]]:
  """Returns `count` images, bright on black, and their labels: positions in `CLASSES`.

  Args:
    count: n; image i depends on `seed` and i alone, so a longer pool starts with a shorter one.
    faces: members of `FACES`, drawn evenly.
    seed: seed of the NumPy generators.
    coarse: share of images with only COARSE x COARSE pixels of detail.
    quarter_turns: share of images turned by 90, 180 or 270 degrees.
  """
  images = np.empty((count, SIDE, SIDE), np.uint8)
  labels = np.empty(count, np.int32)
  for i in range(count):
    rng = np.random.default_rng((*seed, i))
    labels[i] = rng.integers(len(CLASSES))
    letter = CLASSES[labels[i]][rng.integers(len(CLASSES[labels[i]]))]
    glyph = _glyph(faces[rng.integers(len(faces))], letter, int(rng.integers(STROKES)))
    bent = _bend(glyph, rng, turned=rng.random() < quarter_turns)
    images[i] = np.asarray(_reduce(bent, rng, coarse=rng.random() < coarse))
  return images, labels


@functools.cache
def _glyph(face: str, letter: str, stroke: int) -> Image.Image:
  """Returns a letter cropped to its ink, with a black rim of one pixel."""
  file, _, alphabet = face.partition(":")
  path = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", f"{file}.ttf")
  font = ImageFont.truetype(path, GLYPH_SIZE)
  if alphabet:
    order = string.ascii_uppercase + string.ascii_lowercase
    letter = chr(ALPHABETS[alphabet] + order.index(letter))
  image = Image.new("L", (3 * GLYPH_SIZE, 3 * GLYPH_SIZE))
  corner = (GLYPH_SIZE, GLYPH_SIZE)
  ImageDraw.Draw(image).text(corner, letter, fill=255, font=font, stroke_width=stroke)
  left, top, right, bottom = cast(tuple[int, int, int, int], image.getbbox())
  return image.crop((left - 1, top - 1, right + 1, bottom + 1))


def _bend(glyph: Image.Image, rng: np.random.Generator, *, turned: bool) -> Image.Image:
  """Scales, shears, turns, shifts and dents a glyph at random onto a canvas."""
  angle = np.deg2rad(rng.normal(0, 10) + 90 * turned * rng.integers(1, 4))
  aspect, shear = np.exp(rng.normal(0, 0.15)), rng.normal(0, 0.15)
  scale = CANVAS * rng.uniform(0.7, 1.0) / max(glyph.size)
  cos, sin = np.cos(angle), np.sin(angle)
  # canvas -> glyph, the way PIL maps: turn back, then undo shear, aspect and scale
  back = np.array([[aspect, shear], [0, 1 / aspect]]) @ [[cos, sin], [-sin, cos]] / scale
  nodes = GRID - rng.normal(CANVAS / 2, 0.04 * CANVAS, 2)
  nodes = nodes + rng.normal(0, rng.uniform(0, 0.05 * CANVAS), nodes.shape)
  source = nodes @ back.T + np.divide(glyph.size, 2)
  quads = np.concatenate(  # corners from the upper left, counter-clockwise
    [source[:-1, :-1], source[1:, :-1], source[1:, 1:], source[:-1, 1:]], axis=-1
  )
  mesh = list(zip(CELLS, quads.reshape(-1, 8).tolist(), strict=True))
  return glyph.transform((CANVAS, CANVAS), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def _reduce(image: Image.Image, rng: np.random.Generator, *, coarse: bool) -> Image.Image:
  """Averages a canvas down to SIDE pixels; with `coarse` by way of COARSE pixels."""
  sides = [COARSE] if coarse else [int(rng.integers(COARSE + 2, SIDE + 1))]
  image = image.resize((sides[0], sides[0]), Image.Resampling.BOX)
  filters = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)
  return image.resize((SIDE, SIDE), filters[rng.integers(2)])
