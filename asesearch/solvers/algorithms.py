"""Solvers: functions that read as their algorithms, over pairs (t_cur, t_next) of which the last
t_next is `t_clean`. No torch: the arrays are torch's or numpy's, whichever the model gives.

A solver sees the network as `model(x, t)` and knows neither schedule nor guidance.

No solver is taken from diffusers: its schedulers keep integer timesteps and float32 betas, so they
have no VP-SDE, and its DDIM takes a uniform stride. The tests compare with them where they do
apply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asesearch.errors import ConfigError
from asesearch.sampler import grid_of
from asesearch.solvers.noise import DiscreteLevels, NoiseLevels, VPSDELevels

Array = Any
"""A float array, torch's or numpy's; what a solver is given it also returns."""
Model = Callable[[Array, float], Array]
"""(N, C, H, W) at a timestep -> the network's output, (N, C or 2·C, H, W)."""
Noise = Callable[[], Array]
"""Fresh (N, C, H, W) standard normal noise."""
Pairs = Sequence[tuple[float, float]]
"""(t_cur, t_next) of each step, descending."""


def ddpm(model: Model, x: Array, pairs: Pairs, levels: NoiseLevels, noise: Noise) -> Array:
    """Ancestral sampling on a process respaced to the timesteps called.

    The variance is learned where the network has 2·C output channels, else the posterior's ("fixed
    small").

    Source: Ho et al. 2020, algorithm 2; Nichol & Dhariwal 2021, eq. 15 and section 4; official DiT
    code, `p_sample`.
    """
    channels = x.shape[1]
    for t_cur, t_next in pairs:
        output = model(x, t_cur)
        alpha, sigma = levels.level(t_cur)
        alpha_next, sigma_next = levels.level(t_next)
        step_alpha = (alpha / alpha_next) ** 2  # 1 - beta of the respaced process
        beta = 1 - step_alpha
        x_start = (x - sigma * output[:, :channels]) / alpha
        coef_start = alpha_next * beta / sigma**2
        coef_t = math.sqrt(step_alpha) * (sigma_next / sigma) ** 2
        x = coef_start * x_start + coef_t * x
        if t_next == levels.t_clean:
            break
        # of the posterior; beta is the learned one's upper end
        std: Array = math.sqrt(beta) * sigma_next / sigma
        if output.shape[1] > channels:
            frac = (output[:, channels:] + 1) / 2
            std = std * (sigma / sigma_next) ** frac
        x = x + std * noise()
    return x


def ddim(model: Model, x: Array, pairs: Pairs, levels: NoiseLevels, noise: Noise) -> Array:
    """Deterministic DDIM (eta = 0): the first-order solver of the probability-flow ODE.

    Source: Song et al. 2021 (DDIM), eq. 12.
    """
    for t_cur, t_next in pairs:
        eps = model(x, t_cur)[:, : x.shape[1]]
        alpha, sigma = levels.level(t_cur)
        alpha_next, sigma_next = levels.level(t_next)
        x_start = (x - sigma * eps) / alpha
        x = alpha_next * x_start + sigma_next * eps
    return x


def dpmpp_2m(model: Model, x: Array, pairs: Pairs, levels: NoiseLevels, noise: Noise) -> Array:
    """DPM-Solver++(2M): second order, one call per step; into the last timestep first order.

    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2. First order at the first step and at the
    last two: into `t_clean`, where log(alpha / sigma) is infinite, and into the last timestep,
    where on an even grid it grows several times as much
    as in the step before: extrapolating that far makes 25 steps up to ten times worse on Gaussian
    mixtures, whose exact denoiser is known. Of a trained network with few steps it may be the
    better all the same: that is `dpmpp_2m_order2`. On the mixtures an even grid, as the paper's
    DPM-25 has, gains little on DDIM below 50 steps unless the data are smooth; a quadratic one
    (`dpm++2m-quadratic`) is several times closer at 10 to 50, but spends more of its steps near
    data, where schedules are deepest.
    """
    return _multistep(model, x, pairs, levels, len(pairs) - 2)


