"""The pixels that the ViT gets of three small pictures, with a fixed key, never change.

The file of what it sees is made again by: python tests/trust/test_pixels.py
"""

import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from fmlora_jax.input import augment
from fmlora_jax.tasks import images
from fmlora_jax.types import Examples

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "pixels.npz"
SIDE, SOURCE = 8, 12


def pictures() -> Examples:
  """Returns a wide, a high and a square picture, written as PNG and read as a run reads files."""
  rng, decoded = np.random.default_rng(0), []
  for width, height in ((20, 14), (12, 18), (16, 16)):
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
    with images.pillow_limited(10**6):
      decoded.append(np.asarray(images.resize_shorter_side(images.decode(file), SOURCE)))
  sizes = np.array([picture.shape[:2] for picture in decoded], np.int32)
  canvases = np.zeros((len(decoded), *sizes.max(0), 3), np.uint8)
  for canvas, picture in zip(canvases, decoded, strict=True):
    canvas[: len(picture), : picture.shape[1]] = picture
  labels = np.arange(len(decoded), dtype=np.int32)
  return Examples(images=canvases, sizes=sizes, labels=labels, valid=labels >= 0)


def seen() -> dict[str, np.ndarray]:
  """Returns the pixels of each augmentation and normalisation, in training and at test time."""
  examples, rows = jax.tree.map(jnp.asarray, pictures()), jnp.arange(3)
  key = jax.random.key(0)
  presets = [(name, "half") for name in augment.PRESETS]
  presets += [("none", name) for name in augment.NORMALISATIONS if name != "half"]
  found = {}
  for augmentation, normalisation in presets:
    how = {"augmentation": augmentation, "normalisation": normalisation, "size": SIDE}
    how |= {"dtype": jnp.float32, "gather": augment.gather_rows}
    name = f"{augmentation}/{normalisation}"
    found[f"{name}/train"] = augment.train_batch(examples, rows, key, **how).images
    found[f"{name}/test"] = augment.test_batch(examples, rows, **how).images
  return {name: np.asarray(pixels) for name, pixels in found.items()}


def test_pixels_are_those_of_the_file_and_each_preset_has_its_own():
  golden, now = np.load(GOLDEN), seen()
  assert set(golden.files) == now.keys()
  worst = max(float(np.max(np.abs(golden[name] - now[name]))) for name in now)
  print(f"{len(now)} kinds of pixels within {worst:.1e} of those kept")
  assert worst < 1e-5  # float32, in another order on another processor
  both = ("train", "test")  # coda and coda_uncropped differ at test time alone
  trained = [np.stack([golden[f"{p}/half/{when}"] for when in both]) for p in augment.PRESETS]
  normalised = [golden[f"none/{name}/test"] for name in augment.NORMALISATIONS]
  for kinds in (trained, normalised):
    for i, one in enumerate(kinds):
      assert all(np.max(np.abs(one - other)) > 0.01 for other in kinds[:i])


if __name__ == "__main__":
  np.savez_compressed(GOLDEN, **seen())
