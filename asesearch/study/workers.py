"""The workers of a study: who lives, what each is at, and how long any was at work.

Every worker holds a file lock for its life and keeps a small file of the times it was at work, both
in `workers/` in the study directory. These times are of the directory's file system, for the clocks
of machines differ. Within one kernel the lock tells at once whether a worker
lives, whatever the container or process namespace; from elsewhere, its file must change now and
then. Process ids tell nothing: another namespace, or another boot, has the same ones.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asesearch.errors import WriteError
from asesearch.files import loads, shared_time, write_json
from asesearch.locks import check_locks, try_lock
from asesearch.study.directory import WORKERS, listed
from asesearch.study.storage import HEARTBEAT_S

SEARCHING = "searching"
CONFIRMING = "confirming"
BEAT_S = 5.0  # between two signs of life
PAUSE_S = 60.0  # a longer gap between two signs is no time at work: the process was stopped
GRACE_S = 2.0 * HEARTBEAT_S  # a worker elsewhere that gives no sign for so long is taken for dead
OLD_S = 3600.0  # signs so old need not be watched
OFFSET_S = 60.0  # a clock that differs by more from the file system's is named
POLL_S = 1.0

_log = logging.getLogger(__name__)

# -- this worker ---------------------------------------------------------------------------------


def boot_id() -> str:
    """Of the running kernel; empty where it tells none.

    Not psutil's `boot_time`: it is in seconds and follows corrections of the clock, so that one
    boot may have two, and two hosts the same.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


class Worker:
    """This process as one of a study's workers.

    Args:
        run_dir: the study directory; nothing is written before `at_work`.
    """

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / WORKERS
        self.id = uuid.uuid4().hex
        self._state: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),  # for people
            "boot": boot_id(),
            "doing": "",
            "earlier_s": 0.0,
            "times": [],
        }
        self._clock = 0.0  # of the last sign
        self._guard = threading.Lock()
        self._said = False

    @property
    def mark(self) -> dict[str, str]:
        """What a trial carries of its worker."""
        return {"id": self.id, **{key: self._state[key] for key in ("boot", "host")}}

    @contextmanager
    def at_work(self, doing: str, earlier_s: float = 0.0) -> Iterator[None]:
        """Hold this worker's lock, and keep on record since when and until when it was at work.

        Args:
            doing: SEARCHING or CONFIRMING.
            earlier_s: seconds that the study took before its workers kept such a record.

        Raises:
            StudyError: file locks do not work here.
            WriteError: the folder can't be written.
        """
        check_locks(self.folder)
        stop = threading.Event()
        with try_lock(self.folder / f"{self.id}.lock"):
            now = shared_time(self.folder)
            self._say_offset(time.time() - now)
            self._clock = time.monotonic()
            self._state.update(doing=doing, earlier_s=earlier_s or self._state["earlier_s"])
            self._state["times"].append([now, now])
            self._write()
            thread = threading.Thread(target=self._beat_until, args=(stop,), daemon=True)
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()
                self._state["doing"] = ""
                self.beat()

    def beat(self) -> None:
        """Give a sign of life now."""
        with self._guard:
            clock = time.monotonic()
            passed = clock - self._clock
            self._clock = clock
            times = self._state["times"]
            if passed > PAUSE_S:
                now = shared_time(self.folder)
                times.append([now, now])
            else:
                times[-1][1] += passed
            with suppress(WriteError):  # where the disk is full, what is worth keeping says so
                self._write()

    def _say_offset(self, offset_s: float) -> None:
        if abs(offset_s) > OFFSET_S and not self._said:
            self._said = True
            _log.warning(
                "the clock of %s is %.0f s %s that of the file system of %s, by which the workers' "
                "times are counted: set it, best by NTP",
                self._state["host"],
                abs(offset_s),
                "ahead of" if offset_s > 0 else "behind",
                self.folder.parent,
            )

    def _write(self) -> None:
        write_json(self.folder / f"{self.id}.json", self._state)

    def _beat_until(self, stop: threading.Event) -> None:
        while not stop.wait(BEAT_S):
            self.beat()


# -- the others ----------------------------------------------------------------------------------


@dataclass
class _Sign:
    content: str
    since: float


