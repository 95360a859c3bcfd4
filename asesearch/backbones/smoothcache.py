"""SmoothCache by its package dit-smoothcache: attention and feed-forward layers of a diffusers
transformer hand out what they gave at an earlier call.

Source: Liu et al., "SmoothCache: A Universal Inference Acceleration Technique for Diffusion
Transformers", CVPR 2025 Workshops, arXiv 2411.10510. The package's `SmoothCacheHelper` does the
reusing, under a schedule of calls for each kind of layer. The package on PyPI (0.1.1) has none of
the repository's calibration, so schedules are made here by its rule (`Measuring`, `scheduled`). Its
`DiffuserCacheHelper` wraps self-attention alone; here all three kinds of layers are, as in the
paper.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from asesearch.backbones.acceleration import (
    Acceleration,
    Begin,
    Flags,
    Looking,
    Mix,
    diffusers_transformer,
    led,
    library,
    one_depth,
    read_flags,
    run_at,
    written,
)
from asesearch.backbones.base import Backbone, ExitDepth
from asesearch.errors import ConfigError

Array = npt.NDArray[np.float64]
#: Layers of diffusers' BasicTransformerBlock: self-attention, cross-attention, feed-forward.
LAYERS = ("attn1", "attn2", "ff")
#: A layer is computed again after this many calls at the latest.
LOOKAHEAD = 3


@dataclass(frozen=True, eq=False)
class SmoothCache:
    """Which layers hand out what they gave, at which calls.

    A layer that did not run at any earlier call of the batch, for the schedule left its block out,
    is computed, whatever its flag says.

    Attributes:
        reuse: layer -> (calls,) whether those of all blocks reuse at a call.
        shares: layer -> its part of the FLOPs of all these layers.

    Raises:
        ConfigError: unknown layers, or flags of different shapes.
    """

    reuse: dict[str, Flags]
    shares: dict[str, float]

    def __post_init__(self) -> None:
        known = set(LAYERS) >= self.reuse.keys() == self.shares.keys() != set()
        shapes = {flags.shape for flags in self.reuse.values()}
        if not known or len(shapes) != 1 or len(*shapes) != 1:
            raise ConfigError(
                f"SmoothCache takes flags (calls,) and a share for layers of {', '.join(LAYERS)}; "
                f"got { ({k: v.shape for k, v in self.reuse.items()}) } and {self.shares}; "
                "calibrate it"
            )

    @property
    def num_calls(self) -> int:
        return len(next(iter(self.reuse.values())))

    @contextmanager
    def attached(self, net: Backbone) -> Iterator[Begin]:
        modules = _layers(net)
        package = library("SmoothCache", "dit-smoothcache", "smoothcache")
        if modules.keys() != self.reuse.keys():
            raise ConfigError(
                f"this SmoothCache was calibrated for the layers {', '.join(self.reuse)}; got a "
                f"network with {', '.join(modules)}; calibrate it for this one"
            )
        helper = package.SmoothCacheHelper(
            model=net.transformer,
            block_classes=list({type(block) for block in net.transformer_blocks()}),
            components_to_wrap=list(self.reuse),
            schedule={name: (~flags).astype(int).tolist() for name, flags in self.reuse.items()},
        )

        at = [0]

        def begin(call: int) -> None:
            if call == 0:
                helper.reset_state()
            at[0] = call

        def whole(x_t: Tensor, t: Tensor, y: Any = None, *, exit_depth: ExitDepth = None) -> Tensor:
            depth = one_depth("SmoothCache takes", exit_depth)
            # the helper counts calls of each layer, and a schedule leaves some of them out
            helper.current_steps = dict.fromkeys(helper.original_forwards, at[0])
            out: Tensor = forward(x_t, t, y, exit_depth=depth)
            return out

        forward = net.forward
        wrapped = [module for group in modules.values() for module in group]
        with led({net: whole}), _led_by(helper, wrapped):
            yield begin

    def most(self, net: Backbone) -> SmoothCache:
        return SmoothCache(dict.fromkeys(self.reuse, np.array([False, True])), self.shares)

    def to_dict(self) -> dict[str, Any]:
        rows = {name: written(flags) for name, flags in self.reuse.items()}
        return {"kind": "smoothcache", "reuse": rows, "shares": self.shares}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SmoothCache:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: a missing or unknown key, or values that don't fit each other.
        """
        rows, shares = data.get("reuse"), data.get("shares")
        ok = set(data) == {"kind", "reuse", "shares"}
        ok = ok and isinstance(rows, dict) and isinstance(shares, dict)
        rows, shares = (rows or {}, shares or {}) if ok else ({}, {})
        found = {name: read_flags(row) for name, row in rows.items()}
        flags = {name: row for name, row in found.items() if row is not None}
        ok = ok and flags.keys() == found.keys()
        if not ok or not all(type(s) in (int, float) and 0 <= s <= 1 for s in shares.values()):
            raise ConfigError(
                "SmoothCache has the keys kind, reuse, a row of 0 and 1 for each layer, and "
                f"shares, a number for each; got {str(data)[:80]}; calibrate it again"
            )
        return cls(flags, {name: float(share) for name, share in shares.items()})

    def mix(self, net: Backbone, exit_depths: Sequence[int], apart: bool = False) -> list[Mix]:
        """A call that reuses some kinds of layers counts as so much of one that reuses all, by
        their FLOPs."""
        kept = {name: np.zeros((2, net.depth), dtype=np.bool_) for name in self.reuse}
        out: list[Mix] = []
        for call, depth in enumerate(exit_depths):
            runs = run_at(net, depth)
            reused = 0.0
            for name, flags in self.reuse.items():
                seen = kept[name][int(apart and depth == net.depth)]
                again = seen & runs & flags[call]
                reused += self.shares[name] * float(again.sum() / max(1, runs.sum()))
                seen |= runs
            out.append(((1 - reused, depth, False), (reused, depth, True)))
        return out


