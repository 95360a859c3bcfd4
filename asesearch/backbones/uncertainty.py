"""Exits where a block's own estimate of its uncertainty is low: each image leaves at its own depth.

Source: Tang et al., "DeeDiff: Dynamic Uncertainty-Aware Early Exiting for Accelerating Diffusion
Model Generation", 2023, arXiv 2309.17074. A linear map of a block's tokens and of the timestep
estimates the uncertainty, tanh |exit's output - full output|; an image leaves at the first block
whose estimate is at most the threshold. Where we differ: the paper trains estimators and network
together, with a loss at every exit that the uncertainty weighs; here the network stays as it is,
and the logit of the uncertainty, averaged over the image, is a ridge regression on the tokens' mean
and a sinusoidal embedding of t, over one sampling of the calibration's images.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from asesearch.backbones.acceleration import (
    Acceleration,
    Begin,
    Looking,
    Mix,
    as_tokens,
    check_width,
    led,
    one_depth,
    plain_blocks,
)
from asesearch.backbones.base import Backbone, ExitDepth
from asesearch.backbones.conditioning import Conditioning
from asesearch.backbones.dit import timestep_embedding
from asesearch.errors import ConfigError
from asesearch.sampler import LIMITS

#: Channels of the embedding of t that estimators see.
TIME_CHANNELS = 32
#: Of the regression, on standardised features, over the number of samples.
RIDGE = 0.1
#: Uncertainties are taken to lie this far inside (0, 1).
_MARGIN = 1e-6

Estimators = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class DeeDiff:
    """Which images leave where.

    Under guidance the two halves of a batch leave each for itself. An exit schedule still holds:
    no image goes deeper than it says.

    Attributes:
        threshold: an image leaves at the first block whose uncertainty is at most this; at 0 none
            does.
        estimators: (depth - 1, D + TIME_CHANNELS + 1) weights of each droppable block but the last:
            of the tokens' mean, of the embedding of t, and a bias.
        exits: (calls, depth) images that left after 1…depth blocks in the calibration.

    Raises:
        ConfigError: a threshold outside 0…1, or arrays of other shapes.
    """

    threshold: float
    estimators: Estimators
    exits: Counts

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= LIMITS["deediff"]:
            raise ConfigError(
                f"a threshold of uncertainty lies in 0…{LIMITS['deediff']:g}; got "
                f"{self.threshold!r}; choose another"
            )
        counts = self.exits
        ok = counts.ndim == 2 and counts.min(initial=0) >= 0 and (counts.sum(axis=1) > 0).all()
        if not ok or self.estimators.shape[:-1] != (counts.shape[1] - 1,):
            raise ConfigError(
                "uncertainty-based exits have an estimator for each droppable block but the last, "
                f"and counts (calls, depth) of images; got shapes {self.estimators.shape} and "
                f"{counts.shape}; calibrate them again"
            )

    @property
    def num_calls(self) -> int:
        return len(self.exits)

    def attached(self, net: Backbone) -> AbstractContextManager[Begin]:
        return self.leading(net)

    @contextmanager
    def leading(
        self, net: Backbone, on_exits: Callable[[int, Tensor], None] | None = None
    ) -> Iterator[Begin]:
        """As `attached`; `on_exits` sees the number of each call and the blocks it ran of each
        image, (N,)."""
        blocks = plain_blocks(net)[-net.depth :]
        if len(blocks) != self.exits.shape[1]:
            raise ConfigError(
                f"these exits were calibrated for {self.exits.shape[1]} droppable blocks; got a "
                f"network of {len(blocks)}; calibrate them for this one"
            )
        if len(self.estimators):
            check_width(net, self.estimators.shape[1] - TIME_CHANNELS - 1)
        weights = torch.from_numpy(self.estimators).to(next(net.parameters()).device)
        now = _Call(self.threshold)
        at = [0]

        def begin(call: int) -> None:
            at[0] = call

        def whole(x_t: Tensor, t: Tensor, y: Any = None, *, exit_depth: ExitDepth = None) -> Tensor:
            depth = one_depth("uncertainty-based exits take", exit_depth)
            now.begin(t, net.depth if depth is None else depth)
            out: Tensor = forward(x_t, t, y, exit_depth=exit_depth)
            if on_exits is not None:
                on_exits(at[0], now.depths)
            return out

        def through(index: int, block: nn.Module) -> Callable[..., Tensor]:
            inner = block.forward
            last = index + 1 == net.depth
            return lambda x, *args: now.run(inner, None if last else weights[index], index, x, args)

        forward = net.forward
        calls: dict[nn.Module, Callable[..., Any]] = {net: whole}
        with led(calls | {b: through(i, b) for i, b in enumerate(blocks)}):
            yield begin

    def to_dict(self) -> dict[str, Any]:
        little = self.estimators.astype("<f4").tobytes()
        return {
            "kind": "deediff",
            "threshold": self.threshold,
            "estimators": base64.b64encode(little).decode("ascii"),
            "exits": self.exits.tolist(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DeeDiff:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: a missing or unknown key, or values that don't fit each other.
        """
        try:
            if set(data) != {"kind", "threshold", "estimators", "exits"}:
                raise ValueError("keys")
            exits = np.asarray(data["exits"])
            if exits.ndim != 2 or exits.dtype.kind != "i":
                raise ValueError("exits")
            raw = base64.b64decode(data["estimators"].encode("ascii"), validate=True)
            values = np.frombuffer(raw, "<f4").astype(np.float32)
            rows = exits.shape[1] - 1
            estimators = values.reshape(rows, -1) if rows else np.zeros((0, 1), dtype=np.float32)
            threshold = float(data["threshold"])
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                "uncertainty-based exits has the keys kind, threshold, estimators (base64 of "
                f"float32) and exits, rows of integers; got {str(data)[:80]}; calibrate it again"
            ) from error
        return cls(threshold, estimators, exits.astype(np.int64))

    def most(self, net: Backbone) -> DeeDiff:
        """Every block estimates, and no image leaves: the same for all calibrations."""
        return DeeDiff(0.0, np.zeros_like(self.estimators), _all_full(2, net.depth))

    def mix(self, net: Backbone, exit_depths: Sequence[int], apart: bool = False) -> list[Mix]:
        """In expectation: as often as the calibration's images left."""
        out: list[Mix] = []
        for counts, depth in zip(self.exits, exit_depths, strict=True):
            parts = counts / counts.sum()
            early = [(float(p), d, True) for d, p in enumerate(parts[: depth - 1], 1) if p > 0]
            rest = float(parts[depth - 1 :].sum())
            out.append((*early, (rest, depth, True)))
        return out


