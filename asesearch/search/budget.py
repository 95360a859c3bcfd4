"""Keeping a search to its time: what is spent, and what a further trial and the confirmation will
take.

A budget is of wall time: that in which at least one worker is at work, see `workers.worked_s`.
"""

from __future__ import annotations

from statistics import fmean

from asesearch.config import StudyConfig
from asesearch.search.workbench import Workbench
from asesearch.study.records import StudyResults, TrialRecord, select

MARGIN = 0.03  # of the budget, for loading, proposing and the report


def image_s(bench: Workbench, results: StudyResults) -> float:
    """Seconds an image of the full network under the study's own sampler, evaluation included:
    measured, or predicted."""
    full = results.full
    if full is not None and full.quality is not None and full.seconds.get("sample"):
        parts = sum(full.seconds.get(part, 0.0) for part in ("sample", "decode", "evaluate"))
        return parts / (full.quality.protocol.num_samples * len(full.quality.values))
    calls = len(bench.samplers[bench.own_sampler])
    return calls * bench.costs.latency.median_ms[-1] / 1000 / bench.batch_size


def confirmation_s(
    config: StudyConfig,
    per_image_s: float,
    time_fracs: list[float],
    *,
    full: bool = True,
    num_workers: int = 1,
    tuning_s: tuple[float, float] = (0.0, 0.0),
) -> float:
    """Seconds that confirming the full network and points of these time fractions takes.

    Args:
        config: the study file.
        per_image_s: seconds an image of the full network takes, its evaluation included.
        time_fracs: of the points; both are timed, a point and the full network.
        full: whether the full network is yet to be confirmed.
        num_workers: that share the points out.
        tuning_s: of fine-tuning a point and the full network, which each training seed after the
            first does again.
    """
    how = config.confirm
    images = how.num_samples * how.repeats * how.training_seeds * per_image_s
    timed = (how.time_repeats + 1) * how.time_images * per_image_s  # one run of each not counted
    tuning, full_tuning = ((how.training_seeds - 1) * s for s in tuning_s)
    parts = [images * frac + timed * (1 + frac) + tuning for frac in time_fracs]
    parts += [images + full_tuning] * full
    return max(sum(parts) / num_workers, max(parts, default=0.0))


def confirmed_points(config: StudyConfig, results: StudyResults) -> set[int]:
    """Numbers of the points that are confirmed as the study file has it."""
    how = config.confirm.num_samples, config.confirm.repeats
    return {
        c.number
        for c in results.confirmations
        if (c.quality.protocol.num_samples, len(c.quality.values)) == how
        and 1 + len(c.retrained) >= config.confirm.training_seeds
    }


def room_for_trial(
    config: StudyConfig,
    bench: Workbench,
    results: StudyResults,
    worked_s: float,
    num_workers: int = 1,
    full_in_flight: bool = False,
) -> bool:
    """Whether a further trial and then the confirmation of the front fit into the study's budget.

    Args:
        config: the study file.
        bench: of the study.
        results: what is on record.
        worked_s: wall time in which any worker was at work.
        num_workers: at work now, this one included.
        full_in_flight: whether another worker is at the full network.
    """
    budget = config.search.budget_s
    assert budget is not None
    left = budget * (1 - MARGIN) - worked_s - _next_s(results.records)
    full = results.full
    if full is None:
        return left >= 0 or not full_in_flight  # without it nothing can be reported
    chosen = select(results.front(), full, config.confirm.max_points)[1:]
    confirmed = confirmed_points(config, results)
    points = [r.time_frac or 1.0 for r in chosen if r.number not in confirmed]
    if len(chosen) < config.confirm.max_points:
        # the trial may add a point
        points.append(fmean([*(r.time_frac or 1.0 for r in chosen), 0.7]))
    per_image_s = image_s(bench, results)
    full_too = full.number not in confirmed
    tuned = [r.seconds["finetune"] for r in chosen if r.seconds.get("finetune")]
    return left >= confirmation_s(
        config,
        per_image_s,
        points,
        full=full_too,
        num_workers=num_workers,
        tuning_s=(fmean(tuned) if tuned else 0.0, full.seconds.get("finetune", 0.0)),
    )


def _next_s(records: tuple[TrialRecord, ...]) -> float:
    """What a fine-tuned trial took so far (a stopped one where there is none); the full network,
    tuned for longer, left out."""
    others = [r for r in records if not r.schedule.is_full and r.state != "failed"]
    found = [r for r in others if r.state == "complete"] or others
    return fmean(sum(r.seconds.values()) for r in found[-8:]) if found else 0.0
