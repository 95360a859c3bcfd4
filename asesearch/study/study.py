"""A study directory and its Optuna storage: what is on record.

All state is in the two, written as it comes: a process that is killed at any moment loses at most
the trial in flight, and the same command resumes; the fine-tuning of a repeated proposal goes on
from its checkpoint.

Any number of processes may work on one study: give them the same study file, directory and storage.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from optuna.storages._heartbeat import BaseHeartbeat
from optuna.trial import FrozenTrial

from asesearch.config import StudyConfig
from asesearch.errors import StudyError
from asesearch.files import write_json
from asesearch.point import Point
from asesearch.schedule import ExitSchedule
from asesearch.study import directory
from asesearch.study.changes import other_inputs, start_over
from asesearch.study.confirmed import confirmation_files, confirmations_of, of_records
from asesearch.study.difficulty import DifficultyMap
from asesearch.study.directory import SampleFiles, read_state
from asesearch.study.environment import environment
from asesearch.study.importance import Importance
from asesearch.study.opening import Opened, open_to_report, open_to_search
from asesearch.study.records import RECORD, StudyResults, TrialRecord
from asesearch.study.storage import storage_errors
from asesearch.study.workers import Worker, most_at_once

MAX_NAME_BYTES = 250  # of a folder whose name has a lock of five more bytes


class Study:
    """A study directory and its Optuna storage.

    Args:
        config: the study file.
        run_dir: the study directory; made if missing.

    Raises:
        StudyError: the directory holds a study that is not comparable, or directory or storage
            can't be used.
    """

    def __init__(self, config: StudyConfig, run_dir: Path) -> None:
        self._use(Path(run_dir), open_to_search(config, Path(run_dir)))

    @classmethod
    def open(
        cls, run_dir: Path, storage: str | None = None, *, takes_storage: bool = True
    ) -> Study:
        """Open a study directory by what it holds, to be read only: nothing is written or created.

        Args:
            run_dir: the study directory.
            storage: URL, in place of the one on record, which has no password.
            takes_storage: whether an error may advise to give a storage.

        Raises:
            StudyError: no study there, or its storage can't be read.
        """
        study = cls.__new__(cls)
        opened = open_to_report(Path(run_dir), storage, takes_storage=takes_storage)
        study._use(Path(run_dir), opened)
        return study

    def _use(self, run_dir: Path, opened: Opened) -> None:
        self.run_dir = run_dir
        self.config = opened.config
        self.optuna = opened.optuna
        self.shown_storage = opened.where

    # -- what is on record -----------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """The Optuna trials as they are now, by number; not to be changed."""
        with storage_errors(self.shown_storage):
            return list(self.optuna.get_trials(deepcopy=False))

    def stale_trials(self) -> set[int]:
        """Optuna's ids of trials that run and have given the database no heartbeat for long."""
        storage = self.optuna._storage
        assert isinstance(storage, BaseHeartbeat)
        with storage_errors(self.shown_storage):
            return set(storage._get_stale_trial_ids(self.optuna._study_id))

    def records(self, trials: Sequence[FrozenTrial] | None = None) -> list[TrialRecord]:
        """Points that were tried, by number: the last record of each, so a stopped one that was
        promoted later counts once.

        Args:
            trials: what `trials` gave, where all that is asked is to be of one moment.
        """
        trials = self.trials() if trials is None else trials
        found = [self.record_of(t) for t in trials if RECORD in t.user_attrs]
        last = {r.point: r for r in found}
        return [r for r in found if last[r.point] is r]

    def record_of(self, trial: FrozenTrial) -> TrialRecord:
        """What an Optuna trial of the study, which has ended, has on record."""
        data = json.loads(trial.user_attrs[RECORD])
        return TrialRecord.from_dict(data, self.config.sampling.sampler)

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
        """Where a schedule's weights, samples and checkpoint are; one folder per schedule."""
        uncut = self.run_dir / directory.TRIALS / schedule.long_name
        if len(uncut.name) <= MAX_NAME_BYTES and uncut.is_dir():  # of a study begun before slugs
            return uncut
        return self.run_dir / directory.TRIALS / schedule.slug

    def samples_file(self, point: Point) -> Path:
        """Where images of a point are, beside its weights."""
        return self.trial_dir(point.schedule) / directory.samples_file(
            point.sampler, self.config.sampling.sampler
        )

    def results(self) -> StudyResults:
        """Everything a report or an export reads."""
        run_dir = self.run_dir
        confirmed = confirmation_files(run_dir)  # before the records, of which they are
        records = self.records()
        confirmed = of_records(confirmed, records)
        files = {
            record.number: self.samples_file(record.point)
            for record in records
            if record.state == "complete"
        }
        latency = read_state(
            run_dir / directory.LATENCY,
            lambda data: tuple(map(float, data["median_ms"])),
            "left out; the next `asesearch search` measures it again where it is needed",
        )
        return StudyResults(
            self.config.name,
            self.config.shareable(),
            tuple(records),
            confirmations_of(confirmed),
            latency or (),
            read_state(
                run_dir / directory.ENVIRONMENT, dict, "that of this machine is shown instead"
            )
            or environment(),
            SampleFiles(files),
            read_state(run_dir / directory.MAP, DifficultyMap.from_dict, "the report goes without"),
            self._warm_up(),
            read_state(
                run_dir / directory.IMPORTANCE, Importance.from_dict, "the report goes without"
            ),
            {number: why for _, stored in confirmed for number, why in stored["failed"].items()},
            most_at_once(run_dir),
        )

    def _warm_up(self) -> dict[str, Any]:
        """What the warm-up took, and calibrating the samplers' accelerations before it."""
        nothing = "what the warm-up took counts as nothing"
        found = read_state(self.run_dir / directory.WARM_UP, dict, nothing) or {}
        files = directory.listed(self.run_dir, directory.ACCELERATIONS)
        took = [
            read_state(path, lambda data: float(data.get("seconds", 0.0)), "it counts as nothing")
            for path in files
        ]
        if any(took):
            found["seconds"] = {"calibrate": sum(filter(None, took)), **found.get("seconds", {})}
        return found

    # -- searching -------------------------------------------------------------------------------

    @cached_property
    def worker(self) -> Worker:
        """This process as one of the study's workers."""
        return Worker(self.run_dir)

    def check_inputs(self, identity: dict[str, Any]) -> None:
        """Refuse network or data that changed; record them at the first search.

        Args:
            identity: fingerprints of what the scores depend on and the study file only names.

        Raises:
            StudyError: naming what changed.
        """
        differ = other_inputs(self.optuna, self.run_dir, identity)
        if differ:
            start_over(self.run_dir, f"with other {', '.join(differ)}")
        write_json(self.run_dir / directory.INPUTS, identity)
