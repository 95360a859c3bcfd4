"""Writing files whole or not at all, and knowing them by their content."""

from __future__ import annotations

import codecs
import errno
import glob
import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from asesearch.errors import AseSearchError, ConfigError, WriteError

STALE_S = 86_400.0  # without a change, after which nobody writes to a temporary file any more


@contextmanager
def replacing(path: str | os.PathLike[str], *, shared: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, whose folder is made; what the body wrote there takes the
    place of `path` at the end.

    If the body fails, the process is killed or the power goes, `path` is as it was before, or
    whole. Weights may be read by all whom the umask lets, whatever their writer set.

    Args:
        path: the file to write.
        shared: several processes may write it at once.

    Raises:
        WriteError: folder or file can't be written.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}{_suffix(shared)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shared:
            remove_stale(path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 8}.part"))
        yield part
        if path.suffix == ".safetensors":  # its writer gives them to nobody but the user
            follow_umask([part])
        _to_disk(part, os.O_RDWR)
        os.replace(part, path)
        names_to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        raise WriteError(why_not(path, error)) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _suffix(shared: bool) -> str:
    """What `replacing` appends to a name, of the same length each time."""
    return f".{uuid.uuid4().hex[:8]}.part" if shared else ".part"


def follow_umask(paths: Sequence[Path]) -> None:
    """Give files of one folder the permissions that the umask leaves, which some writers, as that
    of safetensors, give to nobody but the user."""
    with suppress(OSError):
        # a file system without permissions; a full or lost one is told by the write itself
        left = stat.S_IMODE(new_file(paths[0].parent).st_mode)
        for path in paths:
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode | left != mode:
                path.chmod(mode | left)


def new_file(folder: Path) -> os.stat_result:
    """Owner, group and permissions that a file gets which is made in a folder now.

    Not by `os.umask`, which can't be read without changing it for other threads, and does not know
    what a folder's access control lists say.

    Raises:
        OSError: none can be made.
    """
    probe = folder / f".{uuid.uuid4().hex[:8]}.umask.part"
    try:
        handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        try:
            return os.fstat(handle)
        finally:
            os.close(handle)
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def shared_time(folder: Path) -> float:
    """Now, in seconds, by the clock of a folder's file system, which all machines that share it
    have in common, though their own may differ; by this machine's, where no file can be made."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.utime(file.fileno())  # no time is given, so the server of the files takes its own
            return os.fstat(file.fileno()).st_mtime
    except (OSError, NotImplementedError):
        return time.time()


def remove_stale(paths: Iterable[Path]) -> None:
    """Remove those of these files and folders that have not changed for a day: killed processes
    left them, for living ones write all the time."""
    for path in paths:
        with suppress(OSError):
            if shared_time(path.parent) - path.stat().st_mtime < STALE_S:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


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


def folder_to_disk(folder: Path) -> None:
    """Wait until a folder's files and their names would survive a power cut."""
    paths = sorted(folder.rglob("*"))
    for path in paths:
        if path.is_file():
            _to_disk(path, os.O_RDWR)
    for path in (*filter(Path.is_dir, paths), folder):
        names_to_disk(path)


def names_to_disk(folder: Path) -> None:
    """Wait until a folder's list of names would survive a power cut."""
    with suppress(OSError):  # a folder can't be opened everywhere
        _to_disk(folder, os.O_RDONLY)


def check_writable(
    path: str | os.PathLike[str], inside: str = "", *, named: str | os.PathLike[str] = ""
) -> None:
    """Find out before hours of work whether `path` can be written, and leave nothing behind.

    Folders and a file of the same names are made, in a temporary folder where the first of them
    would be, and removed again; so other processes never see half of it.

    Args:
        path: the file to write; a folder to write into, where `inside` is given.
        inside: the longest name, relative to that folder, that will be written in it.
        named: what an error calls `path`, where that is only a step on the way to it.

    Raises:
        WriteError: it can't.
    """
    path = Path(path)
    target = path / inside
    if not inside and os.path.isdir(path):
        raise WriteError(f"can't write to {short(path)}: it is a folder; give the name of a file")
    base = target.parent
    while not os.path.lexists(base) and base != base.parent:
        base = base.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".try-", dir=base) as temporary:
            probe = Path(temporary) / target.relative_to(base)
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.with_name(f"{probe.name}{_suffix(shared=True)}").write_bytes(bytes(4096))
    except OSError as error:
        raise WriteError(why_not(Path(named or path), error)) from error


