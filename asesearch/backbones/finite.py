"""The check that weights are finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from asesearch.errors import CheckpointError

_CHUNK = 1 << 24  # numbers looked at together


def refuse_not_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights with NaN or infinity, which would be found out only after hours of sampling.

    Raises:
        CheckpointError: naming the first such tensors, and how many of their numbers are meant.
    """
    bad = {name: count for name, value in state.items() if (count := _not_finite(value))}
    if bad:
        shown = ", ".join(
            f"{count} of {state[name].numel()} in {name}" for name, count in list(bad.items())[:3]
        )
        more = f", and more in {len(bad) - 3} other tensors" if len(bad) > 3 else ""
        raise CheckpointError(
            f"{where} must hold finite numbers; got NaN or infinity: {shown}{more}; take a "
            "checkpoint from before the training broke, or copy a damaged file again"
        )


def _not_finite(value: Tensor) -> int:
    """How many numbers are NaN or infinite; one pass where there are none, and little memory."""
    count = 0
    numbers = value.detach().reshape(-1)
    for start in range(0, len(numbers), _CHUNK):
        chunk = numbers[start : start + _CHUNK]
        low, high = torch.aminmax(chunk)  # NaN goes through
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            count += int((~torch.isfinite(chunk)).sum())
    return count
