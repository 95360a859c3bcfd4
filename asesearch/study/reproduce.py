"""Re-checking a recorded score from its recipe."""

from __future__ import annotations

from typing import Any

from asesearch.score import EvaluationResult

TOLERANCE_FRAC = 0.01


def compare(recorded: EvaluationResult, again: EvaluationResult) -> dict[str, Any]:
    """Whether a score measured again agrees with the one on record.

    Same weights, same seeds: only arithmetic can differ, so each repeat must agree within 1 %. (A
    score on another processor or another version of torch stays within 0.1 %; a wrong seed, N or
    reference does not.)

    Raises:
        EvaluationError: the two were measured under different protocols.
    """
    recorded.protocol.require_same(again.protocol)
    differences = [b / a - 1 for a, b in zip(recorded.values, again.values, strict=True)]
    worst = max(differences, key=abs)
    return {
        "reproduced": abs(worst) <= TOLERANCE_FRAC,
        "recorded": list(recorded.values),
        "again": list(again.values),
        "largest_relative_difference": worst,
        "tolerance": TOLERANCE_FRAC,
    }
