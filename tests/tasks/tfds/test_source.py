"""Benchmarks read from data that TFDS's own builders wrote: pixels, order, splits and manifests."""

import io
import json
import logging
import pickle
import shutil
import subprocess
import sys

import fakes
import numpy as np
import pytest
import tensorflow_datasets as tfds
import yaml
from PIL import Image

from fmlora_jax import tasks
from fmlora_jax.config import ConfigError, TasksConfig
from fmlora_jax.tasks.sequence import SPLIT_CODES
from fmlora_jax.tasks.tfds import index


def make(root, benchmark, num_tasks=5, side=16, **fields):
  settings = TasksConfig(benchmark=benchmark, num_tasks=num_tasks, data_dir=str(root), **fields)
  return tasks.make(settings, seed=1993, source_size=side)


def test_tensorflow_is_not_there():
  """Then what passes here needs none."""
  command = "import fmlora_jax.tasks.tfds.source, sys; sys.exit('tensorflow' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", command]).returncode == 0


def test_pixels_are_those_of_pillow_whatever_the_file(prepared):
  source = make(prepared, "imagenet_r", side=8).source
  raw = tfds.builder("imagenet_r", data_dir=prepared, file_format="array_record").as_data_source(
    "test", decoders={"image": tfds.decode.SkipDecoding()}
  )
  modes = set()
  rows = np.arange(0, 600, 7)
  pixels, sizes = source.decode(rows)
  for row, got, (height, width) in zip(rows.tolist(), pixels, sizes.tolist(), strict=True):
    image = Image.open(io.BytesIO(raw[row]["image"]))
    modes.add(image.mode)
    rgb = image.convert("RGB")
    w, h = rgb.size
    short = min(w, h)
    box = [(w - min(w, 2 * short)) // 2, (h - min(h, 2 * short)) // 2]
    box += [box[0] + min(w, 2 * short), box[1] + min(h, 2 * short)]
    expected = rgb.resize((width, height), Image.Resampling.BICUBIC, box=box)
    np.testing.assert_array_equal(got[:height, :width], np.asarray(expected))
    assert not got[height:].any() and not got[:, width:].any()
    assert min(height, width) == 8
  assert modes >= {"L", "CMYK", "P", "RGBA", "LA", "1", "RGB"}


def test_imagenet_r_is_divided_by_the_lists_of_others(prepared, tmp_path):
  shutil.copytree(prepared / "imagenet_r", tmp_path / "imagenet_r")
  reader = tfds.builder("imagenet_r", data_dir=prepared, file_format="array_record")
  raw = {"image": tfds.decode.SkipDecoding()}
  names = [r["file_name"].decode() for r in reader.as_data_source("test", decoders=raw)]
  held = set(np.random.default_rng(0).permutation(names)[:100].tolist())
  for name, mine in (("train", set(names) - held), ("test", held)):
    paths = [f"data/imagenet-r/{file}" for file in sorted(mine)]
    (tmp_path / f"imagenet-r_{name}.yaml").write_text(yaml.safe_dump({"data": paths}))
  sequence = make(tmp_path, "imagenet_r", split="coda")
  test = np.concatenate([task.test for task in sequence.tasks])
  assert {names[row] for row in test} == held
  assert sum(len(task.train) for task in sequence.tasks) == len(names) - 100
  assert sequence.split_id == "imagenet_r/coda"


def test_large_images_fit_their_canvas(tmp_path):
  examples = [
    (
      i,
      {
        "id": str(i),
        "image": fakes.encode(fakes.picture(0, i, size)),
        "label": i,
        "coarse_label": 0,
      },
    )
    for i, size in enumerate([(500, 400), (300, 700)])
  ]
  fakes.write("cifar100", {"train": examples, "test": examples}, tmp_path)
  source = make(tmp_path, "cifar100", num_tasks=1, side=256, split="full").source
  assert source.canvas == (512, 320)
  sizes = source.decode(np.arange(4))[1].tolist()  # each split in the order of its hashed keys
  assert sorted(sizes) == [[256, 320]] * 2 + [[512, 256]] * 2


def test_reading_order_is_that_of_hashed_keys_over_all_shards(prepared):
  from tensorflow_datasets.core import hashing

  raw = tfds.builder("imagenet_r", data_dir=prepared, file_format="array_record").as_data_source(
    "test", decoders={"image": tfds.decode.SkipDecoding()}
  )
  assert len(list((prepared / "imagenet_r").rglob("*.array_record*"))) == 3
  files = [str(raw[i]["file_name"], "utf8") for i in range(len(raw))]
  hasher = hashing.Hasher("test")
  assert files == sorted(files, key=lambda name: hasher.hash_key(name.replace("/", "_")))


def test_classes_are_ranked_by_their_tfds_label(prepared):
  made = make(prepared, "imagenet_r", order="natural")
  names = tfds.builder("imagenet_r", data_dir=prepared).info.features["label"].names
  assert made.class_names == tuple(names[label * 47] for label in range(20))
  assert make(prepared, "cub200").num_classes == 20


@pytest.mark.parametrize(
  ("benchmark", "split", "expected"),
  [
    ("imagenet_r", None, (420, 60, 120)),
    ("imagenet_r", "slice80", (480, 0, 120)),
    ("imagenet_r", "stratified", (420, 60, 120)),
    ("cifar100", None, (220, 20, 60)),
    ("cifar100", "paper", (200, 40, 60)),
    ("cub200", None, (700, 100, 200)),
    ("cub200", "official", (460, 40, 500)),
    ("domainnet", None, (462, 54, 180)),
    ("domainnet", "paper", (516, 60, 120)),
    ("domainnet", "full", (516, 0, 180)),
  ],
)
def test_splits(prepared, benchmark, split, expected):
  made = make(prepared, benchmark, split=split)
  assert tuple(sum(len(getattr(t, name)) for t in made.tasks) for name in SPLIT_CODES) == expected
  rows = np.concatenate([getattr(t, name) for t in made.tasks for name in SPLIT_CODES])
  assert len(np.unique(rows)) == len(rows) == sum(expected)
  assert made.split_id == f"{benchmark}/{split or DEFAULT_SPLITS[benchmark]}"


DEFAULT_SPLITS = {
  "imagenet_r": "slice",
  "cifar100": "official",
  "cub200": "paper",
  "domainnet": "official",
}


def test_domainnet_in_domains(prepared):
  made = make(prepared, "domainnet", 6, scenario="dil", order="natural")
  assert [task.name for task in made.tasks] == [
    "clipart",
    "infograph",
    "painting",
    "quickdraw",
    "real",
    "sketch",
  ]
  assert all((len(t.train), len(t.val), len(t.test)) == (77, 9, 30) for t in made.tasks)
  fewer = make(
    prepared, "domainnet", 2, scenario="dil", order="natural", domains=("real", "sketch")
  )
  assert [task.name for task in fewer.tasks] == ["real", "sketch"]
  assert len(fewer.source.labels) == 2 * (86 + 30)
  assert fewer.manifest_sha256 != made.manifest_sha256


def test_any_set_of_tfds_is_a_sequence(prepared):
  official = make(prepared, "tfds:cifar100")
  assert official.split_id == "tfds:cifar100/val0.125-testown-seed0"
  assert sum(len(task.test) for task in official.tasks) == 60
  drawn = make(prepared, "tfds:imagenet_r")  # one published split: both are drawn
  assert drawn.split_id == "tfds:imagenet_r/val0.125-test0.2-seed0"
  assert sum(len(task.test) for task in drawn.tasks) == 120


def labelled(label, index):
  return {"image": fakes.encode(fakes.picture(max(label, 0), index, (12, 9))), "label": label}


def write_official(name, root, *, test=None):
  """Writes train and validation, and test images with labels or without, if `test` is set."""
  rows = {"train": range(40), "validation": range(40, 60), "test": range(60, 160)}
  names = {"imagenet2012": "file_name", "places365_small": "filename"}
  more = {names[name]: "x"} if name in names else {}
  splits = {
    split: [
      (f"{i:05d}", labelled(-1 if (split, test) == ("test", "unlabelled") else i % 4, i) | more)
      for i in rows[split]
    ]
    for split in (["train", "validation"] if test is None else rows)
  }
  fakes.write(name, splits, root)


@pytest.mark.parametrize(
  ("name", "test"),
  [("food101", None), ("imagenet2012", "unlabelled"), ("places365_small", "unlabelled")],
)
def test_validation_images_are_the_test_set_where_none_else_are_labelled(
  tmp_path, caplog, name, test
):
  write_official(name, tmp_path, test=test)
  with caplog.at_level(logging.INFO):
    made = make(tmp_path, f"tfds:{name}", num_tasks=2)
  sizes = [sum(len(getattr(task, part)) for task in made.tasks) for part in SPLIT_CODES]
  assert sizes == [36, 4, 20]
  official = {record for record in range(60) if "validation" in made.source.shown(record)}
  assert official == {row for task in made.tasks for row in task.test.tolist()}
  assert made.split_id == f"tfds:{name}/val0.125-testown-seed0"
  assert f"{name}: the published validation images are the test images" in caplog.text
  assert (f"{name}: splits test have no labels and are not used" in caplog.text) == bool(test)


def test_a_test_set_with_labels_is_taken_beside_validation(tmp_path):
  write_official("places365_small", tmp_path, test="labelled")
  made = make(tmp_path, "tfds:places365_small", num_tasks=1, evaluate_on="val", val_fraction=0.5)
  assert made.split_id == "tfds:places365_small/valown-testown"


def test_decoding_survives_a_pickle(prepared):
  source = make(prepared, "domainnet").source
  rows = np.asarray([0, 50, 85, 86, 115, 116, 695])  # within and at the borders of splits
  again = pickle.loads(pickle.dumps(source.decode))
  for left, right in zip(source.decode(rows), again(rows), strict=True):
    np.testing.assert_array_equal(left, right)


# Manifests


@pytest.fixture
def cifar(tmp_path):
  fakes.cifar100(tmp_path)
  return tmp_path


def manifest_of(root):
  (path,) = root.glob(".fmlora_manifest_cifar100_*.json")
  return path, json.loads(path.read_text())


def test_a_manifest_is_written_once_and_read_after(cifar, monkeypatch):
  first = make(cifar, "cifar100")
  path, manifest = manifest_of(cifar)
  assert manifest["splits"]["train"]["num"] == 240
  assert manifest["splits"]["train"]["histogram"] == [12] * 20 + [0] * 80
  assert manifest["split_rules"]["official"]["val"] == 20
  before = path.read_bytes()

  def again(*arguments):
    raise AssertionError("indexed the records again")

  monkeypatch.setattr(index, "index_records", again)
  second = make(cifar, "cifar100")
  assert second.manifest_sha256 == first.manifest_sha256
  assert path.read_bytes() == before


def test_data_that_changed_are_refused(cifar):
  make(cifar, "cifar100")
  for folder in cifar.glob("cifar100/*"):
    for file in folder.iterdir():
      file.unlink()
    folder.rmdir()
  fakes.cifar100(cifar, classes=10, train=24)
  with pytest.raises(
    ConfigError, match="cifar100 train .* has other labels, images or order than when"
  ):
    make(cifar, "cifar100")


def test_data_that_were_copied_are_indexed_again_and_taken(cifar, tmp_path_factory):
  first = make(cifar, "cifar100")
  elsewhere = tmp_path_factory.mktemp("copies") / "data"
  shutil.copytree(cifar, elsewhere, copy_function=shutil.copyfile)
  assert make(elsewhere, "cifar100").manifest_sha256 == first.manifest_sha256


def test_a_split_that_changed_is_refused(cifar, monkeypatch):
  make(cifar, "cifar100")
  from fmlora_jax.tasks import splits
  from fmlora_jax.tasks.benchmarks import cifar100

  monkeypatch.setitem(cifar100.SPLITS, "official", splits.official(5))
  with pytest.raises(ConfigError, match="its split of cifar100 has changed"):
    make(cifar, "cifar100")


def test_a_damaged_manifest_is_refused(cifar):
  make(cifar, "cifar100")
  path, manifest = manifest_of(cifar)
  manifest["splits"]["train"]["sha256"]["labels"] = "0" * 64
  path.write_text(json.dumps(manifest))
  with pytest.raises(
    ConfigError, match="cifar100 train .* has other labels, images or order than when"
  ):
    make(cifar, "cifar100")
  path.write_text("{")
  with pytest.raises(ConfigError, match="can't be read"):
    make(cifar, "cifar100")


def changed_index(root):
  """Damages the stored index of the training records."""
  (path,) = root.glob(".fmlora_index_cifar100_*_train.npz")
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def no_index(root):
  for path in root.glob(".fmlora_index_*"):
    path.unlink()


def old_manifest(root):
  """Makes the manifest one of version 1, which held the index itself and had other names."""
  no_index(root)
  path, manifest = manifest_of(root)
  manifest["cuts"] = manifest.pop("split_rules")
  manifest["splits"]["train"] |= {"labels": "packed", "sizes": "packed", "contents": "packed"}
  path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("change", [changed_index, no_index, old_manifest])
def test_an_index_that_does_not_serve_is_made_again(cifar, change):
  first = make(cifar, "cifar100")
  _, before = manifest_of(cifar)
  change(cifar)
  assert make(cifar, "cifar100").manifest_sha256 == first.manifest_sha256
  assert manifest_of(cifar)[1] == before
  for path in cifar.glob(".fmlora_index_*"):
    assert index.from_npz(path) is not None
  from fmlora_jax.tasks import splits
  from fmlora_jax.tasks.benchmarks import cifar100

  with pytest.MonkeyPatch.context() as patch:  # what the manifest said still holds
    patch.setitem(cifar100.SPLITS, "official", splits.official(5))
    with pytest.raises(ConfigError, match="its split of cifar100 has changed"):
      make(cifar, "cifar100")


def test_a_folder_that_can_not_be_written_is_no_obstacle(cifar, monkeypatch, caplog):
  def refuse(self, content):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr("pathlib.Path.write_bytes", refuse)
  with caplog.at_level(logging.WARNING):
    made = make(cifar, "cifar100")
  assert len(made.tasks) == 5
  assert "can't be written" in caplog.text


def test_the_wrong_number_of_records_is_said(cifar, caplog):
  with caplog.at_level(logging.WARNING):
    make(cifar, "cifar100")
  assert (
    "cifar100 train has 240, published 50000; cifar100 test has 60, published 10000" in caplog.text
  )


# What users get wrong


def test_data_that_are_not_prepared_are_named_with_the_command(tmp_path):
  with pytest.raises(ConfigError) as error:
    make(tmp_path, "imagenet_r")
  assert "imagenet_r is not prepared there; do so once with: " in str(error.value)
  assert f"python -m fmlora_jax.prepare imagenet_r --data_dir={tmp_path}" in str(error.value)


def test_another_version_is_named(cifar):
  (folder,) = (cifar / "cifar100").iterdir()
  folder.rename(folder.with_name("1.0.0"))
  with pytest.raises(ConfigError, match=r"found version 1.0.0, needed 3.0.2"):
    make(cifar, "cifar100")


def test_tfrecord_is_named(cifar):
  (info,) = cifar.glob("cifar100/*/dataset_info.json")
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(ConfigError, match="holds cifar100 as TFRecord"):
    make(cifar, "cifar100")


def test_a_missing_file_is_named(cifar):
  (file,) = cifar.glob("cifar100/*/cifar100-test.array_record*")
  file.unlink()
  with pytest.raises(ConfigError, match=f"lacks {file.name}"):
    make(cifar, "cifar100")


def test_records_that_are_no_images_are_named(tmp_path):
  def example(i, image, label=0):
    return i, {"id": str(i), "image": image, "label": label, "coarse_label": 0}

  good = fakes.encode(Image.new("RGB", (32, 32)), "PNG")
  examples = [example(0, good), example(1, b"text"), example(2, b""), example(3, good)]
  fakes.write("cifar100", {"train": examples, "test": examples[:1]}, tmp_path)
  with pytest.raises(ConfigError, match="2 of 4 records of cifar100 train can't be used"):
    make(tmp_path, "cifar100")


def test_an_image_that_is_cut_off_is_named_when_it_is_decoded(tmp_path):
  whole = fakes.encode(fakes.picture(0, 0, (32, 32)), "PNG")
  cut = whole[: len(whole) // 2]
  examples = [
    (i, {"id": str(i), "image": cut if i == 5 else whole, "label": i % 2, "coarse_label": 0})
    for i in range(24)
  ]
  fakes.write("cifar100", {"train": examples, "test": examples[:4]}, tmp_path)
  source = make(tmp_path, "cifar100", 2).source
  with pytest.raises(ConfigError, match=r"record \d+ of cifar100 train .*used: .*truncated"):
    source.decode(np.arange(24))


@pytest.mark.parametrize(
  ("benchmark", "fields", "message"),
  [
    ("tfds:cifar1000", {}, "TFDS knows no data set 'cifar1000'; did you mean 'cifar100'"),
    ("tfds", {}, "must be one of .*tfds:NAME"),
    ("imagenet_r", {"split": "official"}, "config.tasks.split is 'official': must be one of slice"),
    ("digits", {"split": "slice"}, "config.tasks.split is 'slice': must be left out"),
    ("domainnet", {"domains": ("reel",)}, "config.tasks.domains is 'reel': must be one of clipart"),
    ("cifar100", {"domains": ("real",)}, "config.tasks.domains is 'real': must be left out"),
    ("cifar100", {"num_tasks": 7}, "must divide the 20 classes of cifar100"),
  ],
)
def test_wrong_names(prepared, benchmark, fields, message):
  with pytest.raises(ConfigError, match=message):
    make(prepared, benchmark, **fields)
