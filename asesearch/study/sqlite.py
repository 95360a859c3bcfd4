"""What is particular about a study's storage in a SQLite file: where it lies, and reading it
without a trace."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, unquote

from sqlalchemy.engine import URL

from asesearch.foreign import PULL, foreign
from asesearch.study.directory import DATABASE, STUDY, why_too_long

_SIDE_FILES = ("-journal", "-wal")  # writes that are not in the file itself yet


def location(url: URL) -> Path | None:
    """The file of a SQLite URL; None for other databases."""
    if url.drivername not in ("sqlite", "sqlite+pysqlite") or is_in_memory(url):
        return None
    text = url.database or ""
    if _is_uri(url) and text.startswith("file:"):
        text = text.removeprefix("file:")
        if text.startswith("//"):
            text = "/" + text[2:].partition("/")[2]  # file://localhost/PATH or file:///PATH
        text = unquote(text.partition("?")[0])
    return Path(text)


def _is_uri(url: URL) -> bool:
    return str(url.query.get("uri", "")).lower() in ("1", "true", "yes", "on", "y", "t")


def is_in_memory(url: URL) -> bool:
    """Whether a SQLite URL names no file, so that all is lost with the process."""
    text = (url.database or "").strip()
    path = text.removeprefix("file:").partition("?")
    named = path[0].strip("/")
    query = {**dict(p.partition("=")[::2] for p in path[2].split("&")), **url.query}
    return named in ("", ":memory:") or query.get("mode") == "memory" or query.get("vfs") == "memdb"


def make_file(url: URL) -> None:
    """Make the file of a SQLite URL, empty, where it is missing: with the permissions that the
    umask leaves, where SQLite would give others of a group none to write. What can't be made is
    left to SQLite, which says why."""
    path = location(url)
    if path is None or _is_uri(url):  # whose mode may forbid it
        return
    with suppress(OSError):
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o666))


def resolved(url: URL) -> URL:
    """A SQLite URL whose path does not depend on the working directory."""
    path = location(url)
    if path is None:
        return url
    whole = os.path.abspath(path)
    is_uri = _is_uri(url) and (url.database or "").startswith("file:")
    return url.set(database=f"file:{quote(whole)}" if is_uri else whole)


def is_relative(url: URL) -> bool:
    """Whether a SQLite URL's path depends on the working directory."""
    path = location(url)
    return path is not None and not path.is_absolute()


def creator(path: Path, wait_s: float) -> Callable[[], sqlite3.Connection]:
    """Makes connections that only read, and leave nothing behind.

    Where a process died in a write, SQLite would have to repair the file first, and beside a file
    in WAL mode it makes others: where it can't, a copy is read.
    """

    def connect() -> sqlite3.Connection:
        uri = f"file:{quote(str(path))}?mode=ro"
        connection = sqlite3.connect(uri, uri=True, timeout=wait_s, check_same_thread=False)
        try:
            connection.execute("SELECT count(*) FROM sqlite_master")
        except sqlite3.OperationalError:
            connection.close()
            parts = [part for side in _SIDE_FILES if (part := Path(f"{path}{side}")).exists()]
            if not all(os.access(part, os.R_OK) for part in (path, *parts)):
                raise
            if not parts and not _is_wal(path):
                raise
            return _of_copy(path)
        return connection

    return connect


def _is_wal(path: Path) -> bool:
    """Whether a file's header says that it is written, and read, in WAL mode."""
    with path.open("rb") as file:
        return file.read(20)[18:] == b"\2\2"


def _of_copy(path: Path) -> sqlite3.Connection:
    """A connection to a copy in memory of a file and of what was being written to it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        for side in ("", *_SIDE_FILES):
            if Path(f"{path}{side}").exists():
                shutil.copyfile(f"{path}{side}", f"{copy}{side}")
        repaired = sqlite3.connect(copy)
        memory = sqlite3.connect(":memory:", check_same_thread=False)
        try:
            repaired.backup(memory)
        except sqlite3.Error:
            memory.close()
            raise
        finally:
            repaired.close()
    return memory


def why_unusable(url: URL, reason: str) -> str | None:
    """What stands in the way of a SQLite file, with the fix; None where there is nothing to add.

    Args:
        url: of the storage.
        reason: the driver's own words.
    """
    path = location(url)
    if path is None:
        return None
    foreign_file = "not a database" in reason and path.is_file()
    if foreign_file and (told := foreign(path)) is not None and told.endswith(PULL):
        return f"{path} {told}"
    own = path.name == DATABASE and (path.parent / STUDY).is_file()
    if foreign_file and not own:
        return f"{path} is no SQLite database; name another file"
    if foreign_file or ("malformed" in reason and path.is_file()):
        return (
            f"{path} is damaged, so its trials can't be read; restore it from a copy, or search "
            "into another directory (--out)"
        )
    if not any(text in reason for text in ("unable to open", "readonly", "disk I/O")):
        return None
    if path.exists() and not os.access(path, os.R_OK):
        return f"you may not read the file {path}; change its permissions, or name another place"
    return why_not_writable(url)


def why_not_writable(url: URL) -> str | None:
    """Why a search could not write to a SQLite file, or make it, with the fix; None where nothing
    stands in the way, or of other databases."""
    path = location(url)
    if path is None:
        return None
    if (long := why_too_long(path)) is not None:
        return long
    if path.is_dir():
        return f"{path} is a folder; name a file in it"
    if not os.path.isdir(path.parent):
        return f"the folder {path.parent} does not exist; make it, or name another"
    mode = url.query.get("mode") if _is_uri(url) else None
    if mode == "ro" or (mode == "rw" and not path.exists()):
        return f"with mode={mode} a search can't {_FORBIDDEN[mode]}; leave mode out of the URL"
    for item, what in ((path, "the file"), (path.parent, "the folder")):
        if item.exists() and not os.access(item, os.W_OK):
            return (
                f"you may not write to {what} {item}; change its permissions, or name another place"
            )
    return None


_FORBIDDEN = {"ro": "write its trials", "rw": "make the file"}
