"""The search itself: a two-objective Optuna study over exit schedules.

All state is in the Optuna storage and the study directory, written as it comes: a process that is killed at any moment
loses at most the trial in flight, and the same command resumes. Proposals follow from the seed and the trials on record
alone, so a search that was killed and resumed proposes the same schedules as one that was not; the fine-tuning of a
repeated proposal goes on from its checkpoint.

Any number of processes may work on one study: give them the same study file and a storage that all can reach.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState

from asesearch.config import SearchConfig, StudyConfig
from asesearch.errors import ScheduleError, StudyError
from asesearch.files import write_json
from asesearch.schedule import ExitSchedule
from asesearch.search import directory
from asesearch.search.budget import room_for_trial
from asesearch.search.difficulty import DifficultyMap
from asesearch.search.directory import read_images, read_json, read_state
from asesearch.search.identity import Opened, is_on_record, open_to_report, open_to_search, start_over
from asesearch.search.promotion import num_explored, run_trial, same_point
from asesearch.search.proposer import NAME, DifficultySampler, Problem
from asesearch.search.records import RECORD, REPEAT, Confirmation, StudyResults, TrialRecord
from asesearch.search.space import Space
from asesearch.search.storage import alive, experimental, storage_errors
from asesearch.search.warmup import warm_up
from asesearch.search.workbench import Workbench, environment, sampler_name

WORKER = "worker"  # user attribute "host:pid" of the process that runs the trial
MAX_REPEATS_IN_A_ROW = 50
MAX_NAME_BYTES = 250  # of a folder whose name has a lock of five more bytes


def make_proposer(config: SearchConfig, seed: int) -> optuna.samplers.BaseSampler:
    """The Optuna sampler of a study file, where it is one of Optuna's own."""
    with experimental():
        if config.proposer == "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=8, multivariate=True, constant_liar=True)
        if config.proposer == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=10)
        if config.proposer == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=8)
        return optuna.samplers.RandomSampler(seed=seed)


