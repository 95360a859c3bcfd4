"""`bundle.json`: what an exported folder says of itself, and the hashes of its files.

It is read strictly, and nothing here reads a weight. All formats share it: `format` tells them
apart, and `files` gives size and SHA-256 of every other file.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from asesearch.errors import CheckpointError
from asesearch.files import check_utf8, file_sha256, once

MANIFEST = "bundle.json"
MAX_BYTES = 1 << 24  # of a manifest; those of real studies have a few thousand
MAX_DIGITS = 40  # of an integer in it
# behind a bundle's name and the process: a new one that is not finished, and the one it replaces
PART = ".part"
OLD = ".old.part"
_EXPORT = "export it again"
_COPY = "copy the bundle again"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the folder's manifest says; `format` and `files` are there and are text and a table.

    Raises:
        CheckpointError: none there, or no strict JSON: damaged, a key twice, a number that is none;
            or a path at which safetensors could open none of its files.
    """
    check_utf8(folder.absolute(), "a bundle", CheckpointError)
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        data = json.loads(
            path.read_text(encoding="utf-8-sig"),
            object_pairs_hook=once,
            parse_constant=_refuse_constant,
            parse_int=_integer,
        )
    except RecursionError as error:
        raise CheckpointError(f"can't read {path}: it is nested too deep; {_EXPORT}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        aside = [] if os.path.lexists(folder) else left_of(folder, OLD)
        if aside:
            raise CheckpointError(
                f"can't read {path}: {reason}; the bundle is {aside[0]}, as a process that was to "
                f"overwrite it was killed; rename that to {folder.name}"
            ) from error
        raise CheckpointError(
            f"can't read {path}: {reason}; is {folder} a bundle written by `asesearch export`?"
        ) from error
    if not (
        isinstance(data, dict)
        and isinstance(data.get("format"), str)
        and isinstance(data.get("files"), dict)
    ):
        raise CheckpointError(f"{path} is not the manifest of an asesearch bundle; {_EXPORT}")
    return data


def left_of(folder: Path, kind: str) -> list[Path]:
    """What processes left of a bundle: its name, digits, and `kind`."""
    name = re.compile(rf"{re.escape(folder.name)}\.[0-9]+{re.escape(kind)}")
    found = folder.parent.glob(f"{glob.escape(folder.name)}.*{kind}")
    return sorted(path for path in found if name.fullmatch(path.name))


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"it has an integer of {len(text):,} digits")
    return int(text)


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"it has {text}, which is no JSON number")


def check_format(folder: Path, data: Mapping[str, Any], name: str, version: int) -> None:
    """Refuse the manifest of another format, or of another version of it.

    Raises:
        CheckpointError: naming both.
    """
    path = folder / MANIFEST
    if data["format"] != name:
        raise CheckpointError(
            f"{path} is not the manifest of a bundle of format {name!r}; got "
            f"{data['format'][:40]!r}; give another folder"
        )
    found = data.get("version")
    if type(found) is not int or found != version:
        raise CheckpointError(
            f"{path} has bundle version {repr(found)[:40]}; this release reads "
            f"{version}; update asesearch"
        )


def has_scaling(latents: object, channels: int | None = None) -> bool:
    """Whether a manifest's `latents` is null, or gives shift and scale as lists of as many finite
    numbers.

    Args:
        latents: what the manifest has.
        channels: how many numbers there must be; None for any.
    """
    if latents is None:
        return True
    if not isinstance(latents, dict):
        return False
    lists = [v for v in (latents.get("shift"), latents.get("scale")) if isinstance(v, list)]
    if len(lists) < 2 or len(lists[0]) != len(lists[1]) or not lists[0]:
        return False
    if channels not in (None, len(lists[0])):
        return False
    return all(type(v) in (int, float) and math.isfinite(v) for v in (*lists[0], *lists[1]))


def file_entries(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`files` of a manifest: size and SHA-256 of these files of the folder."""
    return {
        name: {"sha256": file_sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in names
    }


def check_names(folder: Path, data: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse a manifest that names other files than its format has.

    Raises:
        CheckpointError: a name that leads out of the folder, or the first that is too many or too
            few.
    """
    for name in data["files"]:
        _check_name(folder, name)
    wanted = set(names)
    odd = sorted(wanted ^ set(data["files"]))
    if odd:
        what = "lacks the file" if odd[0] in wanted else "names the unknown file"
        raise CheckpointError(f"{folder / MANIFEST} {what} {odd[0][:80]!r}; {_EXPORT}")


def check_files(folder: Path, data: Mapping[str, Any]) -> None:
    """Compare every file on record with its size and hash; nothing else of the folder is read.

    Raises:
        CheckpointError: a name that leads out of the folder, a link, or a file that is missing or
            damaged.
    """
    for name in data["files"]:
        _check_name(folder, name)
    for name, entry in data["files"].items():
        check_file(folder, name, entry)


def _check_name(folder: Path, name: str) -> None:
    """Refuse a name that leads elsewhere, by itself or by a link."""
    parts = PurePosixPath(name).parts
    plain = name and name == "/".join(parts) and not {"..", ".", "/"} & set(parts)
    if not plain or any(c in name for c in "\\:\0") or name == MANIFEST:
        raise CheckpointError(
            f"{folder / MANIFEST} must name files inside the bundle; got {name[:80]!r}; {_EXPORT}"
        )
    for i in range(len(parts)):
        path = folder.joinpath(*parts[: i + 1])
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link, and a bundle has the files themselves; copy what it leads to "
                "(cp -L)"
            )


def check_file(folder: Path, name: str, entry: object) -> None:
    """Compare one file of the folder with its size and hash on record.

    Raises:
        CheckpointError: missing or damaged, or no such record.
    """
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {_COPY}")
    if not (isinstance(entry, dict) and entry.keys() == {"sha256", "bytes"}):
        raise CheckpointError(
            f"{folder / MANIFEST} must give sha256 and bytes of {name}; got {str(entry)[:80]}; "
            f"{_EXPORT}"
        )
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise CheckpointError(
            f"{path} is damaged: it has {size:,} bytes, and {str(entry['bytes'])[:40]} are on "
            f"record; {_COPY}"
        )
    if file_sha256(path) != entry["sha256"]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the recorded one; {_COPY}")
