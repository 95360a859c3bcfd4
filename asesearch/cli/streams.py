"""Stdout and stderr that are closed, or on a full disk: one line, and an exit code that is not 0
only where results were lost."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from asesearch.errors import WriteError


class _Stream:
    """A stream, what fails with an OSError apart."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Told(_Stream):
    """Stderr: what is told may get lost."""

    def write(self, text: str) -> int:
        """Write, or not."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or not."""
        with suppress(OSError):
            self._stream.flush()


class Results(_Stream):
    """Stdout: results that get lost are an error.

    Raises:
        WriteError: from `write` and `flush`.
    """

    def write(self, text: str) -> int:
        """Write."""
        if text == "":  # so click asks whether the stream is one of text, and takes errors for no
            return 0
        try:
            return self._stream.write(text)
        except OSError as error:
            raise self._lost(error) from error

    def flush(self) -> None:
        """Flush."""
        try:
            self._stream.flush()
        except OSError as error:
            raise self._lost(error) from error

    def _lost(self, error: OSError) -> OSError:
        if isinstance(error, BrokenPipeError):  # the reader has enough, which is no error
            return error
        # what is buffered would be tried again at the end of the process
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        return WriteError(
            f"can't write the results to stdout: {error.strerror or error}; make room where it "
            "leads to, and give the same command again"
        )


def guard() -> None:
    """Put these in the place of the process's streams; what an encoding lacks becomes backslash
    escapes."""
    # None where the shell has closed it
    sys.stderr = Told(sys.stderr or open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr's are
    if sys.stdout is not None:
        sys.stdout = Results(sys.stdout)
