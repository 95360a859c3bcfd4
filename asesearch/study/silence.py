"""Calls of a storage whose server is silent: its machine still acknowledges what is sent, so that
the driver waits without end and raises nothing. A thread looks at how long they take; it says so,
and cuts the connection in the end, whereupon the driver raises what is known as an outage."""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from asesearch.study.outages import Outage

SILENT_S = 20.0  # a call that takes longer is said to have no answer
AT_ONCE_S = 60.0  # one that does not wait for a server is cut after so long
HURRY_S = 5.0  # any, where Ctrl-C came or waiting was in vain
POLL_S = 1.0


@dataclass
class _Call:
    begun: float
    waits: bool


class Watch:
    """Looks after the calls of an open storage; a SQLite file needs none.

    Args:
        engine: of the storage, before its first connection that is to be looked after.
        outage: of the storage.
    """

    def __init__(self, engine: Engine, outage: Outage) -> None:
        self._outage = outage
        self._calls: dict[int, _Call] = {}  # by thread
        self._guard = threading.Lock()
        self._connections: weakref.WeakSet[object] = weakref.WeakSet()
        self._begun = False
        self.end = threading.Event()
        if outage.has_server:
            # before the driver's own first questions
            sa.event.listen(engine, "connect", self._connected, insert=True)
            sa.event.listen(engine, "do_connect", self._before_connecting)
            engine.dispose()  # one that the making of the storage left is not known here

    @contextmanager
    def over(self, *, waits: bool) -> Iterator[None]:
        """Inside, this thread asks the server.

        Args:
            waits: whether the call may take as long as an outage; else it is cut soon.
        """
        thread = threading.get_ident()
        if not self._outage.has_server or thread in self._calls:  # a call that is made by another
            yield
            return
        self._begin()
        with self._guard:
            self._calls[thread] = _Call(time.monotonic(), waits)
        try:
            yield
        finally:
            with self._guard:
                self._calls.pop(thread, None)

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            threading.Thread(target=self._look_until_end, daemon=True).start()

    def _look_until_end(self) -> None:
        while not self.end.wait(POLL_S):
            with self._guard:
                if any(map(self._is_over_time, self._calls.values())):
                    self._cut()

    def _is_over_time(self, call: _Call) -> bool:
        """Whether a call has waited long enough; one that goes on to wait is said."""
        now = time.monotonic()
        if call.waits and now - call.begun >= SILENT_S:
            self._outage.silent(call.begun)
        until = self._outage.until
        if until is not None and now >= until and now - call.begun >= HURRY_S:
            return True
        return not call.waits and now - call.begun >= AT_ONCE_S

    def _connected(self, connection: object, _: object) -> None:
        with self._guard, suppress(TypeError):  # a driver whose connections have no weak references
            self._connections.add(connection)

    def _before_connecting(self, *call: object) -> None:
        parameters = call[-1]
        assert isinstance(parameters, dict)
        if self._outage.is_hurried and "connect_timeout" in parameters:
            parameters["connect_timeout"] = int(HURRY_S)

    def _cut(self) -> None:
        """Shut the sockets of all connections: whoever waits at one has the driver's error."""
        for connection in list(self._connections):
            with suppress(Exception):  # closed, or a driver that tells no socket
                held: Any = getattr(connection, "_sock", connection)  # of pymysql
                with socket.socket(fileno=os.dup(held.fileno())) as shared:
                    shared.shutdown(socket.SHUT_RDWR)
