import logging
import pathlib
import re
import shutil
import threading
import time

import numpy as np
import pytest
from PIL import Image

from fmlora_jax import tasks
from fmlora_jax.config import ConfigError, ConfigErrors, TasksConfig
from fmlora_jax.input import resident
from fmlora_jax.tasks import images, task_file
from fmlora_jax.tasks.benchmarks import image_folder
from fmlora_jax.tasks.copies import find_copies

COLORS = {"ant": 40, "bee": 140, "cat": 240}


def save(path, value=0, size=(12, 8), noise=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", size, (value, noise, 0)).save(path)


def fill(root, *folders, count=5):
  """Writes `count` images, each of its own colour, into every class below every folder."""
  for index, folder in enumerate(folders or ("",)):
    for name, value in COLORS.items():
      for i in range(count):
        save(root / folder / name / f"{i}.png", value, noise=10 * i + index)
  return root


def config(root, **fields):
  fields = {"benchmark": "image_folder", "num_tasks": 3, "data_dir": str(root)} | fields
  return TasksConfig(**fields)


def make(root, size=8, **fields):
  return tasks.make(config(root, **fields), seed=0, source_size=size)


def refusal(root, **fields):
  with pytest.raises(ConfigError) as info:
    make(root, **fields)
  message = str(info.value)
  assert message.startswith("config.tasks.data_dir is ")
  return message


def test_a_folder_per_class(tmp_path):
  made = make(fill(tmp_path), order="natural")
  assert made.class_names == ("ant", "bee", "cat")
  assert made.source.domains is None
  assert made.source.canvas == (8, 12)
  assert [len(task.train) for task in made.tasks] == [3, 3, 3]
  assert made.split_id == "image_folder/val0.125-test0.2-seed0"
  for task, value in zip(made.tasks, COLORS.values(), strict=True):
    loaded = resident.load_examples(made, task.train, resident.capacity(made, "train"))
    assert set(loaded.images[..., 0].ravel().tolist()) == {value}
    assert loaded.sizes.tolist() == [[8, 12]] * 3


def test_split_folders_are_the_splits(tmp_path):
  fill(tmp_path, "train", count=4)
  fill(tmp_path, "validation", count=2)
  fill(tmp_path, "test", count=3)
  made = make(tmp_path)
  sizes = [(len(task.train), len(task.val), len(task.test)) for task in made.tasks]
  assert sizes == [(4, 2, 3)] * 3
  assert made.split_id == "image_folder/valown-testown"


@pytest.mark.parametrize(
  "names", [("Train", "Val", "Test"), ("training", "dev", "testing"), ("TRAIN", "Valid", "test")]
)
def test_names_of_splits_may_be_in_any_case(tmp_path, caplog, names):
  for name, count in zip(names, (4, 2, 3), strict=True):
    fill(tmp_path, name, count=count)
  with caplog.at_level(logging.INFO):
    made = make(tmp_path)
  assert [(len(t.train), len(t.val), len(t.test)) for t in made.tasks] == [(4, 2, 3)] * 3
  assert made.source.domains is None
  for name, count in zip(names, (12, 6, 9), strict=True):
    assert f"{name} ({count})" in caplog.text
  assert "checking 27 files" in caplog.text and "layout split/class/*, splits" in caplog.text


@pytest.mark.parametrize("twice", [("Train", "training"), ("val", "validation"), ("test", "TEST")])
def test_two_folders_of_one_split_are_refused(tmp_path, twice):
  message = refusal(fill(tmp_path, "train", "test", *twice))
  assert "mean the same split: must be one folder; merge or rename them" in message
  assert all(repr(name) in message for name in twice)


def test_copies_of_an_image_are_never_in_two_splits(tmp_path, caplog):
  fill(tmp_path, count=8)
  for name in COLORS:
    for i in range(4):
      content = (tmp_path / name / f"{i}.png").read_bytes()
      (tmp_path / name / f"copy of {i}.png").write_bytes(content)
  made = make(tmp_path, val_fraction=0.3)
  group = made.source.group
  assert len(set(group.tolist())) == 24
  for task in made.tasks:
    groups = [set(group[rows].tolist()) for rows in (task.train, task.val, task.test)]
    assert all(groups) and sum(map(len, groups)) == len(set.union(*groups)) == 8
  assert "copies" not in caplog.text


def test_copies_between_split_folders_are_counted(tmp_path, caplog):
  fill(tmp_path, "train", "val", "test")
  made = make(tmp_path)
  assert "copies" not in caplog.text
  for split, count in (("val", 2), ("test", 3)):
    for i in range(count):
      content = (tmp_path / "train" / "bee" / f"{i}.png").read_bytes()
      (tmp_path / split / "bee" / f"{i}.png").write_bytes(content)
  assert make(tmp_path).tasks[0].test.tolist() == made.tasks[0].test.tolist()
  assert "2 validation and 3 test images are copies of training images" in caplog.text


def test_an_image_of_two_classes_is_reported_or_refused(tmp_path, caplog):
  fill(tmp_path, "train", "val", "test")
  assert find_copies(make(tmp_path)).in_two_classes == 0
  for place in ("train/bee/x.png", "test/cat/y.png", "train/ant/z.png"):
    (tmp_path / place).write_bytes((tmp_path / "train" / "ant" / "0.png").read_bytes())
  (tmp_path / "val/ant/x.png").write_bytes((tmp_path / "val/cat/1.png").read_bytes())
  found = find_copies(make(tmp_path))
  assert found.in_two_classes == 2
  assert "2 images are in two classes, such as " in caplog.text
  assert "or no answer is right for both" in caplog.text
  refused = r"copies is 'refuse': .*copies of training .*; 2 images are in two classes, such as .*/"
  with pytest.raises(ConfigError, match=refused):
    make(tmp_path, copies="refuse")


def test_two_classes_alone_are_refused_too(tmp_path):
  fill(tmp_path)
  (tmp_path / "bee/x.png").write_bytes((tmp_path / "ant/0.png").read_bytes())
  with pytest.raises(ConfigError, match="1 images are in two classes, such as .*ant/0.png"):
    make(tmp_path, copies="refuse")


def test_validation_images_may_be_the_test_images(tmp_path):
  for split, count in (("train", 10), ("val", 4)):
    fill(tmp_path, split, count=count)
  drawn, taken = make(tmp_path), make(tmp_path, test_from="val")
  assert [(len(t.train), len(t.val), len(t.test)) for t in drawn.tasks] == [(8, 4, 2)] * 3
  assert [(len(t.train), len(t.val), len(t.test)) for t in taken.tasks] == [(9, 1, 4)] * 3
  assert drawn.split_id == "image_folder/valown-test0.2-seed0"
  assert taken.split_id == "image_folder/val0.125-testval-seed0"
  assert not any("validation images alone" in caveat for caveat in taken.caveats)
  (caveat,) = [caveat for caveat in drawn.caveats if "validation images alone" in caveat]
  assert "test images were drawn from those for training" in caveat
  assert "set config.tasks.test_from to val" in caveat
  for name, made in (("drawn", drawn), ("taken", taken)):
    (tmp_path / f"{name}.json").write_text(task_file.dump_task_file(made))
    for test_from in ("train", "val"):  # which a task file decides
      again = make(tmp_path, task_file=str(tmp_path / f"{name}.json"), test_from=test_from)
      assert (again.split_id, again.manifest_sha256) == (made.split_id, made.manifest_sha256)


@pytest.mark.parametrize(
  ("folders", "has"),
  [
    (("",), "no validation images of its own"),
    (("train", "test"), "test images of its own"),
    (("train", "val", "test"), "test images of its own"),
  ],
)
def test_validation_images_are_no_test_images_where_they_can_not_be(tmp_path, folders, has):
  fill(tmp_path, *folders)
  (tmp_path / folders[0] / "ant" / "0.png").write_text("not decoded before the refusal")
  message = f"test_from is 'val': must be 'train', image_folder has {has}"
  with pytest.raises(ConfigError, match=message):
    make(tmp_path, test_from="val")


@pytest.mark.parametrize(
  ("names", "says"), [(("1", "2", "10"), True), (("1", "2", "3"), False), (("a", "b10"), False)]
)
def test_classes_are_ordered_as_text_and_named(tmp_path, caplog, names, says):
  for name in names:
    for i in range(3):
      save(tmp_path / name / f"{i}.png", noise=i)
  with caplog.at_level(logging.INFO):
    made = make(tmp_path, num_tasks=1)
  assert made.source.class_names == tuple(sorted(names))
  assert f"{len(names)} classes {', '.join(map(repr, sorted(names)))}" in caplog.text
  assert ("in the order of text, as torchvision has them" in caplog.text) == says


def test_a_long_check_says_how_far_it_is(tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(image_folder, "LINE_EVERY_S", 0.0)
  with caplog.at_level(logging.INFO):
    make(fill(tmp_path))
  lines = [record.getMessage() for record in caplog.records]
  assert lines[0].startswith("checking 15 files") and lines[-1] == "  15 of 15 files checked"


def test_an_interrupt_drops_the_files_that_wait():
  done, gate = [], threading.Event()  # closed while 10,000 are handed over, however long it takes
  with pytest.raises(KeyboardInterrupt), images.threads(10**6) as pool:
    for i in range(10_000):
      pool.submit(lambda i: (gate.wait(), time.sleep(0.01), done.append(i)), i)
    gate.set()
    raise KeyboardInterrupt
  assert len(done) < 100


def test_validation_is_drawn_from_train_where_there_is_none(tmp_path):
  made = make(fill(tmp_path, "train", "test"))
  assert [(len(t.train), len(t.val), len(t.test)) for t in made.tasks] == [(4, 1, 5)] * 3


def test_domain_folders_are_the_domains(tmp_path):
  fill(tmp_path, "real", "sketch")
  made = make(tmp_path, scenario="dil", num_tasks=2, order="natural")
  assert [task.name for task in made.tasks] == ["real", "sketch"]
  assert [(task.lo, task.hi) for task in made.tasks] == [(0, 3), (0, 3)]
  pooled = make(tmp_path)
  assert pooled.spec.class_ranges == ((0, 1), (1, 2), (2, 3))
  assert pooled.manifest_sha256 == made.manifest_sha256


@pytest.mark.parametrize("form", ["{domain}/{split}", "{split}/{domain}"])
def test_domains_may_have_splits(tmp_path, form):
  for domain in ("real", "sketch"):
    for split, count in (("train", 4), ("test", 2)):
      fill(tmp_path, form.format(domain=domain, split=split), count=count)
  made = make(tmp_path, scenario="dil", num_tasks=2, order="natural")
  assert [task.name for task in made.tasks] == ["real", "sketch"]
  assert [(len(t.train), len(t.val), len(t.test)) for t in made.tasks] == [(9, 3, 6)] * 2


def test_a_class_may_be_called_train(tmp_path):
  fill(tmp_path)
  for i in range(5):
    save(tmp_path / "train" / f"{i}.png", noise=i)
  assert make(tmp_path, num_tasks=4, order="natural").class_names == ("ant", "bee", "cat", "train")


def test_sizes_within_one_canvas(tmp_path):
  fill(tmp_path)
  save(tmp_path / "ant" / "wide.png", size=(300, 10))
  save(tmp_path / "ant" / "tall.png", size=(10, 13))
  made = make(tmp_path)
  assert made.source.canvas == (10, 16)
  ant = np.flatnonzero(made.source.labels == 0)
  pixels, sizes = made.source.decode(ant[::-1])
  assert sizes.tolist() == [[8, 16], [10, 8]] + [[8, 12]] * 5
  for image, (height, width) in zip(pixels, sizes, strict=True):
    assert not image[height:].any()
    assert not image[:, width:].any()


def test_square_images_have_a_square_canvas(tmp_path):
  for name in COLORS:
    for i in range(3):
      save(tmp_path / name / f"{i}.png", size=(20 + i, 20 + i))
  assert make(tmp_path).source.canvas == (8, 8)


def test_digest_is_of_paths_and_contents(tmp_path):
  fill(tmp_path / "a")
  fill(tmp_path / "b")
  digest = make(tmp_path / "a").source.digest
  assert make(tmp_path / "b", size=16).source.digest == digest
  save(tmp_path / "b" / "ant" / "0.png", 41)
  assert make(tmp_path / "b").source.digest != digest
  (tmp_path / "a" / "ant").rename(tmp_path / "a" / "axe")
  assert make(tmp_path / "a").source.digest != digest


def test_links_are_followed(tmp_path):
  fill(tmp_path / "store")
  (tmp_path / "data").mkdir()
  for name in COLORS:
    (tmp_path / "data" / name).symlink_to(tmp_path / "store" / name)
  (tmp_path / "data" / "ant" / "again.png").symlink_to("0.png")
  assert len(make(tmp_path / "data").source.labels) == 16


def test_other_files_are_ignored_and_counted(tmp_path, caplog):
  fill(tmp_path)
  for name in ("ant/notes.txt", "bee/notes.txt", "README", "bee/film.mpg", "bee/a.eps"):
    (tmp_path / name).write_text("x")
  for name in (".DS_Store", "ant/.hidden.png", "ant/._0.png", "__MACOSX/ant/._0.png"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("x")
  (tmp_path / ".git" / "objects").mkdir(parents=True)
  with caplog.at_level(logging.INFO):
    assert len(make(tmp_path).source.labels) == 15
  assert "ignored 5 files that are no images: .eps, .mpg, .txt, README" in caplog.text
  assert f"checking 15 files of {tmp_path}: layout class/*, 3 classes" in caplog.text


def test_broken_files_are_refused_all_at_once(tmp_path):
  fill(tmp_path)
  for i in range(12):
    (tmp_path / "bee" / f"x{i:02}.jpg").write_text("no image")
  whole = (tmp_path / "ant" / "0.png").read_bytes()
  (tmp_path / "ant" / "0.png").write_bytes(whole[:-30])
  message = refusal(tmp_path)
  assert "13 of 27 images can't be used" in message
  assert "set config.tasks.broken_files to skip" in message
  assert re.search(r"'ant/0\.png': .*truncated", message)
  assert "'bee/x08.jpg': not an image that Pillow can open" in message
  assert "x09" not in message
  assert "and 3 more" in message


def test_large_images_are_refused(tmp_path):
  fill(tmp_path)
  save(tmp_path / "bee" / "large.png", size=(13, 8))
  message = refusal(tmp_path, max_pixels=96)
  assert "'bee/large.png': it has more pixels than config.tasks.max_pixels, 96" in message


def test_broken_files_may_be_skipped(tmp_path, caplog):
  digest = make(fill(tmp_path)).source.digest
  (tmp_path / "bee" / "x.png").touch()
  with caplog.at_level(logging.WARNING):
    made = make(tmp_path, broken_files="skip")
  assert "1 of 16 images can't be used, skipped:\n  'bee/x.png': the file is empty" in caplog.text
  assert made.source.digest == digest


def test_a_class_of_broken_files_alone_is_named(tmp_path):
  fill(tmp_path)
  (tmp_path / "dog").mkdir()
  (tmp_path / "dog" / "x.png").touch()
  with pytest.raises(ConfigError, match="no train image of class 'dog'"):
    make(tmp_path, broken_files="skip", num_tasks=1)


def test_nothing_but_broken_files_is_refused(tmp_path):
  (tmp_path / "dog").mkdir()
  (tmp_path / "dog" / "x.png").touch()
  message = refusal(tmp_path, broken_files="skip")
  assert "1 of 1 images can't be used; repair or move them away:" in message


def test_a_file_that_changes_during_the_run_is_named(tmp_path):
  made = make(fill(tmp_path))
  save(tmp_path / "ant" / "0.png", size=(9, 9))
  with pytest.raises(ConfigError, match=r"'ant/0.png' has changed: it holds something else"):
    made.source.decode(np.array([0]))
  (tmp_path / "ant" / "0.png").unlink()
  with pytest.raises(ConfigError, match=r"'ant/0.png' has changed: not a file"):
    made.source.decode(np.array([0]))


@pytest.mark.parametrize("kind", ["png", "bmp", "tif", "gif", "ppm"])
def test_a_file_exchanged_for_one_of_the_same_size_is_named(tmp_path, kind):
  for name, value in COLORS.items():
    for i in range(5):
      save(tmp_path / name / f"{i}.{kind}", value, noise=i)
  made = make(tmp_path, order="natural")
  made.source.decode(np.arange(15))
  shutil.copyfile(tmp_path / "bee" / f"0.{kind}", tmp_path / "ant" / f"1.{kind}")
  made.source.decode(np.array([0, 2]))
  with pytest.raises(ConfigError, match=rf"'ant/1.{kind}' has changed: it holds something else"):
    made.source.decode(np.array([1]))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_images_that_are_near_black_are_counted(tmp_path, caplog, dtype):
  fill(tmp_path)
  make(tmp_path)
  assert "near black" not in caplog.text
  largest = {np.uint8: 16, np.uint16: 4095}[dtype]
  for i in range(2):
    values = np.full((8, 12), largest - i, dtype)
    Image.fromarray(values).save(tmp_path / "bee" / f"{3 + i}.png")
  make(tmp_path)
  assert "2 images are near black, no value is above 16 of 255, such as 'bee/3.png'" in caplog.text


def test_no_folder_is_refused(tmp_path):
  assert "is None: must be the folder with the images" in refusal(None, data_dir=None)
  assert "is '': must be the folder" in refusal(None, data_dir="")
  assert "/none': no such folder" in refusal(tmp_path / "none")
  (tmp_path / "file").touch()
  assert "/file': is a file, must be a folder" in refusal(tmp_path / "file")
  (tmp_path / "bare" / "ant").mkdir(parents=True)
  assert "/bare': holds no image" in refusal(tmp_path / "bare")


def test_images_without_class_folders_are_refused(tmp_path):
  save(tmp_path / "0.png")
  assert "found folders none, but images such as '0.png'" in refusal(tmp_path)


def test_splits_without_class_folders_are_refused(tmp_path):
  save(tmp_path / "train" / "0.png")
  save(tmp_path / "test" / "0.png")
  assert "found folders 'test', 'train'; must be laid out as one of class/*" in refusal(tmp_path)


def test_splits_beside_domains_are_refused(tmp_path):
  message = refusal(fill(tmp_path, "train", "real"))
  assert "found folders 'real', 'train' / 'ant', 'bee', 'cat'; must be laid out as" in message
  assert "split is one of train, training, val, " in message


def test_different_depths_are_refused(tmp_path):
  fill(tmp_path)
  save(tmp_path / "ant" / "red" / "0.png")
  message = refusal(tmp_path)
  assert "images at different depths, 'ant/0.png', 'ant/red/0.png'; must be laid out" in message


def test_loops_of_links_are_refused(tmp_path):
  root = fill(tmp_path / "data")
  (root / "ant" / "up").symlink_to(root)
  assert f"folder 'ant/up' links back to {str(root)!r}, in which it is" in refusal(root)
  (root / "ant" / "up").unlink()
  (root / "ant" / "up").symlink_to(tmp_path)
  assert "folder 'ant/up/data' links back to " in refusal(root)
  (root / "ant" / "up").unlink()
  (root / "ant" / "bees").symlink_to("../bee")
  (root / "bee" / "ants").symlink_to("../ant")
  message = refusal(root)
  loop = "folder '(ant/bees/ants|bee/ants/bees)' links back to .*; it must lead elsewhere"
  assert re.search(loop, message)
  assert "\n" not in message


@pytest.mark.parametrize("name", ["dog", "ant/x.png"])
def test_links_to_themselves_are_refused(tmp_path, name):
  fill(tmp_path)
  (tmp_path / name).symlink_to(tmp_path / name)
  message = refusal(tmp_path)
  assert f"{name!r} is a symbolic link that leads to itself: must lead to" in message
  assert "\n" not in message


def test_folders_whose_names_are_one_in_two_unicode_forms_are_refused(tmp_path):
  for name, value in (("caf\u00e9", 40), ("cafe\u0301", 140)):
    save(tmp_path / name / "0.png", value)
    names = {path.name for path in tmp_path.iterdir()}
  if len(names) == 1:
    pytest.skip("this file system has one form of a name")
  message = refusal(tmp_path)
  assert "folders 'cafe\\u0301' and 'caf\\xe9' have one name, 'caf\u00e9', in two" in message
  assert "\n" not in message


@pytest.mark.parametrize("kind", ["gif", "png", "tif", "webp"])
def test_images_of_several_pages_are_counted_and_give_their_first(tmp_path, kind):
  fill(tmp_path)
  for name in COLORS:
    save(tmp_path / name / f"one.{kind}", 90)
  assert make(tmp_path, num_tasks=1).caveats == ()
  pages = [Image.new("RGB", (12, 8), (value, 0, 0)) for value in (80, 200)]
  for name in ("bee", "cat"):
    pages[0].save(tmp_path / name / f"two.{kind}", save_all=True, append_images=pages[1:])
  made = make(tmp_path, num_tasks=1, order="natural")
  assert made.caveats == (
    f"2 image files have several pages or frames, such as 'bee/two.{kind}': the first is taken, "
    "the others are left out",
  )
  (row,) = [i for i in range(20) if made.source.shown(i) == f"bee/two.{kind}"]
  pixels, _ = made.source.decode(np.array([row]))
  assert abs(int(pixels[0, 4, 4, 0]) - 80) < 5


def test_a_damaged_second_page_does_no_harm(tmp_path):
  pages = [Image.new("RGB", (12, 8), (value, 0, 0)) for value in (80, 200)]
  pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
  content = (tmp_path / "x.tif").read_bytes()
  (tmp_path / "x.tif").write_bytes(content[:-100])
  with images.pillow_limited(10**6):
    image, _, has_pages = images.read(tmp_path / "x.tif")
  assert image.getpixel((0, 0)) == (80, 0, 0) and has_pages


def test_an_empty_class_is_named(tmp_path):
  (fill(tmp_path) / "dog").mkdir()
  assert "no image in folder 'dog': each class needs some" in refusal(tmp_path)


@pytest.mark.parametrize("folders", [("train", "test"), ("real", "sketch")])
def test_a_class_that_is_missing_somewhere_is_named(tmp_path, folders):
  fill(tmp_path, *folders)
  save(tmp_path / folders[0] / "dog" / "0.png")
  message = refusal(tmp_path)
  assert f"no image in folder '{folders[1]}/dog': each class needs some in every split" in message


def test_dil_without_domains_is_refused(tmp_path):
  with pytest.raises(ConfigError, match="scenario is 'dil': image_folder has no domains"):
    make(fill(tmp_path), scenario="dil")


def test_odd_names_are_taken(tmp_path):
  for name in ("a b", "été", "x'y", "-rf"):
    for i in range(3):
      save(tmp_path / name / f"{i} ü.PNG", noise=i)
  assert make(tmp_path, num_tasks=1, order="natural").class_names == ("-rf", "a b", "x'y", "été")


def test_every_layout_is_found_from_its_own_example():
  example = {"class": ["ant", "bee"], "split": ["train", "test"], "domain": ["real", "sketch"]}
  for layout in image_folder.LAYOUTS:
    files = [(*(example[role][i] for role in layout), "0.png") for i in (0, 1)]
    assert image_folder._layout(pathlib.Path("x"), files) == layout


def test_gaps_and_broken_files_are_said_at_once(tmp_path):
  fill(tmp_path)
  (tmp_path / "dog").mkdir()
  (tmp_path / "bee" / "0.png").write_bytes(b"no image")
  with pytest.raises(ConfigErrors) as error:
    make(tmp_path)
  gap, broken = error.value.problems
  assert "no image in folder 'dog'" in gap
  assert "1 of 15 images can't be used" in broken and "'bee/0.png'" in broken
