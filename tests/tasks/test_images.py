import os
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fmlora_jax.tasks import images

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]


def read(path, max_pixels=10**6):
  with images.pillow_limited(max_pixels):
    return np.asarray(images.read(path)[0])


def grey(values):
  return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=-1)


def saved(path, image, **options):
  image.save(path, **options)
  return path


def palette_image():
  image = Image.fromarray(GREY // 16).convert("P")
  image.putpalette([c for i in range(16) for c in (10 * i, 255 - i, 7)])
  return image


PALETTE_RGB = np.stack([10 * (GREY // 16), 255 - GREY // 16, np.full_like(GREY, 7)], axis=-1)
RGBA = np.concatenate([PIXELS, GREY[..., None]], axis=-1)
LA = np.stack([GREY, PIXELS[..., 1]], axis=-1)

EXACT = {  # name -> (image, save options, RGB)
  "rgb.png": (Image.fromarray(PIXELS), {}, PIXELS),
  "rgb.bmp": (Image.fromarray(PIXELS), {}, PIXELS),
  "rgb.tiff": (Image.fromarray(PIXELS), {}, PIXELS),
  "rgb.ppm": (Image.fromarray(PIXELS), {}, PIXELS),
  "rgb.tga": (Image.fromarray(PIXELS), {}, PIXELS),
  "UPPER.PNG": (Image.fromarray(PIXELS), {}, PIXELS),
  "lossless.webp": (Image.fromarray(PIXELS), {"lossless": True}, PIXELS),
  "lossless.jp2": (Image.fromarray(PIXELS), {"irreversible": False}, PIXELS),
  "l.png": (Image.fromarray(GREY), {}, grey(GREY)),
  "la.png": (Image.fromarray(LA), {}, grey(GREY)),
  "rgba.png": (Image.fromarray(RGBA), {}, PIXELS),
  "rgba.tiff": (Image.fromarray(RGBA), {}, PIXELS),
  "p.png": (palette_image(), {}, PALETTE_RGB),
  "p.gif": (palette_image(), {}, PALETTE_RGB),
  "p_transparent.png": (palette_image(), {"transparency": bytes(range(16))}, PALETTE_RGB),
  "p_one_transparent.png": (palette_image(), {"transparency": 3}, PALETTE_RGB),
  "rgb_transparent.png": (Image.fromarray(PIXELS), {"transparency": (1, 2, 3)}, PIXELS),
  "one_bit.png": (Image.fromarray(GREY > 127), {}, grey((GREY > 127) * 255)),
  "i16.png": (Image.fromarray(GREY.astype(np.uint16) * 257), {}, grey(GREY)),
  "i16.tiff": (Image.fromarray(GREY.astype(np.uint16) * 257), {}, grey(GREY)),
  "i32.tiff": (Image.fromarray(GREY.astype(np.int32) * 257), {}, grey(GREY)),
  "f255.tiff": (Image.fromarray(GREY.astype(np.float32)), {}, grey(GREY)),
  "f1.tiff": (Image.fromarray(GREY.astype(np.float32) / 255), {}, grey(GREY)),
  "cmyk.tiff": (
    Image.frombytes(
      "CMYK", (9, 6), np.concatenate([255 - PIXELS, 0 * PIXELS[..., :1]], -1).tobytes()
    ),
    {},
    PIXELS,
  ),
}


@pytest.mark.parametrize("name", EXACT)
def test_every_mode_becomes_its_rgb(name, tmp_path):
  image, options, want = EXACT[name]
  np.testing.assert_array_equal(read(saved(tmp_path / name, image, **options)), want)
  assert os.path.splitext(name)[1].lower() in images.extensions()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_as_pillow_converts_them(mode, tmp_path):
  path = saved(tmp_path / "a.jpg", Image.fromarray(PIXELS).convert(mode), quality=95)
  with Image.open(path) as image:
    assert image.mode == mode
    np.testing.assert_array_equal(read(path), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
def test_images_stand_upright(name, tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees clockwise
  half = np.zeros((16, 32, 3), np.uint8)
  half[:, :16] = 255
  turned = read(saved(tmp_path / name, Image.fromarray(half), exif=exif))
  assert turned.shape == (32, 16, 3)
  assert turned[:12].min() > 200
  assert turned[20:].max() < 50


@pytest.mark.parametrize("name", ["a.gif", "a.apng", "a.webp", "a.tiff"])
def test_of_several_frames_the_first_is_taken(name, tmp_path):
  frames = [Image.new("RGB", (6, 4), color) for color in ("red", "blue")]
  options = {"lossless": True} if name == "a.webp" else {}
  path = saved(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], **options)
  with Image.open(path) as image:
    assert image.n_frames == 2
  assert read(path)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (np.full((2, 2), np.nan, np.float32), "not finite"),
    (np.array([[0, np.inf]], np.float32), "not finite"),
    (np.array([[0, 300]], np.float32), r"0\.\.300, must be in 0\.\.255"),
    (np.array([[-1, 3]], np.float32), r"-1\.\.3, must be in 0\.\.255"),
    (np.array([[0, 70000]], np.int32), r"0\.\.70000, must be in 0\.\.65535"),
  ],
)
def test_numbers_without_a_meaning_are_refused(values, message, tmp_path):
  path = saved(tmp_path / "a.tiff", Image.fromarray(values))
  with pytest.raises(images.BrokenImage, match=message):
    read(path)


def test_damaged_files_have_a_reason(tmp_path):
  def reason(name):
    with pytest.raises(images.BrokenImage) as info:
      read(tmp_path / name)
    return str(info.value)

  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
  for name in ("a.png", "a.jpg", "a.bmp", "a.gif", "a.webp", "a.tiff"):
    content = saved(tmp_path / name, Image.fromarray(noise)).read_bytes()
    for share in (0.05, 0.5, 0.9):
      (tmp_path / name).write_bytes(content[: int(len(content) * share)])
      assert reason(name)
  (tmp_path / "empty.png").touch()
  assert reason("empty.png") == "the file is empty"
  (tmp_path / "text.png").write_text("hello")
  assert reason("text.png") == "not an image that Pillow can open"
  (tmp_path / "link.png").symlink_to("nowhere")
  assert reason("link.png") == "not a file, or a link to nothing"
  os.mkfifo(tmp_path / "pipe.png")
  assert reason("pipe.png") == "not a file, or a link to nothing"
  (tmp_path / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
  assert reason("page.png") == "not an image that Pillow can open"  # no Ghostscript


def test_an_image_may_have_just_so_many_pixels(tmp_path):
  path = saved(tmp_path / "a.png", Image.new("L", (9, 6)))
  assert read(path, max_pixels=54).shape == (6, 9, 3)
  with pytest.raises(images.BrokenImage, match=r"more pixels than config\.tasks\.max_pixels, 53"):
    read(path, max_pixels=53)


def icon(png):
  return struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(png), 22) + png


def mac_icon(png):
  return struct.pack(">4sI4sI", b"icns", len(png) + 16, b"ic10", len(png) + 8) + png


def cursor(png):
  header = struct.pack("<IiiHHIIiiII", 40, 30000, 60000, 1, 24, 0, 0, 0, 0, 0, 0)
  return struct.pack("<HHHBBBBHHII", 0, 2, 1, 0, 0, 0, 0, 1, 24, len(header), 22) + header


@pytest.mark.parametrize("wrap", [bytes, icon, mac_icon, cursor])
def test_bombs_are_refused_before_they_are_decoded(wrap, tmp_path):
  png = bytearray(saved(tmp_path / "a.png", Image.new("L", (9, 6))).read_bytes())
  png[16:24] = struct.pack(">II", 30000, 30000)
  png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
  (tmp_path / "a").write_bytes(wrap(bytes(png)))
  with pytest.raises(images.BrokenImage, match="more pixels than"):
    read(tmp_path / "a", max_pixels=10**8)
  with pytest.raises(images.BrokenImage, match="(?i)truncated"):
    read(tmp_path / "a", max_pixels=2 * 10**9)


def phone_photo(path, image, **options):
  with images.pillow_limited(10**6):  # from here on Pillow knows the format
    image.save(path, format="HEIF", **options)
  return path


@pytest.mark.parametrize("name", ["IMG_1.HEIC", "IMG_1.heif", "sent.jpg"])
def test_photos_of_phones_are_read_upright(name, tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  half = np.zeros((16, 32, 3), np.uint8)
  half[:, :16] = 255
  turned = read(phone_photo(tmp_path / name, Image.fromarray(half), exif=exif.tobytes()))
  assert turned.shape == (32, 16, 3)
  assert turned[:12].min() > 200
  assert turned[20:].max() < 50
  assert {".heic", ".heif"} <= images.extensions()


def test_without_their_package_photos_of_phones_say_how_they_are_read(tmp_path, monkeypatch):
  path = phone_photo(tmp_path / "a.heic", Image.new("RGB", (16, 16)))
  monkeypatch.delitem(Image.OPEN, "HEIF")
  assert ".heic" in images.extensions()
  with pytest.raises(images.BrokenImage, match=r"pip install 'fmlora_jax\[photos\]'"):
    read(path)


def test_pillows_own_limit_does_not_count_and_comes_back(tmp_path, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
  path = saved(tmp_path / "a.png", Image.new("L", (9, 6)))
  assert read(path).shape == (6, 9, 3)
  threads = [threading.Thread(target=read, args=(path,)) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert Image.MAX_IMAGE_PIXELS == 10
  with pytest.raises(images.BrokenImage):
    read(tmp_path / "none.png")
  assert Image.MAX_IMAGE_PIXELS == 10
  with pytest.raises(Image.DecompressionBombError):
    Image.open(path)
  with pytest.raises(UserWarning), warnings.catch_warnings():
    warnings.simplefilter("error")
    warnings.warn("still heard", stacklevel=1)


def test_large_text_in_a_png_does_no_harm(tmp_path):
  info = PngImagePlugin.PngInfo()
  info.add_text("note", "x" * 100_000, zip=True)
  assert read(saved(tmp_path / "a.png", Image.fromarray(PIXELS), pnginfo=info)).shape == (6, 9, 3)


@pytest.mark.parametrize(
  ("size", "kept"),
  [
    ((100, 100), (32, 32)),
    ((10, 10), (32, 32)),
    ((64, 48), (42, 32)),  # 42.67, truncated
    ((48, 64), (32, 42)),
    ((500, 100), (64, 32)),
    ((1, 300), (32, 64)),
  ],
)
def test_the_shorter_side_is_uniform_and_the_longer_at_most_twice(size, kept):
  image = Image.new("RGB", size)
  assert images.resize_shorter_side(image, 32).size == kept == images.resized_size(size, 32)[0]


def test_wide_images_keep_their_middle():
  wide = np.zeros((10, 60, 3), np.uint8)
  wide[:, 20:40] = 255
  assert np.asarray(images.resize_shorter_side(Image.fromarray(wide), 10)).min() == 255
