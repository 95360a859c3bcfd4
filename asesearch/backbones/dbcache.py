"""DBCache of the package cache-dit: calls of a diffusers transformer run their first block and take
the residual of the others from an earlier call.

Source: cache-dit (github.com/vipshop/cache-dit), used by its own functions: `enable_cache`,
`refresh_context` and `disable_cache`. Which calls reuse it decides while it samples the
calibration's images, by its own rule: the first block's residual changed by less than the threshold
since all blocks were last computed, on the mean of the batch. Where we differ: from then on those
calls are fixed (cache-dit's own `steps_computation_mask`, static), for else an image would depend
on the others of its batch, and a sampling's cost on its images. One block is computed ahead, none
behind, and no call is excluded as warm-up (cache-dit: F1B0W0).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
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
    written,
)
from asesearch.backbones.base import Backbone, ExitDepth
from asesearch.errors import ConfigError

#: Told of each call: its number, its rows, and whether it reused.
OnCall = Callable[[int, int, bool], None]


@dataclass(frozen=True, eq=False)
class DBCache:
    """Which calls reuse the residual of all blocks but the first.

    Attributes:
        reuse: (calls,) whether a call does; the first can't.

    Raises:
        ConfigError: flags of another shape, or the first is set.
    """

    reuse: Flags

    def __post_init__(self) -> None:
        if self.reuse.ndim != 1 or self.reuse.dtype != np.bool_ or self.reuse[:1].any():
            raise ConfigError(
                "DBCache takes flags (calls,), of which the first is not set; got "
                f"{self.reuse.dtype} of shape {self.reuse.shape}; calibrate it"
            )

    @property
    def num_calls(self) -> int:
        return len(self.reuse)

    def attached(self, net: Backbone) -> AbstractContextManager[Begin]:
        mask = [int(not reused) for reused in self.reuse]
        return _cached(net, steps_computation_mask=mask, steps_computation_policy="static")

    def most(self, net: Backbone) -> DBCache:
        return DBCache(np.array([False, True]))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "dbcache", "reuse": written(self.reuse)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DBCache:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: a missing or unknown key, or flags that are not a row of 0 and 1.
        """
        flags = read_flags(data.get("reuse"))
        if flags is None or set(data) != {"kind", "reuse"}:
            raise ConfigError(
                "DBCache has the keys kind and reuse, a row of 0 and 1; got "
                f"{str(data)[:80]}; calibrate it again"
            )
        return cls(flags)

    def mix(self, net: Backbone, exit_depths: Sequence[int], apart: bool = False) -> list[Mix]:
        seen = set()
        out: list[Mix] = []
        for reused, depth in zip(self.reuse, exit_depths, strict=True):
            own = apart and depth == net.depth  # of the weights that make the call
            out.append(((1.0, depth, bool(reused and (own in seen))),))
            seen.add(own)
        return out


class Deciding(Looking):
    """Not an acceleration that is kept but the measure of one: caches as cache-dit decides.

    Args:
        threshold: cache-dit's `residual_diff_threshold`; at 0 nothing is reused, at 1 every call
            but the first does.
        num_calls: of the sampling.
    """

    def __init__(self, threshold: float, num_calls: int) -> None:
        super().__init__(num_calls)
        self.threshold = threshold
        self._reused = np.zeros(num_calls, dtype=np.int64)
        self._rows = np.zeros(num_calls, dtype=np.int64)

    def attached(self, net: Backbone) -> AbstractContextManager[Begin]:
        """Caches, and begins to count anew."""
        self._reused[:] = 0
        self._rows[:] = 0
        return _cached(net, self._count, residual_diff_threshold=self.threshold)

    def _count(self, call: int, rows: int, reused: bool) -> None:
        self._reused[call] += rows * reused
        self._rows[call] += rows

    @property
    def reuse(self) -> Flags:
        """(calls,) whether a call reused, for most images where their batches differ."""
        flags: Flags = 2 * self._reused > self._rows
        return flags


def decided(threshold: float, num_calls: int, look: Callable[[Acceleration], object]) -> DBCache:
    """The calls that cache-dit reuses at a threshold, as one sampling shows."""
    deciding = Deciding(threshold, num_calls)
    look(deciding)
    return DBCache(deciding.reuse)


@contextmanager
def _cached(net: Backbone, on_call: OnCall | None = None, **options: Any) -> Iterator[Begin]:
    """Inside, cache-dit acts on the network's calls, under a configuration with these options."""
    transformer = diffusers_transformer(net, "dbcache")
    package = library("cache_dit", "cache-dit", "dbcache")
    config = package.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=0, enable_separate_cfg=False
    )
    config.update(**options)
    last = net.transformer_blocks()[-1]
    at = [0]
    ran = [False]

    def begin(call: int) -> None:
        at[0] = call
        if call == 0:
            with _quiet():
                package.refresh_context(transformer, cache_config=config)

    def whole(x_t: Tensor, t: Tensor, y: Any = None, *, exit_depth: ExitDepth = None) -> Tensor:
        depth = one_depth("DBCache takes", exit_depth)
        ran[0] = False
        out: Tensor = forward(x_t, t, y, exit_depth=depth)
        if on_call is not None:
            on_call(at[0], len(x_t), not ran[0])
        return out

    def note(*_: object) -> None:
        ran[0] = True

    forward = net.forward
    with led({net: whole}), _enabled(package, transformer, config):
        handle = None if on_call is None else last.register_forward_pre_hook(note)
        try:
            yield begin
        finally:
            if handle is not None:
                handle.remove()


@contextmanager
def _enabled(package: Any, transformer: nn.Module, config: Any) -> Iterator[None]:
    """Inside, cache-dit is enabled; behind, the transformer is as it was, which `disable_cache`
    alone does not see to: it leaves a forward, a second name of an embedding, lists of statistics
    and another order of submodules."""
    if "forward" in vars(transformer):
        raise ConfigError(
            f"a {type(transformer).__name__} of the network is led elsewhere already; attach one "
            "acceleration at a time, and disable what a pipeline has of its own"
        )
    places = [transformer, *transformer.children()]
    before = [(vars(module).copy(), dict(module._modules)) for module in places]
    try:
        with _quiet():
            package.enable_cache(transformer, cache_config=config)
        # a submodule with two names would not outlive a functional call
        for name in transformer._modules.keys() - before[0][1].keys():
            vars(transformer)[name] = transformer._modules.pop(name)
        yield
    finally:
        with _quiet():
            package.disable_cache(transformer)
        for module, (attributes, modules) in zip(places, before, strict=True):
            for name in vars(module).keys() - attributes.keys():
                delattr(module, name)
            module._modules.clear()
            module._modules.update(modules)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, nothing below an error is logged: cache-dit tells of every enabling on stdout."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
