"""Block caching: what a part of a block gave at one call of a sampler stands in for it at later
calls, where it would change little.

Source: Wimbauer et al., "Cache Me if You Can: Accelerating Diffusion Models through Block Caching",
CVPR 2024, arXiv 2312.03209. Which calls reuse is fixed before sampling, from the relative change
that a few samplings of the network show (`recording`, `reuse_of`). Where we differ: a part is
computed again once the changes since it was last computed sum to the threshold, for DiT's and
U-ViT's attention, perceptron or whole block (its residual) alike.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from asesearch.backbones.acceleration import (
    PARTS,
    Begin,
    Flags,
    Looking,
    Mix,
    as_tokens,
    check_width,
    led,
    plain_blocks,
    read_flags,
    run_at,
    written,
)
from asesearch.backbones.base import Backbone
from asesearch.errors import ConfigError

Array = npt.NDArray[np.float64]
Half = npt.NDArray[np.float16]
#: What is reused, given the number of its flag, what was kept, and a way to compute it after all.
Adjust = Callable[[int, Tensor, Callable[[], Tensor]], Tensor]


@dataclass(frozen=True, eq=False)
class Caching:
    """Which blocks reuse what they gave.

    A block that did not run at any earlier call of the batch, for the schedule left it out, is
    computed, whatever its flag says.

    Attributes:
        part: "attn", "mlp", or "block" for a whole block's residual.
        reuse: (calls, blocks) whether a block reuses at a call, over `transformer_blocks`.
        adjustment: (flags that are set, 2, D) for each in the order of `reuse`, by channel: what
            is reused has its scale raised by the first and the second added; None leaves it as it
            is.

    Raises:
        ConfigError: an unknown part, or flags or an adjustment of another shape.
    """

    part: str
    reuse: Flags
    adjustment: Half | None = None

    def __post_init__(self) -> None:
        if self.part not in PARTS or self.reuse.ndim != 2 or self.reuse.dtype != np.bool_:
            raise ConfigError(
                f"caching takes a part of {', '.join(PARTS)} and flags (calls, blocks); got "
                f"{self.part!r} and {self.reuse.dtype} of shape {self.reuse.shape}; calibrate it"
            )
        if self.adjustment is not None and self.adjustment.shape[:-1] != (self.reuse.sum(), 2):
            raise ConfigError(
                f"an adjustment has two rows for each of {self.reuse.sum()} reused outputs; got "
                f"shape {self.adjustment.shape}; calibrate it"
            )

    @property
    def num_calls(self) -> int:
        return len(self.reuse)

    def attached(self, net: Backbone) -> AbstractContextManager[Begin]:
        if self.adjustment is None:
            return self.leading(net, lambda number, kept, compute: kept)
        if (width := self.adjustment.shape[-1]) > 1:  # one stands for all, where nothing is reused
            check_width(net, width)
        device = next(net.parameters()).device
        table = torch.from_numpy(self.adjustment.astype(np.float32)).to(device)
        return self.leading(net, lambda number, kept, compute: adjusted(kept, table[number]))

    @contextmanager
    def leading(self, net: Backbone, adjust: Adjust) -> Iterator[Begin]:
        """As `attached`, with what is reused as `adjust` makes it."""
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
        numbers = self.reuse.cumsum().reshape(self.reuse.shape) - 1

        def begin(call: int) -> None:
            if call == 0:
                kept.clear()
            at[0] = call

        def through(index: int, module: nn.Module) -> Callable[..., Any]:
            forward = module.forward
            whole = self.part == "block"

            def call(x: Tensor, *args: Any) -> Tensor:
                place = (at[0], index)
                if self.reuse[place] and index in kept:

                    def compute() -> Tensor:
                        out = as_tokens(forward(x, *args))
                        return out - x if whole else out

                    value = adjust(int(numbers[place]), kept[index], compute)
                    return x + value if whole else value
                out = as_tokens(forward(x, *args))
                if later[place]:
                    kept[index] = out - x if whole else out
                return out

            return call

        with led({m: through(i, m) for i, m in enumerate(modules)}):
            yield begin

    def to_dict(self) -> dict[str, Any]:
        rows = [written(flags) for flags in self.reuse]
        out = {"kind": "cache", "part": self.part, "reuse": rows}
        if self.adjustment is not None:
            little = self.adjustment.astype("<f2").tobytes()
            out["adjustment"] = base64.b64encode(little).decode("ascii")
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Caching:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: a missing or unknown key, flags that are not rows of 0 and 1 of one length,
                or an adjustment that is not that of so many flags.
        """
        rows = data.get("reuse")
        found = list(map(read_flags, rows)) if isinstance(rows, list) else []
        read = [row for row in found if row is not None]
        ok = len(read) == len(found) and len({*map(len, read)}) == 1
        if not ok or set(data) - {"adjustment"} != {"kind", "part", "reuse"}:
            raise ConfigError(
                "caching has the keys kind, part and reuse, rows of 0 and 1, and maybe adjustment; "
                f"got {str(data)[:80]}; calibrate it again"
            )
        flags = np.stack(read)
        if "adjustment" not in data:
            return cls(data["part"], flags)
        return cls(data["part"], flags, _adjustment(data["adjustment"], int(flags.sum())))

    def most(self, net: Backbone) -> Caching:
        flags = np.zeros((2, len(plain_blocks(net))), dtype=np.bool_)
        flags[1] = True
        if self.adjustment is None:
            return Caching(self.part, flags)
        none = np.zeros((flags.shape[1], 2, self.adjustment.shape[-1]), dtype=np.float16)
        return Caching(self.part, flags, none)

    def mix(self, net: Backbone, exit_depths: Sequence[int], apart: bool = False) -> list[Mix]:
        kept = np.zeros((2, self.reuse.shape[1]), dtype=np.bool_)
        out: list[Mix] = []
        for flags, depth in zip(self.reuse, exit_depths, strict=True):
            runs = run_at(net, depth)
            seen = kept[int(apart and depth == net.depth)]
            reused = float((flags & seen & runs).sum() / max(1, runs.sum()))
            seen |= runs
            out.append(((1 - reused, depth, False), (reused, depth, True)))
        return out


class Recorder(Looking):
    """Not an acceleration but the measure of one: how much each part changes from call to call.

    Args:
        part: see `Caching`.
        num_calls: of the sampling.
    """

    def __init__(self, part: str, num_calls: int) -> None:
        super().__init__(num_calls)
        self.part = part
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


def adjusted(kept: Tensor, adjustment: Tensor) -> Tensor:
    """Kept output (N, L, D) scaled and shifted: (2, D), of which the first is over a scale of 1."""
    scale, shift = adjustment.to(kept)
    return kept + torch.addcmul(shift, kept, scale)


def _adjustment(text: object, count: int) -> Half:
    """What `Caching.to_dict` wrote of so many flags.

    Raises:
        ConfigError: something else.
    """
    try:
        raw = base64.b64decode(str(text).encode("ascii"), validate=True)
        values: Half = np.frombuffer(raw, "<f2").astype(np.float16)
        return values.reshape(count, 2, -1 if raw else 1)
    except ValueError as error:
        raise ConfigError(
            f"an adjustment is two rows of float16 for each of {count} reused outputs, as base64; "
            f"got {str(text)[:40]!r}; calibrate it again"
        ) from error


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