@dataclass
class _Call:
    """Which images of one network call still go on."""

    threshold: float
    time: Tensor = field(default_factory=lambda: torch.empty(0))  # (N, TIME_CHANNELS)
    depths: Tensor = field(default_factory=lambda: torch.empty(0))  # (N,) blocks run in the end
    rows: Tensor | None = None  # images that go on; None for all

    def begin(self, t: Tensor, exit_depth: int) -> None:
        self.time = timestep_embedding(t, TIME_CHANNELS)
        self.depths = torch.full_like(t, exit_depth, dtype=torch.long)
        self.rows = None

    def run(
        self,
        inner: Callable[..., Any],
        weights: Tensor | None,
        index: int,
        x: Tensor,
        args: tuple[Tensor, ...],
    ) -> Tensor:
        """A droppable block on the images that go on, and who leaves behind it."""
        rows = self.rows
        if rows is None:
            fresh = out = as_tokens(inner(x, *args))
        elif len(rows) == 0:
            return x
        else:
            fresh = as_tokens(inner(x[rows], *(a[rows] for a in args)))
            out = x.index_copy(0, rows, fresh.to(x.dtype))
        if weights is None:
            return out
        time = self.time if rows is None else self.time[rows]
        features = torch.cat([_pooled(fresh), time], dim=-1)
        weights = weights.to(features.device)
        # not as a matrix product, whose rounding would depend on the batch
        logit = (features * weights[:-1]).sum(dim=-1) + weights[-1]
        if self.threshold > 0:
            self._leave(logit <= _logit(self.threshold), index + 1)
        return out

    def _leave(self, done: Tensor, depth: int) -> None:
        rows = torch.arange(len(self.time), device=done.device) if self.rows is None else self.rows
        leaving = rows[done]
        if len(leaving):
            self.depths[leaving] = self.depths[leaving].clamp(max=depth)
            self.rows = rows[~done]


