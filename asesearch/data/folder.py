"""What an image folder holds: its images, what is left out, and which class each subfolder is."""

from __future__ import annotations

import errno
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from asesearch.errors import DataError
from asesearch.files import loads, once, printable, read_text, some, whence

#: What torchvision's ImageFolder takes, and two more names of JPEG files.
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp"),
    *(".bmp", ".ppm", ".pgm", ".tif", ".tiff"),
)
#: Of images that are not read.
OTHER_SUFFIXES = frozenset({".gif", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".tga"})
CLASSES_FILE = "classes.json"
#: Files of data sets that are read elsewhere, or said to be, when they lie in the folder itself.
OWN_FILES = (CLASSES_FILE, "metadata.jsonl")
#: How files end that may tell of images in other layouts.
TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
#: What operating systems and network storage leave in folders beside what is hidden by its dot; in
#: lower case.
SYSTEM_NAMES = frozenset(
    {
        "@eadir",
        "@tmp",
        "#recycle",
        "#snapshot",
        "@recycle",
        "@recently-snapshot",
        "@synoeastream",
        "@synoresource",
        "@__thumb",
        "~snapshot",
        "_gsdata_",
        "lost+found",
        "recycled",
        "recycler",
        "$recycle.bin",
        "system volume information",
        "network trash folder",
        "temporary items",
        "__macosx",
        "__pycache__",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
    }
)
LIMIT = 10**9  # of class indices; no network comes near


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One file, mostly an image: its path in the folder (with slashes), size in bytes, time of
    change in nanoseconds, and what else it is known by."""

    name: str
    size: int
    mtime_ns: int
    mark: str = ""


@dataclass(frozen=True, eq=False)
class Files(Sequence[ImageFile]):
    """Files without marks, in a few arrays: 1.28 million of ImageNet are sent to a process that
    reads them in milliseconds, where as objects each they took half a minute.

    Attributes:
        names: one after the other, as the file system has them.
        ends: of each name in it, (N,).
        sizes, times: in bytes and nanoseconds, (N,).
    """

    names: bytes
    ends: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    times: npt.NDArray[np.int64]

    @classmethod
    def of(cls, files: Sequence[ImageFile]) -> Files:
        """The same files."""
        names = [os.fsencode(f.name) for f in files]
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        sizes = np.array([f.size for f in files], dtype=np.int64)
        return cls(
            b"".join(names), ends, sizes, np.array([f.mtime_ns for f in files], dtype=np.int64)
        )

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> ImageFile: ...

    @overload
    def __getitem__(self, index: slice) -> list[ImageFile]: ...

    def __getitem__(self, index: int | slice) -> ImageFile | list[ImageFile]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        begin = int(self.ends[i - 1]) if i else 0
        name = os.fsdecode(self.names[begin : int(self.ends[i])])
        return ImageFile(name, int(self.sizes[i]), int(self.times[i]))


@dataclass
class Listing:
    """What a folder holds.

    Attributes:
        files: its images, sorted by the parts of their paths.
        folders: the subfolders that may be classes, sorted.
        counts: what is not read, by kind.
        broken: links that lead nowhere, as "NAME -> TARGET".
        loops: links that lead back to a folder they lie in.
        unread: for each subfolder, the suffixes of images in it that are not read.
        tables: files in the folder itself that may tell of its images.
    """

    files: list[ImageFile] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)
    unread: dict[str, set[str]] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)

    @property
    def left_out(self) -> str:
        """What is not read, in words; empty if nothing is."""
        parts = [_counted(kind, n) for kind, n in sorted(self.counts.items())]
        if self.broken:
            parts.append(
                f"{_counted('broken link', len(self.broken))} ({some(sorted(self.broken))})"
            )
        if self.loops:
            parts.append(
                f"{_counted('link', len(self.loops))} back into the own path "
                f"({some(sorted(self.loops))})"
            )
        return ", ".join(parts)

    @property
    def told(self) -> str:
        """How many of its images are read, where some are not, and what is left out."""
        others = sum(n for kind, n in self.counts.items() if kind in OTHER_SUFFIXES)
        count = len(self.files)
        share = f"reads {count:,} of {count + others:,} images; " if others else ""
        return f"{share}left out {self.left_out}"


def _counted(kind: str, count: int) -> str:
    plural = kind.split()[-1] in ("file", "folder", "link") and count != 1
    return f"{count:,} {kind}{'s' if plural else ''}"


def _why_none(root: Path) -> str:
    """What keeps the system from finding a folder, in brackets, unless it is simply not there."""
    try:
        os.stat(root)
    except (FileNotFoundError, ValueError):  # ValueError: a NUL character in the path
        return ""
    except OSError as error:
        return f" ({error.strerror})"
    return ""


def list_folder(root: Path) -> Listing:
    """Walk a folder. Links to files and folders are followed, as torchvision does; what is hidden
    is not.

    Raises:
        DataError: no such folder, or a folder that can't be read.
    """
    if os.path.isfile(root):
        raise DataError(
            f"an image folder must be a folder; got the file {printable(root)}; give the folder "
            "that its images are in, unpacked where it is an archive"
        )
    if not os.path.isdir(root):
        why = _why_none(root) + whence(root)
        raise DataError(f"no image folder {printable(root)}{why}; check the path")
    found = Listing()
    todo: list[_Folder] = [(str(root), "", ())]
    while todo:  # not by recursion: folders may lie deeper than Python's stack
        todo += _list(found, *todo.pop())
    found.files.sort(key=lambda f: f.name.split("/"))
    found.folders.sort()
    return found


#: Errors of what is gone, or is a link to nothing or to itself.
_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
#: Its path, what names in it begin with, and device and number of the folders above it.
_Folder = tuple[str, str, tuple[tuple[int, int], ...]]


def _list(
    found: Listing, folder: str, prefix: str, above: tuple[tuple[int, int], ...]
) -> list[_Folder]:
    """Note what one folder holds; what is returned are the folders in it that are still to list."""
    below: list[_Folder] = []
    try:
        here = os.stat(folder)
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(
            f"can't read the folder {printable(folder)}: {error.strerror}; check its permissions, "
            "or move it away"
        ) from error
    above = (*above, (here.st_dev, here.st_ino))
    for entry in entries:
        name = prefix + entry.name
        try:
            facts = entry.stat()
            is_folder = entry.is_dir()
        except OSError as error:
            if entry.name[0] != "." and error.errno not in _NOWHERE:
                if entry.name.lower() in SYSTEM_NAMES:
                    found.counts[f"{printable(entry.name)} file"] += 1
                    continue
                if _is_other_file(entry.name, prefix):
                    _note_other(found, entry.name, prefix)
                    continue
                raise DataError(
                    f"can't read {printable(entry.path)}: {error.strerror}; check the permissions "
                    "of what it lies in or links to, and that the storage is mounted"
                ) from error
            _note_broken(found, entry, name)
            continue
        if entry.name[0] == "." or entry.name.lower() in SYSTEM_NAMES:
            what = "hidden" if entry.name[0] == "." else printable(entry.name)
            found.counts[f"{what} {'folder' if is_folder else 'file'}"] += 1
        elif is_folder and (facts.st_dev, facts.st_ino) in above:
            found.loops.append(name)
        elif is_folder:
            if not prefix:
                found.folders.append(entry.name)
            below.append((entry.path, f"{name}/", above))
        elif not entry.is_file():
            found.counts["special file"] += 1
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
            found.files.append(ImageFile(name, facts.st_size, facts.st_mtime_ns))
        else:
            _note_other(found, entry.name, prefix)
    return below


def _is_other_file(name: str, prefix: str) -> bool:
    """Whether a name is that of a file that is no image and is not read: with a suffix of a few
    letters, as folders rarely have."""
    suffix = os.path.splitext(name)[1].lower()
    usual = 2 <= len(suffix) <= 6 and suffix[1:].isalpha() and suffix not in IMAGE_SUFFIXES
    return usual and (prefix != "" or name not in OWN_FILES)


def _note_other(found: Listing, name: str, prefix: str) -> None:
    """Note a file that is no image that is read."""
    suffix = os.path.splitext(name)[1].lower()
    if prefix and suffix in OTHER_SUFFIXES:
        found.unread.setdefault(prefix.split("/")[0], set()).add(suffix)
    if not prefix and suffix in TABLE_SUFFIXES and name != CLASSES_FILE:
        found.tables.append(name)
    if prefix or name not in OWN_FILES:
        found.counts[printable(suffix) or "file without suffix"] += 1


def _note_broken(found: Listing, entry: os.DirEntry[str], name: str) -> None:
    if entry.name[0] == ".":
        found.counts["hidden file"] += 1
    else:
        target = os.readlink(entry.path) if entry.is_symlink() else "nothing"
        found.broken.append(f"{name} -> {target}")


def class_folders(root: Path, listing: Listing) -> list[str]:
    """The names of the class folders, sorted; none for a folder of images without classes.

    Raises:
        DataError: no images at all, images both in class folders and beside them, or a class folder
            without images.
    """
    shown = printable(root)
    left_out = listing.left_out
    if not listing.files:
        holds = f"it holds {left_out}" if left_out else "it is empty"
        raise DataError(
            f"no images ({' '.join(IMAGE_SUFFIXES)}) in {shown} or its subfolders: {holds}; check "
            "the path"
        )
    beside = [f.name for f in listing.files if "/" not in f.name]
    if len(beside) == len(listing.files):
        return []
    if beside:
        raise DataError(
            f"{shown} holds images both in class folders and beside them ({some(beside)}); move "
            "these"
        )
    classes = sorted({f.name.split("/", 1)[0] for f in listing.files})
    if empty := [name for name in listing.folders if name not in set(classes)]:
        unread = [name for name in empty if name in listing.unread]
        if unread:
            kinds = ", ".join(sorted(set().union(*(listing.unread[name] for name in unread))))
            raise DataError(
                f"every class folder of {shown} must hold images; got only {kinds}, which is not "
                f"read, in {some(unread)}; convert it"
            )
        raise DataError(
            f"every class folder of {shown} must hold images; got none in {some(empty)}; remove or "
            "fill it"
        )
    lost = [
        link
        for link in listing.broken
        if "/" not in link.split(" -> ")[0] and not _has_image_suffix(link)
    ]
    if lost:
        raise DataError(
            f"{shown} holds broken links where class folders are ({some(sorted(lost))}), and the "
            "labels of those after them would shift; fix or remove them"
        )
    return classes


def _has_image_suffix(link: str) -> bool:
    return os.path.splitext(link.split(" -> ")[0])[1].lower() in IMAGE_SUFFIXES


# -- which class a folder is -----------------------------------------------------------------------

ClassMap = Sequence[str] | Mapping[str, int]
FORMS = (
    'a list of folder names in order of class index, or an object such as {"cat": 281, "dog": 207}'
)


def matched(names: Collection[str], there: Collection[str]) -> dict[str, str]:
    """Which of the file names that are there each of `names` means; itself where none is.

    It is the same one, or else the only one of the same normal form: a Mac writes é as two
    characters in file names, and keyboards write it as one.
    """
    lost = _by_form(set(names) - set(there))
    free = _by_form(set(there) - set(names))
    meant = {name: free[form] for form, name in lost.items() if form in free}
    return {name: meant.get(name, name) for name in names}


def _by_form(names: Collection[str]) -> dict[str, str]:
    """Names by their normal form, without those that share one."""
    forms = {name: unicodedata.normalize("NFC", name) for name in names}
    counts = Counter(forms.values())
    return {form: name for name, form in forms.items() if counts[form] == 1}


def class_indices(
    root: Path, folders: Sequence[str], given: ClassMap | None
) -> dict[str, int] | None:
    """The class index of each folder, from `given` or else from `classes.json` in `root`; None
    where neither is there.

    Raises:
        DataError: unreadable, of another form, or not exactly one index, 0 or above, for every
            folder.
    """
    where = "the data section's classes"
    if given is None:
        path = root / CLASSES_FILE
        if not os.path.lexists(path):
            return None
        given = _read_classes(path)
        where = printable(path)
    names = list(given)
    if doubled := [name for name, n in Counter(names).items() if n > 1]:
        raise DataError(
            f"{where} must name each class folder once; got {some(doubled)} more than once; "
            "correct it"
        )
    indices = (
        dict(given) if isinstance(given, Mapping) else {name: i for i, name in enumerate(given)}
    )
    if wrong := [
        f"{name}: {json.dumps(i)}"
        for name, i in indices.items()
        if type(i) is not int or not 0 <= i < LIMIT
    ]:
        raise DataError(
            f"{where} must give class indices, integers from 0 to {LIMIT - 1:,}; got "
            f"{some(wrong)}; correct it"
        )
    if shared := [i for i, n in Counter(indices.values()).items() if n > 1]:
        both = [name for name, i in indices.items() if i == shared[0]]
        raise DataError(
            f"{where} must give each folder an index of its own; got {shared[0]} for {some(both)}; "
            "correct it"
        )
    meant = matched(indices, folders)
    indices = {meant[name]: i for name, i in indices.items()}
    unknown = sorted(indices.keys() - set(folders))
    bare = [name for name in folders if name not in indices]
    if unknown or bare:
        what = [f"no folder {some(unknown)}"] * bool(unknown) + [
            f"no index for the folder {some(bare)}"
        ] * bool(bare)
        raise DataError(
            f"{where} must name exactly the class folders of {printable(root)}; got "
            f"{' and '.join(what)}; correct names, or add or remove entries"
        )
    return {name: indices[name] for name in folders}


def _read_classes(path: Path) -> ClassMap:
    text = read_text(path, DataError)
    try:
        data = loads(text, object_pairs_hook=once)
    except ValueError as error:
        raise DataError(f"can't read {printable(path)}: {error}; it must hold {FORMS}") from error
    if isinstance(data, dict) or (
        isinstance(data, list) and all(isinstance(name, str) for name in data)
    ):
        return data
    raise DataError(f"{printable(path)} must hold {FORMS}; got {json.dumps(data)[:60]}; correct it")
