"""A database server that is away for a while: knowing it by its errors, and waiting for it."""

from __future__ import annotations

import logging
import re
import time

from optuna.exceptions import StorageInternalError
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from asesearch.study.urls import secrets, shown

PATIENCE_S = 600.0  # for so long a server that was there is waited for
PAUSE_S = 0.5  # before the second try; before each further one twice as long
LONGEST_PAUSE_S = 15.0

# PostgreSQL's classes of a server that is told to stop, has crashed, or is not ready yet
_STOPPING = {"57P01", "57P02", "57P03"}
# in the words of servers and their drivers: a connection that is refused for good
_FOR_GOOD = (
    "authentication failed",
    "no password supplied",
    "pg_hba.conf",
    "not permitted to log in",
    "permission denied",
    "does not exist",
    "access denied",
    "unknown database",
)

_SHORT = 4  # characters: a shorter secret may be a part of any word

_log = logging.getLogger(__name__)


def reason_of(error: BaseException, url: URL) -> str:
    """A database driver's own words, on one line, without the secrets of the storage's URL."""
    inner = getattr(error, "orig", None) or error.__cause__ or error
    inner = getattr(inner, "orig", None) or inner
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    reason = " ".join(lines)[:400].rstrip(".") or type(inner).__name__
    for secret in secrets(url):
        text = re.escape(secret)
        if len(secret) < _SHORT:  # else it would be put into other words
            text = rf"(?<=[:=]){text}(?=[@&\s'\"]|$)"
        reason = re.sub(text, "***", reason)
    return reason


def is_away(error: BaseException) -> bool:
    """Whether a server lost the connection or takes none at the moment, which passes; a login or a
    database that it does not know does not pass by itself, nor does what it says of a query."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if not isinstance(cause, DBAPIError):
        return False
    if cause.connection_invalidated or getattr(cause.orig, "sqlstate", None) in _STOPPING:
        return True
    connecting = cause.statement is None and isinstance(cause, OperationalError | InterfaceError)
    text = str(cause.orig).lower()
    return connecting and not any(sign in text for sign in _FOR_GOOD)


class Outage:
    """Whether the server of an open storage is away, and how long its calls still wait for it.

    Where that was in vain or Ctrl-C came, further calls do not wait until one gets through: the
    process is about to end.

    Args:
        url: of the storage; a SQLite file has no server.

    Attributes:
        until: when calls stop waiting, by `time.monotonic`; None while all get through.
    """

    def __init__(self, url: URL) -> None:
        self.url = url
        self.has_server = url.get_backend_name() != "sqlite"
        self.until: float | None = None
        self._pause_s = PAUSE_S
        self._said = False

    def wait(self, error: BaseException) -> bool:
        """Wait a while after a call that failed; whether it is to be tried again."""
        if not (self.has_server and is_away(error)):
            return False
        self._begin(time.monotonic())
        if self.is_hurried:
            return False
        self._say(reason_of(error, self.url))
        try:
            time.sleep(self._pause_s)
        except KeyboardInterrupt:
            self.hurry()
            raise
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        return True

    def silent(self, begun: float) -> None:
        """Take a call for one that waits, though its driver has raised nothing.

        Args:
            begun: when, by `time.monotonic`.
        """
        self._begin(begun)
        if not self.is_hurried:
            self._say(f"no answer for {time.monotonic() - begun:.0f} s")

    def _begin(self, now: float) -> None:
        if self.until is None:
            self.until = now + PATIENCE_S
            self._pause_s = PAUSE_S

    def _say(self, reason: str) -> None:
        if not self._said:
            self._said = True
            _log.warning(
                "the study's storage %s does not answer (%s); waiting up to %.0f minutes for it: "
                "see that its server runs",
                self._where,
                reason,
                PATIENCE_S / 60,
            )

    def hurry(self) -> None:
        """Wait no longer."""
        self.until = time.monotonic()

    @property
    def is_hurried(self) -> bool:
        """Whether calls do not wait."""
        return self.until is not None and time.monotonic() >= self.until

    def over(self) -> None:
        """A call has got through."""
        if self._said:
            _log.warning("the study's storage %s answers again", self._where)
        self.until = None
        self._said = False

    @property
    def _where(self) -> str:
        return shown(self.url.set(drivername=self.url.get_backend_name()))
