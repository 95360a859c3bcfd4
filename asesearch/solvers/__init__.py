"""Solvers by name, and the noise levels and timesteps that they run over. No torch.

The same functions integrate torch's tensors and numpy's arrays, so that every runtime samples by
one code.
"""

from asesearch.solvers.algorithms import (
    SOLVERS,
    Array,
    Model,
    Noise,
    Pairs,
    Solver,
    find_solver,
)
from asesearch.solvers.noise import (
    BETA_SCHEDULES,
    DiscreteLevels,
    NoiseLevels,
    VPSDELevels,
    make_betas,
    make_levels,
)
from asesearch.solvers.seeds import seeds_of

__all__ = [
    "BETA_SCHEDULES",
    "SOLVERS",
    "Array",
    "DiscreteLevels",
    "Model",
    "Noise",
    "NoiseLevels",
    "Pairs",
    "Solver",
    "VPSDELevels",
    "find_solver",
    "make_betas",
    "make_levels",
    "seeds_of",
]
