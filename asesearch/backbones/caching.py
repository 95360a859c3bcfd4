"""Block caching: what a part of a block gave at one call of a sampler stands in for it at later
calls, where it would change little.

Source: Wimbauer et al., "Cache Me if You Can: Accelerating Diffusion Models through Block Caching",
CVPR 2024, arXiv 2312.03209. Which calls reuse is fixed before sampling, from the relative change
that a few samplings of the network show (`recording`, `reuse_of`). Where we differ: a part is
computed again once the changes since it was last computed sum to the threshold, for DiT's and
U-ViT's attention, perceptron or whole block (its residual) alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from asesearch.backbones.acceleration import (
    PARTS,
    Begin,
    Mix,
    as_tokens,
    led,
    plain_blocks,
    run_at,
)
from asesearch.backbones.base import Backbone
from asesearch.errors import ConfigError

Flags = npt.NDArray[np.bool_]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Caching:
    """Which blocks reuse what they gave.

    A block that did not run at any earlier call of the batch, for the schedule left it out, is
    computed, whatever its flag says.

    Attributes:
        part: "attn", "mlp", or "block" for a whole block's residual.
        reuse: (calls, blocks) whether a block reuses at a call, over `transformer_blocks`.

    Raises:
        ConfigError: an unknown part, or flags of another shape.
    """

    part: str
    reuse: Flags

    def __post_init__(self) -> None:
        if self.part not in PARTS or self.reuse.ndim != 2 or self.reuse.dtype != np.bool_:
            raise ConfigError(
                f"caching takes a part of {', '.join(PARTS)} and flags (calls, blocks); got "
                f"{self.part!r} and {self.reuse.dtype} of shape {self.reuse.shape}; calibrate it"
            )

    @property
    def num_calls(self) -> int:
        return len(self.reuse)

    @contextmanager
    def attached(self, net: Backbone) -> Iterator[Begin]:
        modules = _modules(net, self.part)
        if len(modules) != self.reuse.shape[1]:
            raise ConfigError(
                f"this caching was calibrated for {self.reuse.shape[1]} blocks; got a network of "
                f"{len(modules)}; calibrate it for this one"
            )
        kept: dict[int, Tensor] = {}
        at = [0]
        later = np.zeros_like(self.reuse)  # whether what is computed here is read again
        later[:-1] = np.logical_or.accumulate(self.reuse[::-1])[::-1][1:]

        def begin(call: int) -> None:
            if call == 0:
                kept.clear()
            at[0] = call

        def through(index: int, module: nn.Module) -> Callable[..., Any]:
            forward = module.forward
            whole = self.part == "block"

            def call(x: Tensor, *args: Any) -> Tensor:
                if self.reuse[at[0], index] and index in kept:
                    return x + kept[index] if whole else kept[index]
                out = as_tokens(forward(x, *args))
                if later[at[0], index]:
                    kept[index] = out - x if whole else out
                return out

            return call

        with led({m: through(i, m) for i, m in enumerate(modules)}):
            yield begin

    def to_dict(self) -> dict[str, Any]:
        rows = ["".join(map(str, row)) for row in self.reuse.astype(int)]
        return {"kind": "cache", "part": self.part, "reuse": rows}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Caching:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: a missing or unknown key, or flags that are not rows of 0 and 1 of one
                length.
        """
        rows = data.get("reuse")
        ok = isinstance(rows, list) and bool(rows)
        ok = ok and all(isinstance(row, str) and set(row) <= {"0", "1"} for row in rows or ())
        if not ok or len({*map(len, rows or ())}) != 1 or set(data) != {"kind", "part", "reuse"}:
            raise ConfigError(
                f"caching has the keys kind, part and reuse, rows of 0 and 1; got {str(data)[:80]}"
                "; calibrate it again"
            )
        assert rows is not None
        flags = np.array([[c == "1" for c in row] for row in rows], dtype=np.bool_)
        return cls(data["part"], flags)

    def most(self, net: Backbone) -> Caching:
        flags = np.zeros((2, len(plain_blocks(net))), dtype=np.bool_)
        flags[1] = True
        return Caching(self.part, flags)

    def mix(self, net: Backbone, exit_depths: Sequence[int]) -> list[Mix]:
        seen = np.zeros(self.reuse.shape[1], dtype=np.bool_)
        out: list[Mix] = []
        for flags, depth in zip(self.reuse, exit_depths, strict=True):
            runs = run_at(net, depth)
            reused = float((flags & seen & runs).sum() / max(1, runs.sum()))
            seen |= runs
            out.append(((1 - reused, depth, False), (reused, depth, True)))
        return out


class Recorder:
    """Not an acceleration but the measure of one: how much each part changes from call to call.

    Args:
        part: see `Caching`.
        num_calls: of the sampling.

    Attributes:
        num_calls: of the sampling.
    """

    def __init__(self, part: str, num_calls: int) -> None:
        self.part = part
        self.num_calls = num_calls
        self._change: Array = np.zeros((0, 0))
        self._size: Array = np.zeros((0, 0))

    @property
    def changes(self) -> Array:
        """(calls, blocks) mean absolute change of a part's output since the call before, over its
        mean absolute size there; the first call's is 0."""
        return np.divide(
            self._change, self._size, out=np.zeros_like(self._size), where=self._size > 0
        )

    @contextmanager
    def attached(self, net: Backbone) -> Iterator[Begin]:
        """Looks on, and begins to measure anew."""
        modules = _modules(net, self.part)
        self._change = np.zeros((self.num_calls, len(modules)))
        self._size = np.zeros((self.num_calls, len(modules)))
        before: dict[int, Tensor] = {}
        at = [0]

        def begin(call: int) -> None:
            if call == 0:
                before.clear()
            at[0] = call

        def through(index: int, module: nn.Module) -> Callable[..., Any]:
            forward = module.forward

            def call(x: Tensor, *args: Any) -> Tensor:
                out = as_tokens(forward(x, *args))
                value = (out - x if self.part == "block" else out).float()
                if index in before:
                    place = (at[0], index)
                    self._change[place] += float((value - before[index]).abs().sum())
                    self._size[place] += float(value.abs().sum())
                before[index] = value
                return out

            return call

        with led({m: through(i, m) for i, m in enumerate(modules)}), torch.no_grad():
            yield begin

    def most(self, net: Backbone) -> Recorder:
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "recorder", "part": self.part, "changes": self.changes.tolist()}

    def mix(self, net: Backbone, exit_depths: Sequence[int]) -> list[Mix]:
        return [((1.0, depth, False),) for depth in exit_depths]


def reuse_of(changes: Array, threshold: float) -> Flags:
    """Which calls may reuse, given (calls, blocks) relative changes from call to call.

    A block is computed at the first call, and again once the changes since it was last computed sum
    to the threshold. So a threshold of 0 reuses nothing.
    """
    flags = np.zeros(changes.shape, dtype=np.bool_)
    since = np.zeros(changes.shape[1])
    for call in range(1, len(changes)):
        since = since + changes[call]
        flags[call] = since < threshold
        since = np.where(flags[call], since, 0.0)
    return flags


def _modules(net: Backbone, part: str) -> list[nn.Module]:
    """The part of every transformer block."""
    blocks = plain_blocks(net)
    return blocks if part == "block" else [getattr(block, part) for block in blocks]
