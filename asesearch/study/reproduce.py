"""Re-checking a recorded score from its recipe."""

from __future__ import annotations

from typing import Any

from asesearch.score import EvaluationResult

TOLERANCE_FRAC = 0.01
#: Standard errors of a recorded KID that it is compared with where it is smaller than they are: a
#: kernel distance is near 0, of either sign, where images are as good as the reference, and there
#: rounding moves it by any share of itself. So a tenth of a standard error is tolerated.
KID_STD_ERRORS = 10.0


def compare(recorded: EvaluationResult, again: EvaluationResult) -> dict[str, Any]:
    """Whether a score measured again agrees with the one on record.

    Same weights, same seeds: only arithmetic can differ, so each repeat must agree within 1 % of
    the one on record; a KID of several repeats within 1 % of that or of `KID_STD_ERRORS`, whichever
    is more. (A score on another processor or another version of torch stays within 0.1 %; a wrong
    seed, N or reference does not.)

    Raises:
        EvaluationError: the two were measured under different protocols.
    """
    recorded.protocol.require_same(again.protocol)
    is_kid = recorded.protocol.metric == "kid"
    least = KID_STD_ERRORS * (recorded.std_error or 0.0) if is_kid else 0.0
    pairs = zip(recorded.values, again.values, strict=True)
    # beside a 0 that has no scale any other score is off by all of itself
    differences = [(b - a) / (max(abs(a), least) or abs(b) or 1.0) for a, b in pairs]
    worst = max(differences, key=abs)
    return {
        "reproduced": abs(worst) <= TOLERANCE_FRAC,
        "recorded": list(recorded.values),
        "again": list(again.values),
        "largest_relative_difference": worst,
        "tolerance": TOLERANCE_FRAC,
    }
