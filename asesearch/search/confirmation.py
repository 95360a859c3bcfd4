"""The front again, on seeds that no trial has seen, with the real sampling time.

The best of many noisy scores is too good on average; what is reported and exported is confirmed on
fresh seeds first. Workers
share the points out: a lock and a file for each, so that each is confirmed once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from asesearch.backbones.base import Backbone
from asesearch.backbones.checkpoints import load_saved
from asesearch.backbones.device import collect_cycles
from asesearch.errors import (
    EvaluationError,
    StudyError,
    TrainingDiverged,
    WriteError,
    first_line,
    is_out_of_memory,
    memory_told,
)
from asesearch.files import write_json
from asesearch.locks import try_lock, waited_lock
from asesearch.score import EvaluationResult
from asesearch.search.warmup import warm_up
from asesearch.search.workbench import Workbench
from asesearch.study import directory
from asesearch.study.confirmed import Files, confirmation_files, confirmations_of, of_records
from asesearch.study.directory import is_whole
from asesearch.study.records import NOT_CONFIRMED, Confirmation, TrialRecord, left_out, select
from asesearch.study.study import Study
from asesearch.study.workers import CONFIRMING, POLL_S, SEARCHING, Others

_log = logging.getLogger(__name__)


def confirm(
    study: Study, bench: Workbench, progress: Callable[[Confirmation], None] | None = None
) -> list[Confirmation]:
    """Confirm the study's front and the full network; what is confirmed already under the same
    protocol is kept.

    While other workers still search, and may change the front, only the full network is confirmed;
    then all share the points out. At the end every point is confirmed, by whomever.

    Returns:
        Confirmations of the full network and the front.

    Raises:
        StudyError: the full network has no score, and no other worker is at it; or no memory.
        WriteError: the study directory can't be written.
    """
    with study.worker.at_work(CONFIRMING):
        return _Confirming(study, bench, progress).run()


class _Confirming:
    """One worker's part of a confirmation."""

    def __init__(
        self, study: Study, bench: Workbench, progress: Callable[[Confirmation], None] | None
    ) -> None:
        self.study = study
        self.bench = bench
        self.progress = progress
        self.protocol = bench.protocols.confirmation
        how = study.config.confirm
        self.settings: dict[str, Any] = {
            "protocol": self.protocol.to_dict(),
            "time": [how.time_images, how.time_repeats],
        }
        self.others = Others(study.run_dir, study.worker.id)
        self.done: dict[int, Confirmation] = {}
        self.no_memory: dict[int, str] = {}  # what was said, by the trial's number; not on record
        self._said = False

    def run(self) -> list[Confirmation]:
        """Confirm until nothing is left, or with other workers."""
        self._set_aside()
        while True:
            searching = self.others.at_work(SEARCHING)
            points = [r for r in self._points(searching) if r.number not in self.no_memory]
            self.done |= self._on_record()
            left = [r for r in points if not self._is_whole(self.done.get(r.number))]
            if not left and not searching:
                self._remove_retrained(points)
                self._tell_left_out(points[0])
                return [self.done[r.number] for r in points]
            if not any(self._confirm(record, points[0]) for record in left):
                self._wait(searching, left)

    def _on_record(self) -> dict[int, Confirmation]:
        """By trial number, under the settings of this confirmation."""
        return {c.number: c for c in confirmations_of(self._files())}

    def _files(self) -> Files:
        """Of trials on record, under the settings of this confirmation."""
        found = confirmation_files(self.study.run_dir)
        ours = [(path, stored) for path, stored in found if stored["settings"] == self.settings]
        return of_records(ours, self.study.records())

    def _is_whole(self, found: Confirmation | None) -> bool:
        """Whether a point is scored under every training seed; more seeds than before are trained
        beside what is on record."""
        wanted = self.study.config.confirm.training_seeds
        return self._has_spaces(found) and found is not None and 1 + len(found.retrained) >= wanted

    def _has_spaces(self, found: Confirmation | None) -> bool:
        """Whether a point is scored in every feature space."""
        if found is None:
            return False
        scored = {quality.protocol for quality in found.also}
        return scored >= {space.protocol for space in self.bench.also}

    def _points(self, searching: list[str]) -> list[TrialRecord]:
        """What is to be confirmed as the record stands; the full network first."""
        results = self.study.results()
        if results.full is None:
            if searching:
                return []
            raise StudyError(
                "the full network has no score (its fine-tuning failed or has not run), so "
                "nothing can be compared with it; see the failed trials, lower train.lr, and "
                "search under another name"
            )
        if searching:
            return [results.full]
        failed = self._failed()
        front = tuple(r for r in results.front() if r.number not in failed)
        return select(front, results.full, self.study.config.confirm.max_points)

    def _failed(self) -> dict[int, str]:
        """Why a trial can't be confirmed under these settings, by its number."""
        found: dict[int, str] = {}
        for _, stored in self._files():
            found |= stored["failed"]
        return found

    def _tell_left_out(self, full: TrialRecord) -> None:
        """Say which points of the front are not confirmed, as they are worth nothing or failed."""
        for number, why in sorted((self.no_memory | self._failed()).items()):
            _log.warning("trial %d is not confirmed: %s", number, why)
        if out := left_out(self.study.results().front(), full):
            _log.warning("%s", NOT_CONFIRMED.format(", ".join(f"trial {r.number}" for r in out)))

    def _confirm(self, record: TrialRecord, full: TrialRecord) -> bool:
        """Confirm one point, unless another worker is at it or has been."""
        with try_lock(
            self.study.run_dir / directory.LOCKS / f"confirmation-{record.number}.lock"
        ) as mine:
            if not mine:
                return False
            if self._is_whole(self._on_record().get(record.number)):
                return True
            try:
                made = self._made(record, full) or self._made(record, full)
            except EvaluationError as error:
                if record.number == full.number:
                    raise
                why = {str(record.number): first_line(error)}
                self._write(record, {"confirmations": [], "failed": why})
                return True
            except StudyError:
                if any(r.number == record.number for r in self._points([])):
                    raise
                return True  # off the front since, by a worker that had been taken for dead
        if made is not None and self.progress is not None:
            self.progress(made)
        return True

    def _made(self, record: TrialRecord, full: TrialRecord) -> Confirmation | None:
        """What is still missing of a point's confirmation, made and put on record; None where there
        was no memory for it, so that a second try may have what the first has left.

        Raises:
            StudyError: the full network's second try had no memory either.
        """
        try:
            made = self._on_record().get(record.number)
            if made is None or not self._has_spaces(made):
                again = () if made is None else made.retrained
                made = replace(self._measure(record, full), retrained=again)
                made = self._kept(record, made)
            while not self._is_whole(made):
                made = self._kept(record, self._retrained(record, made))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            told = memory_told(error)
        else:
            self.no_memory.pop(record.number, None)
            return made
        collect_cycles()  # the error is gone by now, whose frames held the networks
        if record.number == full.number and record.number in self.no_memory:
            raise StudyError(
                "the full network can't be confirmed, and without it nothing can be compared: "
                f"{told}; end what else holds memory, and give the same command again"
            )
        self.no_memory[record.number] = told
        return None

    def _kept(self, record: TrialRecord, made: Confirmation) -> Confirmation:
        """Put it on record."""
        self.done[made.number] = made
        self._write(record, {"confirmations": [made.to_dict()]})
        return made

    def _write(self, record: TrialRecord, found: dict[str, Any]) -> None:
        path = self.study.run_dir / directory.CONFIRMATIONS / f"{record.number}.json"
        write_json(path, {"settings": self.settings, "point": record.point.to_dict(), **found})

    def _retrained(self, record: TrialRecord, made: Confirmation) -> Confirmation:
        """With the score under one training seed more.

        The network is kept until all points are confirmed: other samplers may share its schedule.
        """
        begun = time.perf_counter()
        seed = 1 + len(made.retrained)
        if record.schedule.is_full and self.study.config.search.own_exits:
            return replace(made, retrained=(*made.retrained, made.quality))  # it is not trained
        folder = self.study.trial_dir(record.schedule) / f"{directory.RETRAINED}{seed}"
        warm_up(self.bench, self.study.run_dir)
        lock = self.study.run_dir / directory.LOCKS / f"{folder.parent.name}-{seed}.lock"
        found: EvaluationResult | str
        try:
            with waited_lock(lock, f"fine-tunes a schedule under training seed {seed}"):
                net = self.bench.trials.tuned(record.schedule, folder, seed).backbone
            found, _ = self.bench.evaluate(net, record.point, self.protocol)
        except (TrainingDiverged, EvaluationError) as error:  # it would be the same again
            found = first_line(error)
            _log.warning("trial %d under training seed %d: %s", record.number, seed, found)
        return replace(
            made,
            retrained=(*made.retrained, found),
            seconds=made.seconds + time.perf_counter() - begun,
        )

    def _remove_retrained(self, points: list[TrialRecord]) -> None:
        """Remove the weights of further training seeds, unless the study keeps all."""
        if self.study.config.search.keep_weights == "all":
            return
        for record in points:
            folders = self.study.trial_dir(record.schedule).glob(f"{directory.RETRAINED}*")
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)

    def _measure(self, record: TrialRecord, full: TrialRecord) -> Confirmation:
        begun = time.perf_counter()
        net = _network(self.study, record, self.bench)
        quality, also, found = self.bench.confirmed(net, record.point)
        ratio = 1.0
        spread = 0.0
        if record.number != full.number:
            full_net = _network(self.study, full, self.bench)
            measured = self.bench.measured_time(net, record.point, full_net)
            ratio = measured.median
            spread = measured.spread
        took = time.perf_counter() - begun
        return Confirmation(
            record.number, quality, ratio, spread, took, also=also, precision_recall=found
        )

    def _wait(self, searching: list[str], left: list[TrialRecord]) -> None:
        if not self._said:
            names = ", ".join(self.others.at_work()) or "another worker"
            what = (
                "still search"
                if searching
                else f"confirm trials {' '.join(str(r.number) for r in left)}"
            )
            _log.warning("waiting for other workers, which %s (%s)", what, names)
        self._said = True
        time.sleep(POLL_S)

    def _set_aside(self) -> None:
        """Set confirmations under other settings aside, and take back those under these."""
        run_dir = self.study.run_dir
        kept = run_dir / directory.CONFIRMATIONS
        with waited_lock(run_dir / directory.LOCKS / "confirmations.lock", "sets some aside"):
            others = [f for f in confirmation_files(run_dir) if f[1]["settings"] != self.settings]
            for path, stored in others:
                _move(path, kept / _key(stored["settings"]))
            ours = directory.listed(kept / _key(self.settings), "*.json")
            for path in ours:
                old = path.name == directory.OLD_CONFIRMATIONS
                _move(path, run_dir if old else kept)
        if others or ours:
            _log.warning(
                "[confirm] or the protocol has changed: what was confirmed before is set aside in "
                "%s, and taken back when it is as it was",
                kept,
            )