class Others:
    """What one worker sees of the study's others.

    Args:
        run_dir: the study directory.
        own: this worker's id.
    """

    def __init__(self, run_dir: Path, own: str) -> None:
        self.folder = run_dir / WORKERS
        self.own = own
        self._signs: dict[str, _Sign] = {}

    def alive(self, mark: object, number: int) -> bool | None:
        """Whether a trial's worker lives; None where only the database can tell.

        Args:
            mark: of the trial: `Worker.mark`, or what earlier releases left, or None.
            number: of the trial.
        """
        if mark is None:  # begun this moment, or killed between two lines
            return self._silent_s(f"trial {number}", "") < GRACE_S
        if not isinstance(mark, dict):
            return None
        held = self._lock_held(str(mark["id"]), str(mark["boot"]))
        if held is not None:
            return held
        return self.gives_signs(mark)

    def gives_signs(self, mark: object) -> bool | None:
        """Whether a worker's file has changed of late; None where there is none."""
        if not isinstance(mark, dict):
            return None
        state = _read(self.folder / f"{mark['id']}.json")
        if state is None:
            return None
        return self._silent_s(str(mark["id"]), json.dumps(state)) < GRACE_S

    def at_work(self, doing: str | None = None) -> list[str]:
        """The other workers at work, as "host, process 12".

        A worker that gives no sign for GRACE_S is left out, be it dead or stopped.

        Args:
            doing: those at this; None for all.
        """
        found = []
        for path in listed(self.folder, "*.json"):
            state = _read(path)
            if path.stem == self.own or state is None or not state["doing"]:
                continue
            silent = self._silent_s(path.stem, json.dumps(state))
            held = self._lock_held(path.stem, state["boot"])
            if held is None:
                held = _age_s(path) < OLD_S
            if held and silent <= GRACE_S and doing in (None, state["doing"]):
                found.append(f"{state['host']}, process {state['pid']}")
        return found

    def _lock_held(self, worker: str, boot: str) -> bool | None:
        """Whether a worker under this kernel holds its lock; None under another, or where the lock
        is of another user, who lets nobody else open it."""
        path = self.folder / f"{worker}.lock"
        if not boot or boot != boot_id() or not path.exists():
            return None
        with suppress(WriteError), try_lock(path) as free:
            return not free
        return None

    def _silent_s(self, worker: str, content: str) -> float:
        """Seconds that this worker has seen another's file unchanged, by its own clock."""
        now = time.monotonic()
        sign = self._signs.get(worker)
        if sign is None or sign.content != content:
            sign = self._signs[worker] = _Sign(content, now)
        return now - sign.since


def worked_s(run_dir: Path) -> float:
    """Seconds in which at least one worker was at work; the time between two runs does not
    count."""
    states = _states(run_dir)
    total = max((float(s["earlier_s"]) for s in states), default=0.0)
    until = float("-inf")
    for begun, ended in sorted(pair for s in states for pair in s["times"]):
        total += max(0.0, ended - max(begun, until))
        until = max(until, ended)
    return total


def most_at_once(run_dir: Path) -> int:
    """The most workers that were at work at one time; 0 where none has put it on record."""
    times = [pair for state in _states(run_dir) for pair in state["times"]]
    return max((sum(a <= begun < b for a, b in times) for begun, _ in times), default=0)


def has_record(run_dir: Path) -> bool:
    """Whether any worker has put on record when it was at work."""
    return bool(listed(run_dir / WORKERS, "*.json"))


def _age_s(path: Path) -> float:
    """Seconds since a file was written, by the clock of its file system."""
    try:
        return shared_time(path.parent) - path.stat().st_mtime
    except OSError:  # it is gone
        return float("inf")


def _states(run_dir: Path) -> list[dict[str, Any]]:
    """What is on record of a study's workers."""
    files = listed(run_dir / WORKERS, "*.json")
    return [s for path in files if (s := _read(path)) is not None]


def _read(path: Path) -> dict[str, Any] | None:
    """A worker's file; None where it is missing or damaged."""
    try:
        state = loads(path.read_text(encoding="utf-8"))
        _ = state["host"], state["pid"], state["boot"], state["doing"], state["earlier_s"]
        return state if all(len(pair) == 2 for pair in state["times"]) and state["times"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
