"""From an image file to 8-bit pixels, and from pixels to a picture."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from asesearch.files import replacing
from asesearch.foreign import PULL, foreign

#: How pixels are turned for each EXIF orientation but the upright one.
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: What Pillow multiplies the samples of a grey PNG of fewer than 8 bits with, but not the one that
#: counts as transparent.
LEVELS = {"L;2": 85, "L;4": 17}
#: Of 8 bits, and what Pillow converts to grey and colour alike.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
#: Tags of TIFF, and what is said by the third that 0 is white.
BITS_PER_SAMPLE, MAX_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 281, 262, 0
SAMPLE_FORMAT, SIGNED = 339, 2
#: The white of 9 to 15 bits, such as a camera's 12, that lie in samples of 16.
FEWER_BITS = tuple(2**bits - 1 for bits in range(9, 16))
LONG = 32  # sides of a ratio beyond this are cropped before they are enlarged
MARGIN = 8  # pixels beside a crop that the bicubic filter may look at: at most 4, and rounding

# of texts in a PNG, to which image generators write their whole workflow: Pillow's own limits call
# what is beyond 1 MB damage
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, 64 << 20)
PngImagePlugin.MAX_TEXT_MEMORY = max(PngImagePlugin.MAX_TEXT_MEMORY, 256 << 20)
#: What Pillow runs another program for.
FOREIGN_FORMATS = ("EPS",)
#: The filter of warnings that come from Pillow's own modules, as `warnings` keeps it.
_PILLOWS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class UnreadableImage(Exception):
    """An image can't be read, and why; `reachable` is False where the file itself can't, whatever
    it may hold, and `fix` is what to do about that where it is known."""

    def __init__(self, reason: str, reachable: bool = True, fix: str = "") -> None:
        super().__init__(reason)
        self.reachable = reachable
        self.fix = fix


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """An open image; whatever Pillow's many decoders raise becomes an `UnreadableImage`, and what
    they warn of, such as many pixels or damaged EXIF data, is none of a reader's concern."""
    if _PILLOWS not in warnings.filters:  # once, since each change makes others' lines come again
        warnings.filterwarnings("ignore", module=_PILLOWS[3].pattern)
    Image.init()
    formats = [name for name in Image.ID if name not in FOREIGN_FORMATS]
    try:
        with Image.open(path, formats=formats) as image:
            yield image
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise _unidentified(path) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(f"too large: {str(error).split(', could')[0]}; shrink it") from error
    except OSError as error:
        damaged = error.errno is None
        fix = "" if damaged else "check permissions, and that the storage is mounted"
        raise UnreadableImage(error.strerror or str(error), damaged, fix) from error
    except Exception as error:
        raise UnreadableImage(str(error) or type(error).__name__) from error


def _unidentified(path: Path) -> UnreadableImage:
    """What a file is that Pillow does not know; one that Git LFS did not fetch is not damaged."""
    what, _, fix = (foreign(path) or "").rpartition("; ")
    if fix == PULL:
        return UnreadableImage(f"it {what}", reachable=False, fix=PULL)
    if not what or what.endswith(" image"):  # the head of one
        return UnreadableImage("no image that is read, by its content")
    return UnreadableImage(f"it {what}")


def read_pixels(path: Path, size: int, channels: int) -> npt.NDArray[np.uint8]:
    """The centre square of an image file: (size, size, channels) uint8.

    The EXIF orientation is applied before the crop. 16 bits are scaled to 8 as 65535 to 255. What
    is transparent is laid on white, palette entries and single colours that count as transparent
    included.

    Raises:
        UnreadableImage: missing, damaged, too large, or of a mode without a fixed white, such as
            floating point.
    """
    with _opened(path) as image:
        _load(image, path)  # not left to `getexif`, whose errors are passed over
        turn = _turn(image)
        flat = _flat(image).convert("L" if channels == 1 else "RGB")
        upright = flat if turn is None else flat.transpose(turn)
        return np.asarray(centre_crop(upright, size)).reshape(size, size, channels)


def check_image(path: Path) -> None:
    """Decode an image file as `read_pixels` does, as cheaply as truth allows: JPEG at an eighth of
    its size.

    Raises:
        UnreadableImage: as `read_pixels`.
    """
    with _opened(path) as image:
        if image.format == "JPEG":
            image.draft("L", (1, 1))
        image.load()
        _refuse_signed(image)
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
            _flat(image).convert("RGB")


def _load(image: ImageFile.ImageFile, path: Path) -> None:
    """Decode an open image. The grey or colour of a PNG that counts as transparent, which is given
    as the file has its samples, is made to fit the 8 bits that Pillow decodes to."""
    raw = image.tile[0][3] if image.format == "PNG" and image.tile else None
    image.load()
    clear = image.info.get("transparency")
    if raw in LEVELS and isinstance(clear, int):
        image.info["transparency"] = clear * LEVELS[raw]
    if raw == "RGB;16B" and isinstance(clear, tuple):
        samples = np.asarray(image).astype(np.uint16) << 8 | _low_bytes(path)  # (H, W, 3)
        opaque = (samples != np.array(clear)).any(-1)
        del image.info["transparency"]
        image.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))


