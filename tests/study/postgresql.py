"""A PostgreSQL server of one's own for tests: `python -m tests.study.postgresql` runs one until
Enter is pressed.

Without PostgreSQL these tests are skipped; with ASESEARCH_REQUIRE_POSTGRESQL=1 they fail, so that
CI can't skip them.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

PASSWORD = "p$ß w/0:rd@%7B{x}"  # what a URL has to spell otherwise
IN_URL = "p%24%C3%9F%20w%2F0%3Ard%40%257B%7Bx%7D"
REQUIRED = os.environ.get("ASESEARCH_REQUIRE_POSTGRESQL") == "1"


def programs():
    """The folder of PostgreSQL's server programs; None where it isn't installed."""
    found = [
        shutil.which("initdb"),
        *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)),
    ]
    return next((Path(path).parent for path in found if path), None)


def skip_where_missing():
    """Skip what needs the server where it isn't installed, unless it is required."""
    if programs() is None and not REQUIRED:
        pytest.skip(
            "PostgreSQL is not installed; ASESEARCH_REQUIRE_POSTGRESQL=1 makes this a failure"
        )


@dataclass
class Server:
    """A server on a free port of this machine that asks for a password.

    Attributes:
        port: of the server.
        start: make it run, and wait until it takes connections.
        stop: end it at once, as a crash would.
        pause: stop its processes, so that it is silent.
        go_on: let them run again.
    """

    port: int
    start: Callable[[], None]
    stop: Callable[[], None]
    pause: Callable[[], None]
    go_on: Callable[[], None]


@contextmanager
def server():
    """The port of a `Server` that runs."""
    with restartable() as made:
        yield made.port


@contextmanager
def restartable():
    """A `Server` that runs; it may be stopped and started again."""
    where = programs()
    assert where is not None, "PostgreSQL is not installed: apt-get install postgresql"
    root = os.getuid() == 0  # whom PostgreSQL refuses to run for
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        home = Path(folder)
        (home / "password").write_text(PASSWORD, encoding="utf-8")
        if root:
            for path in (home, home / "password"):
                shutil.chown(path, "postgres")

        def call(program, *args):
            prefix = ["runuser", "-u", "postgres", "--"] if root else []
            command = [*prefix, str(where / program), "-D", str(home / "data"), *args]
            subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)

        call(
            "initdb",
            "-U",
            "owner",
            "-A",
            "scram-sha-256",
            "-E",
            "UTF8",
            "--pwfile",
            str(home / "password"),
            "--no-sync",
        )
        options = f"-p {port} -h 127.0.0.1 -k {folder} -c fsync=off"

        def start():
            call("pg_ctl", "-w", "-o", options, "-l", str(home / "log"), "start")

        def stop():
            call("pg_ctl", "-m", "immediate", "stop")

        def send(number):
            first = psutil.Process(int((home / "data" / "postmaster.pid").read_text().split()[0]))
            for process in (first, *first.children()):
                process.send_signal(number)

        start()
        try:
            yield Server(
                port, start, stop, lambda: send(signal.SIGSTOP), lambda: send(signal.SIGCONT)
            )
        finally:
            if (home / "data" / "postmaster.pid").exists():
                send(signal.SIGCONT)
                stop()


def url_of(port, database, password=IN_URL):
    return f"postgresql://owner:{password}@127.0.0.1:{port}/{database}"


def new_database(port, name, options=""):
    """An empty database; its URL."""
    import psycopg

    where = f"host=127.0.0.1 port={port} user=owner dbname=postgres"
    with psycopg.connect(where, password=PASSWORD, autocommit=True) as connection:
        connection.execute(f'create database "{name}" {options}')
    return url_of(port, name)


if __name__ == "__main__":
    with server() as port:
        input(f"{new_database(port, 'studies')}\n")
