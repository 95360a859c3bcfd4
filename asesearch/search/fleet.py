"""What the study's other workers are at, and what only one may be at: claims, turns and waiting."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import optuna
from optuna.trial import FrozenTrial, TrialState

from asesearch.locks import try_lock
from asesearch.point import Point
from asesearch.proposer.space import Space
from asesearch.schedule import ExitSchedule
from asesearch.search.ledger import Ledger
from asesearch.study import directory
from asesearch.study.records import RECORD
from asesearch.study.study import Study
from asesearch.study.workers import POLL_S, Others

# user attribute: the mark of the worker that runs the trial; "host:pid" in earlier releases
WORKER = "worker"
TURN_S = 60.0

_log = logging.getLogger(__name__)


class Fleet:
    """The study's workers as one of them sees them.

    Args:
        study: on whose record they work.
        space: of its points.
        ledger: ends the trials of dead workers.
    """

    def __init__(self, study: Study, space: Space, ledger: Ledger) -> None:
        self.study = study
        self.space = space
        self.ledger = ledger
        self.others = Others(study.run_dir, study.worker.id)
        # schedules (`Point.weights_key`) that another held when they were proposed
        self.refused: set[ExitSchedule] = set()
        self._said = ""

    # -- trials in flight ------------------------------------------------------------------------

    def in_flight(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Those of a reading of the study's trials that other workers are at."""
        return [t for t in trials if t.state == TrialState.RUNNING and not self.is_mine(t)]

    def is_mine(self, trial: FrozenTrial) -> bool:
        mark = trial.user_attrs.get(WORKER)
        return isinstance(mark, dict) and mark["id"] == self.study.worker.id

    def schedules_in_flight(self, trials: Sequence[FrozenTrial]) -> set[ExitSchedule]:
        """Schedules that other workers are at."""
        return {
            point.weights_key
            for trial in self.in_flight(trials)
            if (point := self.space.point_of(trial)) is not None
        }

    def release_dead(self) -> list[FrozenTrial]:
        """End the trials of workers that are dead; the study's trials as they are then.

        A missing heartbeat is not enough where the worker gives other signs: it may be the database
        that was away.
        """
        trials = self.study.trials()
        stale = self.study.stale_trials()
        dead = []
        for trial in self.in_flight(trials):
            mark = trial.user_attrs.get(WORKER)
            alive = self.others.alive(mark, trial.number)
            signs = self.others.gives_signs(mark)  # asked every time: silence is counted from here
            if alive and trial._trial_id in stale:
                alive = signs  # it holds its lock, but may be stopped
            if alive is False or (alive is None and trial._trial_id in stale):
                dead.append(trial)
        for trial in dead:
            self.ledger.close(trial)
        return self.study.trials() if dead else trials

    def is_refused(self, trial: optuna.Trial) -> bool:
        """Whether a trial that was queued lies outside the space: it is ended, and said why."""
        queued = self.study.optuna._storage.get_trial(trial._trial_id)
        params = queued.system_attrs.get("fixed_params", {}) | queued.params
        why = self.space.misfit(params)
        if why is not None:
            self.ledger.tell(trial.number, None)
            _log.warning("trial %d was queued and has failed: %s; queue another", trial.number, why)
        return why is not None

    def close_own(self) -> None:
        """End this worker's trial: interrupted or broken, it must not stay open, for the process
        still lives."""
        for trial in self.study.trials():
            if trial.state == TrialState.RUNNING and self.is_mine(trial):
                self.ledger.close(trial)

    # -- claims and turns ------------------------------------------------------------------------

    @contextmanager
    def claim(self, schedule: ExitSchedule) -> Iterator[bool]:
        """Whether this worker alone is at the schedule; the claim of a process that dies is free
        again."""
        name = self.study.trial_dir(schedule).name
        with try_lock(self.study.run_dir / directory.LOCKS / f"{name}.lock") as mine:
            yield mine

    def is_busy(self, point: Point, trials: Sequence[FrozenTrial]) -> bool:
        """Whether another worker is at a point's schedule, under whichever sampler."""
        key = point.weights_key
        return key in self.refused or key in self.schedules_in_flight(trials)

    def still_held(self) -> bool:
        """Whether a schedule that another held when it was proposed is still held."""
        for schedule in self.refused:
            with self.claim(schedule) as mine:
                if not mine:
                    return True
        return False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Workers propose in turn: none pops another's queued trial, or proposes what another is
        just about to.

        A worker that is stopped in its turn is not waited for longer than TURN_S; while turns
        change, others are waited for as long as it takes.
        """
        locks = self.study.run_dir / directory.LOCKS
        begun = locks / "turn.begun"  # the lock's own file changes with every try
        seen = -1
        until = time.monotonic() + TURN_S
        while time.monotonic() < until:
            with try_lock(locks / "turn.lock") as mine:
                if mine:
                    begun.touch()
                    yield
                    return
            with suppress(OSError):
                if (last := begun.stat().st_mtime_ns) != seen:
                    seen = last
                    until = time.monotonic() + TURN_S
            time.sleep(POLL_S / 10)
        yield

    def wait(self) -> None:
        """Wait until something ends that another worker is at; say for whom."""
        trials = self.study.trials()
        before = _moment(trials)
        names = [f"trial {t.number} ({_host(t)})" for t in self.in_flight(trials)]
        line = ", ".join(names) or "another worker, which holds all that is proposed"
        if line != self._said:
            _log.warning("waiting for %s", line)
            self._said = line
        while True:
            time.sleep(POLL_S)
            trials = self.release_dead()
            if _moment(trials) != before or not (self.in_flight(trials) or self.still_held()):
                break
        self.refused.clear()


def _moment(trials: Sequence[FrozenTrial]) -> tuple[frozenset[int], int]:
    """Changes when a trial begins or ends."""
    running = frozenset(t.number for t in trials if t.state == TrialState.RUNNING)
    return running, sum(RECORD in t.user_attrs for t in trials)


def _host(trial: FrozenTrial) -> str:
    mark = trial.user_attrs.get(WORKER, "another worker")
    return f"on {mark['host']}" if isinstance(mark, dict) else str(mark)