def _key(settings: dict[str, Any]) -> str:
    """Name of the folder for confirmations under these settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _move(path: Path, folder: Path) -> None:
    """Move a file into a folder, which is made; in the place of one of its name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.replace(folder / path.name)
    except OSError as error:
        raise WriteError(
            f"can't move {path} to {folder}: {error.strerror or error}; check who may write there"
        ) from error


def _network(study: Study, record: TrialRecord, bench: Workbench) -> Backbone:
    """A point's network; fine-tuned again from the same start with the same seeds, where its file
    is damaged, gone or another schedule's."""
    folder = study.trial_dir(record.schedule)
    path = folder / directory.WEIGHTS
    again = "the schedule is fine-tuned again"
    if not is_whole(path, again, record.schedule):
        warm_up(bench, study.run_dir)
        with waited_lock(
            study.run_dir / directory.LOCKS / f"{folder.name}.lock", "fine-tunes a schedule again"
        ):
            if not is_whole(path, again, record.schedule):  # another worker may have been quicker
                bench.trials.tuned(record.schedule, folder)
    return load_trial(study, record, bench.device)


def trial_weights(study: Study, record: TrialRecord) -> Path:
    """File with a trial's weights.

    Raises:
        StudyError: the trial failed, the weights were deleted, as `keep_weights = "front"` does off
            the front, or they are damaged or another schedule's.
    """
    if record.state != "complete":
        why = record.failure or "its low-fidelity score did not promote it"
        raise StudyError(
            f"trial {record.number} {record.state}, so it has no weights ({why}); choose another"
        )
    path = study.trial_dir(record.schedule) / directory.WEIGHTS
    if is_whole(path, f"trial {record.number} has no weights now", record.schedule):
        return path
    if path.exists():
        raise StudyError(
            f"the weights of trial {record.number} in {path} are damaged, or another schedule's; "
            "`asesearch search` makes those of points to be confirmed again; choose another trial, "
            "or restore the file"
        )
    raise StudyError(
        f"trial {record.number} has no weights in {path.parent}: weights off the front are "
        "deleted; "
        'pick a front point, or search with keep_weights = "all"'
    )


def load_trial(study: Study, record: TrialRecord, device: torch.device) -> Backbone:
    """A trial's network, in eval mode.

    Raises:
        StudyError: see `trial_weights`.
    """
    return load_saved(trial_weights(study, record), study.config.backbone.kind, device)
