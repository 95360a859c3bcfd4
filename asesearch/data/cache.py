"""Where downloads, references and the outcome of checks are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder for downloads and what can be made again.

    It is $ASESEARCH_CACHE, where ~ is the user's home, or `asesearch` in the user's cache folder. A
    user without a home (no $HOME and no entry among the system's users, as in a container that is
    given a bare user number) gets a folder of their own for temporary files; so does one whose ~
    names no known home.
    """
    if own := os.environ.get("ASESEARCH_CACHE"):
        path = os.path.expanduser(own)
        return _temporary() if path.startswith("~") else Path(path)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "asesearch"
    try:
        return Path.home() / ".cache" / "asesearch"
    except RuntimeError:
        return _temporary()


def _temporary() -> Path:
    return Path(os.environ.get("TMPDIR") or "/tmp") / f"asesearch-{os.getuid()}"
