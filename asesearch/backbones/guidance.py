"""Guidance interval: classifier-free guidance acts at some calls of a sampler, and the others run
the conditional half of the batch alone.

Source: Kynkäänniemi et al., "Applying Guidance in a Limited Interval Improves Sample and
Distribution Quality in Diffusion Models", NeurIPS 2024, arXiv 2404.07724. Where we differ: the
interval is one of timesteps, not of noise levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asesearch.backbones.acceleration import Begin, Flags, Mix, led, read_flags, written
from asesearch.backbones.base import Backbone, ExitDepth
from asesearch.backbones.conditioning import take
from asesearch.errors import ConfigError


@dataclass(frozen=True, eq=False)
class GuidanceInterval:
    """Which calls are guided, of any network.

    A guided call has the images twice: with their conditions first, then without. Outside the
    interval the first half is run and stands for both, which guidance of any strength gives back.

    Attributes:
        inside: (calls,) whether guidance acts at a call.

    Raises:
        ConfigError: flags of another shape.
    """

    inside: Flags

    def __post_init__(self) -> None:
        if self.inside.ndim != 1 or self.inside.dtype != np.bool_:
            raise ConfigError(
                f"a guidance interval takes flags (calls,); got {self.inside.dtype} of shape "
                f"{self.inside.shape}; calibrate it"
            )

    @classmethod
    def between(cls, low: float, high: float, timesteps: Sequence[float]) -> GuidanceInterval:
        """Guidance at the calls whose timesteps t have low ≤ t < high."""
        return cls(np.array([low <= t < high for t in timesteps], dtype=np.bool_))

    @property
    def num_calls(self) -> int:
        return len(self.inside)

    @contextmanager
    def attached(self, net: Backbone) -> Iterator[Begin]:
        at = [0]
        forward: Callable[..., Tensor] = net.forward

        def begin(call: int) -> None:
            at[0] = call

        def whole(x_t: Tensor, t: Tensor, y: Any = None, *, exit_depth: ExitDepth = None) -> Tensor:
            if self.inside[at[0]]:
                return forward(x_t, t, y, exit_depth=exit_depth)
            half = _half(len(x_t))
            depth = exit_depth[half] if isinstance(exit_depth, Tensor) else exit_depth
            cond = forward(x_t[half], t[half], take(y, half), exit_depth=depth)  # (N, C, H, W)
            return torch.cat([cond, cond])  # (2N, C, H, W)

        with led({net: whole}):
            yield begin

    def most(self, net: Backbone) -> GuidanceInterval:
        return GuidanceInterval(np.array([True, False]))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "guide", "inside": written(self.inside)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GuidanceInterval:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: a missing or unknown key, or flags that are not a row of 0 and 1.
        """
        flags = read_flags(data.get("inside"))
        if flags is None or set(data) != {"kind", "inside"}:
            raise ConfigError(
                "a guidance interval has the keys kind and inside, a row of 0 and 1; got "
                f"{str(data)[:80]}; calibrate it again"
            )
        return cls(flags)

    def mix(self, net: Backbone, exit_depths: Sequence[int], apart: bool = False) -> list[Mix]:
        pairs = zip(self.inside, exit_depths, strict=True)
        return [((1.0, depth, not on),) for on, depth in pairs]


def check_guided(cfg_scale: float) -> None:
    """Refuse a guidance interval where there is no guidance.

    Raises:
        ConfigError: cfg_scale 1.
    """
    if cfg_scale == 1.0:
        raise ConfigError(
            "a guidance interval says where guidance acts, so it needs some; got cfg_scale 1, "
            "which is none; set another cfg_scale, or leave the acceleration guide out"
        )


def _half(count: int) -> slice:
    """The conditional rows of a guided call of so many.

    Raises:
        ConfigError: an odd number, which no guided call has.
    """
    if count % 2:
        raise ConfigError(
            "a call outside the guidance interval takes each image twice, with its condition and "
            f"without; got {count} rows; give a guided batch"
        )
    return slice(count // 2)
