"""Running recorded evaluations again from their recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from asesearch.errors import StudyError
from asesearch.search.again import check_inputs
from asesearch.search.confirmation import load_trial
from asesearch.search.parts import Parts
from asesearch.study import directory
from asesearch.study.records import TrialRecord
from asesearch.study.reproduce import compare
from asesearch.study.study import Study


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
