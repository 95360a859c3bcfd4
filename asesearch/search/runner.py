"""Searching: propose a point, try it, put it on record, until the study has enough; beside any
number of other workers.

Workers share the study's storage and directory. A schedule is claimed by a file lock while it is
tried, so that nothing is paid for twice; a claim that another holds is not a repeat, but passed
over for now, and where nothing else is left, waited for. Proposals follow from the seed and the
trials on record alone, so a search that was killed and resumed proposes the same schedules as one
that was not.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Literal

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from asesearch.errors import StudyError
from asesearch.files import write_json
from asesearch.point import Point
from asesearch.proposer.proposer import NAME, DifficultySampler, Problem
from asesearch.schedule import ExitSchedule
from asesearch.search.budget import room_for_trial
from asesearch.search.promotion import num_explored, run_trial
from asesearch.search.setup import make_problem, make_proposer, make_space, warm_starts
from asesearch.search.warmup import warm_up
from asesearch.search.workbench import Workbench
from asesearch.study import directory
from asesearch.study.environment import environment
from asesearch.study.records import EXPLORES, RECORD, REPEAT, StudyResults, TrialRecord, spent_s
from asesearch.study.storage import experimental, storage_errors
from asesearch.study.study import Study
from asesearch.study.workers import POLL_S, SEARCHING, Others, has_record, try_lock, worked_s

# user attribute: the mark of the worker that runs the trial; "host:pid" in earlier releases
WORKER = "worker"
MAX_REFUSED_IN_A_ROW = 50
TURN_S = 60.0
MAX_FAILURES = 3  # without a single success
Outcome = Literal["tried", "on record", "taken"]

_log = logging.getLogger(__name__)


class _Failed(Exception):
    """A trial whose failure is on record."""


def run_trials(
    study: Study,
    bench: Workbench,
    progress: Callable[[TrialRecord], None] | None = None,
    on_warm_up: Callable[[int, float], None] | None = None,
) -> None:
    """Search until `num_trials` points have ended (failed and stopped ones count; repeats and
    killed ones do not), or, with a `budget`, until its time is spent or nothing new is found.
    The warm-up comes first, where the study has one.

    Args:
        study: on whose record it works.
        bench: fine-tunes, samples and evaluates a schedule.
        progress: called with each record of this process.
        on_warm_up: called as (steps done, loss) in the elastic warm-up.

    Raises:
        StudyError: the storage can't be used, file locks do not work in the directory, the
            latency table is another device's, the full network's trial or every trial failed,
            or the space holds no further schedule.
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
        self.problem: Problem | None = None
        self.space = make_space(self.config, bench)
        self.warm = warm_starts(self.config, bench)
        self.others = Others(study.run_dir, study.worker.id)
        self._said = ""
        # schedules (`Point.weights_key`) that another held when they were proposed
        self.refused: set[ExitSchedule] = set()
        records = study.records()
        self.before = {r.number for r in records}
        self.again = self._to_try_again(records)

    def run(self, on_warm_up: Callable[[int, float], None] | None = None) -> None:
        """Search until the study has enough; see `run_trials`."""
        # refused here, before anything is paid for, where it is another device's
        _ = self.bench.latency
        made = warm_up(self.bench, self.study.run_dir, on_warm_up)
        if made.difficulty_map is not None:
            self.problem = make_problem(self.space, self.bench, made.difficulty_map)
        with storage_errors(self.study.shown_storage):
            self._search()

    def _search(self) -> None:
        in_a_row = 0
        while self._goes_on():
            outcome = self._one_trial()
            in_a_row = 0 if outcome == "tried" else in_a_row + 1
            if outcome == "tried":
                self.refused.clear()
            if in_a_row < MAX_REFUSED_IN_A_ROW:
                continue
            if self._in_flight() or self._still_held():
                self._wait()
                in_a_row = 0
            elif self.config.search.budget_s is not None:
                return  # nothing is left to spend it on
            else:
                raise StudyError(
                    f"the last {in_a_row} proposals were all points on record; the space is as "
                    "good as exhausted: lower num_trials or widen the space; the trials on record "
                    "are kept"
                )

    def _goes_on(self) -> bool:
        """Whether another trial is to be begun; waits where that depends on those in flight."""
        while True:
            self._release_dead()
            records = self.study.records()
            self._check_failures(records)
            if self.config.search.budget_s is not None:
                return self._in_budget()
            left = self.config.search.num_trials - len(records)
            if left <= 0:
                return False
            room = left - len(self._in_flight())
            missing = self._missing(records)
            free = [origin for origin in missing if not self._is_busy(self.warm[origin])]
            if room > 0 and (free or room > len(missing)):  # proposals leave places for warm starts
                return True
            self._wait()

    def _in_budget(self) -> bool:
        """Whether the budget has room for another trial and the confirmation."""
        self.study.worker.beat()
        spent = worked_s(self.study.run_dir)
        num_workers = 1 + len(self.others.at_work())
        full_in_flight = any(s.is_full for s in self._schedules_in_flight())
        results = self.study.results()
        return room_for_trial(self.config, self.bench, results, spent, num_workers, full_in_flight)

    # -- failures --------------------------------------------------------------------------------

    def _to_try_again(self, records: list[TrialRecord]) -> set[int]:
        """Failed trials that this run tries again: the full network's, and all where none has
        succeeded."""
        failed = [r for r in records if r.state == "failed"]
        none_good = len(failed) == len(records)
        return {r.number for r in failed if none_good or r.point == self.warm["full"]}

    def _check_failures(self, records: list[TrialRecord]) -> None:
        """Stop where nothing more can come of it.

        Raises:
            StudyError: the full network's trial failed since this run began, or the first few
                trials all did.
        """
        new = [r for r in records if r.number not in self.before and r.state == "failed"]
        kept = "; the trials on record are kept, and the same command tries this one again"
        for record in new:
            if record.point == self.warm["full"]:
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

    # -- the others ------------------------------------------------------------------------------

    def _running(self) -> list[FrozenTrial]:
        """Trials in flight, this worker's own included."""
        return self.study.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _in_flight(self) -> list[FrozenTrial]:
        """Trials that other workers are at."""
        return [t for t in self._running() if not self._is_mine(t)]

    def _is_mine(self, trial: FrozenTrial) -> bool:
        mark = trial.user_attrs.get(WORKER)
        return isinstance(mark, dict) and mark["id"] == self.study.worker.id

    def _release_dead(self) -> None:
        """End the trials of workers that are dead."""
        with experimental():
            optuna.storages.fail_stale_trials(self.study.optuna)  # by their missing heartbeat
        for trial in self._in_flight():
            if self.others.alive(trial.user_attrs.get(WORKER), trial.number) is False:
                self._close(trial)

    def _close(self, trial: FrozenTrial) -> None:
        """End a trial whose process is gone or broke off: with its scores, if they were on record
        already."""
        record = (
            TrialRecord.from_dict(json.loads(trial.user_attrs[RECORD]), self.space.samplers[0])
            if RECORD in trial.user_attrs
            else None
        )
        state, values = self._end_of(record)
        self.study.optuna.tell(
            trial.number, values, state=None if values else state, skip_if_finished=True
        )

    def _end_of(self, record: TrialRecord | None) -> tuple[TrialState, tuple[float, float] | None]:
        """State and objectives of an Optuna trial with this record."""
        if record is not None and record.quality is not None:
            return TrialState.COMPLETE, self._values(record)
        return (
            TrialState.PRUNED
            if record is not None and record.state == "stopped"
            else TrialState.FAIL
        ), None

    def _point(self, trial: FrozenTrial) -> Point | None:
        """The point of a trial that is queued or in flight; None while it has none yet."""
        params = trial.system_attrs.get("fixed_params") or trial.params
        if set(params) != set(self.space.distributions()):
            return None
        return self.space.decode(params)

    def _schedules_in_flight(self) -> set[ExitSchedule]:
        """Schedules that other workers are at."""
        return {
            point.weights_key
            for trial in self._in_flight()
            if (point := self._point(trial)) is not None
        }

    def _still_held(self) -> bool:
        """Whether a schedule that another held when it was proposed is still held."""
        for schedule in self.refused:
            with self.claim(schedule) as mine:
                if not mine:
                    return True
        return False

    def _wait(self) -> None:
        """Wait until something ends that another worker is at; say for whom."""
        before = self._snapshot()
        names = [f"trial {t.number} ({_host(t)})" for t in self._in_flight()]
        line = ", ".join(names) or "another worker, which holds all that is proposed"
        if line != self._said:
            _log.warning("waiting for %s", line)
            self._said = line
        while True:
            time.sleep(POLL_S)
            self._release_dead()
            if self._snapshot() != before or not (self._in_flight() or self._still_held()):
                break
        self.refused.clear()

    def _snapshot(self) -> tuple[frozenset[int], int]:
        """Changes when a trial begins or ends."""
        trials = self.study.optuna.get_trials(deepcopy=False)
        running = frozenset(t.number for t in trials if t.state == TrialState.RUNNING)
        return running, sum(RECORD in t.user_attrs for t in trials)

    # -- proposing -------------------------------------------------------------------------------

    def _enqueue_warm_start(self, records: list[TrialRecord]) -> None:
        """Queue the first warm start that is not queued or on record (so one whose trial was killed
        comes again).

        Those whose schedule another worker is at are passed over for now.
        """
        for origin in self._missing(records):
            point = self.warm[origin]
            if not self._is_busy(point):
                self.study.optuna.enqueue_trial(
                    self.space.encode(point), user_attrs={"origin": origin}
                )
                return

    def _missing(self, records: list[TrialRecord]) -> list[str]:
        """Warm starts that are neither on record nor queued nor in flight."""
        known = {r.point for r in records if r.number not in self.again}
        for trial in self.study.optuna.get_trials(
            deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING)
        ):
            if (point := self._point(trial)) is not None:
                known.add(point)
        return [origin for origin, point in self.warm.items() if point not in known]

    def _is_busy(self, point: Point) -> bool:
        """Whether another worker is at a point's schedule, under whichever sampler."""
        key = point.weights_key
        return key in self.refused or key in self._schedules_in_flight()

    def _seed_proposer(self) -> None:
        """A proposer whose seed follows from the study's and from what is on record."""
        trials = self.study.optuna.get_trials(deepcopy=False)
        ended = sum(
            t.state == TrialState.COMPLETE or RECORD in t.user_attrs or REPEAT in t.user_attrs
            for t in trials
        )
        running = sum(t.state == TrialState.RUNNING for t in trials)
        words = np.random.SeedSequence([self.config.search.seed, ended, running]).generate_state(1)
        seed = int(words[0]) % 2**31
        if self.config.search.proposer == NAME:
            problem = self.problem
            assert problem is not None
            self.study.optuna.sampler = DifficultySampler(
                problem.space,
                problem.samplers,
                problem.cost_table,
                problem.full_cost,
                problem.difficulty_map,
                seed=seed,
                explore=num_explored(self.config),
            )
        else:
            self.study.optuna.sampler = make_proposer(self.config.search, seed)

    # -- one trial -------------------------------------------------------------------------------

    def _one_trial(self) -> Outcome:
        """Propose one point and try it, unless it is on record or another worker is at it, which
        costs nothing."""
        fresh: TrialRecord | None = None
        number = -1
        taken = False
        begun = time.perf_counter()
        turn = ExitStack()

        def objective(trial: optuna.Trial) -> tuple[float, float]:
            nonlocal fresh, number, taken
            number = trial.number
            trial.set_user_attr(WORKER, self.study.worker.mark)
            point = self.space.suggest(trial)
            turn.close()
            with self.claim(point.schedule) as mine:
                records = self.study.records()
                tried = [r for r in records if r.point == point]
                record = next(
                    (r for r in tried if r.state != "stopped" and r.number not in self.again), None
                )
                if record is not None:
                    trial.set_user_attr(REPEAT, record.number)
                elif not mine or self._is_one_too_many(trial.number, records):
                    taken = True
                    if not mine:
                        self.refused.add(point.weights_key)
                    trial.set_user_attr(REPEAT, "in flight")
                    raise _Failed("another worker is at this schedule")
                else:
                    record = self._try(trial, point, records, begun)
                    if record.number == trial.number:
                        fresh = record
                        self._put_on_record(trial, record)
                    else:  # of a stopped trial, judged again with the same result
                        trial.set_user_attr(REPEAT, record.number)
            if record.state == "stopped":
                raise optuna.TrialPruned
            if record.quality is None:
                raise _Failed(record.failure)
            return self._values(record)

        with turn:
            turn.enter_context(self._turn())
            self._enqueue_warm_start(self.study.records())
            self._seed_proposer()
            try:
                self.study.optuna.optimize(objective, n_trials=1, catch=(_Failed,))
            except BaseException as error:
                if fresh is None or not self._ended_by_another(number, error):
                    self._close_own()
                    raise
        if fresh is None:
            return "taken" if taken else "on record"
        self._prune_weights()
        if self.progress is not None:
            self.progress(fresh)
        return "tried"

    def _try(
        self,
        trial: optuna.Trial,
        point: Point,
        records: list[TrialRecord],
        begun: float,
    ) -> TrialRecord:
        """Take a claimed point up the rungs."""
        origin = trial.user_attrs.get("origin", self.config.search.proposer)
        begin = TrialRecord(trial.number, origin, point, "")
        judged_by = self.problem if self.config.promotion is not None else None
        explores = bool(getattr(self.study.optuna.sampler, "explores", False))
        trial.set_user_attr(EXPLORES, explores)
        record = run_trial(
            self.bench, begin, self.study.trial_dir(point.schedule), records, judged_by, explores
        )
        if record.number != trial.number:
            return record
        # of an earlier trial whose place this one takes; counted in already
        earlier = (r for r in records if r.point == point and r.cheap is not None)
        before = next((r.seconds for r in earlier), {})
        here_s = sum(record.seconds.values()) - sum(before.values())
        other_s = before.get("other", 0.0) + max(0.0, time.perf_counter() - begun - here_s)
        return replace(record, seconds={**record.seconds, "other": other_s})

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Workers propose in turn: none pops another's queued trial, or proposes what another is
        just about to.

        A worker that is stopped in its turn is not waited for longer than TURN_S.
        """
        until = time.monotonic() + TURN_S
        while time.monotonic() < until:
            with try_lock(self.study.run_dir / directory.LOCKS / "turn.lock") as mine:
                if mine:
                    yield
                    return
            time.sleep(POLL_S / 10)
        yield

    def _put_on_record(self, trial: optuna.Trial, record: TrialRecord) -> None:
        """Put a record into its trial; into one of its own, where another worker, taking this one
        for dead, has ended it."""
        try:
            trial.set_user_attr(RECORD, json.dumps(record.to_dict()))
        except optuna.exceptions.UpdateFinishedTrialError:
            self._keep(trial.number, record)

    def _is_one_too_many(self, number: int, records: list[TrialRecord]) -> bool:
        """Whether the trials on record and those in flight that began before are enough."""
        if self.config.search.budget_s is not None:
            return False
        earlier = sum(t.number < number for t in self._in_flight())
        return earlier > 0 and len(records) + earlier >= self.config.search.num_trials

    def _ended_by_another(self, number: int, error: BaseException) -> bool:
        """Whether a trial could not be told its end since another worker, taking this one for dead,
        had ended it."""
        return (
            isinstance(error, (ValueError, AssertionError))
            and self._trial(number).state.is_finished()
        )

    def _keep(self, number: int, record: TrialRecord) -> None:
        """Put a record into a trial of its own, where the one it was made in was ended
        meanwhile."""
        lost = self._trial(number)
        state, values = self._end_of(record)
        self.study.optuna.add_trial(
            optuna.trial.create_trial(
                state=state,
                values=values,
                params=lost.params,
                distributions=lost.distributions,
                user_attrs={**lost.user_attrs, RECORD: json.dumps(record.to_dict())},
            )
        )

    def _trial(self, number: int) -> FrozenTrial:
        return next(t for t in self.study.optuna.get_trials(deepcopy=False) if t.number == number)

    def _close_own(self) -> None:
        """End this worker's trial: interrupted or broken, it must not stay open, for the process
        still lives."""
        for trial in self._running():
            if self._is_mine(trial):
                self._close(trial)

    def _values(self, record: TrialRecord) -> tuple[float, float]:
        """The two objectives of a trial that has a score."""
        cost = record.time_frac if self.config.search.cost == "time" else record.flops_frac
        assert cost is not None and record.quality is not None
        return record.quality.value, cost

    @contextmanager
    def claim(self, schedule: ExitSchedule) -> Iterator[bool]:
        """Whether this worker alone is at the schedule; the claim of a process that dies is free
        again."""
        name = self.study.trial_dir(schedule).name
        with try_lock(self.study.run_dir / directory.LOCKS / f"{name}.lock") as mine:
            yield mine

    def _prune_weights(self) -> None:
        """With keep_weights = "front": delete weights of schedules that are off the front.

        Never the full network's, nor those that another worker is at.
        """
        if self.config.search.keep_weights == "all":
            return
        results = StudyResults(self.config.name, {}, tuple(self.study.records()), (), (), {})
        kept = [*results.front(), *((results.full,) if results.full else ())]
        keep = {r.point.weights_key for r in kept}
        for record in results.complete:
            path = self.study.trial_dir(record.schedule) / directory.WEIGHTS
            if record.point.weights_key not in keep and path.is_file():
                with self.claim(record.schedule) as mine:
                    if mine:
                        path.unlink(missing_ok=True)


def _host(trial: FrozenTrial) -> str:
    mark = trial.user_attrs.get(WORKER, "another worker")
    return f"on {mark['host']}" if isinstance(mark, dict) else str(mark)
