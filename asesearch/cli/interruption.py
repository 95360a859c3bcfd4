"""Ctrl-C: one line that says what is kept, and exit code 130, at whichever moment it comes.

A KeyboardInterrupt may end as another error: libraries tidy up while it passes, and what fails then
takes its place. So an error counts as Ctrl-C where one is among those that led to it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

AGAIN = "give the same command again"
NOT_BEGUN = f"its work had not begun; {AGAIN}"


class Interrupted(SystemExit):
    """The exit after Ctrl-C has been answered."""

    def __init__(self) -> None:
        super().__init__(130)


def led_to(error: BaseException) -> list[BaseException]:
    """An error and those that it came of, or that were being handled when it came."""
    found: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and not any(one is other for other in found):
            found.append(one)
            left += [one.__cause__, one.__context__]
    return found


def is_unanswered(error: BaseException) -> bool:
    """Whether an error comes of Ctrl-C that nothing has been said of yet."""
    found = led_to(error)
    by_hand = any(isinstance(e, KeyboardInterrupt) for e in found)
    return by_hand and not any(isinstance(e, Interrupted) for e in found)


@contextmanager
def interruptible(kept: str | Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C say in one line what is kept, and exit with 130 as shells expect.

    Args:
        kept: the line, or what makes it.
    """
    try:
        yield
    except BaseException as error:
        if not is_unanswered(error):
            raise
        _answer(kept)
        # libraries run text as code while they load; a KeyboardInterrupt that passed through such a
        # call marks the process to die of the signal in the end, and a new call takes that back
        exec("")
        raise Interrupted from None


def _answer(kept: str | Callable[[], str]) -> None:
    """Say what is kept, or where it can't be found out, that the command can be given again."""
    line = AGAIN
    with suppress(Exception, KeyboardInterrupt):
        line = kept if isinstance(kept, str) else kept()
    with suppress(BrokenPipeError):
        print(f"interrupted: {line}", file=sys.stderr, flush=True)
