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
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy.exc
import torch
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState

from asesearch.config import SearchConfig, StudyConfig, changed_fields, parse_study
from asesearch.errors import EvaluationError, ScheduleError, StudyError, TrainingDiverged
from asesearch.files import write_json
from asesearch.schedule import ExitSchedule
from asesearch.search.records import Confirmation, StudyResults, TrialRecord
from asesearch.search.space import Space
from asesearch.search.workbench import Workbench, environment

RECORD = "record"  # user attribute that holds the TrialRecord
WORKER = "worker"  # user attribute "host:pid" of the process that runs the trial
REPEAT = "repeat_of"  # user attribute of a trial whose schedule is on record (its number), or in another worker's hands
FORMAT_VERSION = 1
HEARTBEAT_S = 60
MAX_REPEATS_IN_A_ROW = 50
CURVE_POINTS = 500
BUSY_WAIT_S = 120.0  # how long to wait for a SQLite file that another process holds


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        StudyError: missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"can't read {path}: {error}; is this a study directory, and is it whole?") from error


def make_proposer(config: SearchConfig, seed: int) -> optuna.samplers.BaseSampler:
    """The Optuna sampler of a study file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if config.proposer == "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=8, multivariate=True, constant_liar=True)
        if config.proposer == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=10)
        return optuna.samplers.RandomSampler(seed=seed)


@contextmanager
def _storage_errors(where: str) -> Iterator[None]:
    """Turn a database's errors into one line."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, ModuleNotFoundError) as error:
        reason = str(getattr(error, "orig", None) or error.__cause__ or error).splitlines()[0]
        raise StudyError(
            f"the study's storage {where} can't be used: {reason}; check the path or URL, its permissions, and that no other "
            "program holds it; the trials on record are kept, and the same command resumes"
        ) from error


