"""Asking for the next point: warm starts first, then the study's proposer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from asesearch.point import Point
from asesearch.proposer.problem import Problem
from asesearch.proposer.proposer import NAME, DifficultySampler
from asesearch.search.fleet import WORKER, Fleet
from asesearch.search.promotion import num_explored
from asesearch.search.setup import make_proposer
from asesearch.study.records import TrialRecord, num_ended
from asesearch.study.storage import ask
from asesearch.study.study import Study


class Asker:
    """Proposes points; what it proposes follows from the seed and the record alone.

    Args:
        study: on whose record it goes.
        fleet: what the other workers are at.
        warm: points to try first, by origin.

    Attributes:
        problem: what the difficulty proposer and promotion know of the study; None where neither
            is used.
        again: failed trials whose points are tried again, by number.
    """

    def __init__(self, study: Study, fleet: Fleet, warm: dict[str, Point]) -> None:
        self.study = study
        self.config = study.config
        self.fleet = fleet
        self.warm = warm
        self.problem: Problem | None = None
        self.again: dict[int, TrialRecord] = {}

    def ask(self) -> tuple[optuna.Trial, Point]:
        """The next point, in a trial of this worker's; queued ones outside the space are ended."""
        with self.fleet.turn():
            while True:
                trials = self.study.trials()
                self.enqueue_warm_start(self.study.records(trials), trials)
                self._seed_proposer(trials)
                trial = ask(self.study.optuna)
                trial.set_user_attr(WORKER, self.study.worker.mark)
                if not self.fleet.is_refused(trial):
                    return trial, self.fleet.space.suggest(trial)

    @property
    def explores(self) -> bool:
        """Whether the last proposal belongs to the exploration phase."""
        return bool(getattr(self.study.optuna.sampler, "explores", False))

    def origin_of(self, point: Point) -> str | None:
        """The warm start that a point is, whoever proposed it; None where it is none."""
        return next((origin for origin, warm in self.warm.items() if warm == point), None)

    def enqueue_warm_start(self, records: list[TrialRecord], trials: Sequence[FrozenTrial]) -> None:
        """Queue the first warm start that is not queued or on record (so one whose trial was killed
        comes again), or else the first point that is tried again.

        Those whose schedule another worker is at are passed over for now.
        """
        for origin, point in self.missing(records, trials):
            if not self.fleet.is_busy(point, trials):
                self.study.optuna.enqueue_trial(
                    self.fleet.space.encode(point), user_attrs={"origin": origin}
                )
                return

    def missing(
        self, records: list[TrialRecord], trials: Sequence[FrozenTrial]
    ) -> list[tuple[str, Point]]:
        """Warm starts, and then points to be tried again, that are neither on record nor queued nor
        in flight: (origin, point)."""
        known = {r.point for r in records if r.number not in self.again}
        for trial in trials:
            if trial.state.is_finished():
                continue
            if (point := self.fleet.space.point_of(trial)) is not None:
                known.add(point)
        warm = self.warm.values()
        again = [r for r in records if r.number in self.again and r.point not in warm]
        wanted = [*self.warm.items(), *((r.origin, r.point) for r in again)]
        return [(origin, point) for origin, point in wanted if point not in known]

    def _seed_proposer(self, trials: Sequence[FrozenTrial]) -> None:
        """A proposer whose seed follows from the study's and from what is on record."""
        running = sum(t.state == TrialState.RUNNING for t in trials)
        own = self.config.search.seed
        words = np.random.SeedSequence([own, num_ended(trials), running]).generate_state(1)
        seed = int(words[0]) % 2**31
        if self.config.search.proposer == NAME:
            assert self.problem is not None
            self.study.optuna.sampler = DifficultySampler(
                self.problem,
                seed=seed,
                explore=num_explored(self.config),
                busy=self.fleet.refused,
            )
        else:
            self.study.optuna.sampler = make_proposer(self.config.search, seed)