def _low_bytes(path: Path) -> npt.NDArray[np.uint8]:
    """The lower bytes of a colour PNG of 16 bits, of which Pillow decodes the upper ones."""
    with Image.open(path, formats=["PNG"]) as image:
        codec, box, offset, _ = image.tile[0]
        # Pillow before 11 has plain tuples
        image.tile = [(codec, box, offset, "RGB;16L")]  # type: ignore[list-item]
        return np.asarray(image)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the image upright, by its EXIF orientation; None where it is, or where that can't
    be read."""
    try:
        return ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    # damaged EXIF data say nothing about the pixels, and come in as many errors as decoders
    except Exception:
        return None


def _flat(image: Image.Image) -> Image.Image:
    """The image in 8 bits without transparency, in a mode that converts to grey and colour."""
    if image.mode == "F" or image.mode[0] == "I":
        return _eight_bits(image)
    _refuse_signed(image)
    if image.mode not in MODES:
        raise UnreadableImage(
            f"mode {image.mode} of a {image.format} file is not read; convert it to RGB"
        )
    if not image.has_transparency_data:
        return image
    if image.format == "BMP" and image.getextrema()[-1] == (0, 0):  # a byte that is not used
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")


def _refuse_signed(image: Image.Image) -> None:
    """Refuse a TIFF of signed bytes, which Pillow decodes as those without a sign.

    Raises:
        UnreadableImage: as said.
    """
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    if image.mode[0] not in "IF" and SIGNED in tags.get(SAMPLE_FORMAT, ()):
        raise UnreadableImage(
            "signed bytes of a TIFF file have no fixed white to scale by; convert it to 8 or 16 "
            "bits without a sign"
        )


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits in 8."""
    sixteen = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in ("PNG", "PPM")
    )
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    if tags.get(BITS_PER_SAMPLE, (16,)) != (16,) or tags.get(MAX_SAMPLE, (0,))[0] in FEWER_BITS:
        sixteen = False
    if not sixteen:
        raise UnreadableImage(
            f"mode {image.mode} of a {image.format} file has no fixed white to scale by; convert "
            "it to 8 or 16 bits"
        )
    values = np.asarray(image).astype(np.uint32)
    grey = ((values + 128) // 257).clip(max=255).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # which Pillow turns round for 8 bits alone
        grey = 255 - grey
    return Image.fromarray(grey)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Shrink by halves with a box filter, then bicubic to `size` on the shorter side, then crop the
    centre square.

    Of an image more than LONG times as long as it is wide only the middle is enlarged, so that
    memory is bounded; its pixels may differ from the official code's by rounding, and where bicubic
    overshoot is cut off between the two directions.

    Source: the official DiT and guided-diffusion code (`center_crop_arr`), whose FIDs depend on it.
    """
    while min(image.size) >= 2 * size:
        image = image.resize(
            (image.size[0] // 2, image.size[1] // 2), resample=Image.Resampling.BOX
        )
    scale = size / min(image.size)
    wide = round(image.size[0] * scale)
    high = round(image.size[1] * scale)
    left = (wide - size) // 2
    top = (high - size) // 2
    if max(image.size) <= LONG * min(image.size):
        image = image.resize((wide, high), resample=Image.Resampling.BICUBIC)
        return image.crop((left, top, left + size, top + size))
    x, columns = _window(image.size[0], wide, left, size)
    y, rows = _window(image.size[1], high, top, size)
    image = image.crop((columns.start, rows.start, columns.stop, rows.stop))
    return image.resize(
        (size, size), resample=Image.Resampling.BICUBIC, box=(x[0], y[0], x[1], y[1])
    )


def _window(pixels: int, scaled: int, first: int, size: int) -> tuple[tuple[float, float], range]:
    """Where `size` of `scaled` pixels from `first` on lie among the image's own, and which of these
    are needed for them.

    The ends are counted from the first of those that are needed.
    """
    start = first * pixels / scaled
    stop = (first + size) * pixels / scaled
    needed = range(max(0, math.floor(start) - MARGIN), min(pixels, math.ceil(stop) + MARGIN))
    return (start - needed.start, stop - needed.start), needed


def save_images(pixels: npt.NDArray[Any], path: Path, name: str = "images") -> None:
    """Write (N, C, H, W) uint8 as a grid (.png, about as wide as high), or any array under `name`
    (.npz).

    Raises:
        WriteError: the file can't be written.
    """
    with replacing(path, shared=True) as part, part.open("wb") as file:
        if path.suffix == ".npz":
            np.savez_compressed(file, **{name: pixels})  # type: ignore[arg-type]  # numpy's stub takes the name for an option
        else:
            _grid(pixels).save(file, format="PNG")


def _grid(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    n, c, h, w = pixels.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    grid = np.full((rows * columns, c, h, w), 255, np.uint8)
    grid[:n] = pixels
    grid = (
        grid.reshape(rows, columns, c, h, w)
        .transpose(0, 3, 1, 4, 2)
        .reshape(rows * h, columns * w, c)
    )
    return Image.fromarray(grid[..., 0] if c == 1 else grid[..., :3])