def check_room(folder: str | os.PathLike[str], size: int, what: str) -> None:
    """Find out before hours of work whether a folder's file system has room for `size` bytes.

    Args:
        folder: there or not.
        size: bytes that will be written at once, at least.
        what: they are, for the message.

    Raises:
        WriteError: it has not.
    """
    try:
        usage = shutil.disk_usage(_there(Path(folder)))
    except OSError:
        return
    free = usage.free
    if usage.total and free < size:  # one that does not tell has 0 in all
        needed = math.ceil(size / 1e5) / 10  # never as much as there is
        raise WriteError(
            f"{what} takes {needed:,.1f} MB; got {free // 1e5 / 10:,.1f} MB of free space for "
            f"{short(Path(folder), 140)}; make room there, or choose another folder"
        )


def share_room(one: Path, other: Path) -> bool:
    """Whether what is written to two paths, there or not, goes to one file system."""
    try:
        return _there(one).stat().st_dev == _there(other).stat().st_dev
    except OSError:
        return False


def _there(place: Path) -> Path:
    """A path, or the first of its parents that is there."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def check_weights_file(path: Path) -> None:
    """Find out before hours of work whether weights can be written to `path`.

    Raises:
        ConfigError: another kind of file than weights are written as.
        WriteError: see `check_writable`.
    """
    check_utf8(path, "weights", ConfigError)
    if path.suffix != ".safetensors":
        raise ConfigError(f"weights are written as .safetensors; got {path}; change --out")
    check_writable(path)


def check_utf8(path: str | os.PathLike[str], what: str, error: type[AseSearchError]) -> None:
    """Refuse a path that SQLite and safetensors can't open.

    Args:
        path: a path.
        what: it is, for the message.
        error: the class to raise.

    Raises:
        AseSearchError: of the class `error`, where the path is not UTF-8.
    """
    text = os.fspath(path)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as cause:
        shown = text.encode("utf-8", "backslashreplace").decode("utf-8")
        with suppress(UnicodeError):
            os.fsencode(text).decode("utf-8")
            raise error(
                f"the path of {what} can't be given to libraries as UTF-8 under the locale's "
                f"encoding, {sys.getfilesystemencoding()}; got {shown}; set LC_ALL=C.UTF-8 or "
                "PYTHONUTF8=1"
            ) from cause
        raise error(f"the path of {what} must be UTF-8; got {shown}; rename it") from cause


def real_path(path: str | os.PathLike[str]) -> Path:
    """A path without symbolic links. Unlike `Path.resolve` it takes a link that leads to itself,
    which it leaves as it is, so that whoever opens it says what is wrong."""
    return Path(os.path.realpath(path))


def whence(path: Path) -> str:
    """What a message adds to a path that is relative: from where it was looked for."""
    return "" if path.is_absolute() else f" (from the working directory {Path.cwd()})"


def printable(name: str | os.PathLike[str]) -> str:
    """A path or message as valid text on one line: bytes of a file name that are not UTF-8, and
    characters that end a line or steer a terminal, become backslash escapes."""
    text = os.fspath(name).encode("utf-8", "backslashreplace").decode("utf-8")
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


@cache
def warn_once(log: logging.Logger, line: str) -> None:
    """Log a warning, once in a process."""
    log.warning("%s", line)


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of many names, and how many more there are."""
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + rest


