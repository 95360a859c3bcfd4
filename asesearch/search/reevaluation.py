"""Recorded scores measured again from their recipe, and the pretrained weights under any
schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asesearch.backbones.base import check_schedule
from asesearch.errors import ConfigError, StudyError
from asesearch.point import Point
from asesearch.schedule import ExitSchedule, schedule_from_text
from asesearch.score import EvaluationResult, Protocol
from asesearch.search.confirmation import load_trial
from asesearch.search.parts import Parts
from asesearch.search.workbench import Workbench
from asesearch.study import directory
from asesearch.study.changes import other_inputs
from asesearch.study.records import TrialRecord
from asesearch.study.reproduce import compare
from asesearch.study.study import Study


def check_inputs(study: Study, parts: Parts, record: TrialRecord | None) -> None:
    """Refuse to measure a score again where what it depends on is not what it was.

    Args:
        study: on whose record it is.
        parts: of the study, as they are now.
        record: of the trial; None for the pretrained weights.

    Raises:
        StudyError: network or data are not those of the study any more, where the score depends on
            them.
    """
    depends_on = parts.identity
    if record is not None and not record.sampler.acceleration:
        del depends_on["weights"]  # a trial has its own
    other_inputs(study.optuna, study.run_dir, depends_on)


class PointEvaluation:
    """A point that is to be evaluated; everything is checked when it is made, nothing is written.

    Args:
        run_dir: the study directory.
        trial: whose weights and point are evaluated; None for the pretrained weights.
        schedule: for the pretrained weights, as `schedule_from_text` takes it; None for all
            blocks.
        storage: URL, in place of the one on record, which has no password.

    Attributes:
        point: what is evaluated.
        protocol: the search's.

    Raises:
        ConfigError: a schedule beside a trial, which has its own.
        StudyError: no study there, no such trial, or one without weights; network or data are not
            those of the study any more, where the score depends on them.
        ScheduleError: a schedule that does not fit the network.
    """

    def __init__(
        self,
        run_dir: Path,
        trial: int | None = None,
        schedule: str | None = None,
        *,
        storage: str | None = None,
    ) -> None:
        if trial is not None and schedule is not None:
            raise ConfigError(
                f"a trial has its own schedule; got --trial {trial} with --schedule; leave one out"
            )
        study = Study.open(run_dir, storage)
        self.bench = Workbench(study.config, run_dir, reading=True)
        self.protocol: Protocol = self.bench.protocols.search
        self.record = None if trial is None else study.record(trial)
        if self.record is None:
            self.net = self.bench.backbone
            chosen = self._schedule("full" if schedule is None else schedule)
            self.point = Point(chosen, self.bench.own_sampler)
        else:
            self.net = load_trial(study, self.record, self.bench.device)
            self.point = self.record.point
        check_inputs(study, self.bench, self.record)

    def _schedule(self, text: str) -> ExitSchedule:
        num_timesteps = self.bench.full.num_train_timesteps
        schedule = schedule_from_text(text, self.net.depth, num_timesteps)
        check_schedule(self.net, num_timesteps, schedule)
        return schedule

    def run(self) -> tuple[EvaluationResult, dict[str, float]]:
        """The score, and the seconds it took by part; see `Workbench.evaluate`.

        Raises:
            EvaluationError: images that are not finite.
        """
        return self.bench.evaluate(self.net, self.point, self.protocol)

    def compare(self, again: EvaluationResult) -> dict[str, Any]:
        """Whether a score of `run` agrees with the trial's on record; see `reproduce.compare`.

        Raises:
            ConfigError: no trial is evaluated.
            EvaluationError: the two were measured under different protocols.
        """
        if self.record is None or self.record.quality is None:
            raise ConfigError("a score is compared with that of a trial; got none; give its number")
        return compare(self.record.quality, again)


@dataclass(frozen=True)
class Recheck:
    """A recorded score and what its recipe gives now.

    Attributes:
        record: of the trial.
        comparison: see `asesearch.study.reproduce.compare`.
    """

    record: TrialRecord
    comparison: dict[str, Any]

    @property
    def reproduced(self) -> bool:
        """Whether each repeat agrees within the tolerance."""
        return bool(self.comparison["reproduced"])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "trial": self.record.number,
            "schedule": str(self.record.schedule),
            "sampler": str(self.record.sampler),
            **self.comparison,
        }


def to_recheck(study: Study, numbers: Sequence[int] = ()) -> list[TrialRecord]:
    """The trials of these numbers; without any, all that have a score and whose weights are kept.

    Raises:
        StudyError: no such trial, one without a score, or none at all.
    """
    if numbers:
        found = [study.record(n) for n in dict.fromkeys(numbers)]
        if without := [r.number for r in found if r.quality is None]:
            raise StudyError(
                f"trial {without[0]} has no score under the search protocol, so there is nothing "
                "to check; choose a complete one"
            )
        return found
    kept = [
        r
        for r in study.records()
        if r.quality is not None and (study.trial_dir(r.schedule) / directory.WEIGHTS).is_file()
    ]
    if not kept:
        raise StudyError(
            "no trial with a score has its weights; search first, or with keep_weights = 'all'"
        )
    return kept


def recheck(
    study: Study,
    parts: Parts,
    records: Sequence[TrialRecord],
    on_trial: Callable[[Recheck], object] | None = None,
) -> list[Recheck]:
    """Evaluate trials again under the study's search protocol and compare with what is on record.

    Args:
        study: on whose record they are; nothing is written to it.
        parts: of the study.
        records: see `to_recheck`.
        on_trial: called after each.

    Raises:
        StudyError: a trial's weights were deleted, or are damaged; network or data are not those of
            the study any more, where a score depends on them.
        EvaluationError: the study's protocol is not the recorded one.
    """
    for record in records:
        check_inputs(study, parts, record)
    found = []
    for record in records:
        assert record.quality is not None  # see `to_recheck`
        net = load_trial(study, record, parts.device)
        again, _ = parts.evaluate(net, record.point, parts.protocols.search)
        found.append(Recheck(record, compare(record.quality, again)))
        if on_trial is not None:
            on_trial(found[-1])
    return found
