"""From image files of every kind to the right pixels, or a line that names the file; damaged ones
are found at once."""

import errno
import logging
import os
import resource
import struct
import subprocess
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from asesearch.config import DataConfig
from asesearch.data import (
    ImageFolder,
    cache_dir,
    centre_crop,
    check_readable,
    checking,
    open_data,
)
from asesearch.errors import ConfigError, DataError
from asesearch.files import warn_once
from tests.test_image_folders import write

pytestmark = pytest.mark.usefixtures("own_cache")

# left black, right white
RAMP = np.linspace(0, 255, 32).round().astype(np.uint8)[None, :].repeat(32, 0)
WIDE = RAMP.astype(np.uint16) * 257  # the same in 16 bits


def read(path, channels=1, size=32):
    return ImageFolder(path.parent, size, channels).read(0)


def read_image(tmp_path, image, suffix="png", channels=1, **options):
    for old in tmp_path.iterdir():
        old.unlink()
    image.save(tmp_path / f"picture.{suffix}", **options)
    return read(tmp_path / "picture.x", channels)


# -- modes -----------------------------------------------------------------------------------------


def png16(pixels, colour_type, *chunks):
    """A PNG of 16 bits, which Pillow can't write in colour: (H, W, C) uint16."""
    rows = [row.astype(">u2").tobytes() for row in pixels]
    return png(rows, pixels.shape[1], 16, colour_type, *chunks)


