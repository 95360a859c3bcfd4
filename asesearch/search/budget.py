"""Keeping a search to its time: what is spent, and what a further trial and the confirmation will take."""

from __future__ import annotations

from statistics import fmean

from asesearch.config import StudyConfig
from asesearch.search.records import StudyResults, TrialRecord, select
from asesearch.search.workbench import Workbench

MARGIN = 0.03  # of the budget, for loading, proposing and the report


def spent_s(results: StudyResults) -> float:
    """Seconds on record: warm-up, trials and confirmations, of all workers together."""
    trials = sum(sum(r.seconds.values()) for r in results.records)
    return float(sum(results.warm_up.get("seconds", {}).values())) + trials + sum(c.seconds for c in results.confirmations)


def image_s(bench: Workbench, results: StudyResults) -> float:
    """Seconds an image of the full network under the study's own sampler, evaluation included: measured, or predicted."""
    full = results.full
    if full is not None and full.quality is not None and full.seconds.get("sample"):
        parts = sum(full.seconds.get(part, 0.0) for part in ("sample", "decode", "evaluate"))
        return parts / (full.quality.protocol.num_samples * len(full.quality.values))
    calls = len(next(iter(bench.samplers.values())))
    return calls * bench.latency.median_ms[-1] / 1000 / bench.batch_size


def confirmation_s(config: StudyConfig, per_image_s: float, time_fracs: list[float]) -> float:
    """Seconds that confirming the full network and points of these time fractions takes."""
    how = config.confirm
    quality = how.num_samples * how.repeats * (1 + sum(time_fracs))
    timing = sum((1 + frac) * (how.time_repeats + 1) * how.time_images for frac in time_fracs)
    return per_image_s * (quality + timing)


def room_for_trial(config: StudyConfig, bench: Workbench, results: StudyResults) -> bool:
    """Whether a further trial and then the confirmation of the front fit into the study's budget."""
    budget = config.search.budget_s
    assert budget is not None
    full = results.full
    if full is None:
        return True  # without it nothing can be reported
    points = [r.time_frac or 1.0 for r in select(results.front(), full, config.confirm.max_points)[1:]]
    if len(points) < config.confirm.max_points:
        points.append(fmean([*points, 0.7]))  # the trial may add a point
    confirm = confirmation_s(config, image_s(bench, results), points)
    done = sum(c.seconds for c in results.confirmations)
    return spent_s(results) + _next_s(results.records) + max(0.0, confirm - done) <= budget * (1 - MARGIN)


def _next_s(records: tuple[TrialRecord, ...]) -> float:
    """What a fine-tuned trial took so far (a stopped one where there is none); the full network, tuned for longer, left out."""
    rivals = [r for r in records if not r.schedule.is_full and r.state != "failed"]
    found = [r for r in rivals if r.state == "complete"] or rivals
    return fmean(sum(r.seconds.values()) for r in found[-8:]) if found else 0.0
