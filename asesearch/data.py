"""Data sources: what training reads and what references are made from.

A source gives batches by index, so a training step's data follow from its seed and number alone.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
import urllib.request
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from asesearch.config import DataConfig
from asesearch.errors import ConfigError, DataError
from asesearch.files import replacing

#: Where Debian's and Ubuntu's package `dataset-fashion-mnist` puts the files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class DataSource(Protocol):
    """What the trainer and the evaluator need of a data set.

    Attributes:
        name: for records, such as "fashion-mnist/train".
        shape: (C, H, W) of x_start.
        num_classes: number of labels, 0 if there are none.
        digest: SHA-256 over everything the batches depend on.
    """

    name: str
    shape: tuple[int, int, int]
    num_classes: int
    digest: str

    def __len__(self) -> int: ...

    def batch(
        self, indices: Sequence[int], generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | dict[str, Tensor] | None]:
        """x_start (N, C, H, W) float32 in [-1, 1] (or scaled latents), and y: (N,) int64, a prompt's tensors, or None.

        `generator` feeds random augmentation; None means none is applied.
        """
        ...


class ImageArray:
    """Images held in memory as bytes.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) integers 0 … num_classes - 1, or None.
        name: for records.
        num_classes: number of labels; by default the largest label plus one.
        flip: mirror half of the images left to right, where a generator is passed.

    Raises:
        DataError: arrays of another shape or type, labels out of range, or no images.
    """

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.integer] | None,
        name: str,
        num_classes: int | None = None,
        flip: bool = False,
    ) -> None:
        if images.ndim != 4 or images.dtype != np.uint8 or len(images) == 0:
            raise DataError(f"images must be uint8 of shape (N, C, H, W), N > 0; got {images.dtype} {images.shape} in {name}")
        if labels is not None and labels.shape != (len(images),):
            raise DataError(f"one label an image is needed; got {labels.shape} labels for {len(images)} images in {name}")
        self.images, self.name, self.flip = torch.tensor(images), name, flip
        self.labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        self.num_classes = 0 if self.labels is None else num_classes or int(self.labels.max()) + 1
        if self.labels is not None and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.num_classes:
            raise DataError(
                f"labels must lie in 0…{self.num_classes - 1}; got {int(self.labels.min())}…{int(self.labels.max())} in {name}"
            )
        self.shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
        sha = hashlib.sha256(repr((images.shape, flip)).encode())
        sha.update(self.images.numpy().data)
        if self.labels is not None:
            sha.update(self.labels.numpy().data)
        self.digest = sha.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        index = torch.as_tensor(indices, dtype=torch.int64)
        x_start = self.images[index].float().div_(127.5).sub_(1.0)  # (N, C, H, W)
        return _mirrored(x_start, self.flip, generator), None if self.labels is None else self.labels[index]


def read_idx(path: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes (MNIST's format), gzipped or not.

    Raises:
        DataError: missing, not IDX, not bytes, truncated, or with bytes left over.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"can't read the IDX file {path}: {error}; check the path or fetch the file again") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise DataError(f"{path} is not an IDX file of unsigned bytes; MNIST's and Fashion-MNIST's files are")
    shape = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    body = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3])
    if body.size != math.prod(shape):
        raise DataError(f"{path} is truncated or damaged: its header says {shape}, it holds {body.size} bytes; fetch it again")
    return body.reshape(shape)


#: The four files and the SHA-256 of their uncompressed content (Debian compresses them anew).
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def cache_dir() -> Path:
    """Folder for downloads and cached references: $ASESEARCH_CACHE, or `asesearch` in the user's cache folder."""
    own = os.environ.get("ASESEARCH_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "asesearch"


def fashion_mnist(split: str = "train", path: str | os.PathLike[str] | None = None, *, download: bool = False) -> ImageArray:
    """Fashion-MNIST: 28×28 grey images of ten kinds of clothing (Xiao et al. 2017, MIT licence).

    The 10,000 `test` images travel in the package. The 60,000 `train` images are taken from `path` where given, else from
    Debian's package `dataset-fashion-mnist`, else from the cache; with `download` they are fetched into the cache.
    The content is checked against its published SHA-256 wherever it came from.

    Raises:
        DataError: unknown split, files not found, or files that are not Fashion-MNIST.
    """
    if split not in ("train", "test"):
        raise DataError(f"Fashion-MNIST has the splits train and test; got {split!r}")
    stem = "train" if split == "train" else "t10k"
    names = [f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"]
    folders = [Path(path)] if path is not None else [DEBIAN_FASHION_MNIST, cache_dir() / "fashion-mnist"]
    if split == "test" and path is None:
        folders.insert(0, Path(str(resources.files("asesearch"))) / "assets" / "fashion-mnist")
    for folder in folders:
        found = [next((f for f in (folder / n, folder / f"{n}.gz") if f.is_file()), None) for n in names]
        if all(found):
            arrays = [_checked_idx(f, n) for f, n in zip(found, names, strict=True) if f is not None]
            break
    else:
        if not (download and path is None):
            raise DataError(
                f"the Fashion-MNIST {split} images are not in {' or '.join(map(str, folders))}; install Debian's package "
                "dataset-fashion-mnist, give the folder that holds the IDX files, or allow the download"
            )
        arrays = [_checked_idx(_download_fashion_mnist(n, folders[-1]), n) for n in names]
    return ImageArray(arrays[0][:, None], arrays[1], f"fashion-mnist/{split}", num_classes=10)


def _checked_idx(path: Path, name: str) -> npt.NDArray[np.uint8]:
    array = read_idx(path)
    raw = path.read_bytes()
    content = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    if hashlib.sha256(content).hexdigest() != FASHION_MNIST_SHA256[name]:
        raise DataError(f"{path} is a readable IDX file but not Fashion-MNIST's {name} (SHA-256 differs); fetch it again")
    return array


def _download_fashion_mnist(name: str, folder: Path) -> Path:
    target = folder / f"{name}.gz"
    try:
        with urllib.request.urlopen(f"{FASHION_MNIST_URL}{name}.gz", timeout=60) as response:
            content = response.read()
    except OSError as error:
        raise DataError(
            f"can't download {FASHION_MNIST_URL}{name}.gz to {folder}: {error}; fetch the files by hand and give their folder"
        ) from error
    with replacing(target, shared=True) as part:
        part.write_bytes(content)
        _checked_idx(part, name)
    return target


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Shrink by halves with a box filter, then bicubic to `size` on the shorter side, then crop the centre square.

    Source: the official DiT and guided-diffusion code (`center_crop_arr`), whose FIDs depend on it.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    wide, high = round(image.size[0] * scale), round(image.size[1] * scale)
    image = image.resize((wide, high), resample=Image.Resampling.BICUBIC)
    left, top = (wide - size) // 2, (high - size) // 2
    return image.crop((left, top, left + size, top + size))


class ImageFolder:
    """Image files, read when they are needed. Subfolders are classes (ImageNet's layout); a flat folder has no labels.

    Args:
        path: the folder; kept as `root`.
        image_size: side of the centre crop, in pixels.
        channels: 1 = grey, 3 = colour.
        flip: mirror half of the images left to right, where a generator is passed.

    `digest` covers names and sizes of the files, not their content, which would mean reading all of ImageNet.

    Raises:
        DataError: no such folder, no images in it, images both beside and in subfolders, or a class folder without images
            (the labels of those after it would shift); on reading, a damaged file.
    """

    def __init__(self, path: str | os.PathLike[str], image_size: int, channels: int = 3, flip: bool = False) -> None:
        root = Path(path)
        if not root.is_dir():
            raise DataError(f"no image folder {root}; check data.path")
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not files:
            raise DataError(f"no images ({' '.join(IMAGE_SUFFIXES)}) in {root} or its subfolders; check data.path")
        nested = [len(p.relative_to(root).parts) > 1 for p in files]
        if any(nested) and not all(nested):
            stray = next(p for p, n in zip(files, nested, strict=True) if not n)
            raise DataError(f"{root} holds images both in class folders and beside them ({stray.name}); move these")
        classes = sorted({p.relative_to(root).parts[0] for p in files}) if all(nested) else []
        empty = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != "." and p.name not in classes)
        if classes and empty:
            raise DataError(
                f"every class folder of {root} must hold images; got none in {', '.join(empty[:5])}; remove or fill it"
            )
        index = {name: i for i, name in enumerate(classes)}
        self.root, self.files, self.channels, self.flip, self.name = root, files, channels, flip, root.resolve().name
        self.labels = torch.tensor([index[p.relative_to(root).parts[0]] for p in files]) if classes else None
        self.num_classes, self.shape = len(classes), (channels, image_size, image_size)
        listing = "\n".join(f"{p.relative_to(root).as_posix()} {p.stat().st_size}" for p in files)
        self.digest = hashlib.sha256(f"{self.shape} {flip}\n{listing}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """One image: (C, H, W) uint8."""
        try:
            with Image.open(self.files[index]) as image:
                pixels = np.asarray(centre_crop(image.convert("L" if self.channels == 1 else "RGB"), self.shape[1]))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all of them are Pillow's
            raise DataError(f"can't read the image {self.files[index]}: {error}; replace or remove it") from error
        return pixels.reshape(*self.shape[1:], self.channels).transpose(2, 0, 1)  # (H, W, C) -> (C, H, W)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        images = np.stack([self.read(i) for i in indices])
        y = None if self.labels is None else self.labels[torch.as_tensor(indices)]
        x_start = torch.from_numpy(images).float().div_(127.5).sub_(1.0)  # (N, C, H, W)
        return _mirrored(x_start, self.flip, generator), y


def _mirrored(x_start: Tensor, flip: bool, generator: torch.Generator | None) -> Tensor:
    if not flip or generator is None:
        return x_start
    mirrored = torch.rand(len(x_start), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], x_start.flip(-1), x_start)


def open_data(config: DataConfig) -> DataSource:
    """The data set of a study file.

    Raises:
        ConfigError: a setting that this kind of data needs is missing, or one that it has no use for.
        DataError: missing, empty or damaged data.
    """
    if config.vae is not None and config.kind != "latents":
        raise ConfigError(f"vae decodes latents; got it for data of kind {config.kind!r}; leave it out")
    if config.kind == "fashion-mnist":
        return fashion_mnist(config.split, config.path, download=config.download)
    if config.path is None:
        raise ConfigError(f"data.path is needed for data of kind {config.kind!r}; got none; give the folder")
    if config.kind == "latents":
        from asesearch.latents import LatentShards  # here, because that module imports this one

        return LatentShards(config.path, config.flip)
    if config.image_size is None:
        raise ConfigError("data.image_size is needed for an image folder; got none; give the side in pixels")
    return ImageFolder(config.path, config.image_size, config.channels, config.flip)


def save_images(pixels: npt.NDArray[Any], path: Path, name: str = "images") -> None:
    """Write (N, C, H, W) uint8 as a grid (.png, about as wide as high), or any array under `name` (.npz).

    Raises:
        WriteError: the file can't be written.
    """
    with replacing(path) as part, part.open("wb") as file:
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
    grid = grid.reshape(rows, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    return Image.fromarray(grid[..., 0] if c == 1 else grid[..., :3])