def png(rows, width, bits, colour_type, *chunks):
    """A PNG of rows of bytes."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, len(rows), bits, colour_type, 0, 0, 0)
    parts = [
        chunk(b"IHDR", head),
        *(chunk(*c) for c in chunks),
        chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "CMYK", "1", "LA", "RGBA"])
def test_every_mode_gives_what_its_eight_bit_grey_twin_gives(tmp_path, mode, channels):
    twin = read_image(tmp_path, Image.fromarray(RAMP), channels=channels)
    assert (twin == RAMP).all()
    source = Image.fromarray(RAMP)
    if mode == "1":
        source = source.point(lambda v: 255 * (v > 127))
        twin = 255 * (twin > 127)
    image = source.convert("RGB").convert("CMYK") if mode == "CMYK" else source.convert(mode)
    options = {"suffix": "jpg", "quality": 100} if mode == "CMYK" else {}
    got = read_image(tmp_path, image, channels=channels, **options).astype(int)
    assert np.abs(got - twin).max() <= (2 if mode == "CMYK" else 0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "how", ["I;16 png", "16-bit ppm", "I;16 tiff", "I;16B tiff", "RGB 16", "RGBA 16", "LA 16"]
)
def test_sixteen_bits_are_scaled_to_eight(tmp_path, how, channels):
    path = tmp_path / "picture.png"
    opaque = np.full_like(WIDE, 65535)
    colour = {
        "RGB 16": (2, [WIDE] * 3),
        "RGBA 16": (6, [WIDE] * 3 + [opaque]),
        "LA 16": (4, [WIDE, opaque]),
    }
    if how == "16-bit ppm":
        path.write_bytes(b"P5 32 32 65535\n" + WIDE.astype(">u2").tobytes())
    elif how in colour:
        kind, planes = colour[how]
        path.write_bytes(png16(np.stack(planes, axis=-1), kind))
    else:
        image = Image.fromarray(WIDE.astype(">u2") if "16B" in how else WIDE)
        image.save(path, format=how.split()[1])
        with Image.open(path) as saved:
            assert saved.mode == how.split()[0]
    assert (read(path, channels) == RAMP).all()


def test_sixteen_bits_are_rounded_not_cut(tmp_path):
    levels = np.array([[0, 128, 129, 257, 65406, 65407, 65535, 32768]], np.uint16).repeat(8, 0)
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert ImageFolder(tmp_path, 8, 1).read(0)[0, 0].tolist() == [0, 0, 1, 1, 254, 255, 255, 128]


@pytest.mark.parametrize("channels", [1, 3])
def test_modes_without_a_fixed_white_are_refused_by_name(tmp_path, channels):
    for mode, pixels in (("F", RAMP.astype(np.float32) / 255), ("I", RAMP.astype(np.int32) * 1000)):
        Image.fromarray(pixels).save(tmp_path / "odd.png", format="TIFF")
        folder = ImageFolder(tmp_path, 8, channels)
        with pytest.raises(
            DataError,
            match=rf"odd\.png: mode {mode} of a TIFF file has no fixed white.*8 or 16 bits",
        ):
            folder.read(0)
        with pytest.raises(DataError, match=rf"1 of 1 images.*odd\.png \(mode {mode}"):
            folder.check()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_mode_that_is_not_read_is_refused_by_name(tmp_path, channels):
    planes = [Image.fromarray(RAMP)] * 3
    Image.merge("LAB", planes).save(tmp_path / "odd.jpg", format="TIFF")
    folder = ImageFolder(tmp_path, 8, channels)
    for use in (lambda: folder.read(0), folder.check):
        with pytest.raises(DataError, match=r"odd\.jpg.*mode LAB of a TIFF file is not read; conv"):
            use()


def test_twelve_bits_in_sixteen_are_refused(tmp_path):
    Image.fromarray(WIDE).save(tmp_path / "a.png", format="TIFF", tiffinfo={258: 16})
    assert (read(tmp_path / "a.png") == RAMP).all()
    content = (tmp_path / "a.png").read_bytes()
    entry = b"\x02\x01\x03\x00\x01\x00\x00\x00"  # BitsPerSample, one short
    assert content.count(entry + b"\x10\x00") == 1
    (tmp_path / "a.png").write_bytes(content.replace(entry + b"\x10\x00", entry + b"\x0c\x00"))
    with pytest.raises(DataError, match=r"a\.png"):
        read(tmp_path / "a.png")


def test_what_a_tiff_says_of_its_white_is_heeded(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(65535 - WIDE).save(path, tiffinfo={262: 0})  # min is white
    assert (read(path) == RAMP).all()
    Image.fromarray(np.rot90(65535 - WIDE).copy()).save(path, tiffinfo={262: 0, 274: 6})
    assert (read(path) == RAMP).all()
    Image.fromarray(WIDE).save(path, tiffinfo={281: 65535})
    assert (read(path) == RAMP).all()
    Image.fromarray(WIDE // 16).save(path, tiffinfo={281: 4095})  # 12 bits in 16
    with pytest.raises(DataError, match=r"a\.tif: mode I;16 of a TIFF file has no fixed white"):
        read(path)


def test_a_tiff_of_signed_bytes_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(RAMP).save(path, tiffinfo={339: 1})
    assert (read(path) == RAMP).all()
    ImageFolder(tmp_path, 32, 1).check()
    Image.fromarray(RAMP).save(path, tiffinfo={339: 2})
    os.utime(path, ns=(1, 1))
    for use in (lambda: read(path), ImageFolder(tmp_path, 32, 1).check):
        with pytest.raises(DataError, match=r"a\.tif.*signed bytes of a TIFF file have no fixed"):
            use()


# -- transparency and orientation ------------------------------------------------------------------


def half_clear(mode):
    """Left half clear over red, right half opaque blue."""
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[:, :16] = 255, 0, 0, 0
    rgba[:, 16:] = 0, 0, 255, 255
    image = Image.fromarray(rgba)
    if mode == "RGBA":
        return image, {}
    if mode == "P bytes":
        return image.quantize(8), {}
    if mode == "P index":
        image = Image.fromarray(
            np.eye(2, dtype=np.uint8)[1].repeat(16)[None].repeat(32, 0), "L"
        ).convert("P")
        image.putpalette([255, 0, 0, 0, 0, 255])
        return image, {"transparency": 0}
    if mode == "RGB colour":
        return image.convert("RGB"), {"transparency": (255, 0, 0)}
    raise AssertionError(mode)


@pytest.mark.parametrize("alpha", [0, 128])
def test_a_bitmap_whose_fourth_byte_is_not_used_is_opaque(tmp_path, alpha):
    masks = [0xFF0000, 0xFF00, 0xFF, 0xFF000000]
    pixels = np.tile(np.array([30, 20, 10, 0], np.uint8), (32, 32, 1))  # blue, green, red
    pixels[0, 0, 3] = alpha
    head = struct.pack("<IiiHHIIiiII4I", 108, 32, 32, 1, 32, 3, 4096, 0, 0, 0, 0, *masks)
    head = head.ljust(108, b"\0")
    content = b"BM" + struct.pack("<IHHI", 122 + 4096, 0, 0, 122) + head + pixels.tobytes()
    (tmp_path / "a.bmp").write_bytes(content)
    wanted = [255, 255, 255] if alpha else [10, 20, 30]
    assert read(tmp_path / "a.bmp", channels=3)[:, 9, 9].tolist() == wanted


@pytest.mark.parametrize("mode", ["RGBA", "P bytes", "P index", "RGB colour"])
def test_what_is_transparent_is_white(tmp_path, mode):
    image, options = half_clear(mode)
    pixels = read_image(tmp_path, image, channels=3, **options)
    assert pixels[:, 5, 3].tolist() == [255, 255, 255] and pixels[:, 5, 30].tolist() == [0, 0, 255]
    grey = read_image(tmp_path, image, channels=1, **options)
    assert grey[0, 5, [3, 30]].tolist() == [255, 29]  # 0.114 · 255


def test_webp_and_partly_transparent_grey(tmp_path):
    # grey 100 under a ramp of opacity
    pixels = np.stack([np.full((32, 32), 100, np.uint8), RAMP], axis=-1)
    got = read_image(tmp_path, Image.fromarray(pixels))
    expected = 255 - RAMP.astype(int) * 155 / 255
    assert np.abs(got - expected).max() <= 1
    image, _ = half_clear("RGBA")
    assert read_image(tmp_path, image, "webp", 3, lossless=True)[:, 5, 3].tolist() == [
        255,
        255,
        255,
    ]


@pytest.mark.parametrize(
    ("kind", "clear", "planes"), [(0, b"\x12\x34", 1), (2, b"\x12\x34" * 3, 3)]
)
def test_one_colour_of_a_sixteen_bit_png_may_be_transparent(tmp_path, kind, clear, planes):
    pixels = np.full((8, 8, planes), 0x8080, np.uint16)
    pixels[:, :4] = 0x1234
    (tmp_path / "a.png").write_bytes(png16(pixels, kind, (b"tRNS", clear)))
    got = ImageFolder(tmp_path, 8, 3).read(0)
    assert got[:, 0, 1].tolist() == [255] * 3 and got[:, 0, 6].tolist() == [0x80] * 3


@pytest.mark.parametrize("clear", [(0, 0, 0), (1, 2, 3), (200, 200, 200), (40_000, 1, 65_535)])
def test_of_sixteen_bits_all_tell_whether_a_colour_is_the_transparent_one(tmp_path, clear):
    near = np.array(clear, np.uint16)
    near[1] ^= 1
    pixels = np.stack([np.array(clear, np.uint16), near]).repeat(4, 0)[None].repeat(8, 0)
    (tmp_path / "a.png").write_bytes(png16(pixels, 2, (b"tRNS", struct.pack(">HHH", *clear))))
    folder = ImageFolder(tmp_path, 8, 3)
    folder.check()
    got = folder.read(0)
    assert got[:, 0, 1].tolist() == [255] * 3
    assert got[:, 0, 6].tolist() == [value >> 8 for value in clear]


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_transparent_colour_of_sixteen_bits_turns_with_the_image(tmp_path, orientation):
    pixels = np.zeros((8, 8, 3), np.uint16)
    pixels[0] = 9
    exif = Image.Exif()
    exif[0x0112] = orientation
    chunks = [(b"tRNS", struct.pack(">HHH", 9, 9, 9)), (b"eXIf", exif.tobytes()[6:])]
    (tmp_path / "a.png").write_bytes(png16(pixels, 2, *chunks))
    got = ImageFolder(tmp_path, 8, 3).read(0)[0]
    want = np.zeros((8, 8), np.uint8)
    want[0] = 255
    assert (got == (want if orientation == 1 else np.rot90(want, -1))).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("bits", "row"), [(1, b"\x55"), (2, b"\x1b" * 2), (4, b"\x07\x7f" * 2)])
def test_one_grey_of_few_bits_may_be_transparent(tmp_path, bits, row, channels):
    path = tmp_path / "a.png"
    planes = np.unpackbits(np.frombuffer(row, np.uint8)).reshape(8, bits)
    samples = planes @ 2 ** np.arange(bits)[::-1]
    path.write_bytes(png([row] * 8, 8, bits, 0))
    levels = samples * (255 // (2**bits - 1))
    assert read(path, channels, 8)[0, 0].tolist() == levels.tolist()
    for clear in set(samples.tolist()):
        path.write_bytes(png([row] * 8, 8, bits, 0, (b"tRNS", struct.pack(">H", clear))))
        want = np.where(samples == clear, 255, levels)
        assert read(path, channels, 8)[:, 0].tolist() == [want.tolist()] * channels


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_before_the_crop(tmp_path, orientation, suffix):
    pixels = (
        np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = read_image(tmp_path, Image.fromarray(pixels), suffix, 3, exif=exif, quality=95)
    with Image.open(tmp_path / f"picture.{suffix}") as image:
        want = np.asarray(centre_crop(ImageOps.exif_transpose(image).convert("RGB"), 32)).transpose(
            2, 0, 1
        )
        plain = np.asarray(centre_crop(image.convert("RGB"), 32)).transpose(2, 0, 1)
    assert (got == want).all() and ((want != plain).any() or orientation == 1)


def test_a_corner_of_a_photo_held_upright(tmp_path):
    """Orientation 6: what is stored on the left is the top of the picture."""
    stored = np.zeros((64, 64, 3), np.uint8)
    stored[:, :32] = 255, 0, 0
    exif = Image.Exif()
    exif[0x0112] = 6
    got = read_image(tmp_path, Image.fromarray(stored), "png", 3, exif=exif)
    assert got[:, 2, 16].tolist() == [255, 0, 0] and got[:, 29, 16].tolist() == [0, 0, 0]


def test_damaged_orientation_is_passed_over_and_damaged_pixels_are_not(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08garbage")
    assert (read(tmp_path / "a.png") == pixels).all()
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.png"):
        read(tmp_path / "a.png")


# -- long and large images -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(3200, 16), (16, 3200), (2001, 31), (700, 5), (5, 701), (1000, 1)]
)
def test_the_middle_of_a_long_image_is_as_in_the_official_crop(size):
    # no overshoot to be cut off
    levels = np.random.default_rng(0).integers(80, 176, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(levels)
    factor = 16 / min(size)
    whole = np.asarray(
        image.resize([round(s * factor) for s in size], Image.Resampling.BICUBIC)
    ).astype(int)
    top = (whole.shape[0] - 16) // 2
    left = (whole.shape[1] - 16) // 2
    cropped = np.asarray(centre_crop(image, 16)).astype(int)
    assert cropped.shape == (16, 16, 3)
    assert np.abs(cropped - whole[top : top + 16, left : left + 16]).max() <= 1


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (60_000, 2)])
def test_a_line_is_not_enlarged_as_a_whole(tmp_path, size):
    Image.fromarray(np.full((size[1], size[0], 3), (1, 2, 3), np.uint8)).save(tmp_path / "line.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels = ImageFolder(tmp_path, 256).read(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert pixels.shape == (3, 256, 256) and (pixels == np.array([1, 2, 3]).reshape(3, 1, 1)).all()
    assert grown < 200  # MB; the whole line would take 3,900


def test_long_texts_in_a_png_are_no_damage(tmp_path):
    info = PngInfo()
    info.add_text("workflow", "node " * (1 << 19), zip=True)  # 2.5 MB
    Image.fromarray(RAMP).save(tmp_path / "a.png", pnginfo=info)
    assert (read(tmp_path / "a.png") == RAMP).all()


def test_too_many_pixels_are_said_to_be_that(tmp_path, monkeypatch):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    # Pillow refuses twice its limit, and warns from the limit on
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(
        DataError,
        match=r"a\.png: too large: Image size \(1024 pixels\) exceeds limit of .* shrink it",
    ):
        read(tmp_path / "a.png")


def test_what_pillow_warns_of_is_not_printed(tmp_path, monkeypatch, recwarn):
    Image.fromarray(RAMP).save(tmp_path / "a.tif", tiffinfo={305: "a program"})
    content = bytearray((tmp_path / "a.tif").read_bytes())
    entry = content.index(struct.pack("<HH", 305, 2))  # its text, which is far behind the end now
    struct.pack_into("<II", content, entry + 4, 500, 1 << 20)
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.warns(UserWarning, match="Truncated"), Image.open(tmp_path / "a.tif") as image:
        image.load()
        image.getexif()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert (read(tmp_path / "a.tif") == RAMP).all() and not recwarn.list


def test_no_program_is_run_for_a_picture(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a program was run")

    monkeypatch.setattr(subprocess, "check_call", fail)
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")
    with pytest.raises(DataError, match=r"a\.png: it is a text that begins .%!PS"):
        read(tmp_path / "a.png")
    Image.fromarray(RAMP).save(tmp_path / "a.png", format="GIF")  # which is but misnamed
    assert (read(tmp_path / "a.png") == RAMP).all()


# -- damaged images --------------------------------------------------------------------------------


@pytest.fixture
def some_damaged(tmp_path):
    """Two classes of six images, three of them damaged in different ways."""
    root = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for i in range(6):
            suffix = ("png", "jpg", "webp")[i % 3]
            write(root / name / f"{i}.{suffix}", rng.integers(0, 256, (32, 32, 3), np.uint8))
    for name in ("cat/1.jpg", "dog/0.png"):
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: len(content) * 2 // 3])
    (root / "dog" / "5.webp").write_text("<html>404</html>")
    return root


DAMAGED = ["cat/1.jpg", "dog/0.png", "dog/5.webp"]


def test_all_damaged_images_are_listed_at_once(some_damaged):
    folder = ImageFolder(some_damaged, 16)
    assert sorted(folder.damaged()) == DAMAGED
    with pytest.raises(DataError) as caught:
        check_readable(folder)
    for part in (
        "3 of 12 images",
        *DAMAGED,
        "truncated",
        "it is a web page",
        "skip_damaged = true",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_that_git_lfs_did_not_fetch_are_not_damaged(some_damaged):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 2700\n"
    (some_damaged / "dog" / "4.jpg").write_text(pointer)
    why = r"read: dog/4\.jpg \(it is a Git LFS pointer .* run `git lfs pull` in its repository$"
    for use in (
        lambda: ImageFolder(some_damaged, 16).check(),
        lambda: ImageFolder(some_damaged, 16, skip_damaged=True),
    ):
        with pytest.raises(DataError, match=why):
            use()
    folder = ImageFolder(some_damaged, 16)
    with pytest.raises(DataError, match=r"4\.jpg: it is a Git LFS .*; run `git lfs pull` in its"):
        folder.read(folder.files.index(some_damaged / "dog" / "4.jpg"))


def test_of_many_the_first_are_named_and_the_rest_counted(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"9 of 9 images.*0\.png \(it is empty\).*1\.png.*2\.png.* and 6 more"
    ):
        ImageFolder(tmp_path, 8).check()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "ppm"])
def test_the_check_finds_what_reading_would_stop_at(tmp_path, suffix):
    """Cut anywhere: the check says the same as reading in full."""
    path = tmp_path / f"a.{suffix}"
    rng = np.random.default_rng(0)
    write(path, rng.integers(0, 256, (48, 40, 3), np.uint8))
    whole = path.read_bytes()
    found = []
    for share in (0.02, 0.3, 0.6, 0.9, 0.99, 1.0):
        path.write_bytes(whole[: int(len(whole) * share)])
        folder = ImageFolder(tmp_path, 16)
        found.append(not folder.damaged())
        if found[-1]:
            folder.read(0)
        else:
            with pytest.raises(DataError):
                folder.read(0)
    assert found[:3] == [False] * 3 and found[-1]


def test_images_are_decoded_once_and_again_when_they_change(some_damaged, monkeypatch):
    decoded = []

    def counting(path):
        decoded.append(path.name)
        return true_check(path)

    true_check = checking.check_image
    monkeypatch.setattr(checking, "check_image", counting)
    ImageFolder(some_damaged, 16).damaged()
    assert len(decoded) == 12
    decoded.clear()
    checking._known.clear()  # another process
    assert sorted(ImageFolder(some_damaged, 8, 1).damaged()) == DAMAGED
    assert sorted(decoded) == ["0.png", "1.jpg", "5.webp"]  # what is damaged may have been repaired
    decoded.clear()
    path = some_damaged / "cat" / "0.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    assert sorted(ImageFolder(some_damaged, 16).damaged()) == ["cat/0.png", *DAMAGED]
    (kept,) = (cache_dir() / "checked").glob("*.npy")
    for damage in (b"", b"garbage", kept.read_bytes()[:-3]):
        kept.write_bytes(damage)
        checking._known.clear()
        decoded.clear()
        ImageFolder(some_damaged, 16).damaged()
        assert len(decoded) == 12


def test_only_tiffs_are_checked_again_for_their_signed_bytes(tmp_path, monkeypatch):
    names = ["a.TIF", "b.tif.png", "c.jpg", "d.tiff"]
    for name in names:
        write(tmp_path / "whole" / name)
    with monkeypatch.context() as before:
        before.setattr(checking, "VERSION_OF_TIFF", 1)
        ImageFolder(tmp_path / "whole", 16).damaged()
    decoded = []
    monkeypatch.setattr(checking, "check_image", lambda path: decoded.append(path.name))
    ImageFolder(tmp_path / "whole", 16).damaged()
    assert sorted(decoded) == ["a.TIF", "d.tiff"]


def test_two_that_begin_at_once_check_each_image_once(tmp_path, monkeypatch):
    for i in range(12):
        write(tmp_path / "whole" / f"{i}.png")
    decoded = []
    true_check = checking.check_image

    def counting(path):
        time.sleep(0.02)
        decoded.append(path.name)
        return true_check(path)

    monkeypatch.setattr(checking, "check_image", counting)
    folders = [ImageFolder(tmp_path / "whole", 16) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ImageFolder.damaged, folders)) == [{}] * 3
    assert len(decoded) == 12


def test_damaged_images_are_skipped_where_asked(some_damaged, caplog):
    whole = ImageFolder(some_damaged, 16)
    warn_once.cache_clear()
    folder = open_data(
        DataConfig(kind="image-folder", path=str(some_damaged), image_size=16, skip_damaged=True)
    )
    assert (
        len(folder) == 9
        and list(folder.skipped) == DAMAGED
        and folder.labels.tolist() == [0] * 5 + [1] * 4
    )
    folder.check()
    assert folder.batch(range(9))[0].shape == (9, 3, 16, 16)
    assert "skipped 3 damaged of 12 images: cat/1.jpg (" in caplog.text
    assert folder.digest != whole.digest
    for name in DAMAGED:
        (some_damaged / name).unlink()
    assert ImageFolder(some_damaged, 16).digest == folder.digest  # the same images are read
    assert ImageFolder(some_damaged, 16, skip_damaged=True).digest == folder.digest


def test_a_class_of_damaged_images_only_is_refused(some_damaged):
    for path in (some_damaged / "dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="that can be read in dog too; all of them are damaged"):
        ImageFolder(some_damaged, 16, skip_damaged=True)


def test_what_can_not_be_reached_is_not_skipped_as_damaged(some_damaged, monkeypatch):
    true_open = Image.open

    def failing(path, **how):
        if path.name == "2.webp":
            raise OSError(errno.EIO, "Input/output error")
        return true_open(path, **how)

    monkeypatch.setattr(Image, "open", failing)
    why = r"2 of 12 images.*cat/2\.webp \(Input/output error\).*; check permissions, and"
    with pytest.raises(DataError, match=why):
        ImageFolder(some_damaged, 16, skip_damaged=True)


def test_a_check_that_can_not_be_kept_is_made_all_the_same(
    some_damaged, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ASESEARCH_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        assert sorted(ImageFolder(some_damaged, 16).damaged()) == DAMAGED
    assert "can't be kept" in caplog.text and "ASESEARCH_CACHE" in caplog.text


@pytest.mark.parametrize(
    ("setting", "kinds"),
    [
        ({"skip_damaged": True}, ["fashion-mnist", "latents"]),
        ({"classes": ("a",)}, ["fashion-mnist", "latents"]),
        ({"classes": {"a": 0}}, ["fashion-mnist", "latents"]),
        ({"num_workers": 2}, ["fashion-mnist", "latents"]),
        ({"image_size": 28}, ["fashion-mnist", "latents"]),
        ({"channels": 1}, ["fashion-mnist", "latents"]),
        ({"split": "test"}, ["image-folder", "latents"]),
        ({"download": True}, ["image-folder", "latents"]),
        ({"flip": True}, ["fashion-mnist"]),
        ({"vae": "folder"}, ["fashion-mnist", "image-folder"]),
    ],
)
def test_settings_of_one_kind_of_data_are_refused_elsewhere(kinds, setting):
    for kind in kinds:
        rule = rf"data\.{next(iter(setting))} is for data of kind .*; got .* for kind '{kind}'"
        with pytest.raises(ConfigError, match=rule):
            open_data(DataConfig(kind=kind, path="nowhere", **setting))