class Study:
    """A study directory and its Optuna storage.

    Args:
        config: the study file.
        run_dir: the study directory; made if missing.

    Raises:
        StudyError: the directory holds a study that is not comparable, or directory or storage can't be used.
    """

    def __init__(self, config: StudyConfig, run_dir: Path) -> None:
        self._use(Path(run_dir), open_to_search(config, Path(run_dir)))

    @classmethod
    def open(cls, run_dir: Path, storage: str | None = None) -> Study:
        """Open a study directory by what it holds, to be read only: nothing is written or created.

        Args:
            run_dir: the study directory.
            storage: URL, in place of the one on record, which has no password.

        Raises:
            StudyError: no study there, or its storage can't be read.
        """
        study = cls.__new__(cls)
        study._use(Path(run_dir), open_to_report(Path(run_dir), storage))
        return study

    def _use(self, run_dir: Path, opened: Opened) -> None:
        self.run_dir = run_dir
        self.config = opened.config
        self.optuna = opened.optuna
        self._shown = opened.where

    # -- what is on record -----------------------------------------------------------------------

    def records(self) -> list[TrialRecord]:
        """Points that were tried, by number: the last record of each, so a stopped one that was promoted later counts once."""
        with storage_errors(self._shown):
            trials = self.optuna.get_trials(deepcopy=False)
        found = [TrialRecord.from_dict(json.loads(t.user_attrs[RECORD])) for t in trials if RECORD in t.user_attrs]
        last = {(r.schedule.merged(), r.sampler): r for r in found}
        return [r for r in found if last[r.schedule.merged(), r.sampler] is r]

    def record(self, number: int) -> TrialRecord:
        """One trial.

        Raises:
            StudyError: no such trial, or it has not ended.
        """
        found = [r for r in self.records() if r.number == number]
        if not found:
            known = " ".join(str(r.number) for r in self.records())
            raise StudyError(f"the study has no finished trial {number}; it has {known or 'none'}")
        return found[0]

    def trial_dir(self, schedule: ExitSchedule) -> Path:
        """Where a schedule's weights, samples and checkpoint are; one folder a schedule."""
        uncut = self.run_dir / directory.TRIALS / schedule.long_name
        if len(uncut.name) <= MAX_NAME_BYTES and uncut.is_dir():  # of a study begun before slugs
            return uncut
        return self.run_dir / directory.TRIALS / schedule.slug

    def results(self) -> StudyResults:
        """Everything a report or an export reads."""
        records = self.records()
        run_dir = self.run_dir
        samples = {}
        for record in records:
            file = self.trial_dir(record.schedule) / directory.samples_file(record.sampler)
            images = read_images(file, "the trial is shown without") if record.state == "complete" else None
            if images is not None:
                samples[record.number] = images
        confirmations = read_state(
            run_dir / directory.CONFIRMATIONS,
            lambda data: [Confirmation.from_dict(c) for c in data["confirmations"]],
            "its points count as unconfirmed",
        )
        latency = read_state(
            run_dir / directory.LATENCY,
            lambda data: tuple(map(float, data["median_ms"])),
            "left out; the next `asesearch search` measures it again where it is needed",
        )
        return StudyResults(
            self.config.name,
            self.config.shareable(),
            tuple(records),
            tuple(confirmations or ()),
            latency or (),
            read_state(run_dir / directory.ENVIRONMENT, dict, "that of this machine is shown instead") or environment(),
            samples,
            read_state(run_dir / directory.MAP, DifficultyMap.from_dict, "the report goes without"),
            read_state(run_dir / directory.WARM_UP, dict, "what the warm-up took counts as nothing") or {},
        )

    # -- searching -------------------------------------------------------------------------------

    def _release_dead(self) -> None:
        """Fail trials whose process on this machine is gone; other machines' are failed by their missing heartbeat."""
        host = socket.gethostname()
        for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            where, _, pid = str(trial.user_attrs.get(WORKER, ":")).rpartition(":")
            if where == host and pid.isdecimal() and not alive(int(pid)):
                self._close(trial)

    def _close(self, trial: FrozenTrial) -> None:
        """End a trial whose process is gone or broke off: with its figures, if they were on record already."""
        record = TrialRecord.from_dict(json.loads(trial.user_attrs[RECORD])) if RECORD in trial.user_attrs else None
        values = None if record is None or record.quality is None else self._values(record)
        stopped = record is not None and record.state == "stopped"
        state = None if values else TrialState.PRUNED if stopped else TrialState.FAIL
        self.optuna.tell(trial.number, values, state=state, skip_if_finished=True)

    def _values(self, record: TrialRecord) -> tuple[float, float]:
        """The two objectives of a trial that has a figure."""
        cost = record.time_frac if self.config.search.cost == "time" else record.flops_frac
        assert cost is not None and record.quality is not None
        return record.quality.value, cost

    def _enqueue_warm_start(self, space: Space, warm: dict[str, Start], records: list[TrialRecord]) -> None:
        """Queue the first warm start that is not queued, running or on record (so one whose trial was killed comes again)."""
        known = {(r.schedule.merged(), r.sampler) for r in records}
        for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING)):
            params = trial.system_attrs.get("fixed_params") or trial.params
            if set(params) == set(space.distributions()):
                known.add((space.decode(params).merged(), self._sampler(space, params)))
        for origin, (schedule, sampler) in warm.items():
            if (schedule.merged(), sampler) not in known:
                self.optuna.enqueue_trial(space.encode(schedule, sampler), user_attrs={"origin": origin})
                return

    def _sampler(self, space: Space, params: dict[str, Any]) -> str:
        """The way of sampling of a set of parameters; empty for the study's own."""
        chosen = space.sampler(params)
        return "" if chosen == sampler_name(self.config.sampling) else chosen

    def _seed_proposer(self, problem: Problem | None) -> None:
        """A proposer whose seed follows from the study's and from what is on record."""
        trials = self.optuna.get_trials(deepcopy=False)
        ended = sum(t.state == TrialState.COMPLETE or RECORD in t.user_attrs or REPEAT in t.user_attrs for t in trials)
        running = sum(t.state == TrialState.RUNNING for t in trials)
        words = np.random.SeedSequence([self.config.search.seed, ended, running]).generate_state(1)
        seed = int(words[0]) % 2**31
        if self.config.search.proposer == NAME:
            assert problem is not None
            self.optuna.sampler = DifficultySampler(
                problem.space, problem.samplers, problem.cost_table, problem.full_cost, problem.difficulty_map, seed=seed,
                explore=num_explored(self.config),
            )  # fmt: skip
        else:
            self.optuna.sampler = make_proposer(self.config.search, seed)

    def run(
        self,
        bench: Workbench,
        progress: Callable[[TrialRecord], None] | None = None,
        on_warm_up: Callable[[int, float], None] | None = None,
    ) -> None:
        """Search until `num_trials` points have ended (failed and stopped ones count; repeats and killed ones do not), or, with
        a `budget`, until its time is spent or nothing new is found. The warm-up comes first, where the study has one.

        Args:
            bench: fine-tunes, samples and evaluates a schedule.
            progress: called with each record of this process.
            on_warm_up: called as (steps done, loss) in the elastic warm-up.

        Raises:
            StudyError: the storage can't be used, or the space holds no further schedule.
        """
        self._check_inputs(bench)
        write_json(self.run_dir / directory.ENVIRONMENT, environment())
        space, warm = make_space(self.config, bench), warm_starts(self.config, bench)
        made = warm_up(bench, self.run_dir, on_warm_up)
        problem = None if made.difficulty_map is None else make_problem(space, bench, made.difficulty_map)
        repeats = 0
        with storage_errors(self._shown):
            while self._goes_on(bench, records := self.records()):
                self._release_dead()
                self._enqueue_warm_start(space, warm, records)
                self._seed_proposer(problem)
                repeats = 0 if self._one_trial(space, bench, problem, progress) else repeats + 1
                if repeats == MAX_REPEATS_IN_A_ROW:
                    if self.config.search.budget_s is not None:
                        return  # nothing is left to spend it on
                    raise StudyError(
                        f"the last {repeats} proposals were all schedules tried before; the space is as good as exhausted: "
                        "lower num_trials or widen the space; the trials on record are kept"
                    )

    def _goes_on(self, bench: Workbench, records: list[TrialRecord]) -> bool:
        """Whether another trial is to be begun."""
        if self.config.search.budget_s is None:
            return len(records) < self.config.search.num_trials
        return room_for_trial(self.config, bench, self.results())

    def _check_inputs(self, bench: Workbench) -> None:
        """Refuse network or data that changed behind the same path.

        Raises:
            StudyError: naming what changed.
        """
        path = self.run_dir / directory.INPUTS
        stored = bench.identity
        if path.exists():
            fix = "it tells whether network and data are still those of the trials on record; if they are, remove it"
            stored = read_json(path, fix)
        differ = [k for k in bench.identity if not isinstance(stored, dict) or stored.get(k) != bench.identity[k]]
        if differ and is_on_record(self.optuna, self.run_dir):
            raise StudyError(
                f"the study in {self.run_dir} was begun with other {', '.join(differ)} (their content differs), so its trials "
                "could not be compared with new ones; restore them, or search in another directory"
            )
        if differ:
            start_over(self.run_dir, f"with other {', '.join(differ)}")
        write_json(path, bench.identity)

    def _one_trial(
        self,
        space: Space,
        bench: Workbench,
        problem: Problem | None,
        progress: Callable[[TrialRecord], None] | None,
    ) -> bool:
        """Propose and try one point; False if it has been tried before, which costs nothing."""
        fresh: TrialRecord | None = None
        begun = time.perf_counter()

        def objective(trial: optuna.Trial) -> tuple[float, float]:
            nonlocal fresh
            trial.set_user_attr(WORKER, f"{socket.gethostname()}:{os.getpid()}")
            schedule, chosen = space.suggest(trial)
            sampler = "" if chosen == sampler_name(self.config.sampling) else chosen
            with self._claim(schedule) as mine:
                records = self.records()
                record = next((r for r in records if same_point(r, schedule, sampler) and r.state != "stopped"), None)
                if record is None and not mine:
                    trial.set_user_attr(REPEAT, "in flight")
                    raise _Failed("another worker is at this schedule")
                if record is None:
                    origin = trial.user_attrs.get("origin", self.config.search.proposer)
                    begin = TrialRecord(trial.number, origin, schedule, "", sampler=sampler)
                    judged_by = problem if self.config.promotion is not None else None
                    record = run_trial(bench, begin, self.trial_dir(schedule), records, judged_by)
                if record.number == trial.number:
                    # of a stopped trial whose place this one takes; counted in already
                    before = next((r.seconds for r in records if same_point(r, schedule, sampler)), {})
                    here_s = sum(record.seconds.values()) - sum(before.values())
                    other_s = before.get("other", 0.0) + max(0.0, time.perf_counter() - begun - here_s)
                    fresh = record = replace(record, seconds={**record.seconds, "other": other_s})
                    trial.set_user_attr(RECORD, json.dumps(record.to_dict()))
                    self._prune_weights([*records, record])
                else:
                    trial.set_user_attr(REPEAT, record.number)
            if record.state == "stopped":
                raise optuna.TrialPruned
            if record.quality is None:
                raise _Failed(record.failure)
            return self._values(record)

        try:
            self.optuna.optimize(objective, n_trials=1, catch=(_Failed,))
        except BaseException:
            # an interrupted or broken trial must not stay open: this process is still alive
            for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if trial.user_attrs.get(WORKER) == f"{socket.gethostname()}:{os.getpid()}":
                    self._close(trial)
            raise
        if fresh is not None and progress is not None:
            progress(fresh)
        return fresh is not None

    @contextmanager
    def _claim(self, schedule: ExitSchedule) -> Iterator[bool]:
        """Whether this worker alone has the schedule in hands; the claim of a process that dies is free again."""
        folder = self.run_dir / directory.LOCKS
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{self.trial_dir(schedule).name}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _prune_weights(self, records: list[TrialRecord]) -> None:
        """With keep_weights = "front": delete weights of schedules that are off the front (never the full network's)."""
        if self.config.search.keep_weights == "all":
            return
        results = StudyResults(self.config.name, {}, tuple(records), (), (), {})
        kept = [*results.front(), *((results.full,) if results.full else ())]
        keep = {r.schedule.merged() for r in kept}  # ways of sampling share a schedule's weights
        for record in results.complete:
            if record.schedule.merged() not in keep:
                (self.trial_dir(record.schedule) / directory.WEIGHTS).unlink(missing_ok=True)


