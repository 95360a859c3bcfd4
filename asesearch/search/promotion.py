"""One trial from rung to rung: low-fidelity score, decision, brief fine-tuning, the search
protocol's score.

Optuna refuses pruning where there are two objectives, so the rungs lie within a trial. The third
rung, the full protocol on fresh seeds, is `confirmation`. Scores of different rungs are never
compared: a low-fidelity one speaks only through the quality model, which has learned from trials
with both scores what it is worth.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

from asesearch.backbones.device import collect_cycles
from asesearch.config import StudyConfig
from asesearch.errors import (
    EvaluationError,
    TrainingDiverged,
    first_line,
    is_out_of_memory,
    memory_told,
)
from asesearch.proposer.belief import judge
from asesearch.proposer.problem import Problem
from asesearch.proposer.proposer import NAME
from asesearch.score import EvaluationResult
from asesearch.search.trials import Outcome
from asesearch.search.workbench import Workbench
from asesearch.study.environment import versions
from asesearch.study.records import EXPLORATION, LowFidelity, TrialRecord, shortened

Spent = dict[str, dict[str, float]]  # "seconds" and "gflops" of a record, by part


def run_trial(
    bench: Workbench,
    trial: TrialRecord,
    folder: Path,
    records: list[TrialRecord],
    problem: Problem | None,
    explores: bool = False,
) -> TrialRecord:
    """Take one point up the rungs.

    Args:
        bench: fine-tunes, samples and evaluates.
        trial: number, origin and point of the trial; state and scores are filled in.
        folder: for its weights and images.
        records: of the study so far; one of the same point, stopped before, lends its low-fidelity
            score, and one of the same schedule its fine-tuning, which is counted once.
        problem: what the quality model needs to judge a point; None without promotion.
        explores: whether the trial is part of the exploration phase, so that it ends with its
            low-fidelity score.

    Returns:
        The finished record; that of the same point where it was stopped before and is again. A
        failure of the schedule's own is recorded, not raised.
    """
    spent: Spent = {"seconds": {}, "gflops": {}}
    low_fidelity: LowFidelity | None = None
    failure: str | None = None
    try:
        if problem is not None:
            low_fidelity = _low_fidelity_rung(bench, trial, records, problem, explores, spent)
            if not low_fidelity.promoted:
                before = _on_record(trial, records)
                if before is not None:
                    return before  # judged again, with the same result
                return _stopped(bench, trial, low_fidelity, spent)
        outcome = bench.trials.try_point(trial.point, folder)
    except (RuntimeError, MemoryError) as error:
        failure = _own_failure(error)
        if failure is None:
            raise
    if failure is not None:  # the error is gone by now, whose frames held the networks
        collect_cycles()
        failed = _ended(trial, "failed", failure=failure, low_fidelity=low_fidelity, **spent)
        if not failed.had_no_memory:  # or the next try goes on with what was trained
            _discard_weights(folder, trial, records)
        return failed
    return _complete(trial, outcome, records, low_fidelity, spent)


def _own_failure(error: Exception) -> str | None:
    """A failure of the schedule's own in one line; None for any other."""
    if is_out_of_memory(error):
        return memory_told(error)
    if isinstance(error, (TrainingDiverged, EvaluationError)):
        return first_line(error)
    return None


def _stopped(
    bench: Workbench, trial: TrialRecord, low_fidelity: LowFidelity, spent: Spent
) -> TrialRecord:
    """The record of a trial that is not promoted."""
    names = ("time_frac", "flops_frac", "block_frac")
    fracs = dict(zip(names, bench.costs.fracs(trial.point), strict=True))
    return _ended(trial, "stopped", low_fidelity=low_fidelity, **spent, **fracs)


def _complete(
    trial: TrialRecord,
    outcome: Outcome,
    records: list[TrialRecord],
    low_fidelity: LowFidelity | None,
    spent: Spent,
) -> TrialRecord:
    """The record of a trial that went all the way; its fine-tuning is left out where it is on
    record already."""
    if _counted(trial, outcome, records):
        outcome.losses = []
        outcome.seconds["finetune"] = 0.0
        outcome.gflops.pop("finetune", None)
    return _ended(
        trial,
        "complete",
        low_fidelity=low_fidelity,
        quality=outcome.quality,
        time_frac=outcome.time_frac,
        flops_frac=outcome.flops_frac,
        block_frac=outcome.block_frac,
        losses=tuple(shortened(outcome.losses)),
        finetune_steps=outcome.finetune_steps,
        seconds={**spent["seconds"], **outcome.seconds},
        gflops={**spent["gflops"], **outcome.gflops},
    )