class Measuring(Looking):
    """Not an acceleration but the measure of one: how far what layers give is from what they gave
    at earlier calls.

    Args:
        num_calls: of the sampling.
    """

    def __init__(self, num_calls: int) -> None:
        super().__init__(num_calls)
        self._change: dict[str, Array] = {}
        self._size: dict[str, Array] = {}
        self._flops: dict[str, float] = {}

    @contextmanager
    def attached(self, net: Backbone) -> Iterator[Begin]:
        """Looks on, and begins to measure anew."""
        modules = _layers(net)
        shape = (LOOKAHEAD, self.num_calls, net.depth)
        self._change = {name: np.zeros(shape) for name in modules}
        self._size = {name: np.zeros(shape) for name in modules}
        self._flops = {}
        before: dict[tuple[str, int], list[Tensor]] = {}
        at = [0]

        def begin(call: int) -> None:
            if call == 0:
                before.clear()
            at[0] = call

        def through(name: str, block: int, module: nn.Module) -> Callable[..., Any]:
            forward = module.forward

            def call(*args: Any, **kwargs: Any) -> Any:
                if name not in self._flops:
                    self._flops[name] = _flops(forward, args, kwargs)
                out = forward(*args, **kwargs)
                value = out.float()
                earlier = before.setdefault((name, block), [])
                for back, old in enumerate(earlier):
                    place = (back, at[0], block)
                    self._change[name][place] += float((value - old).abs().sum())
                    self._size[name][place] += float(value.abs().sum())
                earlier.insert(0, value)
                del earlier[LOOKAHEAD:]
                return out

            return call

        calls = {m: through(k, i, m) for k, group in modules.items() for i, m in enumerate(group)}
        with led(calls), torch.no_grad():
            yield begin

    @property
    def errors(self) -> dict[str, Array]:
        """Layer -> (LOOKAHEAD, calls): entry [k, i] is the sum of absolute differences of what it
        gives at call i and gave k + 1 calls before, over that of absolute values, as the mean of
        all blocks."""
        found = {}
        for name, change in self._change.items():
            size = self._size[name]
            ratio = np.divide(change, size, out=np.zeros_like(size), where=size > 0)
            found[name] = ratio.mean(axis=-1)
        return found

    @property
    def shares(self) -> dict[str, float]:
        """See `SmoothCache`."""
        total = sum(self._flops.values())
        return {name: flops / total for name, flops in self._flops.items()}


def smoothed(
    threshold: float, num_calls: int, look: Callable[[Acceleration], object]
) -> SmoothCache:
    """The schedules of a threshold, as one sampling shows."""
    library("SmoothCache", "dit-smoothcache", "smoothcache")  # before anything is measured
    measuring = Measuring(num_calls)
    look(measuring)
    errors = measuring.errors
    reuse = {name: scheduled(found, threshold) for name, found in errors.items()}
    return SmoothCache(reuse, measuring.shares)


def scheduled(errors: Array, threshold: float) -> Flags:
    """(calls,) which reuse, given a layer's `Measuring.errors`.

    From each computed call, as many of the following as the lookahead allows reuse it, while what
    the last of them would give is at most the threshold away. The first and the last call are
    computed, and at a threshold of 0 all are.
    """
    lookahead, num_calls = errors.shape
    flags = np.zeros(num_calls, dtype=np.bool_)
    call = 0
    while call < num_calls:
        fits = [
            k
            for k in range(1, lookahead + 1)
            if call + k < num_calls and errors[k - 1, call + k] <= threshold and threshold > 0
        ]
        skipped = max(fits, default=0)
        flags[call + 1 : call + 1 + skipped] = True
        call += 1 + skipped
    flags[-1] = False
    return flags


def _layers(net: Backbone) -> dict[str, list[nn.Module]]:
    """The layers of every block, by kind."""
    diffusers_transformer(net, "smoothcache")
    blocks = net.transformer_blocks()
    found = {name: [getattr(block, name, None) for block in blocks] for name in LAYERS}
    return {k: [m for m in v if m is not None] for k, v in found.items() if None not in v}


@contextmanager
def _led_by(helper: Any, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the helper is enabled, without the line that it prints for each layer of each call;
    behind, no module has a forward of its own."""
    if taken := [module for module in modules if "forward" in vars(module)]:
        raise ConfigError(
            f"a {type(taken[0]).__name__} of the network is led elsewhere already; attach one "
            "acceleration at a time"
        )
    names = vars(sys.modules[type(helper).__module__])
    before = names.get("print", print)
    try:
        names["print"] = lambda *_: None
        helper.enable()
        yield
    finally:
        names["print"] = before
        helper.disable()
        for module in modules:
            vars(module).pop("forward", None)


def _flops(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Of one call, counted with attention as plain products: not every fused one is counted."""
    # not at module level: bundles load without them
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(*args, **kwargs)
    return float(counter.get_total_flops())
