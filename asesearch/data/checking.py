"""Finding damaged files of a data set once, before anything is paid for."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from asesearch.data.cache import cache_dir
from asesearch.data.folder import ImageFile
from asesearch.data.pixels import UnreadableImage, check_image
from asesearch.errors import WriteError
from asesearch.files import printable, real_path, replacing
from asesearch.locks import waited_if_possible

READERS = 16  # threads, at most
KEEP_EVERY = 20_000  # files between writes of what is known
#: Of what `check_image` finds: 2 where it began to find more, the signed bytes of TIFFs.
VERSION, VERSION_OF_TIFF = 1, 2

Fault = TypeVar("Fault")
_log = logging.getLogger(__name__)
# what this process has found, wherever it could be kept
_known: dict[Path, npt.NDArray[np.uint64]] = {}


def find_unreadable(root: Path, files: Sequence[ImageFile]) -> dict[str, UnreadableImage]:
    """The images that can't be read, by name, with the reason; every image is decoded once, see
    `find_faults`."""
    return find_faults(root, files, lambda file: _fault(root / file.name), "images")


def find_faults(
    root: Path, files: Sequence[ImageFile], check: Callable[[ImageFile], Fault | None], what: str
) -> dict[str, Fault]:
    """What `check` finds wrong with files, by name; it runs in several threads.

    Files that were found whole are known again by name, size, time of change and mark, from a file
    in `cache_dir()`, and are not checked a second time.

    Args:
        root: the folder that the files' names begin in.
        files: of the data set.
        check: gives None for a file that is whole.
        what: the files are, for messages.
    """
    keys = np.array([_key(f) for f in files], dtype=np.uint64)
    path = (
        cache_dir()
        / "checked"
        / f"{hashlib.sha256(os.fsencode(real_path(root))).hexdigest()[:32]}.npy"
    )
    if np.isin(keys, _read_known(path)).all():
        return {}
    with waited_if_possible(path.with_suffix(".lock"), f"checks these {what}"):
        return _checked(path, keys, files, check, what)


def _checked(
    path: Path,
    keys: npt.NDArray[np.uint64],
    files: Sequence[ImageFile],
    check: Callable[[ImageFile], Fault | None],
    what: str,
) -> dict[str, Fault]:
    """`find_faults` among the files that are not known by their keys."""
    whole = np.isin(keys, _read_known(path))
    todo = np.flatnonzero(~whole)
    faults: dict[str, Fault] = {}
    threads = min(os.cpu_count() or 1, READERS)
    bar = tqdm(
        total=len(todo),
        desc=f"check {what}",
        file=sys.stderr,
        dynamic_ncols=True,
        leave=False,
        delay=1.0,
    )
    with bar, ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(todo), KEEP_EVERY):
            part = todo[first : first + KEEP_EVERY].tolist()
            for i, fault in zip(part, pool.map(check, [files[i] for i in part]), strict=True):
                bar.update()
                whole[i] = fault is None
                if fault is not None:
                    faults[files[i].name] = fault
            _keep(path, np.unique(keys[whole]), what)
    return faults


def _key(file: ImageFile) -> int:
    version = VERSION_OF_TIFF if file.name.lower().endswith((".tif", ".tiff")) else VERSION
    text = f"{version} {file.name} {file.size} {file.mtime_ns}{file.mark}"
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big"
    )


def _fault(path: Path) -> UnreadableImage | None:
    try:
        check_image(path)
    except UnreadableImage as fault:
        return fault
    return None


def _read_known(path: Path) -> npt.NDArray[np.uint64]:
    """Keys of files that were found whole; none where the file is missing or damaged."""
    none = np.zeros(0, dtype=np.uint64)
    if path in _known:
        return _known[path]
    try:
        keys = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return none
    whole = isinstance(keys, np.ndarray) and keys.ndim == 1 and keys.dtype == np.uint64
    return keys if whole else none


def _keep(path: Path, keys: npt.NDArray[np.uint64], what: str) -> None:
    _known[path] = keys
    try:
        with replacing(path, shared=True) as part, part.open("wb") as file:
            np.save(file, keys, allow_pickle=False)
    except WriteError as error:
        reason = getattr(error.__cause__, "strerror", None) or error.__cause__
        _log.warning(
            "%s will be checked again by the next run, as what was found can't be kept in %s: "
            "%s; set ASESEARCH_CACHE to a folder you may write to",
            what,
            printable(path.parent),
            reason,
        )
