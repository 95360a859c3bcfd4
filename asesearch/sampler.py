"""`Sampler`: a solver and its number of steps, the second half of what is searched. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from asesearch.errors import ConfigError

MAX_STEPS = 999_999
_NAME = re.compile(r"([a-z][a-z0-9.+-]*)-([1-9][0-9]*)")
#: How the timesteps of a solver are spaced, behind its name: t grows with the step's number to this
#: power. Written one way each, so that equal samplers have equal names.
GRID = r"-(?:quadratic|power(?!(?:1|2)(?:-|$))(?:[1-3](?:\.[0-9]?[1-9])?|0\.[1-9][1-9]?|4))"
_GRIDDED = re.compile(rf"(.+?)({GRID})?")


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


@dataclass(frozen=True, order=True)
class Sampler:
    """How images are made, apart from guidance, batch and precision: `str()` gives "ddim-50".

    Attributes:
        solver: name of the solver, see `asesearch.solvers.SOLVERS`.
        num_steps: steps of the solver.

    Raises:
        ConfigError: an empty solver name, or a number of steps that is not an integer in 1…999999.
    """

    solver: str
    num_steps: int

    def __post_init__(self) -> None:
        steps = self.num_steps
        if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
            raise ConfigError(
                f"num_steps must be an integer in 1…{MAX_STEPS}; got {steps!r}; choose another"
            )
        if _NAME.fullmatch(str(self)) is None:
            raise ConfigError(
                f"a solver's name has small letters, digits, +, - and .; got {self.solver!r}; "
                'write for example "ddim"'
            )

    def __str__(self) -> str:
        return f"{self.solver}-{self.num_steps}"

    @classmethod
    def from_string(cls, text: str) -> Sampler:
        """The sampler that `str()` wrote.

        Raises:
            ConfigError: not of the form SOLVER-STEPS.
        """
        found = _NAME.fullmatch(text)
        if found is None or len(found[2]) > len(str(MAX_STEPS)):
            raise ConfigError(
                f'a sampler is written SOLVER-STEPS; got {text!r}; write for example "ddim-50"'
            )
        return cls(found[1], int(found[2]))
