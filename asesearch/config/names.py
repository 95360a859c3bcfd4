"""Names of solvers and samplers as a study file has them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from asesearch.errors import ConfigError
from asesearch.sampler import GRID, acceleration_of

#: The solvers: those with any grid of timesteps, and those with one.
_SOLVER = rf"(?:(?:ddim|dpm\+\+2m(?:-order2)?|unipc)(?:{GRID})?|ddpm|euler-maruyama)"


_SOLVERS = (
    "ddpm, euler-maruyama, ddim, dpm++2m, dpm++2m-order2 or unipc, the last four maybe with "
    "-quadratic or -powerX (X from 0.1 to 4, shortest form)"
)


def _fully(pattern: str, rule: str) -> AfterValidator:
    """Refuses text that does not match as a whole."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise ValueError(rule)
        return text

    return AfterValidator(check)


SolverName = Annotated[
    str,
    _fully(
        _SOLVER,
        f'should be {_SOLVERS}; write for example "unipc-quadratic" (steps go into num_steps, an '
        "acceleration into search.samplers)",
    ),
]


def _with_acceleration(text: str) -> str:
    """Refuses an acceleration that there is not, or more of one than it takes."""
    found = re.fullmatch(rf"{_SOLVER}-[0-9]+\+(.+)", text)
    try:
        if found is not None:
            acceleration_of(found[1])
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return text


#: A way to sample as "SOLVER-STEPS" or "SOLVER-STEPS+ACCELERATION".
SamplerName = Annotated[
    str,
    _fully(
        rf"{_SOLVER}-[1-9][0-9]{{0,5}}(?:\+.+)?",
        "should be SOLVER-STEPS or SOLVER-STEPS+ACCELERATION, 1 to 999999 steps; a solver is "
        f'{_SOLVERS}; write for example "unipc-quadratic-6"',
    ),
    AfterValidator(_with_acceleration),
]
