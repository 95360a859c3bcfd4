"""Writing files whole or not at all, and knowing them by their content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from asesearch.errors import WriteError


@contextmanager
def replacing(path: str | os.PathLike[str], *, shared: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, whose folder is made; what the body wrote there takes the place of `path` at the end.

    If the body fails, the process is killed or the power goes, `path` is as it was before, or whole.

    Args:
        path: the file to write.
        shared: several processes may write it at once.

    Raises:
        WriteError: folder or file can't be written.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part" if shared else f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _to_disk(part, os.O_RDWR)
        os.replace(part, path)
        with suppress(OSError):  # a folder can't be opened everywhere
            _to_disk(path.parent, os.O_RDONLY)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise WriteError(f"can't write to {path}: {reason}; choose a folder you may write to, with room in it") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _to_disk(path: Path, flags: int) -> None:
    """Wait until a file's content, or a folder's list of names, would survive a power cut."""
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise  # a file system that has no such call is not an error, a full disk is
    finally:
        os.close(handle)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out before hours of work whether `path` can be written; nothing is left behind but its folder.

    Raises:
        WriteError: it can't.
    """
    path = Path(path)
    with replacing(path.with_name(f".{path.name}.writable"), shared=True) as part:
        part.touch()
    path.with_name(f".{path.name}.writable").unlink()


def write_json(path: Path, data: Any) -> None:
    """Write JSON.

    Raises:
        WriteError: see `replacing`.
    """
    with replacing(path, shared=True) as part:
        part.write_text(json.dumps(data, indent=1), encoding="utf-8")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
