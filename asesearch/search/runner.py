"""Searching: propose a point, try it, put it on record, until the study has enough; beside any
number of other workers.

Workers share the study's storage and directory. A schedule is claimed by a file lock while it is
tried, so that nothing is paid for twice; a claim that another holds is not a repeat, but passed
over for now, and where nothing else is left, waited for. Proposals follow from the seed and the
trials on record alone, so a search that was killed and resumed proposes the same schedules as one
that was not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import optuna
from optuna.trial import FrozenTrial

from asesearch.errors import StudyError, TrainingDiverged, is_out_of_memory
from asesearch.files import write_json
from asesearch.point import Point
from asesearch.proposer.importance import importance
from asesearch.proposer.space import has_short_names
from asesearch.search.asking import Asker
from asesearch.search.budget import room_for_trial
from asesearch.search.fleet import Fleet
from asesearch.search.ledger import Ledger
from asesearch.search.promotion import run_trial
from asesearch.search.setup import make_problem, make_space, warm_starts
from asesearch.search.warmup import is_being_made, warm_up
from asesearch.search.workbench import Workbench
from asesearch.study import directory
from asesearch.study.environment import environment
from asesearch.study.importance import Importance
from asesearch.study.interrupts import beating
from asesearch.study.records import EXPLORES, REPEAT, StudyResults, TrialRecord, spent_s
from asesearch.study.storage import storage_errors
from asesearch.study.study import Study
from asesearch.study.workers import SEARCHING, has_record, worked_s

MAX_REFUSED_IN_A_ROW = 50
MAX_FAILURES = 3  # without a single success
MAX_WITHOUT_MEMORY = 2  # in a row
Outcome = Literal["tried", "on record", "taken"]
_log = logging.getLogger(__name__)


def run_trials(
    study: Study,
    bench: Workbench,
    progress: Callable[[TrialRecord], None] | None = None,
    on_warm_up: Callable[[int, float], None] | None = None,
) -> None:
    """Search until `num_trials` points have ended (failed and stopped ones count; repeats and
    killed ones do not, nor those that an earlier run had no memory for, which are tried again),
    with a `budget` until its time is spent, or until nothing new is found. The
    warm-up comes first, where the study has one.

    Args:
        study: on whose record it works.
        bench: fine-tunes, samples and evaluates a schedule.
        progress: called with each record of this process.
        on_warm_up: called as (steps done, loss) in the elastic warm-up.

    Raises:
        StudyError: the storage can't be used, file locks do not work in the directory, the
            latency table is another device's, the full network's trial or every trial failed, or
            memory ran out in one trial after the other.
    """
    study.check_inputs(bench.identity)
    write_json(study.run_dir / directory.ENVIRONMENT, environment())
    runner = Runner(study, bench, progress)
    earlier_s = 0.0 if has_record(study.run_dir) else spent_s(study.results())
    with study.worker.at_work(SEARCHING, earlier_s):
        runner.run(on_warm_up)


class Runner:
    """One worker's search.

    Args:
        study: on whose record it works.
        bench: fine-tunes, samples and evaluates a point.
        progress: called with each record of this worker.
    """

    def __init__(
        self, study: Study, bench: Workbench, progress: Callable[[TrialRecord], None] | None = None
    ) -> None:
        self.study = study
        self.config = study.config
        self.bench = bench
        self.progress = progress
        self.ledger = Ledger(study)
        with storage_errors(study.shown_storage):
            short = has_short_names(study.optuna)
        space = replace(make_space(self.config, bench), short_names=short)
        self.fleet = Fleet(study, space, self.ledger)
        self.asker = Asker(study, self.fleet, warm_starts(self.config, bench))
        records = study.records()
        self.before = {r.number for r in records}
        self.asker.again = self._to_try_again(records)
        self.without_memory = 0  # trials of this worker in a row

    def run(self, on_warm_up: Callable[[int, float], None] | None = None) -> None:
        """Search until the study has enough; see `run_trials`."""
        # refused here, before anything is paid for, where it is another device's
        _ = self.bench.costs.latency
        self.bench.calibrate()
        self._tune_full_meanwhile()
        made = warm_up(self.bench, self.study.run_dir, on_warm_up)
        if made.difficulty_map is not None:
            self.asker.problem = make_problem(self.fleet.space, self.bench, made.difficulty_map)
        with storage_errors(self.study.shown_storage):
            self._search()
            self._weigh_intervals()

    def _tune_full_meanwhile(self) -> None:
        """While another worker makes the elastic weights, fine-tune the full network, which needs
        none of them; its trial finds the weights."""
        full = self.asker.warm["full"]
        known = any(r.point == full for r in self.study.records())
        if known or not is_being_made(self.bench, self.study.run_dir):
            return
        with self.fleet.claim(full.schedule) as mine:
            if mine:
                # where it fails: the trial does so again, and puts it on record
                try:
                    self.bench.trials.tuned(full.schedule, self.study.trial_dir(full.schedule))
                except (RuntimeError, MemoryError) as error:
                    if not (isinstance(error, TrainingDiverged) or is_out_of_memory(error)):
                        raise

    def _weigh_intervals(self) -> None:
        """Put on record what each interval is worth, by all trials that have ended."""
        if self.asker.problem is None:
            return
        path = self.study.run_dir / directory.IMPORTANCE
        found = importance(self.asker.problem, self.study.records())
        stored = directory.read_state(path, Importance.from_dict, "it is worked out again")
        if found is not None and (stored is None or stored.num_scores < found.num_scores):
            write_json(path, found.to_dict())

    def _search(self) -> None:
        in_a_row = 0
        while self._goes_on():
            outcome = self._one_trial()
            in_a_row = 0 if outcome == "tried" else in_a_row + 1
            if outcome == "tried":
                self.fleet.refused.clear()
            if in_a_row < MAX_REFUSED_IN_A_ROW:
                continue
            if self.fleet.in_flight(self.study.trials()) or self.fleet.still_held():
                self.fleet.wait()
                in_a_row = 0
            else:
                line = (
                    f"the last {in_a_row} proposals were all points on record: the space is as "
                    f"good as exhausted, and the search ends with {len(self.study.records())} "
                    "schedules on record; a wider space has more"
                )
                _log.warning("%s", line)
                return

    def _goes_on(self) -> bool:
        """Whether another trial is to be begun; waits where that depends on those in flight."""
        while True:
            trials = self.fleet.release_dead()
            records = self.study.records(trials)
            self._check_failures(records)
            if self.config.search.budget_s is not None:
                return self._in_budget(trials)
            left = self.config.search.num_trials - len(self._counted(records))
            if left <= 0:
                return False
            room = left - len(self.fleet.in_flight(trials))
            missing = self.asker.missing(records, trials)
            free = [point for _, point in missing if not self.fleet.is_busy(point, trials)]
            if room > 0 and (free or room > len(missing)):  # proposals leave places for warm starts
                return True
            self.fleet.wait()

    def _in_budget(self, trials: Sequence[FrozenTrial]) -> bool:
        """Whether the budget has room for another trial and the confirmation."""
        self.study.worker.beat()
        spent = worked_s(self.study.run_dir)
        num_workers = 1 + len(self.fleet.others.at_work())
        full_in_flight = any(s.is_full for s in self.fleet.schedules_in_flight(trials))
        results = self.study.results()
        return room_for_trial(self.config, self.bench, results, spent, num_workers, full_in_flight)

    # -- failures --------------------------------------------------------------------------------

    def _to_try_again(self, records: list[TrialRecord]) -> dict[int, TrialRecord]:
        """Trials that this run tries again, by number: the full network's that failed, or that an
        earlier release stopped, those that had no memory, and all failed where none has
        succeeded."""
        failed = [r for r in records if r.state == "failed"]
        none_good = len(failed) == len(records)
        full = self.asker.warm["full"]
        again = [r for r in records if r.point == full and r.state != "complete"]
        again += [r for r in failed if none_good or r.had_no_memory]
        return {r.number: r for r in again}

    def _counted(self, records: list[TrialRecord]) -> list[TrialRecord]:
        """Records that count towards `num_trials`: all but those still to be tried again."""
        return [r for r in records if r.number not in self.asker.again]

    def _check_memory(self, record: TrialRecord) -> None:
        """Stop where memory is gone, before the search ends in failed trials.

        A point that had none in an earlier run either may take more than there is: it does not
        stop the search again.

        Raises:
            StudyError: as said.
        """
        self.without_memory = self.without_memory + 1 if record.had_no_memory else 0
        known = any(r.point == record.point for r in self.asker.again.values())
        if self.without_memory >= MAX_WITHOUT_MEMORY and not known:
            raise StudyError(
                f"{self.without_memory} trials in a row failed without memory, though a step of "
                f"each kind had fitted: {record.failure}; end what else holds memory, and give the "
                "same command again, which goes on with what they had trained"
            )

    def _check_failures(self, records: list[TrialRecord]) -> None:
        """Stop where nothing more can come of it.

        Raises:
            StudyError: the full network's trial failed since this run began, or the first few
                trials all did.
        """
        new = [r for r in records if r.number not in self.before and r.state == "failed"]
        kept = "; the trials on record are kept, and the same command tries this one again"
        for record in new:
            if record.point == self.asker.warm["full"]:
                raise StudyError(
                    "the full network's trial failed, and without it nothing can be compared: "
                    f"{record.failure}{kept}; where it takes another setting, search under another "
                    "name"
                )
        if len(new) >= MAX_FAILURES and all(r.state == "failed" for r in records):
            reasons = list(dict.fromkeys(str(r.failure) for r in new))
            what = reasons[0] if len(reasons) == 1 else "; ".join(reasons[:MAX_FAILURES])
            raise StudyError(
                f"all {len(new)} trials so far failed, so the search stops: {what}; put that right "
                "and run the same command again, which tries them again; where it takes another "
                "setting, search under another name"
            )

    # -- one trial -------------------------------------------------------------------------------

    def _one_trial(self) -> Outcome:
        """Propose one point and try it, unless it is on record or another worker is at it, which
        costs nothing."""
        begun = time.perf_counter()
        try:
            trial, point = self.asker.ask()
            with beating(self.study.optuna, trial), self.fleet.claim(point.schedule) as mine:
                outcome, record = self._take(trial, point, mine, begun)
                if outcome == "tried":
                    assert record is not None
                    self.ledger.put(trial, record)
            self.ledger.tell(trial.number, record)
        except BaseException:
            self.fleet.close_own()
            raise
        if outcome == "tried" and record is not None:
            self._prune_weights()
            if self.progress is not None:
                self.progress(record)
            self._check_memory(record)
        return outcome

    def _take(
        self, trial: optuna.Trial, point: Point, mine: bool, begun: float
    ) -> tuple[Outcome, TrialRecord | None]:
        """Try a proposed point, unless it is on record or another worker is at it.

        Args:
            trial: that carries it.
            point: what is proposed.
            mine: whether this worker has the claim to its schedule.
            begun: when the proposal began.

        Returns:
            What came of it, and the point's record, if there is one.
        """
        trials = self.study.trials()
        others = {t.number for t in self.fleet.in_flight(trials)}
        records = self.study.records(trials)
        tried = [r for r in records if r.point == point]
        known = (r for r in tried if r.state != "stopped" and r.number not in self.asker.again)
        if (record := next(known, None)) is not None:
            trial.set_user_attr(REPEAT, record.number)
            return "on record", record
        if not mine or self._is_one_too_many(trial.number, others, records):
            if not mine:
                self.fleet.refused.add(point.weights_key)
            trial.set_user_attr(REPEAT, "in flight")
            return "taken", None
        record = self._try(trial, point, records, begun)
        if record.number == trial.number:
            return "tried", record
        trial.set_user_attr(REPEAT, record.number)  # a stopped one, judged again as before
        return "on record", record

    def _try(
        self,
        trial: optuna.Trial,
        point: Point,
        records: list[TrialRecord],
        begun: float,
    ) -> TrialRecord:
        """Take a claimed point up the rungs; a warm start as such, whoever proposed it."""
        warm = self.asker.origin_of(point)
        origin = warm or trial.user_attrs.get("origin", self.config.search.proposer)
        begin = TrialRecord(trial.number, origin, point, "")
        judged_by = self.asker.problem if self.config.promotion is not None else None
        explores = self.asker.explores and warm is None
        trial.set_user_attr(EXPLORES, explores)
        record = run_trial(
            self.bench, begin, self.study.trial_dir(point.schedule), records, judged_by, explores
        )
        if record.number != trial.number:
            return record
        # of an earlier trial whose place this one takes; counted in already
        earlier = (r for r in records if r.point == point and r.low_fidelity is not None)
        before = next((r.seconds for r in earlier), {})
        here_s = sum(record.seconds.values()) - sum(before.values())
        other_s = before.get("other", 0.0) + max(0.0, time.perf_counter() - begun - here_s)
        return replace(record, seconds={**record.seconds, "other": other_s})

    def _is_one_too_many(self, number: int, others: set[int], records: list[TrialRecord]) -> bool:
        """Whether the trials on record and those in flight that began before are enough."""
        if self.config.search.budget_s is not None:
            return False
        earlier = {other for other in others if other < number} - {r.number for r in records}
        return len(self._counted(records)) + len(earlier) >= self.config.search.num_trials

    def _prune_weights(self) -> None:
        """With keep_weights = "front": delete weights of schedules that are off the front.

        Never the full network's, nor those that another worker is at.
        """
        if self.config.search.keep_weights == "all":
            return
        config = self.config.shareable()
        results = StudyResults(self.config.name, config, tuple(self.study.records()), (), (), {})
        for record in results.complete:
            path = self.study.trial_dir(record.schedule) / directory.WEIGHTS
            if not results.has_weights(record) and path.is_file():
                with self.fleet.claim(record.schedule) as mine:
                    if mine:
                        path.unlink(missing_ok=True)
