"""The checks that weights are numbers that a training leaves: finite, and not zero throughout."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from asesearch.errors import CheckpointError

_CHUNK = 1 << 24  # numbers looked at together
#: Weights that begin at random and that no training makes zero, under the names of DiT, U-ViT and
#: diffusers. Not among them: modulations, output layers of a block or a network, which may begin at
#: zero (as in blocks that are added to make a network deeper), and biases.
_NEVER_ZERO = re.compile(
    r"(?:^|\.)(?:(?:x_embedder|patch_embed|pos_embed)\.proj|attn1?\.(?:qkv|to_[qkv])"
    r"|mlp\.fc1|ff\.net\.0\.proj)\.weight$"
)


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


def refuse_zero(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are zero throughout where no training leaves that, as a file has them of
    which space was set aside but not all was written.

    Raises:
        CheckpointError: naming the first such tensors.
    """
    bad = [k for k, v in state.items() if _NEVER_ZERO.search(k) and _is_zero(v)]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise CheckpointError(
            f"{where} must hold trained weights; got nothing but zeros in {', '.join(bad[:3])}"
            f"{more}, as an unfinished download leaves it; download it again"
        )


def _is_zero(value: Tensor) -> bool:
    """Whether there are numbers and all are zero; of others only the first are looked at."""
    numbers = value.detach().reshape(-1)
    return len(numbers) > 0 and not (bool(numbers[:64].any()) or bool(numbers.any()))
