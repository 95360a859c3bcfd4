"""The check that a PyTorch file still holds what was written into it."""

from __future__ import annotations

import os
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from asesearch.errors import CheckpointError
from asesearch.files import some

_known: set[tuple[str, int, int]] = set()  # files that this process has found whole


def refuse_changed(path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not those that were written, by the CRC-32 of each record of a zip
    archive, as PyTorch has written since 1.6.

    PyTorch itself reads without a look at them. Only the tensors in use and the records beside the
    tensors are read, and each file once a process. Nothing is told by a CRC-32 of 0, which PyTorch
    writes where it was told to take none (`set_crc32_options`, `skip_data`), nor by those of
    numbers that were turned round from another byte order.

    Args:
        path: the file.
        state: tensors of it as they were loaded.

    Raises:
        CheckpointError: naming the first tensors that differ.
    """
    facts = os.stat(path)
    mark = (str(path.resolve()), facts.st_size, facts.st_mtime_ns)
    if mark in _known or not zipfile.is_zipfile(path):
        return
    if bad := _changed(path, state):
        raise CheckpointError(
            f"{path} must hold the bytes that were written into it; got others in "
            f"{some(bad)}, by the CRC-32 in the file: it was damaged on its way or "
            "on the disk; copy or download it again"
        )
    _known.add(mark)


def _changed(path: Path, state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors, or else of the records beside them, whose bytes have changed."""
    with zipfile.ZipFile(path) as archive:
        checked = [member for member in archive.infolist() if member.CRC != 0]
        unchecked = {member.file_size for member in archive.infolist() if member.CRC == 0}
        for member in checked:
            if "/data/" in member.filename:
                continue
            try:
                text = archive.read(member)
            except zipfile.BadZipFile:
                return [member.filename]
            if member.filename.endswith("/byteorder") and text.decode() != sys.byteorder:
                return []
    written = {(member.file_size, member.CRC) for member in checked}
    found: dict[int, bool] = {}  # storages may be shared
    for value in state.values():
        storage = value.untyped_storage()
        if storage.data_ptr() not in found and storage.nbytes() not in unchecked:
            held = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            found[storage.data_ptr()] = (held.nbytes, zlib.crc32(held.data)) in written
    return [k for k, v in state.items() if not found.get(v.untyped_storage().data_ptr(), True)]
