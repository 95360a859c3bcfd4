"""Choosing one point of a front."""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Real

from asesearch.errors import ConfigError, StudyError
from asesearch.score import EvaluationResult
from asesearch.study.records import UNITS, StudyResults, TrialRecord
from asesearch.study.timing import UNEXPLAINED, credited_time

MODES = ("best-quality", "fastest-within", "best-within")
FORMS = (
    "a score (7.5), an excess over the full network's (+5%), ci (not shown to be worse at 95 % "
    "confidence) or standard errors (1se)"
)


def parse_budget(text: str) -> tuple[str, float]:
    """A quality budget as ("score", "percent", "se" or "ci", its number; 0 for "ci").

    Raises:
        ConfigError: it has none of these forms.
    """
    if not isinstance(text, str):
        raise _no_text(text)
    if text.strip() == "ci":
        return "ci", 0.0
    number = r"\d+(?:\.\d*)?|\.\d+"
    form = re.fullmatch(
        rf"\+(?P<percent>{number})%|(?P<se>{number})se|(?P<score>-?(?:{number}))", text.strip()
    )
    if form is None:
        raise ConfigError(f"a quality budget is {FORMS}; got {text[:60]!r}; write one of these")
    kind = form.lastgroup
    assert kind is not None
    return kind, float(form[kind])


