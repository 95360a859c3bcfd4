"""The folder of a page: written whole or not at all, and never over anything else."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jinja2

from asesearch.errors import StudyError, WriteError
from asesearch.files import check_writable, remove_stale, why_not

MARK = '<meta name="generator" content="asesearch {what}">'
_SUBFOLDERS = ("figures", "tables")


def environment() -> jinja2.Environment:
    """Where the templates of pages are; text from outside is escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("asesearch.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def check_folder(out_dir: Path, what: str) -> None:
    """Refuse a folder that no page of this kind can be written to; nothing is left in it.

    Args:
        out_dir: to be written, there or not.
        what: "report" or "comparison".

    Raises:
        StudyError: it holds something else.
        WriteError: it can't be written.
    """
    given, out_dir = out_dir, _named(out_dir, what)
    # a temporary folder beside it comes first
    check_writable(
        out_dir.with_name(f".{out_dir.name}.{'0' * 8}.part"), "tables/confirmation.csv", named=given
    )
    page = out_dir / "index.html"
    mark = MARK.format(what=what)
    ours = page.is_file() and mark in page.read_text(encoding="utf-8", errors="replace")
    if out_dir.exists() and not ours and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise StudyError(
            f"a {what} goes into an empty folder or over an earlier {what}; got {given}; give "
            "another folder"
        )
    check_writable(out_dir, "tables/confirmation.csv")


def write_folder(out_dir: Path, what: str, write: Callable[[Path], None]) -> Path:
    """Write `index.html`, `figures/` and `tables/`; returns the path of `index.html`.

    Everything is made in a temporary folder first and moved at the end, the page last.

    Args:
        out_dir: see `check_folder`.
        what: "report" or "comparison".
        write: makes the files in an empty folder that has the subfolders.

    Raises:
        StudyError, WriteError: see `check_folder`.
    """
    check_folder(out_dir, what)
    given, out_dir = out_dir, _named(out_dir, what)
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(out_dir.parent.glob(f".{glob.escape(out_dir.name)}.{'?' * 8}.part"))
        with tempfile.TemporaryDirectory(
            prefix=f".{out_dir.name}.", suffix=".part", dir=out_dir.parent
        ) as temporary:
            made = Path(temporary) / "page"
            for name in _SUBFOLDERS:
                (made / name).mkdir(parents=True)
            write(made)
            _move(made, out_dir)
    except OSError as error:
        raise WriteError(why_not(given, error)) from error
    return given / "index.html"


def _named(out_dir: Path, what: str) -> Path:
    """The folder by a path that ends in its name.

    Raises:
        StudyError: it has none.
    """
    found = Path(os.path.abspath(out_dir))
    if not found.name:
        raise StudyError(f"a {what} goes into a folder of its own; got {out_dir}; give another")
    return found


def _move(source: Path, target: Path) -> None:
    """The whole folder at once where none is there, so that nobody finds a part of it; else each
    file over its predecessor, the page last, then what an earlier page left over is removed."""
    if not target.exists():
        with suppress(OSError):  # of another worker, at this moment
            os.rename(source, target)
            return
    names = sorted(
        p.relative_to(source) for p in source.rglob("*") if p.is_file() and p.name != "index.html"
    )
    for name in [*names, Path("index.html")]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / name, target / name)
    for folder in _SUBFOLDERS:
        for path in (target / folder).glob("*"):
            if path.relative_to(target) not in names and path.suffix in (".svg", ".png", ".csv"):
                path.unlink()
