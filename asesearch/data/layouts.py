"""What the names in an image folder suggest beside classes: parts of a data set, a folder too many,
tables of labels, numbers that do not sort as they count. It is warned of; nothing is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from asesearch.data.folder import IMAGE_SUFFIXES, Listing
from asesearch.files import encoding_of

_FILLING = r"(?:set|data|images?|imgs?|split|\d+(?:x\d+)?(?:px)?)"
#: Names of parts of a data set, such as train, test_set, images_val, val2017 and train_64x64.
SPLIT = re.compile(
    rf"(?:{_FILLING}[_-]?)*(?:train|training|val|valid|validation|dev|eval|evaluation|test|testing)"
    rf"(?:[_-]?{_FILLING})*",
    re.IGNORECASE,
)
#: Names of folders of images beside those of what was drawn or said of them.
BESIDE = re.compile(
    r"(?:images?|imgs?|(?:seg(?:mentation)?_?)?masks?|labels?|annotations?|segmentations?|depth)",
    re.IGNORECASE,
)
LOOKED_AT = 32  # files that may be tables, at most: more are one for each image
_LABEL = r"(?:label|class|category)(?:e?s|_?id|_?name)?"
_LABEL_KEY = re.compile(rf'"{_LABEL}"\s*:(?!\s*null)', re.IGNORECASE)
_NAME = rf"[^\",;\t]*\.(?:{'|'.join(s[1:] for s in IMAGE_SUFFIXES)})"
#: A table of labels that has no names of columns, and an object of images and labels.
_BARE_LABEL = re.compile(rf'\s*"?{_NAME}"?\s*[,;\t]\s*"?[\w-]+"?\s*', re.IGNORECASE)
_LABEL_OF = re.compile(rf'"{_NAME}"\s*:\s*(?:\d+|"\w+")\s*[,}}\n]', re.IGNORECASE)
_LABEL_COLUMN = re.compile(rf'(?:^|[,;\t])\s*"?{_LABEL}"?\s*(?:$|[,;\t])', re.IGNORECASE)


def are_splits(folders: Sequence[str], listing: Listing) -> bool:
    """Whether class folders look like the parts of a data set, such as train and val, or images and
    masks: none has another name, and there are several or folders in them."""
    nested = any(f.name.count("/") > 1 for f in listing.files)
    named = bool(folders) and all(SPLIT.fullmatch(f) for f in folders)
    beside = len(folders) > 1 and all(BESIDE.fullmatch(f) for f in folders)
    return beside or (named and (nested or len(folders) > 1))


def wrapped(folders: Sequence[str], listing: Listing) -> list[str]:
    """The subfolders, two or more, that hold all images of the one class folder there is; none
    elsewhere."""
    parts = [f.name.split("/") for f in listing.files]
    if len(folders) != 1 or any(len(p) < 3 for p in parts):
        return []
    inner = sorted({p[1] for p in parts})
    # numbers alone are parts, such as FFHQ's thousands, more often than classes
    return inner if len(inner) > 1 and not all(name.isdecimal() for name in inner) else []


def label_tables(root: Path, listing: Listing) -> list[str]:
    """Names of files in a folder that tell labels in layouts that are not read."""
    names = sorted(listing.tables)
    return [name for name in names if len(names) <= LOOKED_AT and _tells_labels(root / name)]


def _tells_labels(path: Path) -> bool:
    """Whether a table begins with labels, not with captions or none."""
    try:
        with path.open("rb") as file:
            raw = file.read(1 << 16)
    except OSError:
        return False
    text = raw.decode(encoding_of(raw), "replace").removeprefix("\ufeff")
    if path.suffix.lower() == ".json":
        return bool(_LABEL_KEY.search(text) or _LABEL_OF.search(text))
    line = text.partition("\n")[0]
    if path.suffix.lower() == ".jsonl":
        return bool(_LABEL_KEY.search(line))
    return bool(_LABEL_COLUMN.search(line) or _BARE_LABEL.fullmatch(line))


def shuffled_numbers(folders: Sequence[str]) -> tuple[str, str, int] | None:
    """Two class folders that stand in the order of text, where all are numbers, maybe with the same
    words around, and theirs is another; and the number of the second."""
    for form in (r"([^0-9]*)([0-9]+)(.*)", r"(.*?)([0-9]+)([^0-9]*)"):  # first number, or last
        found = [re.fullmatch(form, name, re.DOTALL) for name in folders]
        parts = [m.groups() for m in found if m]
        if len(parts) < len(folders) or len({(before, after) for before, _, after in parts}) > 1:
            continue
        numbers = [int(number) for _, number, _ in parts]
        for i, number in enumerate(numbers[1:]):
            if numbers[i] > number:
                return folders[i], folders[i + 1], number
    return None