def _no_text(budget: object) -> ConfigError:
    shown = repr(budget)[:60]
    quotable = _is_number(budget) and len(shown) < 30
    fix = f"write it in quotes, as '{budget}'" if quotable else "write one of these"
    return ConfigError(f"a quality budget is text: {FORMS}; got {shown}; {fix}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def within_quality(budget: str, quality: EvaluationResult, full: EvaluationResult | None) -> bool:
    """Whether a score is within a quality budget.

    Args:
        budget: a score ("7.5"); an excess over the full network's ("+5%"); "ci", not shown to
            be worse than the full network at 95 % confidence (the interval of the difference begins
            at 0 or below, see `EvaluationResult.margin`; few repeats hide a loss, which may be as
            large as the interval's end, see `told_difference`); or standard errors of the
            difference, paired by repeat ("1se"), which is no verdict: at three repeats a score as
            good as the full network's misses it in one case of five.
        quality: the schedule's score.
        full: the full network's under the same protocol; a budget that is a score needs none.

    Raises:
        ConfigError: none of these forms, or a spread is needed where there is one repeat.
        StudyError: the budget is relative to the full network, which has no score.
    """
    kind, number = parse_budget(budget)
    if kind == "score":
        return quality.value <= number
    if full is None:
        raise StudyError(
            f"the full network has no score to measure the quality budget {budget!r} against; "
            "give a score (7.5) as the budget, or pick best-quality"
        )
    if kind == "percent":
        return quality.value <= full.value + abs(full.value) * number / 100
    difference, std_error = quality.minus(full)
    allowed = quality.margin(full) if kind == "ci" else std_error and number * std_error
    if allowed is None:
        raise ConfigError(
            f"quality budget {budget!r} needs repeats; got one; raise evaluation.repeats and "
            "confirm.repeats, or give a score (7.5) or an excess (+5%) as the budget"
        )
    return difference <= allowed


@dataclass(frozen=True)
class Scored:
    """A record with the score and time that it is picked by.

    Attributes:
        record: of the trial.
        quality: its confirmed score, or the search's.
        cost_frac: sampling time relative to the full network's that may be claimed: measured, or
            predicted; the bound of its block calls where the measured one is better than they can
            explain. Not measured, in a study of FLOPs, its FLOPs.
        confirmed: whether it was measured.
        measured_frac: the measured time; None where it was not measured.
        unit: what `cost_frac` is a part of, in a word: "time" or "FLOPs".
    """

    record: TrialRecord
    quality: EvaluationResult
    cost_frac: float
    confirmed: bool
    measured_frac: float | None = None
    unit: str = "time"

    def __str__(self) -> str:
        frac = self.cost_frac
        share = f"{frac:.3f} of the time" if self.unit == "time" else f"{frac:.3f} of the FLOPs"
        return (
            f"trial {self.record.number} with {self.quality.value:.4g} at {share} "
            f"({self.record.point}{self.reservation})"
        )

    @property
    def reservation(self) -> str:
        """What is said behind its time: nothing, or that the measured one can't be right."""
        if self.measured_frac in (None, self.cost_frac):
            return ""
        return f"; by its block calls, for {self.measured_frac:.3f} measured is {UNEXPLAINED}"

    @property
    def early(self) -> bool:
        """Whether its schedule exits early anywhere."""
        return not self.record.schedule.is_full


def pick(
    results: StudyResults,
    mode: str,
    quality: str | None = None,
    time_frac: float | None = None,
    *,
    early_exit: bool = False,
) -> TrialRecord:
    """One point of the front, by confirmed scores where there are any, else by the search's.

    Args:
        results: of the study.
        mode: "best-quality"; "fastest-within" a `quality` budget (see `within_quality`);
            "best-within" a `time_frac` of the full network's sampling time, in (0, 1], or of its
            FLOPs where nothing is measured in a study of FLOPs.
        early_exit: only schedules that exit early, not all blocks under a faster sampler.

    Raises:
        ConfigError: unknown mode, or its budget is missing, of no known form or out of range.
        StudyError: no point meets the budget; the message names the nearest.
    """
    point, shortfall = choose(results, mode, quality, time_frac, early_exit)
    if shortfall:
        told = told_unconfirmed(results)
        why = f"{told}; {shortfall}" if told else shortfall
        raise StudyError(f"{why}; --or-nearest takes it, or change the budget")
    return point.record


def pick_nearest(
    results: StudyResults,
    mode: str,
    quality: str | None = None,
    time_frac: float | None = None,
    *,
    early_exit: bool = False,
) -> tuple[TrialRecord, str]:
    """As `pick`, but where no point meets the budget the next best one, and what it falls short of.

    The next best is the point nearest to the budget (the lowest score, or the shortest time); with
    `early_exit` and no such point on the front, what is asked for among those of full depth.

    Returns:
        The point, and one line in words; empty where it is what was asked for.

    Raises:
        ConfigError: unknown mode, or its budget is missing, of no known form or out of range.
        StudyError: the study has no score at all.
    """
    point, shortfall = choose(results, mode, quality, time_frac, early_exit)
    return point.record, f"{shortfall}; taking it" if shortfall else ""


def pick_and_tell(
    results: StudyResults,
    mode: str,
    quality: str | None = None,
    time_frac: float | None = None,
    *,
    early_exit: bool = False,
    or_nearest: bool = False,
) -> tuple[TrialRecord, list[str]]:
    """As `pick`, or with `or_nearest` as `pick_nearest`, and what there is to say of the point.

    Returns:
        The point, and lines in words: what it falls short of, and, where the quality budget is
        relative to the full network's score, how far its own lies from that.

    Raises:
        ConfigError, StudyError: as said there.
    """
    if or_nearest:
        record, shortfall = pick_nearest(results, mode, quality, time_frac, early_exit=early_exit)
    else:
        record = pick(results, mode, quality, time_frac, early_exit=early_exit)
        shortfall = ""
    lines = [line for line in (told_unconfirmed(results), shortfall) if line]
    relative = quality is not None and parse_budget(quality)[0] != "score"
    if relative and (told := told_difference(results, record)):
        lines.append(f"trial {record.number}: {told}")
    return record, lines


def told_difference(results: StudyResults, record: TrialRecord) -> str:
    """Between what a pick's score minus the full network's lies, in words; empty where it can't be
    told, and of the full network itself."""
    points = scored_points(results)
    full = next((p.quality for p in points if p.record.origin == "full"), None)
    mine = next((p.quality for p in points if p.record.number == record.number), None)
    if full is None or mine is None or mine is full:
        return ""
    margin = mine.margin(full)
    if margin is None:
        return ""
    difference, _ = mine.minus(full)
    return (
        f"its score minus the full network's {full.value:.4g} lies between "
        f"{difference - margin:+.3g} and {difference + margin:+.3g} at 95 % confidence, over "
        f"{len(mine.values)} repeats"
    )


def scored_points(results: StudyResults) -> list[Scored]:
    """The points that a choice is made among: the confirmed ones as soon as a schedule is, else the
    search's front and the full network."""
    return (_confirmed(results) if results.stands_confirmed else []) or _searched(results)


def choose(
    results: StudyResults,
    mode: str,
    quality: str | None,
    time_frac: float | None,
    early_exit: bool,
) -> tuple[Scored, str]:
    """The point picked, and what it falls short of in words that name it last; empty if nothing."""
    check_question(results, mode, quality, time_frac)
    points = scored_points(results)
    if not points:
        raise StudyError(
            "the study has no evaluated schedule to pick from; run `asesearch search` first"
        )
    if not early_exit:
        point, shortfall = _best(points, points, mode, quality, time_frac, "schedule")
        return point, _with_unconfirmed(shortfall, results, point, time_frac, early_exit)
    unconfirmed = "no early-exit schedule is confirmed; by the search's scores "
    for among, prefix in ((points, ""), (_searched(results), unconfirmed)):
        exits = [p for p in among if p.early]
        if exits:
            what = "early-exit schedule"
            point, shortfall = _best(exits, among, mode, quality, time_frac, what)
            if prefix:
                shortfall = prefix + (shortfall or f"there is {point}")
            return point, _with_unconfirmed(shortfall, results, point, time_frac, early_exit)
    point, shortfall = _best(points, points, mode, quality, time_frac, "point of full depth")
    none = f"no early-exit schedule is on the front{_tried(results)}"
    return point, f"{none}; {shortfall or f'of full depth there is {point}'}"


def _best(
    points: list[Scored],
    among: list[Scored],
    mode: str,
    quality: str | None,
    time_frac: float | None,
    what: str,
) -> tuple[Scored, str]:
    """The best of `points`, and what it falls short of in words.

    The full network is looked for `among` all points with a score of the same protocol.
    """
    best = min(points, key=lambda p: (p.quality.value, p.cost_frac))
    if mode == "best-quality":
        return best, ""
    if quality is not None:
        full = next((p.quality for p in among if p.record.origin == "full"), None)
        if full is None and parse_budget(quality)[0] != "score":
            kind = "confirmed score" if best.confirmed else "score"
            return best, (
                f"the full network has no {kind} to measure the quality budget {quality!r} against "
                f"(`asesearch search` gives it one); the {what} with the best is {best}"
            )
        allowed = [p for p in points if within_quality(quality, p.quality, full)]
        if allowed:
            return min(allowed, key=lambda p: (p.cost_frac, p.quality.value)), ""
        return best, f"no {what} is within {_in_words(quality, full)}; the nearest is {best}"
    assert time_frac is not None
    allowed = [p for p in points if p.cost_frac <= time_frac]
    if allowed:
        return min(allowed, key=lambda p: (p.quality.value, p.cost_frac)), ""
    fastest = min(points, key=lambda p: (p.cost_frac, p.quality.value))
    budget = f"the {fastest.unit} budget {float(time_frac):g}"
    return fastest, f"no {what} is within {budget}; the nearest is {fastest}"


def _with_unconfirmed(
    shortfall: str, results: StudyResults, point: Scored, time_frac: float | None, early_exit: bool
) -> str:
    """Before a shortfall of time, the points of the search's front that would be fast enough and
    are not confirmed nor will be; for those that will see `told_unconfirmed`."""
    if not shortfall or time_frac is None or not point.confirmed:
        return shortfall
    known = {c.number for c in results.confirmations} | {r.number for r in results.unconfirmed}
    fast = [
        p
        for p in _searched(results)
        if p.record.number not in known and p.cost_frac <= time_frac and (p.early or not early_exit)
    ]
    if not fast:
        return shortfall
    return (
        f"not confirmed, and so not picked from (--trial takes one): {'; '.join(map(str, fast))}; "
        f"{shortfall}"
    )


def told_unconfirmed(results: StudyResults) -> str:
    """Which points of the front are still to be confirmed, in words; empty if none, or before it
    begins."""
    if not results.unconfirmed:
        return ""
    names = ", ".join(f"trial {r.number}" for r in results.unconfirmed)
    by = ", and not picked from" if results.stands_confirmed else ": picked by the search's scores"
    return f"still to be confirmed by the same `asesearch search`, {names}{by}"


def check_question(
    results: StudyResults, mode: str, quality: str | None, time_frac: float | None
) -> None:
    """Refuse a mode without its budget, and a budget without its mode, before anything is chosen.

    Raises:
        ConfigError: as said, a budget of no known form or range, or no results of a study.
    """
    if not isinstance(results, StudyResults):
        raise ConfigError(
            f"a point is picked from the results of a study; got {type(results).__name__}; give "
            "those of Study.results()"
        )
    if mode not in MODES:
        raise ConfigError(f"pick one of {', '.join(MODES)}; got {repr(mode)[:60]}")
    if (mode == "fastest-within") != (quality is not None) or (mode == "best-within") != (
        time_frac is not None
    ):
        raise ConfigError(
            "fastest-within takes a quality budget, best-within a time budget, best-quality none; "
            f"got {mode} with quality {repr(quality)[:60]} and time {repr(time_frac)[:60]}"
        )
    if quality is not None:
        parse_budget(quality)
    if time_frac is not None and not (_is_number(time_frac) and 0 < time_frac <= 1):
        raise ConfigError(
            "a time budget is a part of the full network's time, above 0 and at most 1; got "
            f"{repr(time_frac)[:60]}; give a number such as 0.7"
        )


def _searched(results: StudyResults) -> list[Scored]:
    """The front and the full network by the search's scores."""
    records = {r.number: r for r in results.front()}
    if results.full is not None:
        records[results.full.number] = results.full
    unit = UNITS[results.cost]
    return [
        Scored(r, r.quality, cost, False, unit=unit)
        for r in records.values()
        if r.quality is not None and (cost := results.cost_frac(r)) is not None
    ]


def _confirmed(results: StudyResults) -> list[Scored]:
    """The points with confirmed scores, except those that left the search's front since.

    Their weights are deleted, unless the study keeps all.
    """
    scored = {r.number: r for r in results.complete}
    found = [
        Scored(
            scored[c.number],
            c.quality,
            credited_time(
                c.measured_time_frac, c.measured_time_spread, scored[c.number].block_frac
            ),
            True,
            c.measured_time_frac,
        )
        for c in results.confirmations
        if c.number in scored
    ]
    return [p for p in found if results.has_weights(p.record)]


def _tried(results: StudyResults) -> str:
    """How many early-exit schedules have a score, in words; empty if none."""
    number = sum(not r.schedule.is_full for r in results.complete)
    return f" ({number} have a score and are dominated)" if number else ""


def _in_words(quality: str, full: EvaluationResult | None) -> str:
    """A quality budget with the score it comes to."""
    kind, number = parse_budget(quality)
    if kind == "percent" and full is not None:
        limit = full.value + abs(full.value) * number / 100
        return (
            f"the quality budget {quality!r} over the full network's {full.value:.4g} ({limit:.4g})"
        )
    if kind == "se" and full is not None:
        return f"{number:g} standard errors of the full network's {full.value:.4g}"
    if kind == "ci" and full is not None:
        return f"the 95 % interval of the full network's {full.value:.4g}"
    return f"the quality budget {quality!r}"
