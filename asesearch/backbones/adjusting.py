"""Cached output adjusted by a scale and a shift of each channel, call and block.

Source: Wimbauer et al., "Cache Me if You Can: Accelerating Diffusion Models through Block Caching",
CVPR 2024, arXiv 2312.03209, "scale-shift adjustment". Where we differ: the paper trains scales and
shifts by distillation, with the network that caches as student; here each is the least-squares fit
to what the block would have given, over all images and tokens of one sampling of the calibration's
images. As there, the sampling is the caching network's own: what is fitted is in use at once, so
later blocks and calls are fitted to what they will get.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from asesearch.backbones.acceleration import Begin, Flags, Looking
from asesearch.backbones.base import Backbone
from asesearch.backbones.caching import Caching, Half, adjusted

#: A channel that varies less than this part of its mean square is as good as constant.
_CONSTANT = 1e-9


class Fitting(Looking):
    """Not an acceleration but the measure of one: computes what is reused after all, and fits the
    reused to it.

    Args:
        caching: without adjustment.
    """

    def __init__(self, caching: Caching) -> None:
        super().__init__(caching.num_calls)
        self.caching = caching
        self._sums: dict[int, Tensor] = {}
        self._count: dict[int, int] = {}

    @contextmanager
    def attached(self, net: Backbone) -> Iterator[Begin]:
        """Caches with the adjustment of the images so far, this batch's included; begins anew."""
        self._sums.clear()
        self._count.clear()
        with self.caching.leading(net, self._adjusted) as begin, torch.no_grad():
            yield begin

    def _adjusted(self, number: int, kept: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        x = kept.double().flatten(0, -2)  # (N·L, D)
        y = compute().double().flatten(0, -2)
        sums = torch.stack([x.sum(0), y.sum(0), (x * x).sum(0), (x * y).sum(0)])  # (4, D)
        self._sums[number] = self._sums.get(number, 0) + sums
        self._count[number] = self._count.get(number, 0) + len(x)
        return adjusted(kept, self._fit(number))

    def _fit(self, number: int) -> Tensor:
        """(2, D) what the scale is more than 1, and the shift: float32 that float16 holds."""
        mean_x, mean_y, square, product = self._sums[number] / self._count[number]
        variance = square - mean_x**2
        slope = (product - mean_x * mean_y) / variance - 1
        varies = variance > _CONSTANT * square
        slope = torch.where(varies, slope, torch.zeros_like(slope)).half().float()
        # the shift makes the means right for the slope as it is kept
        shift = (mean_y - mean_x - slope.double() * mean_x).half().float()
        fit = torch.stack([slope, shift])
        return torch.where(fit.isfinite().all(dim=0), fit, torch.zeros_like(fit))

    @property
    def adjustment(self) -> Half:
        """See `Caching`. What no image reused is not adjusted."""
        width = next((s.shape[1] for s in self._sums.values()), 1)
        out = torch.zeros(int(self.caching.reuse.sum()), 2, width, dtype=torch.float16)
        for number in self._sums:
            out[number] = self._fit(number).cpu()
        found: Half = out.numpy()
        return found


def fitted(part: str, reuse: Flags, look: Callable[[Fitting], object]) -> Caching:
    """Caching with the adjustment that one sampling gives."""
    caching = Caching(part, reuse)
    fitting = Fitting(caching)
    if reuse.any():
        look(fitting)
    return Caching(part, reuse, fitting.adjustment)
