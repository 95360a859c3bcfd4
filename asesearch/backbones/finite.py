"""The checks that weights are numbers that a training leaves: finite, and not zero throughout."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from asesearch.errors import CheckpointError
from asesearch.files import some

_CHUNK = 1 << 24  # numbers looked at together
_PAGE = 1024  # numbers in 4,096 bytes of float32; two of these in half precision
_BLOCK = _PAGE // 2  # any page of zeros covers a block of so many
_CHANCE = 64  # zeros in the edge row of pruned rows that sparsity alone does not leave
_POSITIONS = "pos_embed"
#: Weights that begin at random, or as positions, and that no training makes zero, under the names
#: of DiT, U-ViT and diffusers. Not among them: modulations, output layers of a block or of a DiT,
#: which may begin at zero (as in blocks that are added to make a network deeper), and biases.
_NEVER_ZERO = re.compile(
    r"(?:^|\.)(?:(?:x_embedder|patch_embed|pos_embed)\.proj|attn1?\.(?:qkv|to_[qkv])"
    r"|mlp\.fc1|ff\.net\.0\.proj|t_embedder\.mlp\.[02]|time_embed\.[02]"
    r"|timestep_embedder\.linear_[12]|decoder_pred)\.weight$"
    rf"|^{_POSITIONS}$"
)
#: Embeddings of labels, which are so too where there are classes: a network without is given zeros.
_LABELS = re.compile(r"(?:^|\.)(?:embedding_table|label_emb)\.weight$")
_CLASSLESS = 2  # rows: one label, and the null label
#: The last layer of a DiT or of diffusers' transformers, which begins at zero: what is put out.
_LAST = re.compile(r"(?:^|\.)(?:final_layer\.linear|proj_out(?:_2)?)\.weight$")


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


def as_float32(name: str, value: Tensor, where: str) -> Tensor:
    """A weight in float32.

    Raises:
        CheckpointError: of integers or of 8 bits, as quantised networks have, complex, or with
            numbers that float32 can't hold.
    """
    if not value.is_floating_point() or value.dtype.itemsize == 1:
        why = "as quantised networks have; give the weights from before the quantisation"
        if value.is_complex():
            why = "complex numbers; give the weights of a network that computes with real ones"
        raise CheckpointError(
            f"{where} must hold floating-point weights of 16 bits or more; got {name} of "
            f"{str(value.dtype).removeprefix('torch.')}, {why}"
        )
    single = value.float()
    if value.dtype == torch.float64 and (lost := _not_finite(single) - _not_finite(value)):
        raise CheckpointError(
            f"{where} must hold numbers that float32 can; got {lost} of {value.numel()} in {name} "
            f"beyond ±{torch.finfo(torch.float32).max:.1e}; correct them where they were made"
        )
    return single


def refuse_zero(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are zero where no training leaves that, throughout or in a hole, as a
    file has them of which space was set aside but not all was written.

    Raises:
        CheckpointError: naming the first such tensors.
    """
    weights = {
        k: v
        for k, v in state.items()
        if _NEVER_ZERO.search(k) or (_LABELS.search(k) and len(v) > _CLASSLESS)
    }
    bad = [k for k, v in weights.items() if _is_zero(v)]
    if bad:
        raise CheckpointError(
            f"{where} must hold trained weights; got nothing but zeros in {some(bad)}"
            ", as an unfinished download leaves it; download it again"
        )
    for name, value in weights.items():
        # the first of the fixed positions are partly zero
        if name != _POSITIONS and (hole := _hole(value)) is not None:
            raise CheckpointError(
                f"{where} must hold trained weights; got {len(hole):,} zeros in a row in {name} "
                f"from number {hole.start:,} on, amid its rows, as an unfinished download leaves "
                "it; download it again"
            )


def refuse_untrained(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse a network as it is before any training, whose output is zero whatever its input.

    Raises:
        CheckpointError: naming its last layer.
    """
    for name, value in state.items():
        if _LAST.search(name) and _is_zero(value):
            raise CheckpointError(
                f"{where} must hold a trained network; got nothing but zeros in {name}, its last "
                "layer, so nothing was trained yet; give a later checkpoint, or train it first"
            )


def _is_zero(value: Tensor) -> bool:
    """Whether there are numbers and all are zero; of others only the first are looked at."""
    numbers = value.detach().reshape(-1)
    return len(numbers) > 0 and not (bool(numbers[:64].any()) or bool(numbers.any()))


def _hole(value: Tensor) -> range | None:
    """Where zeros in a row are those of pages that were not written; None where there are none."""
    numbers = value.detach().reshape(-1)
    blocks = numbers[: len(numbers) - len(numbers) % _BLOCK].view(-1, _BLOCK)
    zero = blocks[:, 0] == 0
    zero[zero.clone()] = ~blocks[zero].any(1)
    edges = torch.diff(zero.int(), prepend=zero.new_zeros(1), append=zero.new_zeros(1))
    firsts = (edges == 1).nonzero().flatten().tolist()
    lasts = (edges == -1).nonzero().flatten().tolist()
    for first, last in zip(firsts, lasts, strict=True):
        before = numbers[max(0, first - 1) * _BLOCK : first * _BLOCK].nonzero()
        after = numbers[last * _BLOCK : (last + 1) * _BLOCK].nonzero()
        start = (first - 1) * _BLOCK + int(before[-1]) + 1 if len(before) else 0
        stop = last * _BLOCK + int(after[0]) if len(after) else len(numbers)
        if _is_torn(numbers, range(start, stop), len(numbers) // value.shape[0]):
            return range(start, stop)
    return None


def _is_torn(numbers: Tensor, zeros: range, width: int) -> bool:
    """Whether zeros in a row, in rows of `width` numbers, are no pruning or padding, which leave
    whole rows or columns: they begin and end amid rows, with numbers above and below them, and are
    so many pages long; where they go on in the tensor beside, they take more of the row at their
    edge than sparsity leaves by chance."""
    whole = zeros.start > 0 and zeros.stop < len(numbers)
    if len(zeros) < _PAGE or (whole and len(zeros) % _PAGE):
        return False
    least = 1 if whole else _CHANCE
    if zeros.start > 0:
        above = max(0, zeros.start - width)
        if not zeros.start % width or width - zeros.start % width < least or not numbers[above]:
            return False
    if zeros.stop < len(numbers):
        below = min(zeros.stop - 1 + width, len(numbers) - 1)
        if zeros.stop % width < least or not numbers[below]:
            return False
    return True
