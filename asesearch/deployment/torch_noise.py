"""torch's standard normal numbers without torch, so that a seed means the same image everywhere.

torch's CPU generator is the Mersenne Twister that numpy has too; from 16 numbers on it makes pairs
of them normal by Box and Muller's method in blocks of 16. The test compares with `torch.randn`;
what is left is the rounding of logarithm, cosine and sine.

Source: PyTorch, `aten/src/ATen/native/cpu/DistributionTemplates.h` (`normal_fill`) and
`aten/src/ATen/core/DistributionsHelper.h`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from asesearch.errors import ConfigError

BLOCK = 16

Floats = npt.NDArray[np.float32]


def image_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Callable[[], Floats]:
    """Noise whose image i follows from seeds[i] alone, as `asesearch.sampling.image_noise`; each
    call gives fresh (N, *shape) float32.

    Raises:
        ConfigError: images of fewer than 16 numbers, for which torch has another method.
    """
    count = math.prod(shape)
    if count < BLOCK:
        raise ConfigError(
            f"noise is made for images of at least {BLOCK} numbers; got {shape}; give noise"
        )
    generators = [np.random.RandomState(int(seed)) for seed in seeds]

    def noise() -> Floats:
        rows = [_normal(generator, count) for generator in generators]
        return np.stack(rows).reshape(len(rows), *shape)

    return noise


def _normal(generator: np.random.RandomState, count: int) -> Floats:
    """The next `count` standard normal numbers."""
    rest = count % BLOCK
    values = _box_muller(_uniform(generator, count - rest))
    if rest:
        # torch makes the last whole block anew, over numbers that it has drawn already
        _uniform(generator, rest)
        values = np.concatenate([values[: count - BLOCK], _box_muller(_uniform(generator, BLOCK))])
    return values


def _uniform(generator: np.random.RandomState, count: int) -> Floats:
    """24 random bits each, in [0, 1)."""
    words = np.frombuffer(generator.bytes(4 * count), dtype="<u4")
    return (words & (2**24 - 1)).astype(np.float32) * np.float32(2**-24)


def _box_muller(uniform: Floats) -> Floats:
    first, second = np.moveaxis(uniform.reshape(-1, 2, BLOCK // 2), 1, 0)
    radius = np.sqrt(np.float32(-2) * np.log1p(-first))
    angle = np.float32(2 * math.pi) * second
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(-1).astype(np.float32, copy=False)