def dpmpp_2m_order2(
    model: Model, x: Array, pairs: Pairs, levels: NoiseLevels, noise: Noise
) -> Array:
    """DPM-Solver++(2M) as it is published, and as diffusers' `DPMSolverMultistepScheduler` has it:
    second order into the last timestep too; see `dpmpp_2m`."""
    return _multistep(model, x, pairs, levels, len(pairs) - 1)


def _multistep(model: Model, x: Array, pairs: Pairs, levels: NoiseLevels, second: int) -> Array:
    """DPM-Solver++(2M), of first order from step `second` on."""
    last = None
    for i, (t_cur, t_next) in enumerate(pairs):
        eps = model(x, t_cur)[:, : x.shape[1]]
        alpha, sigma = levels.level(t_cur)
        alpha_next, sigma_next = levels.level(t_next)
        x_start = (x - sigma * eps) / alpha
        if t_next == levels.t_clean:
            return x_start
        h = math.log(alpha_next / sigma_next) - math.log(alpha / sigma)
        d = x_start
        if last is not None and i < second:
            h_last, x_start_last = last
            d = x_start + (x_start - x_start_last) * (0.5 * h / h_last)
        x = sigma_next / sigma * x - alpha_next * math.expm1(-h) * d
        last = h, x_start
    return x


def unipc(model: Model, x: Array, pairs: Pairs, levels: NoiseLevels, noise: Noise) -> Array:
    """UniPC: a second-order predictor, and a corrector that makes it third order and asks the
    network nothing new.

    One call per step: the network's answer at a point also corrects the step that led there. Lower
    order where history is short; the step to `t_clean` takes the predicted image. The step into the
    last timestep is extrapolated far (see `dpmpp_2m`), the further the fewer steps are near data: a
    quadratic grid, or one of a power above 1, is closer to the exact flow than an even one.

    Source: Zhao et al. 2023 (UniPC), algorithms 5 and 6 with B2(h) = e^h - 1 and data prediction.
    """
    # log(alpha / sigma) of the points called, the predicted images there beside
    lambdas: list[float] = []
    images: list[Array] = []
    # the point that the last step left from, corrected, and its sigma
    before: tuple[Array, float] | None = None
    for t_cur, t_next in pairs:
        eps = model(x, t_cur)[:, : x.shape[1]]
        alpha, sigma = levels.level(t_cur)
        alpha_next, sigma_next = levels.level(t_next)
        lambdas.append(math.log(alpha / sigma))
        images.append((x - sigma * eps) / alpha)
        if before is not None:
            x = _unipc_step(*before, lambdas[-3:], images[-3:], alpha, sigma)
        if t_next == levels.t_clean:
            return images[-1]
        before = x, sigma
        x = _unipc_step(
            x,
            sigma,
            [*lambdas[-2:], math.log(alpha_next / sigma_next)],
            images[-2:],
            alpha_next,
            sigma_next,
        )
    return x


def _unipc_step(
    x: Array,
    sigma: float,
    lambdas: Sequence[float],
    images: Sequence[Array],
    alpha_next: float,
    sigma_next: float,
) -> Array:
    """From the last point but one of `lambdas` to the last; a corrected step has the image of that
    too."""
    h = lambdas[-1] - lambdas[-2]
    here = images[len(lambdas) - 2]
    others = [i for i in range(len(images)) if i != len(lambdas) - 2]
    ratios = np.array([(lambdas[i] - lambdas[-2]) / h for i in others])
    factor = math.expm1(-h) / -h - 1
    targets = []
    for k in range(1, len(others) + 1):
        targets.append(factor * math.factorial(k) / math.expm1(-h))
        factor = factor / -h - 1 / math.factorial(k + 1)
    weights = (
        np.full(1, 0.5)
        if len(others) == 1
        else np.linalg.solve(np.vander(ratios, increasing=True).T, targets)
    )
    mean = here  # of the predicted image over the step
    for weight, i in zip((weights / ratios).tolist(), others, strict=True):
        mean = mean + weight * (images[i] - here)
    return sigma_next / sigma * x - alpha_next * math.expm1(-h) * mean


