"""What a batch is conditioned on: class labels (N,), or a prompt's tensors by name, each with
leading dimension N. Who handles it without caring which does so by these functions; None, of an
unconditional network, passes through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

import torch
from torch import Tensor

Conditioning = Tensor | dict[str, Tensor]


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


def repeat(y: Conditioning, count: int) -> Conditioning:
    """The one row of `y`, `count` times, without copying."""
    return each(lambda value: value.expand(count, *value.shape[1:]), y)
