"""What a batch is conditioned on: class labels (N,), or a prompt's tensors by name, each with
leading dimension N. Who handles it without caring which does so by these functions; None, of an
unconditional network, passes through them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from asesearch.errors import ConfigError

Conditioning = Tensor | dict[str, Tensor]
#: What a caller may give for it.
Given = Conditioning | Sequence[int] | npt.NDArray[Any]
#: A prompt's embedding (N, L, D), and which of its tokens count (N, L), all where there is none.
TOKENS, MASK = "encoder_hidden_states", "encoder_attention_mask"
_EXCLUDED = -10000.0  # of diffusers' bias, where a token does not count


def conditioning_of(y: Given | None) -> Conditioning | None:
    """What a caller gave, labels as a tensor.

    Raises:
        ConfigError: neither labels nor a prompt's tensors.
    """
    if y is None or isinstance(y, Tensor):
        return y
    if isinstance(y, Mapping) and all(isinstance(v, Tensor) and v.ndim for v in y.values()):
        return dict(y)
    if isinstance(y, np.ndarray) and y.dtype.kind in "iu":
        return torch.from_numpy(y.astype(np.int64))
    try:
        if not isinstance(y, Sequence) or isinstance(y, str | bytes):
            raise TypeError
        if any(isinstance(label, bool) for label in y):
            raise TypeError
        return torch.tensor([operator.index(label) for label in y], dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # the latter three: a huge one
        shown = repr(y)
        raise ConfigError(
            "y must be class labels, an integer for each image in a list, array or tensor, or a "
            f"prompt's tensors by name; got {shown[:60]}{'…' if len(shown) > 60 else ''}; pass "
            "these, or leave y out"
        ) from None


def labels_of(y: Conditioning | None) -> Tensor | None:
    """The class labels; None for anything else."""
    return y if isinstance(y, Tensor) else None


def prompt_of(y: Conditioning | None) -> dict[str, Tensor] | None:
    """A prompt's tensors; None for anything else."""
    return None if y is None or isinstance(y, Tensor) else dict(y)


@overload
def each(change: Callable[..., Tensor], y: Conditioning, *others: Conditioning) -> Conditioning: ...
@overload
def each(
    change: Callable[..., Tensor], y: Conditioning | None, *others: Conditioning | None
) -> Conditioning | None: ...
def each(
    change: Callable[..., Tensor], y: Conditioning | None, *others: Conditioning | None
) -> Conditioning | None:
    """Change each tensor of `y`, given the same tensor of others of its kind: `change(y, *others)`.

    Raises:
        TypeError: labels and prompts together.
    """
    if len({type(other) for other in (y, *others)}) > 1:
        raise TypeError("labels and prompts can't be combined; give one kind")
    if y is None:
        return None
    if isinstance(y, Tensor):
        return change(y, *others)
    prompts = [prompt_of(other) or {} for other in others]
    return {name: change(value, *(p[name] for p in prompts)) for name, value in y.items()}


def take(y: Conditioning | None, rows: slice | list[int]) -> Conditioning | None:
    """Some rows of the batch."""
    return each(lambda value: value[rows], y)


def join(parts: Sequence[Conditioning | None]) -> Conditioning | None:
    """Batches one after the other, as one."""
    return each(lambda *values: torch.cat(values), *parts)


def to(y: Conditioning | None, device: torch.device) -> Conditioning | None:
    """The same on a device."""
    return each(lambda value: value.to(device), y)


def where(rows: Tensor, a: Conditioning, b: Conditioning) -> Conditioning:
    """`a` in the rows that `rows` (N,) names, else `b`."""

    def choose(x: Tensor, z: Tensor) -> Tensor:
        return torch.where(rows.view(-1, *(1,) * (z.ndim - 1)), x, z)

    # the names are those of `b`: a null condition may know more
    return each(lambda z, x: choose(x, z), b, a)


def matched(a: Conditioning, b: Conditioning) -> tuple[Conditioning, Conditioning]:
    """Both as they can stand in one batch: prompts get a mask where only the other has one, or has
    another number of tokens, and the shorter is padded with tokens that don't count."""
    one, other = prompt_of(a), prompt_of(b)
    if one is None or other is None or not (TOKENS in one and TOKENS in other):
        return a, b
    length = max(one[TOKENS].shape[1], other[TOKENS].shape[1])
    if MASK not in one.keys() | other.keys() and one[TOKENS].shape[1] == other[TOKENS].shape[1]:
        return a, b
    biased = any(MASK in prompt and prompt[MASK].ndim == 3 for prompt in (one, other))
    return _padded(one, length, biased), _padded(other, length, biased)


def _padded(prompt: dict[str, Tensor], length: int, biased: bool) -> dict[str, Tensor]:
    """A prompt of `length` tokens, with a mask (N, L), or diffusers' bias (N, 1, L) if `biased`."""
    tokens = prompt[TOKENS]
    mask = prompt.get(MASK, tokens.new_ones(tokens.shape[:2]))
    if biased and mask.ndim == 2:
        mask = ((1 - mask.to(tokens.dtype)) * _EXCLUDED).unsqueeze(1)  # (N, 1, L)
    more = length - tokens.shape[1]
    rest = pad(mask, (0, more), value=_EXCLUDED if biased else 0)
    return prompt | {TOKENS: pad(tokens, (0, 0, 0, more)), MASK: rest}


def repeat(y: Conditioning, count: int) -> Conditioning:
    """The one row of `y`, `count` times, without copying."""
    return each(lambda value: value.expand(count, *value.shape[1:]), y)
