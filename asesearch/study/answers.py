"""Which point of a front to take: the questions users have, answered in words and as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from asesearch.errors import StudyError
from asesearch.score import CONFIDENCE
from asesearch.study.picking import Scored, check_question, choose, scored_points
from asesearch.study.records import StudyResults


@dataclass(frozen=True)
class Answer:
    """A point of the front and the question that it answers.

    Attributes:
        question: in words; "nearest to the …" where no point is within the budget.
        point: with the score and time that it was chosen by.
        full_score: the full network's score under the same protocol; None where it has none.
        same: numbers of the other points that can't be told apart from it at the confidence of
            `asesearch.score.CONFIDENCE`; None where one repeat tells nothing of the spread.
        shortfall: what it falls short of, where no point is within the budget; else empty.
        alone: whether there is no other point to compare it with.
    """

    question: str
    point: Scored
    full_score: float | None
    same: tuple[int, ...] | None
    shortfall: str = ""
    alone: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        record = self.point.record
        quality = self.point.quality
        timed = self.point.unit == "time"
        return {
            "question": self.question,
            **record.described(),
            "metric": quality.protocol.metric_name,
            "score": quality.value,
            "std_error": quality.std_error,
            "full_score": self.full_score,
            "time_frac": self.point.cost_frac if timed else None,
            "speed_up": 1 / self.point.cost_frac if timed else None,
            "flops_frac": record.flops_frac,
            "measured_time_frac": self.point.measured_frac,
            "confirmed": self.point.confirmed,
            "same": None if self.same is None else list(self.same),
            "shortfall": self.shortfall,
        }

    def __str__(self) -> str:
        quality = self.point.quality
        spread = "" if quality.std_error is None else f" ± {quality.std_error:.2g}"
        timed = self.point.unit == "time"
        kind = "by the search, predicted" if timed else "by the search"
        if self.point.confirmed:
            kind = "confirmed" if self.point.reservation else "confirmed, measured"
        of = "" if self.full_score is None else f" (full network: {self.full_score:.4g})"
        if self.same is None:
            told = "one repeat: nothing can be told apart"
        elif self.alone:
            told = "no other point has a score of that kind"
        elif self.same:
            points = "trial" if len(self.same) == 1 else "trials"
            told = f"not told apart from {points} {', '.join(map(str, self.same))}"
        else:
            told = f"differs from every other point at {100 * CONFIDENCE:g} % confidence"
        fast = f", {1 / self.point.cost_frac:.2f}x as fast" if timed else ""
        lines = [self.shortfall] if self.shortfall else []
        lines.append(
            f"{self.question}: trial {self.point.record.number}, {self.point.record.point}, "
            f"{quality.protocol.metric_name} {quality.value:.4g}{spread}{of} at "
            f"{self.point.cost_frac:.3f}x the {self.point.unit}{fast} "
            f"({kind}{self.point.reservation}); {told}"
        )
        return "\n".join(lines)


def answers(
    results: StudyResults,
    quality: str = "+5%",
    time_frac: float = 0.75,
    *,
    early_exit: bool = False,
) -> list[Answer]:
    """The fastest point within a quality budget, the best within a time budget, and the knee.

    Scores are the confirmed ones where there are any, else the search's.

    Args:
        results: of the study.
        quality: budget of the first, see `asesearch.study.picking.within_quality`.
        time_frac: budget of the second, see `asesearch.study.picking.pick`.
        early_exit: only schedules that exit early, not all blocks under a faster sampler.

    Raises:
        ConfigError: a budget of no known form, or out of range.
        StudyError: the study has no score at all.
    """
    check_question(results, "fastest-within", quality, None)
    check_question(results, "best-within", None, time_frac)
    points = scored_points(results)
    unit = points[0].unit if points else "time"
    asked: list[tuple[str, tuple[str, str | None, float | None]]] = [
        (f"fastest with quality within {quality}", ("fastest-within", quality, None)),
        (f"best quality within {float(time_frac):g}x the {unit}", ("best-within", None, time_frac)),
    ]
    found = []
    for question, how in asked:
        point, shortfall = choose(results, *how, early_exit)
        if shortfall:
            question = f"nearest to the {question}"
        found.append(_answer(question, point, points, shortfall))
    exits = [p for p in points if p.early] if early_exit else points
    if exits:
        found.append(_answer("knee of the front", knee(exits), points, ""))
    return found


def _answer(question: str, point: Scored, points: list[Scored], shortfall: str) -> Answer:
    alike = [p for p in points if p.confirmed == point.confirmed]
    full = next((p.quality.value for p in alike if p.record.origin == "full"), None)
    same = indistinguishable(point, alike)
    return Answer(question, point, full, same, shortfall, alone=len(alike) == 1)


def indistinguishable(point: Scored, points: list[Scored]) -> tuple[int, ...] | None:
    """Numbers of the other points whose score can't be told apart from a point's; None where one
    repeat tells nothing of the spread."""
    if len(point.quality.values) == 1:
        return None
    same = []
    for other in points:
        if other.record.number == point.record.number:
            continue
        margin = point.quality.margin(other.quality)
        if margin is None:
            return None
        if abs(point.quality.minus(other.quality)[0]) <= margin:
            same.append(other.record.number)
    return tuple(sorted(same))


def knee(points: list[Scored]) -> Scored:
    """The point where a front bends: cost and score each scaled to [0, 1], the one with the least
    sum of both, which lies furthest below the line between the front's ends.

    Raises:
        StudyError: there is no point.

    Source: Satopää et al. 2011 (Kneedle), for a curve of few points without smoothing.
    """
    if not points:
        raise StudyError("the study has no evaluated schedule to pick from; run `asesearch search`")
    times = [p.cost_frac for p in points]
    scores = [p.quality.value for p in points]
    width = max(times) - min(times) or 1.0
    height = max(scores) - min(scores) or 1.0

    def sum_of(p: Scored) -> float:
        return (p.cost_frac - min(times)) / width + (p.quality.value - min(scores)) / height

    return min(points, key=lambda p: (sum_of(p), p.cost_frac))
