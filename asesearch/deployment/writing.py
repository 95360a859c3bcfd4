"""Writing a bundle: its folder appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from asesearch.backbones.base import check_schedule
from asesearch.backbones.saving import save_backbone
from asesearch.deployment.bundle import FILES, FORMAT, VERSION, Bundle
from asesearch.deployment.manifest import MANIFEST, OLD, PART, file_entries, left_of
from asesearch.deployment.parity import make_parity
from asesearch.deployment.recorded import parity_count
from asesearch.errors import CheckpointError, WriteError
from asesearch.files import (
    check_utf8,
    check_writable,
    folder_to_disk,
    follow_umask,
    names_to_disk,
    remove_stale,
    why_not,
)


def write_bundle(bundle: Bundle, folder: Path, *, overwrite: bool = False) -> Path:
    """Write a bundle; the folder appears whole or not at all.

    Raises:
        CheckpointError, WriteError: see `check_bundle_dir`.
        ConfigError: no prompts for a network that takes them, or prompts that it does not take.
        ScheduleError: the schedule does not fit the network.
    """
    folder = Path(folder)
    check_schedule(bundle.backbone, bundle.diffusion.num_train_timesteps, bundle.schedule)
    if bundle.backbone.takes_prompt:
        bundle.backbone.check_conditioning(bundle.prompts, parity_count(bundle.prompts))
    with whole_folder(folder, overwrite=overwrite) as part:
        write_files(bundle, part)
    return folder


@contextmanager
def whole_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` at the end; if that or the body
    fails, `folder` is as it was. If the power goes, it has all of its files or not its name.

    Raises:
        CheckpointError, WriteError: see `check_bundle_dir`.
    """
    check_bundle_dir(folder, overwrite=overwrite)
    part = folder.with_name(f"{folder.name}.{os.getpid()}{PART}")
    try:
        remove_stale([*left_of(folder, PART), *left_of(folder, OLD)])
        part.mkdir(parents=True)
        yield part
        for place in (part, *(p for p in part.rglob("*") if p.is_dir())):
            if files := [p for p in place.iterdir() if p.is_file()]:
                follow_umask(files)
        folder_to_disk(part)
        _take_place(part, folder)
        names_to_disk(folder.parent)
    except (OSError, SafetensorError) as error:
        raise WriteError(why_not(folder, error)) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _take_place(part: Path, folder: Path) -> None:
    """Give a finished folder its name. What had it before is put back if that fails; if the process
    dies in between, `check_bundle_dir` puts it back."""
    if not folder.exists():
        os.replace(part, folder)
        return
    old = folder.with_name(f"{folder.name}.{os.getpid()}{OLD}")
    os.replace(folder, old)
    try:
        os.replace(part, folder)
    except BaseException:
        os.replace(old, folder)
        raise
    os.replace(old, part)  # to be removed


def _put_back(folder: Path) -> None:
    """Give a bundle its name again that a killed process had set aside to overwrite it."""
    for old in left_of(folder, OLD):
        if not os.path.lexists(folder):
            os.replace(old, folder)


def check_bundle_dir(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that no bundle can be written to; nothing is left behind. A bundle that a
    killed process had set aside to overwrite it is put back first.

    Raises:
        CheckpointError: it exists (and `overwrite` is not set), holds something else, or its path
            is not UTF-8.
        WriteError: it can't be written.
    """
    folder = Path(folder)
    check_utf8(folder.absolute(), "a bundle", CheckpointError)
    with suppress(OSError):
        _put_back(folder)
    if os.path.lexists(folder):
        if not folder.is_dir() or folder.is_symlink() or os.path.ismount(folder):
            raise CheckpointError(
                f"a bundle is a folder of its own, replaced as a whole; got {folder}, which is a "
                "file, a link or a mount point; choose another, or a folder in it"
            )
        if not overwrite:
            raise CheckpointError(
                f"{folder} exists already; choose another folder, or overwrite it (--overwrite)"
            )
        if any(folder.iterdir()) and not (folder / MANIFEST).is_file():
            raise CheckpointError(
                f"{folder} is not a bundle, so it is not overwritten; choose another folder"
            )
    check_writable(folder.with_name(f"{folder.name}.{2**22}{OLD}"), FILES[1], named=folder)


def write_files(bundle: Bundle, folder: Path) -> None:
    """Write a bundle's files into a folder that is there."""
    net = bundle.backbone
    save_backbone(net, folder / FILES[0], {})
    steps = bundle.diffusion.num_train_timesteps
    save_file(make_parity(net, bundle.schedule, steps, bundle.prompts), folder / FILES[1])
    own = {
        "format": FORMAT,
        "version": VERSION,
        "backbone": {"kind": bundle.kind, "config": net.config},
    }
    write_manifest(folder, own, bundle, FILES)


def write_manifest(
    folder: Path, own: Mapping[str, Any], bundle: Bundle, files: Sequence[str]
) -> None:
    """Write what every format records of a bundle, with what is a format's own, and the size and
    hash of its files."""
    data = {
        **own,
        "schedule": bundle.schedule.to_dict(),
        "diffusion": bundle.diffusion.model_dump(mode="json"),
        "sampling": bundle.sampling.model_dump(mode="json"),
        "evaluation": bundle.evaluation,
        "provenance": bundle.provenance,
        "latents": bundle.latents,
        "files": file_entries(folder, files),
    }
    if bundle.acceleration is not None:
        calibration = bundle.acceleration.to_dict()
        data["acceleration"] = {"name": bundle.acceleration_name, "calibration": calibration}
    (folder / MANIFEST).write_text(json.dumps(data, indent=1), encoding="utf-8")