class _Failed(Exception):
    """A trial whose failure is on record."""


Start = tuple[ExitSchedule, str]  # a schedule, and a way of sampling other than the study's own, or empty


def make_space(config: StudyConfig, bench: Workbench) -> Space:
    """The study's search space for its network."""
    search, chain = config.search, config.diffusion.num_train_timesteps
    samplers = tuple(bench.samplers) if len(bench.samplers) > 1 else ()
    return Space(bench.backbone.depth, chain, search.num_intervals, search.noise_easy, bench.min_exit_depth, samplers)


def make_problem(space: Space, bench: Workbench, difficulty_map: DifficultyMap) -> Problem:
    """What the quality model needs to know of the study."""
    own, table = next(iter(bench.samplers.values())), np.asarray(bench.call_cost)
    return Problem(space, bench.samplers, table, len(own) * float(table[-1]), difficulty_map)


def warm_starts(config: StudyConfig, bench: Workbench) -> dict[str, Start]:
    """Points to try first, by origin: the full network, the study's schedules, and the full network under other samplers.

    Raises:
        ScheduleError: an unknown name, or a schedule outside the space.
    """
    space, depth, chain = make_space(config, bench), bench.backbone.depth, config.diffusion.num_train_timesteps
    full = ExitSchedule.full(depth, chain)
    out: dict[str, Start] = {"full": (full, "")}
    for text in config.search.warm_start:
        if text != "full":
            out[text] = ExitSchedule.from_string(text, depth, chain), ""
    for name, (schedule, _) in out.items():
        try:
            space.encode(schedule)
        except ScheduleError as error:
            raise ScheduleError(f"warm start {name!r} does not fit the search space: {error}") from error
    return out | {f"full {sampler}": (full, sampler) for sampler in list(bench.samplers)[1:]}