class Study:
    """A study directory and its Optuna storage.

    Args:
        config: the study file.
        run_dir: the study directory; made if missing.

    Raises:
        StudyError: the directory holds a study that is not comparable, or directory or storage can't be used.
    """

    def __init__(self, config: StudyConfig, run_dir: Path) -> None:
        self.run_dir = Path(run_dir)
        self.config = self._settle(config)
        path = self.run_dir / "study.db"
        self.url = config.search.storage or f"sqlite:///{path}"
        shown = sqlalchemy_safe(self.url)
        with _storage_errors(shown), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            wait = {"connect_args": {"timeout": BUSY_WAIT_S}} if self.url.startswith("sqlite") else {"pool_pre_ping": True}
            storage = optuna.storages.RDBStorage(self.url, engine_kwargs=wait, heartbeat_interval=HEARTBEAT_S)
            self.optuna = optuna.create_study(
                study_name=config.name, storage=storage, directions=["minimize", "minimize"], load_if_exists=True
            )
            self.optuna.set_metric_names(["quality", "cost_frac"])
        self._shown = shown

    def _settle(self, config: StudyConfig) -> StudyConfig:
        """Compare with the study file on record; put this one on record."""
        path = self.run_dir / "study.json"
        if path.is_file():
            data = read_json(path)
            if data.get("version") != FORMAT_VERSION:
                raise StudyError(f"{path} has version {data.get('version')!r}; this release reads {FORMAT_VERSION}")
            differ = changed_fields(parse_study(data["config"], str(path)), config)
            if differ:
                raise StudyError(
                    f"the study in {self.run_dir} was begun with other settings, so its trials could not be compared with new "
                    f"ones ({'; '.join(differ)}); undo the change, or choose another name or directory"
                )
        data = {"version": FORMAT_VERSION, "config": config.model_dump(mode="json")}
        if not path.is_file() or read_json(path) != data:  # so that a study is read where it can't be written
            write_json(path, data)
        return config

    @classmethod
    def open(cls, run_dir: Path) -> Study:
        """Open a study directory by what it holds.

        Raises:
            StudyError: no study there.
        """
        path = Path(run_dir) / "study.json"
        if not path.is_file():
            raise StudyError(f"no study in {run_dir}: study.json is missing; run `asesearch search` first, or check the path")
        return cls(parse_study(read_json(path)["config"], str(path)), Path(run_dir))

    # -- what is on record -----------------------------------------------------------------------

    def records(self) -> list[TrialRecord]:
        """Trials that ended with a record, by number; repeats of a schedule left out."""
        with _storage_errors(self._shown):
            trials = self.optuna.get_trials(deepcopy=False)
        return [TrialRecord.from_dict(json.loads(t.user_attrs[RECORD])) for t in trials if RECORD in t.user_attrs]

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
        merged = schedule.merged()
        bounds = "" if len(merged.exit_depths) == 1 else "_at_" + "-".join(map(str, merged.boundaries[1:-1]))
        return self.run_dir / "trials" / ("-".join(map(str, merged.exit_depths)) + bounds)

    def results(self) -> StudyResults:
        """Everything a report or an export reads."""
        records = self.records()
        confirmations = []
        path = self.run_dir / "confirmations.json"
        if path.is_file():
            confirmations = [Confirmation.from_dict(c) for c in read_json(path)["confirmations"]]
        samples = {}
        for record in records:
            file = self.trial_dir(record.schedule) / "samples.npz"
            if record.state == "complete" and file.is_file():
                with np.load(file, allow_pickle=False) as data:
                    samples[record.number] = data["images"]
        path = self.run_dir / "latency.json"
        latency = tuple(read_json(path)["median_ms"]) if path.is_file() else ()
        path = self.run_dir / "environment.json"
        return StudyResults(
            self.config.name,
            self.config.shareable(),
            tuple(records),
            tuple(confirmations),
            latency,
            read_json(path) if path.is_file() else environment(),
            samples,
        )

    # -- searching -------------------------------------------------------------------------------

    def _release_dead(self) -> None:
        """Fail trials whose process on this machine is gone; other machines' are failed by their missing heartbeat."""
        host = socket.gethostname()
        for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            where, _, pid = str(trial.user_attrs.get(WORKER, ":")).rpartition(":")
            if where == host and pid.isdecimal() and not _alive(int(pid)):
                self._close(trial)

    def _close(self, trial: FrozenTrial) -> None:
        """End a trial whose process is gone or broke off: with its figures, if they were on record already."""
        record = TrialRecord.from_dict(json.loads(trial.user_attrs[RECORD])) if RECORD in trial.user_attrs else None
        values = None if record is None or record.quality is None else self._values(record)
        self.optuna.tell(trial.number, values, state=None if values else TrialState.FAIL, skip_if_finished=True)

    def _values(self, record: TrialRecord) -> tuple[float, float]:
        """The two objectives of a trial that has a figure."""
        cost = record.time_frac if self.config.search.cost == "time" else record.flops_frac
        assert cost is not None and record.quality is not None
        return record.quality.value, cost

    def _enqueue_warm_start(self, space: Space, warm: dict[str, ExitSchedule], records: list[TrialRecord]) -> None:
        """Queue the first warm start that is not queued, running or on record (so one whose trial was killed comes again)."""
        known = {r.schedule.merged() for r in records}
        for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING)):
            params = trial.system_attrs.get("fixed_params") or trial.params
            if set(params) == set(space.distributions()):
                known.add(space.decode(params).merged())
        for origin, schedule in warm.items():
            if schedule.merged() not in known:
                self.optuna.enqueue_trial(space.encode(schedule), user_attrs={"origin": origin})
                return

    def _seed_proposer(self) -> None:
        """A proposer whose seed follows from the study's and from what is on record."""
        trials = self.optuna.get_trials(deepcopy=False)
        ended = sum(t.state == TrialState.COMPLETE or RECORD in t.user_attrs or REPEAT in t.user_attrs for t in trials)
        running = sum(t.state == TrialState.RUNNING for t in trials)
        words = np.random.SeedSequence([self.config.search.seed, ended, running]).generate_state(1)
        self.optuna.sampler = make_proposer(self.config.search, int(words[0]) % 2**31)

    def run(self, bench: Workbench, progress: Callable[[TrialRecord], None] | None = None) -> None:
        """Search until `num_trials` schedules have ended (failed ones count; repeats and killed ones do not).

        Args:
            bench: fine-tunes, samples and evaluates a schedule.
            progress: called with each record of this process.

        Raises:
            StudyError: the storage can't be used, or the space holds no further schedule.
        """
        self._check_inputs(bench)
        write_json(self.run_dir / "environment.json", environment())
        space, warm = make_space(self.config, bench), warm_starts(self.config, bench)
        repeats = 0
        with _storage_errors(self._shown):
            while len(records := self.records()) < self.config.search.num_trials:
                self._release_dead()
                self._enqueue_warm_start(space, warm, records)
                self._seed_proposer()
                repeats = 0 if self._one_trial(space, bench, progress) else repeats + 1
                if repeats == MAX_REPEATS_IN_A_ROW:
                    raise StudyError(
                        f"the last {repeats} proposals were all schedules tried before; the space is as good as exhausted: "
                        "lower num_trials or widen the space; the trials on record are kept"
                    )

    def _check_inputs(self, bench: Workbench) -> None:
        """Refuse network or data that changed behind the same path.

        Raises:
            StudyError: naming what changed.
        """
        path = self.run_dir / "inputs.json"
        stored = read_json(path) if path.is_file() else bench.identity
        differ = [k for k in bench.identity if stored.get(k) != bench.identity[k]]
        if differ:
            raise StudyError(
                f"the study in {self.run_dir} was begun with other {', '.join(differ)} (their content differs), so its trials "
                "could not be compared with new ones; restore them, or search in another directory"
            )
        write_json(path, bench.identity)

    def _one_trial(self, space: Space, bench: Workbench, progress: Callable[[TrialRecord], None] | None) -> bool:
        """Propose and try one schedule; False if it has been tried before, which costs nothing."""
        fresh: TrialRecord | None = None

        def objective(trial: optuna.Trial) -> tuple[float, float]:
            nonlocal fresh
            trial.set_user_attr(WORKER, f"{socket.gethostname()}:{os.getpid()}")
            schedule = space.suggest(trial)
            with self._claim(schedule) as mine:
                records = self.records()
                record = next((r for r in records if r.schedule.merged() == schedule.merged()), None)
                if record is None and not mine:
                    trial.set_user_attr(REPEAT, "in flight")
                    raise _Failed("another worker is at this schedule")
                if record is None:
                    fresh = record = run_trial(bench, trial, schedule, self)
                    trial.set_user_attr(RECORD, json.dumps(record.to_dict()))
                    self._prune_weights([*records, record])
                else:
                    trial.set_user_attr(REPEAT, record.number)
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
        folder = self.run_dir / "locks"
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
        keep = {r.number for r in results.front()} | ({results.full.number} if results.full else set())
        for record in results.complete:
            if record.number not in keep:
                (self.trial_dir(record.schedule) / "weights.safetensors").unlink(missing_ok=True)


