"""Fashion-MNIST and the IDX files it comes in."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
import urllib.request
import zlib
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt

from asesearch.data.cache import cache_dir
from asesearch.data.sources import ImageArray
from asesearch.errors import DataError, WriteError
from asesearch.files import check_writable, replacing

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


def read_idx(path: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes (MNIST's format), gzipped or not.

    Raises:
        DataError: missing, not IDX, not bytes, truncated, or with bytes left over.
    """
    path = Path(path)
    return _array_in(_content(path), path)


def _content(path: Path) -> bytes:
    """What a file holds, uncompressed."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"can't read the IDX file {path}: {error}; check the path or fetch the file again"
        ) from error


def _array_in(data: bytes, path: Path) -> npt.NDArray[np.uint8]:
    """The array, read-only, that an IDX file of this content holds."""
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise DataError(
            f"{path} is not an IDX file of unsigned bytes; MNIST's and Fashion-MNIST's files are"
        )
    shape = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    body = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3])
    if body.size != math.prod(shape):
        raise DataError(
            f"{path} is truncated or damaged: its header says {shape}, it holds {body.size} bytes; "
            "fetch it again"
        )
    return body.reshape(shape)


#: The four files and the SHA-256 of their uncompressed content (Debian compresses them again).
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def fashion_mnist(
    split: str = "train", path: str | os.PathLike[str] | None = None, *, download: bool = False
) -> ImageArray:
    """Fashion-MNIST: 28×28 grey images of ten kinds of clothing (Xiao et al. 2017, MIT licence).

    The 10,000 `test` images travel in the package. The 60,000 `train` images are taken from `path`
    where given, else from Debian's package `dataset-fashion-mnist`, else from the cache; with
    `download` they are fetched into the cache. The content is checked against its published SHA-256
    wherever it came from.

    Raises:
        DataError: unknown split, files not found, or files that are not Fashion-MNIST.
    """
    if split not in ("train", "test"):
        raise DataError(f"Fashion-MNIST has the splits train and test; got {split!r}")
    stem = "train" if split == "train" else "t10k"
    names = [f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"]
    folders = (
        [Path(path)] if path is not None else [DEBIAN_FASHION_MNIST, cache_dir() / "fashion-mnist"]
    )
    if split == "test" and path is None:
        folders.insert(0, Path(str(resources.files("asesearch"))) / "assets" / "fashion-mnist")
    for folder in folders:
        found = [
            next((f for f in (folder / n, folder / f"{n}.gz") if os.path.isfile(f)), None)
            for n in names
        ]
        if all(found):
            arrays = [
                _checked_idx(f, n) for f, n in zip(found, names, strict=True) if f is not None
            ]
            break
    else:
        if not (download and path is None):
            raise DataError(
                f"the Fashion-MNIST {split} images are not in {' or '.join(map(str, folders))}; "
                "install Debian's package dataset-fashion-mnist, give the folder that holds the "
                "IDX files, or allow the download"
            )
        arrays = [_checked_idx(_download_fashion_mnist(n, folders[-1]), n) for n in names]
    return ImageArray(arrays[0][:, None], arrays[1], f"fashion-mnist/{split}", num_classes=10)


def _checked_idx(path: Path, name: str) -> npt.NDArray[np.uint8]:
    """The array of one of Fashion-MNIST's files; read-only, and read once per process as long as
    the file stays as it is."""
    status = path.stat()
    return _checked_content(path, name, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _checked_content(path: Path, name: str, _mtime_ns: int, _size: int) -> npt.NDArray[np.uint8]:
    content = _content(path)
    array = _array_in(content, path)
    if hashlib.sha256(content).hexdigest() != FASHION_MNIST_SHA256[name]:
        raise DataError(
            f"{path} is a readable IDX file but not Fashion-MNIST's {name} (SHA-256 differs); "
            "fetch it again"
        )
    return array


def _download_fashion_mnist(name: str, folder: Path) -> Path:
    target = folder / f"{name}.gz"
    try:
        check_writable(target)
    except WriteError as error:
        raise DataError(
            f"can't keep Fashion-MNIST in {folder}: {error.__cause__}; set ASESEARCH_CACHE to a "
            "folder you may write to"
        ) from error
    try:
        with urllib.request.urlopen(f"{FASHION_MNIST_URL}{name}.gz", timeout=60) as response:
            content = response.read()
    except OSError as error:
        raise DataError(
            f"can't download {FASHION_MNIST_URL}{name}.gz to {folder}: {error}; fetch the files by "
            "hand and give their folder"
        ) from error
    with replacing(target, shared=True) as part:
        part.write_bytes(content)
        _checked_idx(part, name)
    return target
