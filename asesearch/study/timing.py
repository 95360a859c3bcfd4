"""A measured sampling time beside what its block calls can explain."""

from __future__ import annotations

#: Half-IQRs of the pairs' ratios by which a sound measurement may lie below the bound.
NOISE = 2.0
#: Share of the bound that is not made a fuss about: no more than two printed digits show.
SLACK = 0.02
#: What is said of a measured time that is too good.
UNEXPLAINED = "better than its block calls can explain"


def is_unexplained(measured_frac: float, spread: float, block_frac: float | None) -> bool:
    """Whether a measured time is better than its block calls can explain: below their bound by more
    than its spread allows. Then something else held the full network's runs up, or made short calls
    faster than their blocks are fewer, as a cache of the processor can that holds few blocks.

    Args:
        measured_frac: sampling time over the full network's.
        spread: half-IQR of the pairs' ratios.
        block_frac: block calls over the full network's; None where they are unknown, and nothing
            can be said.
    """
    if block_frac is None:
        return False
    return measured_frac + max(NOISE * spread, SLACK * block_frac) < block_frac


def credited_time(measured_frac: float, spread: float, block_frac: float | None) -> float:
    """The relative time that may be claimed: the measured one, or the bound of the block calls
    where the measured one is better than they can explain."""
    if is_unexplained(measured_frac, spread, block_frac):
        assert block_frac is not None
        return block_frac
    return measured_frac
