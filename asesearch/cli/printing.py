"""What commands print: results as JSON to stdout, all else to stderr."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from tqdm import tqdm


def print_json(data: Any) -> None:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    plain = codecs.lookup(encoding).name != "utf-8"  # else what it lacks would be no JSON
    text = json.dumps(data, indent=1, ensure_ascii=plain)
    # a path may hold bytes that are not UTF-8
    typer.echo(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def say(text: str) -> None:
    typer.echo(text, err=True)


@contextmanager
def bar_of_parts(what: str, *, hidden: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, for work of more than half a second; the callback takes (parts
    done, of all)."""
    with tqdm(
        desc=what, file=sys.stderr, dynamic_ncols=True, leave=False, delay=0.5, disable=hidden
    ) as bar:

        def on_part(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_part


@contextmanager
def bar_of_steps(
    total: int, what: str, *, hidden: bool = False
) -> Iterator[Callable[[int, float], None]]:
    """A progress bar on stderr; the callback takes (steps done, loss)."""
    with tqdm(
        total=total, desc=what, file=sys.stderr, dynamic_ncols=True, leave=False, disable=hidden
    ) as bar:

        def on_step(done: int, loss: float) -> None:
            bar.update(done - bar.n)
            bar.set_postfix(loss=f"{loss:.4f}")

        yield on_step