def euler_maruyama(
    model: Model, x: Array, pairs: Pairs, levels: NoiseLevels, noise: Noise
) -> Array:
    """Euler-Maruyama on the reverse VP-SDE; no noise in the step to data.

    Source: Song et al. 2021 (score SDE), eq. 6; baofff/U-ViT, `sde.py`.
    """
    assert isinstance(levels, VPSDELevels)
    for t_cur, t_next in pairs:
        eps = model(x, t_cur)[:, : x.shape[1]]
        beta = levels.beta(t_cur)
        _, sigma = levels.level(t_cur)
        ds = (t_cur - t_next) / levels.t_max
        x = x + ds * beta * (0.5 * x - eps / sigma)
        if t_next != levels.t_clean:
            x = x + math.sqrt(beta * ds) * noise()
    return x


@dataclass(frozen=True)
class Solver:
    """A solver by name.

    Attributes:
        name: what reports and study files call it.
        integrate: from x_t at the first timestep to the image; calls `model` once per pair.
        processes: the kinds of forward process it is for, by their levels.
        power: of its timesteps' spacing, see `NoiseLevels.timesteps`.
    """

    name: str
    integrate: Callable[[Model, Array, Pairs, NoiseLevels, Noise], Array]
    processes: tuple[type[NoiseLevels], ...] = (DiscreteLevels, VPSDELevels)
    power: float = 1.0

    def check_process(self, levels: NoiseLevels) -> Solver:
        """This solver, for a process it is for.

        Raises:
            ConfigError: it is for another kind.
        """
        if not isinstance(levels, self.processes):
            kinds = " or ".join(kind.kind for kind in self.processes)
            fit = ", ".join(s.name for s in SOLVERS.values() if isinstance(levels, s.processes))
            raise ConfigError(
                f"{self.name} is for a {kinds} process; got {levels.kind}; choose one of {fit}"
            )
        return self


SOLVERS = {
    solver.name: solver
    for solver in (
        Solver("ddpm", ddpm, (DiscreteLevels,)),
        Solver("ddim", ddim),
        Solver("ddim-quadratic", ddim, power=2.0),
        Solver("dpm++2m", dpmpp_2m),
        Solver("dpm++2m-quadratic", dpmpp_2m, power=2.0),
        Solver("dpm++2m-order2", dpmpp_2m_order2),
        Solver("dpm++2m-order2-quadratic", dpmpp_2m_order2, power=2.0),
        Solver("unipc", unipc),
        Solver("unipc-quadratic", unipc, power=2.0),
        Solver("euler-maruyama", euler_maruyama, (VPSDELevels,)),
    )
}


#: Those whose timesteps may be spaced by any power.
GRIDDED = {
    "ddim": ddim,
    "dpm++2m": dpmpp_2m,
    "dpm++2m-order2": dpmpp_2m_order2,
    "unipc": unipc,
}


def find_solver(name: str, levels: NoiseLevels) -> Solver:
    """The solver of a name, for a process; its grid may have a power of its own, see
    `sampler.grid_of`.

    Raises:
        ConfigError: unknown, or for another kind of process.
    """
    own, power = grid_of(name)
    if own in GRIDDED and power not in (1.0, 2.0):
        return Solver(name, GRIDDED[own], power=power).check_process(levels)
    if name not in SOLVERS:
        raise ConfigError(
            f"unknown solver {name!r}; choose one of {', '.join(SOLVERS)}, or a grid of another "
            f"power behind {', '.join(GRIDDED)}, as in unipc-power1.5"
        )
    return SOLVERS[name].check_process(levels)
