"""From the name of an acceleration to one that runs: what it needs to know of the network is
measured by sampling it a little."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from asesearch.backbones.acceleration import Acceleration
from asesearch.backbones.adjusting import fitted
from asesearch.backbones.caching import Caching, Recorder, reuse_of
from asesearch.backbones.dbcache import DBCache, decided
from asesearch.backbones.guidance import GuidanceInterval
from asesearch.backbones.merging import Merging
from asesearch.backbones.smoothcache import SmoothCache, smoothed
from asesearch.backbones.uncertainty import DeeDiff, learned
from asesearch.errors import ConfigError
from asesearch.sampler import SEEDS_END, acceleration_of

#: Images that show how much a part changes from call to call.
NUM_IMAGES = 16
#: Their seeds, which no protocol has.
SEEDS = range(SEEDS_END, SEEDS_END + NUM_IMAGES)
#: Samples the full network for `SEEDS`, under an acceleration that only looks on.
Look = Callable[[Acceleration], object]
#: Accelerations of an amount, a number of calls and what samples.
LEARNED: dict[str, Callable[[float, int, Look], Acceleration]] = {
    "deediff": learned,
    "dbcache": decided,
    "smoothcache": smoothed,
}


def calibrated(name: str, timesteps: Sequence[float], look: Look) -> Acceleration:
    """The acceleration of a name for a sampler.

    Args:
        name: see `asesearch.sampler.acceleration_of`.
        timesteps: of the sampler's network calls.
        look: samples the full network; called only where something is to be measured.

    Raises:
        ConfigError: an unknown name, or a network that it does not fit.
    """
    kind, amounts = acceleration_of(name)
    if kind == "guide":
        low, high = amounts
        return GuidanceInterval.between(low, high, timesteps)
    (amount,) = amounts
    if kind == "merge":
        return Merging(amount)
    if kind in LEARNED:
        return LEARNED[kind](amount, len(timesteps), look)
    _, part, *adjusted = kind.split("-")
    recorder = Recorder(part, len(timesteps))
    look(recorder)
    reuse = reuse_of(recorder.changes, amount)
    return fitted(part, reuse, look) if adjusted else Caching(part, reuse)


def num_looks(name: str) -> int:
    """Samplings that calibrating an acceleration takes, of `NUM_IMAGES` images each, at most."""
    kind, _ = acceleration_of(name)
    if kind in ("guide", "merge"):
        return 0
    return 2 if kind == "deediff" or kind.endswith("-adjusted") else 1


def read_acceleration(data: dict[str, Any]) -> Acceleration:
    """Inverse of an acceleration's `to_dict`.

    Raises:
        ConfigError: plain data of another kind.
    """
    readers: dict[Any, Callable[[dict[str, Any]], Acceleration]] = {
        "cache": Caching.from_dict,
        "merge": Merging.from_dict,
        "deediff": DeeDiff.from_dict,
        "dbcache": DBCache.from_dict,
        "smoothcache": SmoothCache.from_dict,
        "guide": GuidanceInterval.from_dict,
    }
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in readers:
        raise ConfigError(
            f"an acceleration is of kind {', '.join(readers)}; got {kind!r}; calibrate it again"
        )
    return readers[kind](data)


def check_named(acceleration: Acceleration, name: str) -> None:
    """Refuse an acceleration that is not what its name says, as far as it tells.

    Raises:
        ConfigError: an unknown name, or that of another.
    """
    kind, amounts = acceleration_of(name)
    told = acceleration.to_dict()
    own: tuple[object, ...] = (told["kind"],)
    wanted: tuple[object, ...] = (kind,)
    if kind.startswith("cache-"):
        own = (told["kind"], told.get("part"), "adjustment" in told)
        wanted = ("cache", kind.split("-")[1], kind.endswith("-adjusted"))
    elif kind in ("merge", "deediff"):
        own = (told["kind"], told.get("ratio", told.get("threshold")))
        wanted = (kind, *amounts)
    if own != wanted:
        raise ConfigError(
            f"a calibration is that of the acceleration's name, {name}; got one of "
            f"{' '.join(map(str, own))}; calibrate it again"
        )
