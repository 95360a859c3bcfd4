"""One point of a study under its protocol: a trial's weights again, or the pretrained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asesearch.backbones.base import check_schedule
from asesearch.errors import ConfigError
from asesearch.point import Point
from asesearch.schedule import ExitSchedule, schedule_from_text
from asesearch.score import EvaluationResult, Protocol
from asesearch.search.confirmation import load_trial
from asesearch.search.parts import Parts
from asesearch.search.workbench import Workbench
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
