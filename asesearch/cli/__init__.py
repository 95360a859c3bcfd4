"""The command line: parse, call, print. Results go to stdout, progress and errors to stderr.

Its modules load when they are needed, so that Ctrl-C is answered while they do.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from asesearch.cli.interruption import AGAIN, interruptible, none_lost

if TYPE_CHECKING:
    from asesearch.cli.program import app as app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point: asesearch's own errors become one line and exit code 1; wrong usage exits with
    2, Ctrl-C with 130."""
    with none_lost(), interruptible(AGAIN):
        _check_working_directory()
        from asesearch.cli.program import run
        from asesearch.cli.streams import guard

        guard()
        run()


def _check_working_directory() -> None:
    """End in one line where there is none, before libraries fail at it in ways of their own."""
    try:
        os.getcwd()
    except FileNotFoundError:
        sys.exit("error: the working directory no longer exists; cd to one that does")


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'asesearch.cli' has no attribute {name!r}")
    from asesearch.cli.program import app

    return app
