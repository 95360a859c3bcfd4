"""Processes of tests, forked from one that has imported everything already.

They are real processes, to be killed, stopped or interrupted; but importing PyTorch takes seconds,
which each process that is started on its own would spend again.
"""

import importlib
import multiprocessing
import os
import shutil
import tempfile
import weakref
from contextlib import chdir
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTED = ["asesearch.cli.program", "tests.search.fake_search"]

#: Modules that wait with a `POLL_S` of their own.
POLLING = ("asesearch.study.workers", "asesearch.search.fleet", "asesearch.search.confirmation")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(IMPORTED)


class Child:
    """A process that calls a function of a module, given by reference, and ends.

    Attributes:
        pid: of the process.
    """

    def __init__(self, function, *args):
        folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._streams = [folder / "stdout", folder / "stderr"]
        with chdir(ROOT):  # where the server finds what it imports
            forkserver.ensure_running()
        streams = list(map(str, self._streams))
        self._process = _context.Process(target=_call, args=(streams, function, args), daemon=True)
        self._process.start()
        self.pid = self._process.pid

    def stderr(self):
        """What it has written to stderr so far."""
        path = self._streams[1]
        return path.read_text() if path.exists() else ""

    def is_alive(self):
        return self._process.is_alive()

    def kill(self):
        self._process.kill()

    def ended(self, timeout_s=120):
        """Wait for the end: the exit code (negative for a signal), stdout and stderr."""
        self._process.join(timeout_s)
        assert self._process.exitcode is not None, f"it goes on; it said: {self.stderr()}"
        return self._process.exitcode, *(p.read_text() for p in self._streams)


def poll_often(setattr=setattr):
    """Let workers of studies look at each other ten times a second."""
    for name in POLLING:
        setattr(importlib.import_module(name), "POLL_S", 0.1)


def _call(streams, function, args):
    poll_often()
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    function(*args)