class _Failed(Exception):
    """A trial whose failure is on record."""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sqlalchemy_safe(url: str) -> str:
    """A storage URL without its password, to be shown.

    Raises:
        StudyError: not a URL.
    """
    try:
        return sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError as error:
        raise StudyError(f"search.storage must be a database URL such as postgresql://user@host/name; got {url!r}") from error


def make_space(config: StudyConfig, bench: Workbench) -> Space:
    """The study's search space for its network."""
    search, net = config.search, bench.backbone
    low = max(1, net.min_exit_depth) if search.min_exit_depth is None else search.min_exit_depth
    return Space(net.depth, config.diffusion.num_train_timesteps, search.num_intervals, search.noise_easy, low)


def warm_starts(config: StudyConfig, bench: Workbench) -> dict[str, ExitSchedule]:
    """Schedules to try first, by origin; the full network is always the first.

    Raises:
        ScheduleError: an unknown name, or a schedule outside the space.
    """
    space, depth, chain = make_space(config, bench), bench.backbone.depth, config.diffusion.num_train_timesteps
    out = {"full": ExitSchedule.full(depth, chain)}
    for text in config.search.warm_start:
        if text != "full":
            out[text] = ExitSchedule.from_string(text, depth, chain)
    for name, schedule in out.items():
        try:
            space.encode(schedule)
        except ScheduleError as error:
            raise ScheduleError(f"warm start {name!r} does not fit the search space: {error}") from error
    return out


def run_trial(bench: Workbench, trial: optuna.Trial, schedule: ExitSchedule, study: Study) -> TrialRecord:
    """Fine-tune, sample, evaluate one schedule; a failure of the schedule's own is returned, not raised."""
    origin = trial.user_attrs.get("origin", study.config.search.proposer)
    folder = study.trial_dir(schedule)
    try:
        outcome = bench.try_schedule(schedule, folder)
    except (TrainingDiverged, EvaluationError, torch.cuda.OutOfMemoryError) as error:
        reason = str(error).splitlines()[0]
        shutil.rmtree(folder, ignore_errors=True)
        return TrialRecord(
            trial.number, origin, schedule, "failed", failure=reason, versions=environment()["versions"], finished_at=_now()
        )
    losses = outcome.losses
    if len(losses) > CURVE_POINTS:
        losses = [float(part.mean()) for part in np.array_split(np.asarray(losses), CURVE_POINTS)]
    return TrialRecord(
        number=trial.number,
        origin=origin,
        schedule=schedule,
        state="complete",
        quality=outcome.quality,
        time_frac=outcome.time_frac,
        flops_frac=outcome.flops_frac,
        block_frac=outcome.block_frac,
        losses=tuple(losses),
        seconds=outcome.seconds,
        versions=environment()["versions"],
        finished_at=_now(),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
