"""Calls of the storage, which Ctrl-C does not cut short, and which outlast an outage of its server.

Amid a call of Optuna's storage Ctrl-C would leave a transaction or a cursor open, which keeps the
database locked for the next call: the one that is to end the interrupted trial.
"""

from __future__ import annotations

import inspect
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import wraps
from types import FrameType
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._heartbeat import BaseHeartbeat
from sqlalchemy.exc import SQLAlchemyError

from asesearch.study.outages import Outage
from asesearch.study.silence import HURRY_S, Watch

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
def undisturbed(outage: Outage | None = None) -> Iterator[None]:
    """Inside, Ctrl-C is noted and comes at the end.

    Signals are the main thread's; in others there is nothing to hold back.

    Args:
        outage: of the storage that is asked inside. Where it has a server, which may never answer,
            Ctrl-C hurries what waits for it, and a second one a while later comes at once.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    noted: list[tuple[int, FrameType | None, float]] = []

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if outage is not None and outage.has_server:
            if noted and now - noted[0][2] > HURRY_S:
                noted.clear()
                handler(number, frame)
                return
            outage.hurry()
        noted.append((number, frame, now))

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if noted:
            handler(*noted[0][:2])


def _whole(method: Callable[..., Any], *, waits: bool = False) -> Callable[..., Any]:
    """A method that Ctrl-C does not cut short; `waits` where it is called again in an outage."""

    @wraps(method)
    def call(storage: WholeCalls, *args: Any, **kwargs: Any) -> Any:
        with undisturbed(storage.outage), storage.watched(waits):
            return method(storage, *args, **kwargs)

    return call


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    """A whole method that is called again where the server was away; Ctrl-C ends the waiting.

    Where the server had done what it was told and only its answer was lost, it is told twice. What
    comes of that is at worst a trial that nobody runs, ended like any dead worker's, or the same
    record twice.
    """
    whole = _whole(method, waits=True)

    @wraps(whole)
    def call(storage: WholeCalls, *args: Any, **kwargs: Any) -> Any:
        if getattr(_inside, "call", False):  # a part of a transaction can't be tried again
            return method(storage, *args, **kwargs)
        while True:
            _inside.call = True
            try:
                found = whole(storage, *args, **kwargs)
            except (StorageInternalError, SQLAlchemyError) as error:
                if storage.outage is None or not storage.outage.wait(error):
                    raise
            except KeyboardInterrupt:
                if storage.outage is not None:
                    storage.outage.hurry()
                raise
            else:
                if storage.outage is not None:
                    storage.outage.over()
                return found
            finally:
                _inside.call = False

    return call


class WholeCalls(RDBStorage):
    """Optuna's storage, whose calls Ctrl-C does not cut short, and which wait for a server that is
    away for a while. Making it may be interrupted, and does not wait.

    Inside the package, Optuna calls private methods of it too, so that all are wrapped.

    Attributes:
        outage: of its server; None while it is made.
    """

    outage: Outage | None = None
    _watch: Watch | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except BaseException:
            if (engine := getattr(self, "engine", None)) is not None:
                engine.dispose()
            raise
        self.outage = Outage(self.engine.url)
        self._watch = Watch(self.engine, self.outage)
        weakref.finalize(self, self._watch.end.set)

    def watched(self, waits: bool) -> AbstractContextManager[None]:
        """See `Watch.over`."""
        return nullcontext() if self._watch is None else self._watch.over(waits=waits)


for _name, _method in vars(RDBStorage).items():
    if inspect.isfunction(_method) and not _name.startswith("__"):
        setattr(WholeCalls, _name, (_whole if _name in _AT_ONCE else _patient)(_method))


@contextmanager
def beating(study: optuna.Study, trial: optuna.Trial) -> Iterator[None]:
    """Inside, the database sees signs of life of a trial, as Optuna's `optimize` gives them; where
    the database is away, the next sign is given when it is there again."""
    outage = getattr(getattr(study._storage, "_backend", study._storage), "outage", None)
    stop = threading.Event()
    thread = threading.Thread(target=_beat_until, args=(stop, study._storage, trial._trial_id))
    begun = False
    try:
        with undisturbed():  # a thread that was begun and is not known of would never end
            thread.start()
            begun = True
        yield
    except KeyboardInterrupt:  # nothing waits for a server after it
        if outage is not None:
            outage.hurry()
        raise
    finally:
        if begun:
            with undisturbed(outage):
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
