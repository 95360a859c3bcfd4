"""A folder of images as a data source."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asesearch.data.checking import find_unreadable
from asesearch.data.folder import (
    CLASSES_FILE,
    ClassMap,
    Files,
    class_folders,
    class_indices,
    list_folder,
)
from asesearch.data.layouts import are_splits, label_tables, shuffled_numbers, wrapped
from asesearch.data.pixels import UnreadableImage, read_pixels
from asesearch.data.sources import mirrored
from asesearch.errors import DataError
from asesearch.files import printable, real_path, some, warn_once

_log = logging.getLogger(__name__)


class ImageFolder:
    """Image files, read when they are needed. Subfolders are classes (ImageNet's layout); a flat
    folder has no labels.

    Links are followed. Hidden files and folders, and those that systems leave behind (@eaDir,
    __MACOSX, lost+found, …), are not read; what is left out is said once, in one warning. Images
    are turned as their EXIF orientation says, transparency is laid on white, and 16 bits are scaled
    to 8.

    Args:
        path: the folder; kept as `root`.
        image_size: side of the centre crop, in pixels.
        channels: 1 = grey, 3 = colour.
        flip: mirror half of the images left to right, where a generator is passed.
        classes: class index of each class folder, as folder names in order of index or as name ->
            index. By default what `classes.json` in the folder says, in either form; without it the
            folders are counted in sorted order, of text as torchvision has it, which is said where
            they are numbers in another.
        skip_damaged: check all images and leave out those that are damaged.
        num_workers: processes that training and references read the images ahead with, see
            `read_ahead`; no result depends on it.

    Attributes:
        classes: class index of each class folder; empty for a flat folder.
        labels_by_order: labels merely count the class folders, so they are a network's only if it
            has as many classes.
        skipped: names of the images that `skip_damaged` left out, and why.
        digest: covers names and sizes of the files, not their content, which would mean reading all
            of ImageNet, and classes where they are not the sorted folders.

    Raises:
        DataError: no such folder, no images in it, images both beside and in subfolders, a class
            folder without images (the labels of those after it would shift), or classes that do not
            fit the folders; on reading, a damaged file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        image_size: int,
        channels: int = 3,
        flip: bool = False,
        *,
        classes: ClassMap | None = None,
        skip_damaged: bool = False,
        num_workers: int = 0,
    ) -> None:
        self.root = root = Path(path)
        listing = list_folder(root)
        folders = class_folders(root, listing)
        if not folders and classes is None and os.path.lexists(root / CLASSES_FILE):
            listing.counts[CLASSES_FILE] += 1
        given = class_indices(root, folders, classes) if folders or classes is not None else None
        if given is None:
            if are_splits(folders, listing):
                warn_once(
                    _log,
                    f"{printable(root)}: the images of {some(folders)} are all read, and these are "
                    "its classes; if they are the parts of a data set, give the folder of one, "
                    f"such as {printable(root / folders[0])}",
                )
            elif inner := wrapped(folders, listing):
                warn_once(
                    _log,
                    f"{printable(root)}: the images of {some(inner)} are all of one class, "
                    f"{printable(folders[0])}; if these are its classes, give the folder "
                    f"{printable(root / folders[0])}",
                )
            if (pair := shuffled_numbers(folders)) is not None:
                warn_once(_log, _order_told(root, folders, *pair))
            if tables := label_tables(root, listing):
                warn_once(
                    _log,
                    f"{printable(root)}: labels in {some(tables)} are not read, "
                    f"{'and the folders are its classes' if folders else 'and it has no classes'}; "
                    "if they are meant, move the images into a folder for each class",
                )
        if listing.left_out:
            warn_once(_log, f"{printable(root)}: {listing.told}")
        self.skipped: dict[str, str] = {}
        self._listed = Files.of(listing.files)
        if skip_damaged:
            self._skip(folders)
        by_order = {name: i for i, name in enumerate(folders)}
        self.classes = by_order if given is None else given
        self.labels_by_order = bool(folders) and given is None
        self.channels = channels
        self.flip = flip
        self.num_workers = num_workers
        self.name = printable(real_path(root).name)
        self.num_classes = 1 + max(self.classes.values(), default=-1)
        self.shape = (channels, image_size, image_size)
        self.labels = None
        if folders:
            self.labels = torch.tensor(
                [self.classes[f.name.split("/", 1)[0]] for f in self._listed]
            )
        text = f"{self.shape} {flip}\n" + "\n".join(f"{f.name} {f.size}" for f in self._listed)
        if self.classes != by_order:
            text += f"\nclasses {json.dumps(self.classes, sort_keys=True)}"
        self.digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def _skip(self, folders: Sequence[str]) -> None:
        """Leave out damaged images."""
        faults = find_unreadable(self.root, self._listed)
        if not faults:
            return
        if not all(fault.reachable for fault in faults.values()):
            raise DataError(self._faults_text({n: f for n, f in faults.items() if not f.reachable}))
        kept = [f for f in self._listed if f.name not in faults]
        bare = sorted(set(folders) - {f.name.split("/", 1)[0] for f in kept})
        if bare or not kept:
            raise DataError(
                f"{printable(self.root)} must hold images that can be "
                f"read{f' in {some(bare)} too' if bare else ''}; all of them are damaged "
                f"({_reasons({n: str(f) for n, f in faults.items()})}); replace them"
            )
        self.skipped = {n: str(f) for n, f in faults.items()}
        warn_once(
            _log,
            f"{printable(self.root)}: skipped {len(faults):,} damaged of {len(self._listed):,} "
            f"images: {_reasons(self.skipped)}",
        )
        self._listed = Files.of(kept)

    def __len__(self) -> int:
        return len(self._listed)

    @property
    def files(self) -> list[Path]:
        """Paths of the images."""
        return [self.root / f.name for f in self._listed]

    def damaged(self) -> dict[str, str]:
        """Names in the folder of the images that can't be read, and why; every image is decoded
        once, see `find_unreadable`."""
        return {
            name: str(fault) for name, fault in find_unreadable(self.root, self._listed).items()
        }

    def check(self) -> None:
        """Find all images that can't be read, before anything is paid for.

        Raises:
            DataError: some can't be; how many, and which come first.
        """
        if faults := find_unreadable(self.root, self._listed):
            raise DataError(self._faults_text(faults))

    def _faults_text(self, faults: dict[str, UnreadableImage]) -> str:
        """What is wrong, those first that have a fix of their own, which is then the one told."""
        shown = sorted(faults.items(), key=lambda item: not item[1].fix)
        reasons = _reasons({name: str(fault) for name, fault in shown})
        count = f"{len(faults):,} of {len(self._listed):,}"
        if fix := shown[0][1].fix:
            return f"{count} images in {printable(self.root)} can't be read: {reasons}; {fix}"
        return (
            f"{count} images in {printable(self.root)} can't be read: {reasons}; replace or remove "
            "them, or leave out what is damaged with skip_damaged = true in the data section (or "
            "asesearch latents: --skip-damaged)"
        )

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """One image: (C, H, W) uint8."""
        path = self.root / self._listed[index].name
        try:
            pixels = read_pixels(path, self.shape[1], self.channels)  # (H, W, C)
        except UnreadableImage as error:
            raise DataError(
                f"can't read the image {printable(path)}: {error}; "
                f"{error.fix or 'replace or remove it'}"
            ) from error
        return pixels.transpose(2, 0, 1)  # (C, H, W)

    def batch(
        self, indices: Sequence[int], generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        images = np.stack([self.read(i) for i in indices])
        y = None if self.labels is None else self.labels[torch.as_tensor(indices)]
        x_start = torch.from_numpy(images).float().div_(127.5).sub_(1.0)  # (N, C, H, W)
        return mirrored(x_start, self.flip, generator), y


def _order_told(root: Path, folders: Sequence[str], first: str, second: str, number: int) -> str:
    """What to say of class folders that are numbers in the order of text."""
    place = folders.index(first)
    return (
        f"{printable(root)}: class folders are counted in the order of text, {first} before "
        f"{second}: {first} is class {place}, {second} class {place + 1}; if other classes are "
        'meant, say which in the data section, classes = { "'
        f'{second}" = {number}, … }}, or in a classes.json'
    )


def _reasons(faults: dict[str, str]) -> str:
    return some([f"{name} ({reason})" for name, reason in faults.items()])
