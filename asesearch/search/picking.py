"""Choosing one point of a front."""

from __future__ import annotations

import re

from asesearch.errors import ConfigError, StudyError
from asesearch.evaluation.results import EvaluationResult
from asesearch.search.records import StudyResults, TrialRecord

MODES = ("best-quality", "fastest-within", "best-within")


def within_quality(budget: str, quality: EvaluationResult, full: EvaluationResult) -> bool:
    """Whether a figure is within a quality budget.

    Args:
        budget: a figure ("7.5"); an excess over the full network's ("+5%"); "ci", not worse than the full network at 95 %
            confidence (the interval of the difference begins at 0 or below, see `EvaluationResult.margin`); or standard
            errors of the difference, paired by repeat ("1se"), which is no verdict: at three repeats a figure as good as
            the full network's misses it in one case of five.
        quality: the schedule's figure.
        full: the full network's.

    Raises:
        ConfigError: none of these forms, or a spread is needed where there is one repeat.
    """
    text = budget.strip()
    if text == "ci":
        margin = quality.margin(full)
        if margin is None:
            raise ConfigError(f"quality budget {text!r} needs repeats; got one; raise evaluation.repeats and confirm.repeats")
        return quality.value - full.value <= margin
    form = re.fullmatch(r"\+(?P<percent>[\d.]+)%|(?P<se>[\d.]+)se|(?P<figure>-?[\d.]+)", text)
    try:
        kind, number = next((k, float(v)) for k, v in (form.groupdict() if form else {}).items() if v is not None)
    except (StopIteration, ValueError) as error:
        raise ConfigError(
            "a quality budget is a figure (7.5), an excess over the full network (+5%), ci (not worse at 95 % confidence) or "
            f"standard errors (1se); got {text!r}"
        ) from error
    if kind == "figure":
        return quality.value <= number
    if kind == "percent":
        return quality.value <= full.value * (1 + number / 100)
    difference, std_error = quality.minus(full)
    if std_error is None:
        raise ConfigError(f"quality budget {text!r} needs a standard error; got one repeat; raise evaluation.repeats")
    return difference <= number * std_error


def pick(results: StudyResults, mode: str, quality: str | None = None, time_frac: float | None = None) -> TrialRecord:
    """One point of the study, by confirmed figures where there are any, else by the search's.

    Args:
        results: of the study.
        mode: "best-quality"; "fastest-within" a `quality` budget (see `within_quality`); "best-within" a `time_frac` of the
            full network's sampling time, in (0, 1].

    Raises:
        ConfigError: unknown mode, or its budget is missing.
        StudyError: no point meets the budget; the message names the nearest.
    """
    if mode not in MODES:
        raise ConfigError(f"pick one of {', '.join(MODES)}; got {mode!r}")
    if (mode == "fastest-within") != (quality is not None) or (mode == "best-within") != (time_frac is not None):
        raise ConfigError(
            "fastest-within takes a quality budget, best-within a time budget, best-quality none; "
            f"got {mode} with quality {quality!r} and time {time_frac!r}"
        )
    confirmed = {c.number: c for c in results.confirmations}
    points = []  # (record, quality, time)
    for record in results.complete:
        if record.quality is None or record.time_frac is None:
            continue
        if record.number in confirmed:
            c = confirmed[record.number]
            points.append((record, c.quality, c.measured_time_frac))
        elif not confirmed:
            points.append((record, record.quality, record.time_frac))
    if not points:
        raise StudyError("the study has no evaluated schedule to pick from; run `asesearch search` first")
    if mode == "best-quality":
        return min(points, key=lambda p: (p[1].value, p[2]))[0]
    if mode == "fastest-within":
        full = next((q for r, q, _ in points if r.origin == "full"), None)
        if full is None:
            raise StudyError("the full network has no figure to measure a quality budget against; pick best-quality")
        assert quality is not None
        allowed = [p for p in points if within_quality(quality, p[1], full)]
        if not allowed:
            best = min(points, key=lambda p: p[1].value)
            raise StudyError(
                f"no schedule is within the quality budget {quality!r}; the best is {best[1].value:.4g} ({best[0].schedule})"
            )
        return min(allowed, key=lambda p: (p[2], p[1].value))[0]
    assert time_frac is not None
    allowed = [p for p in points if p[2] <= time_frac]
    if not allowed:
        best = min(points, key=lambda p: p[2])
        raise StudyError(
            f"no schedule is within the time budget {time_frac:g}; the fastest takes {best[2]:.3f} ({best[0].schedule})"
        )
    return min(allowed, key=lambda p: (p[1].value, p[2]))[0]
