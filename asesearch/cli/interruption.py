"""Ctrl-C: one line that says what is kept, and exit code 130, at whichever moment it comes.

A KeyboardInterrupt may end as another error: libraries tidy up while it passes, and what fails then
takes its place. So an error counts as Ctrl-C where one is among those that led to it.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

AGAIN = "give the same command again"
NOT_BEGUN = f"its work had not begun; {AGAIN}"
DONE = "its work was done, and only what it prints may be missing"
LATER_S = 0.01  # after a Ctrl-C that was thrown away

_ended = 0  # bodies of `interruptible` that ran to their end, in this process


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
    return _is_by_hand(error) and not any(isinstance(e, Interrupted) for e in led_to(error))


def _is_by_hand(error: BaseException) -> bool:
    return any(isinstance(e, KeyboardInterrupt) for e in led_to(error))


def _is_new(error: BaseException) -> bool:
    """Whether an error comes of another Ctrl-C than the one that is being handled: what fails while
    that one passes has it as its context."""
    now = sys.exc_info()[1]
    handled = [] if now is None else led_to(now)
    return any(
        isinstance(e, KeyboardInterrupt) and not any(e is other for other in handled)
        for e in led_to(error)
    )


@contextmanager
def none_lost() -> Iterator[None]:
    """Inside, no Ctrl-C is thrown away.

    Python does that where it comes amid what nobody called: the callback of a weak reference, a
    `__del__`, the garbage collector's. There it prints a traceback and goes on, so that the signal
    is sent again, a moment later.
    """
    told = sys.unraisablehook

    def hook(lost: sys.UnraisableHookArgs) -> None:
        if lost.exc_value is None or not _is_new(lost.exc_value):
            told(lost)
            return
        with suppress(RuntimeError):  # no thread begins while Python ends
            # not a `threading.Timer`, whose locks may be held where this was called
            _thread.start_new_thread(_interrupt_later, ())

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = told


def _interrupt_later() -> None:
    time.sleep(LATER_S)
    os.kill(os.getpid(), signal.SIGINT)


def interruptible_command() -> AbstractContextManager[None]:
    """`interruptible` around a whole command: what is outside of its own comes before the work, or
    after it."""
    before = _ended
    return interruptible(lambda: NOT_BEGUN if _ended == before else DONE)


@contextmanager
def interruptible(kept: str | Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C say in one line what is kept, and exit with 130 as shells expect.

    Args:
        kept: the line, or what makes it.
    """
    global _ended
    try:
        yield
        _ended += 1
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
