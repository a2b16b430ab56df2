"""The digits in four domains; a digit that is for test in one domain is for test in all. Ours."""

import functools

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageChops, ImageFilter

from fmlora_jax.config import TasksConfig
from fmlora_jax.tasks.benchmarks import digits
from fmlora_jax.tasks.sequence import DataSource

NUM_CLASSES = digits.NUM_CLASSES
DOMAIN_NAMES = ("plain", "inverted", "rotated", "noisy")
NOISE = 32.0  # standard deviation in grey levels
BLUR = 1 / 24  # standard deviation in image sides: a third of an original pixel


def _render(image: Image.Image, domain: str, seed: int) -> Image.Image:
  """Returns the grey image in the style of `domain`; `seed` is of the noise."""
  if domain == "inverted":
    return ImageChops.invert(image)
  if domain == "rotated":
    return image.transpose(Image.Transpose.ROTATE_90)
  if domain == "noisy":
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(image.width * BLUR)), np.float64)
    noise = np.random.RandomState(seed).normal(0.0, NOISE, blurred.shape)
    return Image.fromarray(np.clip(np.rint(blurred + noise), 0, 255).astype(np.uint8))
  return image


def _decode(images: UInt8[np.ndarray, "n 8 8"], size: int, records: Int[np.ndarray, " k"]):
  rendered = []
  for record in records:
    domain, base = divmod(int(record), len(images))
    rendered.append(_render(digits.enlarge(images[base], size), DOMAIN_NAMES[domain], base))
  return digits.pack(rendered, size)


def make(config: TasksConfig, source_size: int) -> DataSource:
  """Returns 4 x 1,797 records: all digits in the first domain, then all in the second ..."""
  del config
  images, labels = digits.load()
  num_domains, count = len(DOMAIN_NAMES), len(labels)

  return DataSource(
    name="digits_dil",
    labels=np.tile(labels, num_domains),
    class_names=digits.CLASS_NAMES,
    canvas=(source_size, source_size),
    decode=functools.partial(_decode, images, source_size),
    digest=digits.digest("digits_dil", images, labels),
    domains=np.repeat(np.arange(num_domains, dtype=np.int32), count),
    domain_names=DOMAIN_NAMES,
    group=np.tile(np.arange(count), num_domains),
  )
