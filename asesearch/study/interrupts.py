"""Ctrl-C amid the storage: it waits until the storage is in order again.

Amid a call of Optuna's storage it would leave a transaction or a cursor open, which keeps the
database locked for the next call: the one that is to end the interrupted trial.
"""

from __future__ import annotations

import inspect
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from types import FrameType
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._heartbeat import BaseHeartbeat
from sqlalchemy.exc import SQLAlchemyError


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, Ctrl-C is noted and comes at the end.

    Signals are the main thread's; in others there is nothing to hold back.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    noted: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: noted.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if noted:
            handler(*noted[0])


def _whole(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that Ctrl-C does not cut short."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with undisturbed():
            return method(*args, **kwargs)

    return call


class WholeCalls(RDBStorage):
    """Optuna's storage, whose calls Ctrl-C does not cut short; only making it may be interrupted.

    Inside the package, Optuna calls private methods of it too, so that all are wrapped.
    """


for _name, _method in vars(RDBStorage).items():
    if inspect.isfunction(_method) and not _name.startswith("__"):
        setattr(WholeCalls, _name, _whole(_method))


@contextmanager
def beating(study: optuna.Study, trial: optuna.Trial) -> Iterator[None]:
    """Inside, the database sees signs of life of a trial, as Optuna's `optimize` gives them; where
    the database is away, the next sign is given when it is there again."""
    stop = threading.Event()
    thread = threading.Thread(target=_beat_until, args=(stop, study._storage, trial._trial_id))
    begun = False
    try:
        with undisturbed():  # a thread that was begun and is not known of would never end
            thread.start()
            begun = True
        yield
    finally:
        if begun:
            with undisturbed():
                stop.set()
                thread.join()


def _beat_until(stop: threading.Event, storage: BaseStorage, trial_id: int) -> None:
    if not isinstance(storage, BaseHeartbeat):
        return
    while True:
        with suppress(StorageInternalError, SQLAlchemyError):
            storage.record_heartbeat(trial_id)
        if stop.wait(storage.get_heartbeat_interval()):
            return