class Learning(Looking):
    """Not an acceleration but the measure of one: how far the outputs of exits are from the full
    output, and what the blocks' tokens are then. The network is run at full depth."""

    def __init__(self, num_calls: int) -> None:
        super().__init__(num_calls)
        self._gram: list[Tensor] = []
        self._cross: list[Tensor] = []

    @contextmanager
    def attached(self, net: Backbone) -> Iterator[Begin]:
        """Begins to measure anew."""
        blocks = plain_blocks(net)[-net.depth :]
        self._gram = []
        self._cross = []
        pooled: list[Tensor] = []

        def through(block: nn.Module) -> Callable[..., Tensor]:
            inner = block.forward

            def call(x: Tensor, *args: Any) -> Tensor:
                out = as_tokens(inner(x, *args))
                pooled.append(_pooled(out))
                return out

            return call

        def whole(
            x_t: Tensor,
            t: Tensor,
            y: Conditioning | None = None,
            *,
            exit_depth: ExitDepth = None,
        ) -> Tensor:
            pooled.clear()
            outputs = list(net.all_exits(x_t, t, y))[-net.depth :]  # after 1…depth blocks
            eps = [out[:, : net.in_channels].float() for out in outputs]
            gaps = [torch.tanh((e - eps[-1]).abs()).flatten(1).mean(dim=1) for e in eps[:-1]]
            self._add(pooled[:-1], timestep_embedding(t, TIME_CHANNELS), gaps)
            return outputs[-1]

        calls: dict[nn.Module, Callable[..., Any]] = {net: whole}
        with led(calls | {block: through(block) for block in blocks}), torch.no_grad():
            yield lambda call: None

    def _add(self, pooled: list[Tensor], time: Tensor, gaps: list[Tensor]) -> None:
        for i, (tokens, gap) in enumerate(zip(pooled, gaps, strict=True)):
            one = torch.ones_like(time[:, :1])
            features = torch.cat([tokens, time, one], dim=-1).double()  # (N, F)
            target = torch.logit(gap.double(), _MARGIN)
            if i == len(self._gram):
                size = features.shape[1]
                self._gram.append(features.new_zeros(size, size))
                self._cross.append(features.new_zeros(size))
            self._gram[i] += features.T @ features
            self._cross[i] += features.T @ target

    @property
    def estimators(self) -> Estimators:
        """See `DeeDiff`."""
        rows = [_regressed(g, c) for g, c in zip(self._gram, self._cross, strict=True)]
        found: Estimators = (
            torch.stack(rows).float().cpu().numpy() if rows else np.zeros((0, 1), np.float32)
        )
        return found


class _Counting(Looking):
    """Not an acceleration but the measure of one: where images leave."""

    def __init__(self, deediff: DeeDiff) -> None:
        super().__init__(deediff.num_calls)
        self.deediff = deediff
        self.exits = np.zeros_like(deediff.exits)

    def attached(self, net: Backbone) -> AbstractContextManager[Begin]:
        """Exits as it will."""
        self.exits[:] = 0
        return self.deediff.leading(net, self._count)

    def _count(self, call: int, depths: Tensor) -> None:
        counts = torch.bincount(depths, minlength=self.exits.shape[1] + 1)[1:]
        self.exits[call] += counts.cpu().numpy()


def learned(threshold: float, num_calls: int, look: Callable[[Acceleration], object]) -> DeeDiff:
    """The exits of a threshold: one sampling teaches the estimators, one more shows who leaves
    where."""
    learning = Learning(num_calls)
    look(learning)
    estimators = learning.estimators
    return counted(DeeDiff(threshold, estimators, _all_full(num_calls, len(estimators) + 1)), look)


def counted(deediff: DeeDiff, look: Callable[[Acceleration], object]) -> DeeDiff:
    """The same with the exits that one sampling shows."""
    counting = _Counting(deediff)
    look(counting)
    return replace(deediff, exits=counting.exits)


def _regressed(gram: Tensor, cross: Tensor) -> Tensor:
    """Ridge regression from sums over samples whose last feature is 1: (F, F), (F,) -> (F,)."""
    count = gram[-1, -1]
    mean = gram[-1, :-1] / count
    mean_target = cross[-1] / count
    covariance = gram[:-1, :-1] / count - mean[:, None] * mean
    spread = covariance.diagonal().clamp(min=0).sqrt()
    varies = spread > 1e-6 * (1 + mean.abs())
    scale = torch.where(varies, spread, torch.full_like(spread, math.inf))
    correlation = covariance / scale[:, None] / scale
    correlation.diagonal().add_(RIDGE)
    along = (cross[:-1] / count - mean * mean_target) / scale
    weights = torch.linalg.solve(correlation, along) / scale
    return torch.cat([weights, (mean_target - mean @ weights)[None]])


def _all_full(num_calls: int, depth: int) -> Counts:
    """Counts of one image that never leaves early."""
    exits = np.zeros((num_calls, depth), dtype=np.int64)
    exits[:, -1] = 1
    return exits


def _pooled(tokens: Tensor) -> Tensor:
    """The mean of an image's tokens, in float32: (N, L, D) -> (N, D)."""
    return tokens.float().mean(dim=1)


def _logit(p: float) -> float:
    return math.inf if p >= 1 else math.log(p / (1 - p))