def short(path: Path, most: int = 200) -> str:
    """A path as it is shown in a message, at most so many characters of it."""
    text = printable(path)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def why_not(path: Path, error: Exception) -> str:
    """One line of at most 300 characters on why `path` can't be written, and what to do about it.

    Args:
        path: the file or folder.
        error: that writing it, or a file in it, came to.
    """
    number, reason = _told_by(error)
    fix = "choose a folder you may write to, with room in it"
    if number == errno.ENAMETOOLONG:
        fix = "a file system takes names of 255 bytes and paths of 4,096: give a shorter one"
    elif number in (errno.ENOSPC, errno.EDQUOT):
        fix = "make room there, or choose another folder"
    elif number in (errno.EMFILE, errno.ENFILE):
        fix = "let more files be open at once (ulimit -n)"
    elif number in (errno.EIO, errno.ESTALE):
        fix = "see whether its disk or server works, or choose another folder"
    left = 300 - len(f"can't write to : ; {fix}")
    shown = short(path, max(left - len(reason), left // 2))
    return f"can't write to {shown}: {reason[: left - len(shown)]}; {fix}"


def _told_by(error: Exception) -> tuple[int | None, str]:
    """The system's number and words for what went wrong, or an error's own words, on one line."""
    if isinstance(error, WriteError) and isinstance(error.__cause__, Exception):
        return _told_by(error.__cause__)  # of a file inside
    number = getattr(error, "errno", None)
    if isinstance(error, SafetensorError) and (found := _OS_ERROR.search(str(error))) is not None:
        number = int(found[1])
    if number is None and _CUT_SHORT.fullmatch(str(error)):
        return errno.ENOSPC, "only a part of it could be written"
    reason = str(error) if number is None else getattr(error, "strerror", "") or os.strerror(number)
    return number, (printable(reason).strip() or type(error).__name__)[:200]


_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust tells it
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")  # as NumPy does, which loses the number


def encoding_of(raw: bytes) -> str:
    """The encoding of a text, by the byte order mark that it begins with; UTF-8 without one."""
    return next((name for mark, name in _MARKS if raw.startswith(mark)), "utf-8")


def read_text(
    path: str | os.PathLike[str],
    error: type[AseSearchError] = ConfigError,
    errors: str = "strict",
) -> str:
    """Read a text file that a user wrote, in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Args:
        path: the file.
        error: the class to raise.
        errors: what becomes of bytes that are not such text, see `bytes.decode`.

    Raises:
        AseSearchError: of the class `error`, where the file is missing, unreadable or no such text.
    """
    shown = short(Path(path))
    try:
        raw = Path(path).read_bytes()
    except (OSError, ValueError) as cause:  # ValueError: a NUL character in the path
        reason = getattr(cause, "strerror", None) or str(cause)
        raise error(f"can't read {shown}: {reason}; check the path") from cause
    encoding = encoding_of(raw)
    try:
        text = raw.decode(encoding, errors)
    except UnicodeDecodeError as cause:
        line = raw.count(b"\n", 0, cause.start) + 1
        what = "it is not text" if b"\0" in raw else f"line {line} is not in {encoding.upper()}"
        raise error(f"can't read {shown}: {what} ({cause.reason}); save it as UTF-8") from cause
    if "\0" in text:
        what = "it has NUL characters, so it is no text, or UTF-16 without a byte order mark"
        raise error(f"can't read {shown}: {what}; save it as UTF-8")
    return text.removeprefix("\ufeff")


#: Byte order marks, the longer ones first, since UTF-32's begins as UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


def has_mark(path: Path) -> bool:
    """Whether a file is there and begins with a byte order mark, which not every reader takes."""
    try:
        return path.read_bytes().startswith(tuple(mark for mark, _ in _MARKS))
    except OSError:
        return False


def loads(text: str | bytes, **how: Any) -> Any:
    """`json.loads`, for which a text nested too deep is a ValueError like any other that is none.

    Raises:
        ValueError: no JSON.
    """
    try:
        return json.loads(text, **how)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values, for `loads` as `object_pairs_hook`; by itself JSON would
    take the last of two values.

    Raises:
        ValueError: a key twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the key {twice[:40]!r} twice")
    return found


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
