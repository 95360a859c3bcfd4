"""Ctrl-C: one line that says what is kept, and exit code 130."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from asesearch.cli.printing import say


@contextmanager
def interruptible(kept: str | Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C say in one line what is kept, and exit with 130 as shells expect."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted: {kept if isinstance(kept, str) else kept()}")
        raise typer.Exit(130) from None
