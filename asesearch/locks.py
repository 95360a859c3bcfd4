"""File locks between processes, within one kernel and over file systems that have them."""

from __future__ import annotations

import errno
import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from asesearch.errors import AseSearchError, StudyError, WriteError
from asesearch.files import short, why_not

POLL_S = 0.1  # between two looks at a lock that is waited for
SAY_S = 2.0  # a longer wait is said
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

_log = logging.getLogger(__name__)


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold a file lock if it is free now; a process that dies gives its own back.

    Yields:
        Whether it is held.

    Raises:
        StudyError: the folder's file system has no locks.
        WriteError: the folder or the lock's file can't be written.
    """
    lock = _acquired(path)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


@contextmanager
def waited_lock(path: Path, what: str) -> Iterator[None]:
    """Hold a file lock, waiting for it as long as another process does; says once that it waits.

    Args:
        path: of the lock's file.
        what: what the other does, for the message.

    Raises:
        StudyError, WriteError: see `try_lock`.
    """
    begun = time.monotonic()
    said = False
    while (lock := _acquired(path)) is None:
        if not said and time.monotonic() - begun > SAY_S:
            _log.warning("waiting for another worker, which %s", what)
            said = True
        time.sleep(POLL_S)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def waited_if_possible(path: Path, what: str) -> Iterator[None]:
    """`waited_lock`; where the folder can't be written or has no locks, each process does the work
    for itself."""
    with ExitStack() as held:
        with suppress(StudyError, WriteError):
            held.enter_context(waited_lock(path, what))
        yield


@contextmanager
def alone(path: Path, refusal: AseSearchError) -> Iterator[None]:
    """Keep other processes out, where the folder's file system has locks.

    Args:
        path: of the lock's file.
        refusal: raised where another process holds it.

    Raises:
        WriteError: see `try_lock`.
    """
    with ExitStack() as stack:
        mine = True
        with suppress(StudyError):  # no locks there
            mine = stack.enter_context(try_lock(path))
        if not mine:
            raise refusal
        yield


def check_locks(folder: Path) -> None:
    """Find out whether file locks work in a folder.

    Raises:
        StudyError: they do not.
        WriteError: the folder can't be written.
    """
    path = folder / f"{uuid.uuid4().hex}.try"
    try:
        with try_lock(path), try_lock(path) as twice:
            if twice:
                raise _no_locks(folder, "a lock held by one is given to a second")
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _acquired(path: Path) -> BaseFileLock | None:
    """The lock, held; None where another holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock: BaseFileLock = FileLock(path, timeout=0)
        lock.acquire()
    except Timeout:
        return None
    except (NotImplementedError, UserWarning) as error:
        raise _no_locks(path.parent, str(error)) from error
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise _no_locks(path.parent, error.strerror or str(error)) from error
        raise WriteError(_refused(path, error)) from error
    # a mark in its place, which a process that dies leaves behind
    if isinstance(lock, SoftFileLock):
        lock.release()
        raise _no_locks(path.parent, "flock is not supported")
    return lock


def _refused(path: Path, error: OSError) -> str:
    """Why a lock's file can't be opened, and what to do about it."""
    denied = error.errno in (errno.EACCES, errno.EPERM)
    if denied and path.is_file() and os.access(path.parent, os.W_OK):
        return (
            f"can't write to {short(path, 150)}: {error.strerror}; all who share a "
            "folder set umask 002, and whoever owns what others can't write there runs chmod -R "
            "g+w on it"
        )
    return why_not(path.parent if denied and not os.path.isdir(path) else path, error)


def _no_locks(folder: Path, reason: str) -> StudyError:
    return StudyError(
        f"workers of a study need file locks in its directory; can't lock a file in "
        f"{short(folder, 100)} ({reason[:50]}); choose a directory on a file system that has them"
    )
