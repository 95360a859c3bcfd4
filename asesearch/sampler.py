"""`Sampler`: a solver, its number of steps, and what else makes its calls cheaper: the second half
of what is searched. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from asesearch.errors import ConfigError

MAX_STEPS = 999_999
#: Image seeds that a score's protocol may have; what is sampled to calibrate has those above.
SEEDS_END = 2**32 - 32
_NAME = re.compile(r"([a-z][a-z0-9.+-]*)-([1-9][0-9]*)")
#: Ways to make the calls of a sampler cheaper, other than an exit schedule, behind "+" in its name.
ACCELERATIONS = (
    *("cache-attn", "cache-mlp", "cache-block"),
    *("cache-attn-adjusted", "cache-mlp-adjusted", "cache-block-adjusted"),
    "merge",
    "deediff",
    *("dbcache", "smoothcache"),
    "guide",
)
#: The largest amount of those that have one below 100.
LIMITS = {"merge": 0.5, "deediff": 1.0, "dbcache": 1.0}
_AMOUNTS = ACCELERATIONS[:-1]
#: Their names with an amount in its shortest form, "cache-attn-0.1", or with an interval of
#: timesteps, "guide-100-700".
_ACCELERATION = (
    rf"(?:{'|'.join(_AMOUNTS)})-(?:0|(?:0|[1-9][0-9]?)\.[0-9]{{0,5}}[1-9]|[1-9][0-9]?)"
    r"|guide-(0|[1-9][0-9]{0,5})-([1-9][0-9]{0,5})"
)
#: How the timesteps of a solver are spaced, behind its name: t grows with the step's number to this
#: power. Written one way each, so that equal samplers have equal names.
GRID = r"-(?:quadratic|power(?!(?:1|2)(?:-|$))(?:[1-3](?:\.[0-9]?[1-9])?|0\.[1-9][1-9]?|4))"
_GRIDDED = re.compile(rf"(.+?)({GRID})?")


def passes_per_call(cfg_scale: float) -> int:
    """How often a network runs in a call of a sampler: guidance takes two passes, with the
    condition and without."""
    return 1 if cfg_scale == 1 else 2


def grid_of(solver: str) -> tuple[str, float]:
    """A solver's name without its grid, and the power of the grid: "unipc-quadratic" has 2,
    "ddim-power1.5" has 1.5, "ddim" has 1.

    Above 1 the calls are denser near data, below 1 near noise.
    """
    found = _GRIDDED.fullmatch(solver)
    if found is None or not found[2]:
        return solver, 1.0
    name = found[2].removeprefix("-")
    return found[1], 2.0 if name == "quadratic" else float(name.removeprefix("power"))


def acceleration_of(name: str) -> tuple[str, tuple[float, ...]]:
    """What an acceleration does and how much of it: "cache-attn-0.1" is ("cache-attn", (0.1,)), and
    "guide-100-700" is ("guide", (100, 700)).

    Raises:
        ConfigError: a name of another form, too large an amount, or an empty interval.
    """
    found = re.fullmatch(_ACCELERATION, name)
    if found is None:
        raise ConfigError(_no_acceleration(name))
    if found[1] is not None:
        low, high = int(found[1]), int(found[2])
        if low >= high:
            raise ConfigError(
                f"the acceleration guide-LO-HI holds timesteps LO ≤ t < HI; got {name!r}; write "
                'for example "guide-100-700"'
            )
        return "guide", (low, high)
    kind, _, amount = name.rpartition("-")
    if float(amount) > LIMITS.get(kind, 100):
        raise ConfigError(
            f"{kind} takes an amount from 0 to {LIMITS[kind]:g}; got {name!r}; write for example "
            f'"{kind}-{LIMITS[kind]:g}"'
        )
    return kind, (float(amount),)


def _no_acceleration(name: str) -> str:
    """Why a name is none of an acceleration."""
    if "+" in name.strip("+"):
        return f"a sampler has one acceleration at most; got {name!r}; leave the others out"
    begun = re.match(rf"({'|'.join(sorted(ACCELERATIONS, key=len, reverse=True))})-", name)
    if begun is None:
        return (
            "an acceleration is cache-PART-AMOUNT or cache-PART-adjusted-AMOUNT (PART attn, mlp or "
            "block), merge-AMOUNT, deediff-AMOUNT, dbcache-AMOUNT, smoothcache-AMOUNT or "
            f'guide-LO-HI; got {name!r}; write for example "cache-attn-0.1"'
        )
    if begun[1] == "guide":
        return (
            "the acceleration guide-LO-HI has two timesteps, integers from 0 to 999999; got "
            f'{name!r}; write for example "guide-100-700"'
        )
    return (
        f"the acceleration {begun[1]} takes an amount below 100 in its shortest form, with at most "
        f'six digits behind the point; got {name!r}; write for example "{begun[1]}-0.1"'
    )


@dataclass(frozen=True, order=True)
class Sampler:
    """How images are made, apart from guidance, batch and precision: `str()` gives "ddim-50", or
    "ddim-50+cache-attn-0.1".

    Attributes:
        solver: name of the solver, see `asesearch.solvers.SOLVERS`.
        num_steps: steps of the solver.
        acceleration: what makes its calls cheaper, see `acceleration_of`; empty for nothing.

    Raises:
        ConfigError: an empty solver name, a number of steps that is not an integer in 1…999999, or
            an unknown acceleration.
    """

    solver: str
    num_steps: int
    acceleration: str = ""

    def __post_init__(self) -> None:
        steps = self.num_steps
        if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
            raise ConfigError(
                f"num_steps must be an integer in 1…{MAX_STEPS}; got {steps!r}; choose another"
            )
        if self.acceleration:
            acceleration_of(self.acceleration)
        if _NAME.fullmatch(f"{self.solver}-{steps}") is None:
            raise ConfigError(
                f"a solver's name has small letters, digits, +, - and .; got {self.solver!r}; "
                'write for example "ddim"'
            )

    @property
    def plain(self) -> Sampler:
        """The same without its acceleration."""
        return Sampler(self.solver, self.num_steps)

    def __str__(self) -> str:
        name = f"{self.solver}-{self.num_steps}"
        return f"{name}+{self.acceleration}" if self.acceleration else name

    @classmethod
    def from_string(cls, text: str) -> Sampler:
        """The sampler that `str()` wrote.

        Raises:
            ConfigError: not of the form SOLVER-STEPS or SOLVER-STEPS+ACCELERATION.
        """
        name, plus, acceleration = text, "", ""
        if any(f"+{kind}" in text for kind in ACCELERATIONS):  # a solver's name may hold a plus too
            name, plus, acceleration = text.rpartition("+")
        found = _NAME.fullmatch(name)
        if found is None or len(found[2]) > len(str(MAX_STEPS)):
            raise ConfigError(
                "a sampler is written SOLVER-STEPS, with an acceleration as "
                f'SOLVER-STEPS+ACCELERATION; got {text!r}; write for example "ddim-50"'
            )
        if plus:
            acceleration_of(acceleration)
        return cls(found[1], int(found[2]), acceleration)
