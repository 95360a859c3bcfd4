"""Names of solvers and samplers as a study file has them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from asesearch.errors import ConfigError
from asesearch.sampler import GRID, acceleration_of

#: The solvers: those with any grid of timesteps, and those with one.
_SOLVER = rf"(?:(?:ddim|dpm\+\+2m)(?:{GRID})?|unipc{GRID}|ddpm|euler-maruyama)"


def _fully(pattern: str, example: str) -> AfterValidator:
    """Refuses text that does not match as a whole."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise ValueError(
                "should be ddpm, euler-maruyama, ddim, dpm++2m or unipc, with -quadratic or "
                "-powerX (X from 0.1 to 4, shortest form) behind unipc, and maybe behind ddim "
                f"and dpm++2m; write for example {example}"
            )
        return text

    return AfterValidator(check)


SolverName = Annotated[str, _fully(_SOLVER, '"unipc-quadratic"')]


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
    _fully(rf"{_SOLVER}-[1-9][0-9]{{0,5}}(?:\+.+)?", '"unipc-quadratic-6"'),
    AfterValidator(_with_acceleration),
]
