"""Calls of the storage, which Ctrl-C does not cut short, and which outlast an outage of its server.

Amid a call of Optuna's storage Ctrl-C would leave a transaction or a cursor open, which keeps the
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

from asesearch.study.outages import Outage

# these do not wait for a server that is away: a heartbeat is given again anyway, an Optuna study is
# made or deleted where a command begins, and the others ask no server
_AT_ONCE = {
    "record_heartbeat",
    "create_new_study",
    "delete_study",
    "get_heartbeat_interval",
    "get_heartbeat_stale_trial_callback",
    "get_failed_trial_callback",
    "remove_session",
}
_inside = threading.local()


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


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    """A whole method that is called again where the server was away; Ctrl-C ends the waiting.

    Where the server had done what it was told and only its answer was lost, it is told twice. What
    comes of that is at worst a trial that nobody runs, ended like any dead worker's, or the same
    record twice.
    """
    whole = _whole(method)

    @wraps(whole)
    def call(storage: WholeCalls, *args: Any, **kwargs: Any) -> Any:
        if getattr(_inside, "call", False):  # a part of a transaction can't be tried again
            return method(storage, *args, **kwargs)
        while True:
            _inside.call = True
            try:
                found = whole(storage, *args, **kwargs)
            except (StorageInternalError, SQLAlchemyError) as error:
                if not storage.outage.wait(error):
                    raise
            except KeyboardInterrupt:
                storage.outage.hurry()
                raise
            else:
                storage.outage.over()
                return found
            finally:
                _inside.call = False

    return call


class WholeCalls(RDBStorage):
    """Optuna's storage, whose calls Ctrl-C does not cut short, and which wait for a server that is
    away for a while. Making it may be interrupted, and does not wait.

    Inside the package, Optuna calls private methods of it too, so that all are wrapped.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.outage = Outage(self.engine.url)


for _name, _method in vars(RDBStorage).items():
    if inspect.isfunction(_method) and not _name.startswith("__"):
        setattr(WholeCalls, _name, (_whole if _name in _AT_ONCE else _patient)(_method))


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