def _discard_weights(folder: Path, trial: TrialRecord, records: list[TrialRecord]) -> None:
    """Delete the weights of a failed trial, unless a complete one shares them."""
    key = trial.point.weights_key
    if not any(r.state == "complete" and r.point.weights_key == key for r in records):
        shutil.rmtree(folder, ignore_errors=True)


def _on_record(trial: TrialRecord, records: list[TrialRecord]) -> TrialRecord | None:
    """The record of the trial's point, stopped before."""
    return next((r for r in records if r.point == trial.point), None)


def _counted(trial: TrialRecord, outcome: Outcome, records: list[TrialRecord]) -> bool:
    """Whether the fine-tuning that gave the outcome's weights is on record already, by the trial of
    another sampler.

    No two fine-tunings take the same time to the last digit, so the seconds tell them apart:
    weights that were deleted and made again are counted again.
    """
    same = [r for r in records if r.point.weights_key == trial.point.weights_key]
    return any(r.seconds.get("finetune") == outcome.seconds["finetune"] for r in same)


def _low_fidelity_rung(
    bench: Workbench,
    trial: TrialRecord,
    records: list[TrialRecord],
    problem: Problem,
    explores: bool,
    spent: Spent,
) -> LowFidelity:
    """The point's low-fidelity score, measured or on record, and whether it is promoted; adds what
    that took to `spent`.

    One that was promoted, and failed then, is again. The difficulty proposer returns to a stopped
    point because it expects more of it than of any other, in the light of all scores so far: that
    is the judgement. Others know nothing of low-fidelity scores, so that such a point is
    judged again.
    """
    before = _on_record(trial, records)
    if before is None or before.low_fidelity is None:
        quality, seconds, gflops = bench.trials.try_low_fidelity(trial.point)
        spent["seconds"]["low_fidelity"] = seconds
        spent["gflops"]["low_fidelity"] = gflops
        if explores:
            return LowFidelity(quality, False, None, EXPLORATION)
        return LowFidelity(quality, *_decide(bench, trial, records, problem, quality))
    spent["seconds"] |= before.seconds  # this record takes the place of that one
    spent["gflops"] |= before.gflops
    if before.low_fidelity.promoted:  # and failed then: decided as it was
        return before.low_fidelity
    quality = before.low_fidelity.quality
    if trial.origin == NAME:
        return LowFidelity(
            quality,
            True,
            before.low_fidelity.probability,
            "proposed again in the light of later trials",
        )
    promoted, probability, reason = _decide(bench, trial, records, problem, quality)
    return LowFidelity(quality, promoted, probability, f"proposed again: {reason}")


def _decide(
    bench: Workbench,
    trial: TrialRecord,
    records: list[TrialRecord],
    problem: Problem,
    quality: EvaluationResult,
) -> tuple[bool, float | None, str]:
    config = bench.config.promotion
    assert config is not None
    if trial.origin != bench.config.search.proposer:
        return True, None, "a warm start"
    high = sum(r.state == "complete" and r.origin == trial.origin for r in records)
    if high < config.always:
        return True, None, f"among the first {config.always} proposals"
    probability = judge(problem, records, trial.point, quality)
    promoted = probability >= config.threshold
    return (
        promoted,
        probability,
        f"on the front with probability {probability:.2f}, threshold {config.threshold:g}",
    )


def num_explored(config: StudyConfig) -> int:
    """How many of the proposals belong to the exploration phase; `promotion.explore`, and no more
    than half of all trials.

    Proposers that take no account of low-fidelity scores would never come back to such a point:
    theirs none.
    """
    if config.promotion is None or config.search.proposer != NAME:
        return 0
    few = config.search.budget_s is None
    return (
        min(config.promotion.explore, config.search.num_trials // 2)
        if few
        else config.promotion.explore
    )


def _ended(trial: TrialRecord, state: str, **fields: object) -> TrialRecord:
    data = {**vars(trial), "state": state, "versions": versions(), **fields}
    return TrialRecord(**{**data, "finished_at": datetime.now(UTC).isoformat(timespec="seconds")})
