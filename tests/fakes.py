"""Small data sets in the form that TFDS prepares, written by its own builders without a download.

Only where the examples come from is replaced; files, keys, order and features are the real ones.
"""

import io
import types

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

tfds.disable_progress_bar()

ODD = (  # what real sets hold besides RGB: mode, kind of file
  ("L", "JPEG"),
  ("CMYK", "JPEG"),
  ("P", "PNG"),
  ("RGBA", "PNG"),
  ("LA", "PNG"),
  ("1", "PNG"),
)


def encode(image: Image.Image, kind: str = "JPEG") -> bytes:
  file = io.BytesIO()
  image.save(file, kind)
  return file.getvalue()


def picture(label: int, index: int, size: tuple[int, int]) -> Image.Image:
  """Returns noise around a colour of the class."""
  rng = np.random.default_rng([label, index])
  colour = np.random.default_rng(label).uniform(40, 215, 3)
  pixels = rng.normal(colour, 20, (size[1], size[0], 3))
  return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def image_file(label: int, index: int) -> bytes:
  """Returns a photograph in miniature; the first of each class are odd ones."""
  if index < len(ODD):
    mode, kind = ODD[index]
    return encode(picture(label, index, (12, 9)).convert(mode), kind)
  size = (1, 14) if index == len(ODD) else (10 + index % 5, 8 + label % 5)
  return encode(picture(label, index, size))


def write(name: str, splits: dict, data_dir, shards: int | None = None) -> None:
  """Writes {split: [(key, example), ...]} with the builder `name`."""
  builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
  builder._split_generators = lambda manager: {s: iter(e) for s, e in splits.items()}
  builder._make_download_manager = lambda **_: types.SimpleNamespace(downloaded_size=0)
  settings = tfds.download.DownloadConfig(num_shards=shards) if shards else None
  builder.download_and_prepare(download_config=settings)


def imagenet_r(data_dir, classes: int = 20, each: int = 30) -> None:
  names = tfds.builder("imagenet_r", data_dir=data_dir).info.features["label"].names
  examples = []
  for label in range(classes):
    wnid = names[label * 47]  # of 1,000, as the 200 that have images are
    for i in range(each):
      file = f"{('art', 'toy', 'sketch')[i % 3]}_{i}.jpg"
      example = {"image": image_file(label, i), "label": wnid, "file_name": f"{wnid}/{file}"}
      examples.append((f"{wnid}_{file}", example))
  write("imagenet_r", {"test": examples}, data_dir, shards=3)


def cifar100(data_dir, classes: int = 20, train: int = 12, test: int = 3) -> None:
  def examples(split, each):
    for i in range(classes * each):
      label = i % classes
      image = encode(picture(label, i, (32, 32)), "PNG")
      example = {"id": f"{split}_{i:05d}", "image": image, "label": label, "coarse_label": 0}
      yield i, example

  splits = {split: list(examples(split, n)) for split, n in (("train", train), ("test", test))}
  write("cifar100", splits, data_dir)


def caltech_birds2011(data_dir, classes: int = 20, each: int = 25) -> None:
  names = tfds.builder("caltech_birds2011", data_dir=data_dir).info.features["label"].names
  box = tfds.features.BBox(ymin=0.1, xmin=0.1, ymax=0.9, xmax=0.9)
  mask = encode(Image.new("L", (8, 8)), "PNG")

  def examples(split):
    for label in range(classes):
      for i in range(each):
        path = f"CUB_200_2011/images/{names[label]}/{split}_{i}.jpg"
        yield (
          path,
          {
            "image": image_file(label, i),
            "image/filename": path,
            "label": label,
            "label_name": names[label],
            "bbox": box,
            "segmentation_mask": mask,
          },
        )

  write("caltech_birds2011", {s: list(examples(s)) for s in ("train", "test")}, data_dir)


def domainnet(data_dir, classes: int = 10, train: int = 9, test: int = 3) -> None:
  """Of the last class there are five training images."""
  for domain in ("real", "painting", "clipart", "quickdraw", "infograph", "sketch"):
    splits = {}
    for split, each in (("train", train), ("test", test)):
      counts = [each] * (classes - 1) + [min(each, 5)]
      labels = [label for label, count in enumerate(counts) for _ in range(count)]  # as published
      splits[split] = [
        (f"{domain}_{split}_{i:08d}", {"image": image_file(label, i % 9), "label": label})
        for i, label in enumerate(labels)
      ]
    write(f"domainnet/{domain}", splits, data_dir, shards=2)
