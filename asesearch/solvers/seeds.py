"""Seeds of images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from asesearch.errors import ConfigError


def seeds_of(seeds: Iterable[Any]) -> Sequence[int]:
    """The seeds that a caller gave, as Python's integers: those of a range, list, generator, array
    or tensor (N,).

    Raises:
        ConfigError: none, or other than integers from 0 to 2^32 - 1.
    """
    if isinstance(seeds, range) and seeds and 0 <= min(seeds) <= max(seeds) < 2**32:
        return seeds
    # of an array or tensor; one without dimensions gives a number
    plain = seeds.tolist() if hasattr(seeds, "tolist") else seeds
    if not isinstance(plain, Iterable):
        raise ConfigError(
            f"seeds must be one for each image; got {_shown(seeds)}; give a list, such as range(10)"
        )
    found = list(plain)
    if not found:
        raise ConfigError("seeds must be one for each image; got none; give at least one")
    for seed in found:
        whole = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
        if not (whole and 0 <= seed < 2**32):
            raise ConfigError(
                "seeds must be integers from 0 to 2^32 - 1 (torch's CPU generator ignores higher "
                f"bits), one per image; got {_shown(seed)}; choose others"
            )
    return [int(seed) for seed in found]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
