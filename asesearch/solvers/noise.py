"""Noise levels and timestep grids: what a solver knows of a forward process. No torch.

Everything is float64. `asesearch.diffusion` adds what training needs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from asesearch.config import DiffusionConfig
from asesearch.errors import ConfigError

BETA_SCHEDULES = ("linear", "scaled_linear")


def make_betas(
    beta_schedule: str = "linear", num_train_timesteps: int = 1000
) -> npt.NDArray[np.float64]:
    """Noise added per step: (num_train_timesteps,) float64.

    `linear` is DDPM's and DiT's (1e-4 … 0.02 at 1000 steps, scaled to other lengths);
    `scaled_linear` is Stable Diffusion's (0.00085 … 0.012, linear in the square root), which the
    latent U-ViT-H have; the latent U-ViT-L are in continuous time, as those of pixels.

    Raises:
        ConfigError: unknown schedule or fewer than two timesteps.
    """
    if num_train_timesteps < 2:
        raise ConfigError(
            f"num_train_timesteps must be at least 2; got {num_train_timesteps}; DiT uses 1000"
        )
    scale = 1000 / num_train_timesteps
    if beta_schedule == "linear":
        betas = np.linspace(scale * 1e-4, scale * 0.02, num_train_timesteps)
    elif beta_schedule == "scaled_linear":
        ends = (math.sqrt(scale * 0.00085), math.sqrt(scale * 0.012))
        betas = np.linspace(*ends, num_train_timesteps) ** 2
    else:
        raise ConfigError(
            f"unknown beta_schedule {beta_schedule!r}; choose one of {', '.join(BETA_SCHEDULES)}"
        )
    if float(betas.max()) >= 1:
        raise ConfigError(
            f"num_train_timesteps = {num_train_timesteps} gives a beta of 1 or more; use at least "
            "21"
        )
    return betas


class NoiseLevels(ABC):
    """The levels of a variance-preserving process: x_t = alpha(t) x_start + sigma(t) noise, alpha²
    + sigma² = 1.

    Attributes:
        kind: `discrete` or `vp-sde`, as `DiffusionConfig.process`.
        num_train_timesteps: the network's timesteps lie in [0, num_train_timesteps), 0 nearest to
            data.
        t_clean: where sampling ends: alpha is 1 and sigma 0 there, and the network is never called.
    """

    kind: str
    num_train_timesteps: int
    t_clean: float

    @abstractmethod
    def level(self, t: float) -> tuple[float, float]:
        """(alpha, sigma) at one timestep, or at `t_clean`."""

    @abstractmethod
    def timesteps(self, num_steps: int, power: float = 1.0) -> tuple[float, ...]:
        """Timesteps a sampler calls the network at, descending: num_steps of them, without
        `t_clean`.

        t grows with the `power` of the step's number: evenly spaced at 1, denser near data above
        (evenly spaced square roots at 2), denser near noise below. A single step begins at the
        noise end.

        Raises:
            ConfigError: num_steps no integer, below 1, or above the number of diffusion timesteps.
        """


def _is_whole(number: object) -> bool:
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)


class DiscreteLevels(NoiseLevels):
    """Discrete time.

    Raises:
        ConfigError: see `make_betas`.
    """

    kind = "discrete"
    t_clean = -1.0

    def __init__(self, beta_schedule: str = "linear", num_train_timesteps: int = 1000) -> None:
        self.beta_schedule = beta_schedule
        self.num_train_timesteps = num_train_timesteps
        left = np.cumprod(1 - make_betas(beta_schedule, num_train_timesteps))
        # the last entry, index -1, is t_clean
        self._alphas: list[float] = [*np.sqrt(left).tolist(), 1.0]
        self._sigmas: list[float] = [*np.sqrt(1 - left).tolist(), 0.0]

    def level(self, t: float) -> tuple[float, float]:
        return self._alphas[int(t)], self._sigmas[int(t)]

    def timesteps(self, num_steps: int, power: float = 1.0) -> tuple[float, ...]:
        """See `NoiseLevels.timesteps`. Where steps of a grid that is not even are too short for
        integer timesteps, they become 1.

        Source: `space_timesteps` of the official DiT code with one section, whose rounding of a
        running sum it repeats; that function would call a single step at t = 0.
        """
        last = self.num_train_timesteps - 1
        if not (_is_whole(num_steps) and 1 <= num_steps <= last + 1):
            raise ConfigError(
                f"num_steps must lie in 1…{last + 1}, an integer up to the number of diffusion "
                f"timesteps; got {num_steps!r}"
            )
        if num_steps == 1:
            return (last,)
        if power != 1:
            grid = [round(last * (i / (num_steps - 1)) ** power) for i in range(num_steps)]
            shortest = range(num_steps) if power > 1 else range(last + 1 - num_steps, last + 1)
            bound = max if power > 1 else min
            return tuple(map(bound, shortest, grid))[::-1]
        stride = last / (num_steps - 1)
        return tuple(round(t) for t in accumulate([0.0] + [stride] * (num_steps - 1)))[::-1]


class VPSDELevels(NoiseLevels):
    """The continuous-time process of Song et al.: dx = -β(s)/2 x ds + sqrt(β(s)) dw, s in [0, 1], β
    linear in s.

    The network is called at t = (num_train_timesteps - 1) · s, a fraction.

    Args:
        beta_min: β at s = 0.
        beta_max: β at s = 1.
        num_train_timesteps: scale of the network's time.

    Source: Song et al. 2021, eq. 11 and appendix C; baofff/U-ViT, `sde.py` (its models of pixels
    and its latent U-ViT-L: β 0.1 … 20, network time 999·s, sampling from s = 1 to 1e-3 and then to
    0).

    Raises:
        ConfigError: betas that are not ascending, or fewer than two timesteps.
    """

    kind = "vp-sde"
    t_clean = 0.0
    s_min = 1e-3  # where the last call of a sampler is

    def __init__(
        self, beta_min: float = 0.1, beta_max: float = 20.0, num_train_timesteps: int = 1000
    ) -> None:
        if not (0 < beta_min <= beta_max and num_train_timesteps >= 2):
            raise ConfigError(
                "the VP-SDE needs 0 < beta_min <= beta_max and num_train_timesteps of at least 2; "
                f"got {beta_min}, {beta_max} and {num_train_timesteps}; U-ViT uses 0.1, 20 and 1000"
            )
        self.beta_schedule = f"vp-sde {beta_min:g} … {beta_max:g}"
        self.beta_min = beta_min
        self.beta_max = beta_max
        self.num_train_timesteps = num_train_timesteps

    @property
    def t_max(self) -> float:
        """Timestep of s = 1."""
        return float(self.num_train_timesteps - 1)

    def beta(self, t: float) -> float:
        """β, per unit of s."""
        return self.beta_min + t / self.t_max * (self.beta_max - self.beta_min)

    def level(self, t: float) -> tuple[float, float]:
        s = t / self.t_max
        integral = self.beta_min * s + 0.5 * (self.beta_max - self.beta_min) * s**2
        return math.exp(-0.5 * integral), math.sqrt(-math.expm1(-integral))

    def timesteps(self, num_steps: int, power: float = 1.0) -> tuple[float, ...]:
        if not (_is_whole(num_steps) and num_steps >= 1):
            raise ConfigError(
                f"num_steps must be at least 1, an integer; got {num_steps!r}; U-ViT takes 1000 "
                "Euler-Maruyama steps"
            )
        s = np.linspace(1.0, self.s_min ** (1 / power), num_steps) ** power
        return tuple((s * self.t_max).tolist())


def make_levels(config: DiffusionConfig) -> DiscreteLevels | VPSDELevels:
    """The levels of a study file's process.

    Raises:
        ConfigError: a beta schedule that the process does not have, or too few timesteps.
    """
    if config.process == "discrete":
        return DiscreteLevels(config.beta_schedule, config.num_train_timesteps)
    if config.beta_schedule != "linear":
        raise ConfigError(
            f"the vp-sde process has linear betas only; got {config.beta_schedule!r}; leave "
            "beta_schedule out"
        )
    return VPSDELevels(num_train_timesteps=config.num_train_timesteps)
