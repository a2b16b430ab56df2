"""Rendered Latin letters, warped like handwriting: what the micro backbone is pre-trained on.

No digit is ever drawn, so that digits stay new to the backbone. Fonts are those that matplotlib
ships; the same seed gives the same pixels.
"""

import pathlib
import string

import matplotlib
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont

# fonts whose Latin letters are letters: no symbol fonts, no "display" variants
PREFIXES = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmb10", "cmmi10", "cmr10", "cmss10", "cmt")
# lower-case letters that are a smaller capital (or look like l = I) share its class
SAME_SHAPE = {**{c: c.upper() for c in "ckopsuvwxyz"}, "l": "I", "i": "I"}
LETTERS = tuple(string.ascii_letters)
CLASSES = tuple(sorted({SAME_SHAPE.get(letter, letter) for letter in LETTERS}))

SIDE = 32  # pixels of an image
CANVAS = 64  # drawn at twice the size, then warped and reduced


def fonts() -> list[pathlib.Path]:
  """Returns the font files, sorted by name."""
  folder = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf")
  files = (f for f in folder.glob("*.ttf") if f.name.startswith(PREFIXES))
  return sorted(f for f in files if "Display" not in f.name)


def render(
  files: list[pathlib.Path], count: int, seed: int
) -> tuple[UInt8[np.ndarray, "n 32 32"], Int[np.ndarray, " n"]]:
  """Returns `count` grey images, bright strokes on black, and their indices into CLASSES."""
  rng = np.random.default_rng(seed)
  faces = [ImageFont.truetype(str(file), 44) for file in files]
  images = np.empty((count, SIDE, SIDE), np.uint8)
  labels = np.empty(count, np.int32)
  for i in range(count):
    letter = LETTERS[rng.integers(len(LETTERS))]
    face = faces[rng.integers(len(faces))]
    images[i] = _degrade(_warp(_draw(letter, face, rng), rng), rng)
    labels[i] = CLASSES.index(SAME_SHAPE.get(letter, letter))
  return images, labels


def _draw(letter, face, rng) -> Image.Image:
  """Draws a letter that fills its canvas up to a random margin, its aspect half kept."""
  stroke = int(rng.integers(0, 4))
  left, top, right, bottom = face.getbbox(letter, stroke_width=stroke)
  width, height = right - left, bottom - top
  tight = Image.new("L", (width, height))
  ImageDraw.Draw(tight).text((-left, -top), letter, fill=255, font=face, stroke_width=stroke)
  tall = int(CANVAS * rng.uniform(0.65, 0.98))
  wide = int(np.clip(tall * (width / height) ** 0.7 * rng.uniform(0.75, 1.2), 10, 0.98 * CANVAS))
  canvas = Image.new("L", (CANVAS, CANVAS))
  shift = rng.integers(-3, 4, 2)
  place = ((CANVAS - wide) // 2 + int(shift[0]), (CANVAS - tall) // 2 + int(shift[1]))
  canvas.paste(tight.resize((wide, tall), Image.Resampling.BILINEAR), place)
  return canvas


def _warp(image, rng) -> Image.Image:
  """Turns, shears and bends: the four cells of a 3 x 3 grid of control points, each moved a little."""
  angle, shear = np.deg2rad(rng.normal(0, 9)), rng.normal(0, 0.15)
  turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
  turn = turn @ np.array([[1, shear], [0, 1]])
  grid = np.stack(np.meshgrid(*[np.array([-1.0, 0.0, 1.0])] * 2), -1) @ turn.T
  grid = (grid + rng.normal(0, 0.09, grid.shape) + 1) * CANVAS / 2
  half = CANVAS // 2
  cells = []
  for row in range(2):
    for column in range(2):
      box = (column * half, row * half, (column + 1) * half, (row + 1) * half)
      corners = [grid[row + r, column + c] for r, c in ((0, 0), (1, 0), (1, 1), (0, 1))]
      cells.append((box, tuple(float(v) for corner in corners for v in corner)))
  warped = image.transform(image.size, Image.Transform.MESH, cells, Image.Resampling.BILINEAR)
  if rng.random() < 0.15:
    warped = warped.rotate(90 * int(rng.integers(1, 4)))
  return warped


def _degrade(image, rng) -> UInt8[np.ndarray, "32 32"]:
  """Mostly 8 x 8 pixels enlarged, as scikit-learn's digits are; else other resolutions."""
  side = 8 if rng.random() < 0.75 else int(rng.integers(9, SIDE + 1))
  coarse = np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32)
  coarse = np.clip(coarse * rng.uniform(0.8, 1.6), 0, 255).astype(np.uint8)
  return np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
