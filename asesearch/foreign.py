"""What a file is that is not the checkpoint, image or database it should be, in words, with what
to do about it."""

from __future__ import annotations

import re
import tarfile
import zipfile
from pathlib import Path

from asesearch.files import loads

_HEAD = 4096  # bytes that are looked at
_LFS = b"version https://git-lfs.github.com/spec/"
_ARCHIVES = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
}
_OTHER = {
    b"\x89HDF": "an HDF5 file, as Keras writes",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF file",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
    b"SQLite format 3": "a SQLite database",
}
_CONVERT = "convert it, or give the checkpoint that PyTorch wrote (.pt, .pth or .safetensors)"
_AGAIN = "download it again"
#: The fix of a file that was not fetched, whatever it is to be.
PULL = "run `git lfs pull` in its repository"


def foreign(path: Path, plain_text: bool = True) -> str | None:
    """What a file is and how to fix that, as "WHAT; FIX"; None where it may be a checkpoint, whole
    or damaged.

    Args:
        path: of a file that can be read.
        plain_text: tell JSON and other text too.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if size == 0:
        return f"is empty; {_AGAIN}"
    if head.startswith(_LFS):
        return _lfs_pointer(head)
    for magic, name in _ARCHIVES.items():
        if head.startswith(magic):
            return f"is a {name} archive; unpack it, and give the checkpoint that is in it"
    for magic, name in _OTHER.items():
        if head.startswith(magic):
            return f"is {name}; {_CONVERT}"
    if head.startswith(b"PK"):
        return _zip(path, size)
    if not head.strip(b"\0"):
        return f"begins with nothing but zeros, as an unfinished download does; {_AGAIN}"
    if tarfile.is_tarfile(path):
        return "is a tar archive; unpack it, and give the checkpoint that is in it"
    return _text(path, head, size, plain_text)


def _lfs_pointer(head: bytes) -> str:
    found = re.search(rb"^size (\d+)", head, re.MULTILINE)
    meant = f", whose {int(found[1]):,} bytes were not fetched" if found else ""
    return f"is a Git LFS pointer to the file{meant}; {PULL}"


def _zip(path: Path, size: int) -> str | None:
    """A zip archive that is not PyTorch's, or not whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            methods = {member.compress_type for member in archive.infolist()}
    except zipfile.BadZipFile:
        return f"is cut short after {size:,} bytes, as an unfinished download is; {_AGAIN}"
    if any(name.endswith("constants.pkl") for name in names):
        return (
            "is a TorchScript program; save its state dict: torch.save(module.state_dict(), FILE)"
        )
    if any(name.endswith("data.pkl") for name in names):
        if methods <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            return None
        return (
            "was packed again in a way that PyTorch can't read; unpack it, and zip it uncompressed"
        )
    if names and all(name.endswith(".npy") for name in names):
        return f"is an archive of NumPy arrays (.npz); {_CONVERT}"
    return (
        f"is a zip archive of {', '.join(names[:3]) or 'nothing'}; unpack it, and give the "
        "checkpoint"
    )


def _text(path: Path, head: bytes, size: int, plain_text: bool) -> str | None:
    """Text of any kind; None for binary data."""
    try:
        text = head[: -4 if size > _HEAD else None].decode("utf-8-sig").lstrip()
    except UnicodeDecodeError:
        return None
    if not text or not all(c.isprintable() or c.isspace() for c in text):
        return None
    lower = text.lower()
    if lower.startswith("<") and ("<html" in lower or "<!doctype html" in lower):
        title = re.search(r"<title>\s*([^<]{1,80}?)\s*</title>", text, re.IGNORECASE)
        shown = f" ({title[1]!r})" if title else ""
        return (
            f"is a web page{shown}; download the file itself, signed in where the site asks for it"
        )
    if lower.startswith("<") and "<svg" in lower:
        return f"is an SVG drawing; {_CONVERT}"
    if lower.startswith("<?xml") or (lower.startswith("<") and "</" in lower):
        return f"is an XML text, often a server's error message; {_AGAIN}"
    if not plain_text:
        return None
    if text[0] in "{[" and _is_json(path):
        return "is a JSON text; give the file of weights, or the folder that holds both"
    return f"is a text that begins {text.splitlines()[0][:60]!r}; give the checkpoint"


def _is_json(path: Path) -> bool:
    try:
        loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return False
    return True
