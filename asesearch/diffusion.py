"""Forward processes, hybrid loss and timestep grids. Everything is computed in float64 and cast at
the end.

Source: Ho et al. 2020 (DDPM); Nichol & Dhariwal 2021 (learned variance, hybrid loss), and the
official DiT code's `diffusion/` (facebookresearch/DiT), which the numbers match.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from asesearch.config import DiffusionConfig
from asesearch.errors import ConfigError

BETA_SCHEDULES = ("linear", "scaled_linear")


def make_betas(beta_schedule: str = "linear", num_train_timesteps: int = 1000) -> Tensor:
    """Noise added per step: (num_train_timesteps,) float64.

    `linear` is DDPM's and DiT's (1e-4 … 0.02 at 1000 steps, scaled to other lengths);
    `scaled_linear` is Stable Diffusion's (0.00085 … 0.012, linear in the square root), which the
    latent U-ViTs use.

    Raises:
        ConfigError: unknown schedule or fewer than two timesteps.
    """
    if num_train_timesteps < 2:
        raise ConfigError(
            f"num_train_timesteps must be at least 2; got {num_train_timesteps}; DiT uses 1000"
        )
    scale = 1000 / num_train_timesteps
    if beta_schedule == "linear":
        betas = torch.linspace(scale * 1e-4, scale * 0.02, num_train_timesteps, dtype=torch.float64)
    elif beta_schedule == "scaled_linear":
        ends = (math.sqrt(scale * 0.00085), math.sqrt(scale * 0.012))
        betas = torch.linspace(*ends, num_train_timesteps, dtype=torch.float64) ** 2
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


class Process(ABC):
    """A variance-preserving forward process: x_t = alpha(t) x_start + sigma(t) noise, alpha² +
    sigma² = 1.

    Attributes:
        beta_schedule: name of the noise schedule; with `num_train_timesteps` it says all about the
            process.
        num_train_timesteps: the network's timesteps lie in [0, num_train_timesteps), 0 nearest to
            data.
        time_dtype: type of a timestep: integer in discrete time, float32 in continuous time.
        t_clean: where sampling ends: alpha is 1 and sigma 0 there, and the network is never called.
    """

    beta_schedule: str
    num_train_timesteps: int
    time_dtype: torch.dtype
    t_clean: float

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Factor of x_start at timesteps t, which may include `t_clean`: any shape, same shape out,
        float64."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Factor of the noise at timesteps t, as `alpha`."""

    @abstractmethod
    def draw_t(self, u: Tensor) -> Tensor:
        """Training timesteps for uniform numbers in [0, 1): (N,) -> (N,) of `time_dtype`."""

    @abstractmethod
    def timesteps(self, num_steps: int, quadratic: bool = False) -> tuple[float, ...]:
        """Timesteps a sampler calls the network at, descending: num_steps of them, without
        `t_clean`.

        Evenly spaced, or with evenly spaced square roots: denser near data. A single step begins at
        the noise end.

        Raises:
            ConfigError: num_steps below 1, or above the number of diffusion timesteps.
        """

    def level(self, t: float) -> tuple[float, float]:
        """(alpha, sigma) at one timestep, or at `t_clean`."""
        time = torch.tensor(
            t, dtype=torch.float64 if self.time_dtype.is_floating_point else self.time_dtype
        )
        return float(self.alpha(time)), float(self.sigma(time))

    def snr(self, t: Tensor | None = None) -> Tensor:
        """Signal-to-noise ratio (alpha / sigma)² at t (default: every integer timestep): float64,
        infinite where sigma is 0."""
        t = torch.arange(self.num_train_timesteps) if t is None else t
        return (self.alpha(t) / self.sigma(t)) ** 2

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noise clean images: (N, C, H, W), (N,) timesteps, (N, C, H, W) -> x_t (N, C, H, W)."""
        return (
            _per_image(self.alpha(t), x_start) * x_start
            + _per_image(self.sigma(t), x_start) * noise
        )

    def predict_x_start(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Clean image that (x_t, eps) implies: (N, C, H, W)."""
        alpha = self.alpha(t)
        return _per_image(1 / alpha, x_t) * x_t - _per_image(self.sigma(t) / alpha, x_t) * eps

    def vb_terms(
        self, eps: Tensor, interpolation: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """Variational bound per sample, (N,): what trains a learned variance; 0 where the process
        has no use for one."""
        return torch.zeros_like(eps[:, 0, 0, 0])

    def hybrid_loss(
        self,
        output: Tensor,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        noise: Tensor,
        target: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean square of the noise prediction, and the bound that trains the learned variance.

        Args:
            output: (N, C or 2·C, H, W), what the backbone gave.
            x_start: (N, C, H, W), the data.
            x_t: (N, C, H, W), the data with noise at t.
            noise: (N, C, H, W), what was added.
            t: (N,) integer timesteps.
            target: (N, C, H, W), what eps should be; `noise` by default (distillation mixes the
                teacher in).

        Returns:
            (mse, vb), each (N,); their sum is the official hybrid loss. vb is 0 without a learned
            variance.

        Source: Nichol & Dhariwal 2021, eq. 16; official DiT code (mean square plus unscaled bound).
        """
        channels = x_start.shape[1]
        eps = output[:, :channels].float()
        mse = ((noise if target is None else target) - eps).pow(2).flatten(1).mean(dim=1)  # (N,)
        if output.shape[1] == channels:
            return mse, torch.zeros_like(mse)
        return mse, self.vb_terms(eps.detach(), output[:, channels:].float(), x_start, x_t, t)


class Diffusion(Process):
    """Discrete time.

    Attributes:
        betas, alphas_cumprod: (num_train_timesteps,) float64, on the CPU.
    """

    time_dtype = torch.int64
    t_clean = -1.0

    def __init__(self, beta_schedule: str = "linear", num_train_timesteps: int = 1000) -> None:
        self.beta_schedule = beta_schedule
        self.num_train_timesteps = num_train_timesteps
        self.betas = make_betas(beta_schedule, num_train_timesteps)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        # the last entry, index -1, is t_clean
        self._alpha = F.pad(self.alphas_cumprod, (0, 1), value=1.0).sqrt()
        self._sigma = F.pad(1 - self.alphas_cumprod, (0, 1), value=0.0).sqrt()
        prev = F.pad(self.alphas_cumprod[:-1], (1, 0), value=1.0)
        one = 1 - self.alphas_cumprod
        self._posterior_var = self.betas * (1 - prev) / one
        # the posterior variance is 0 at t = 0: its logarithm is clipped to the next one, as in the
        # official code
        self._posterior_log_var = torch.cat(
            [self._posterior_var[1:2], self._posterior_var[1:]]
        ).log()
        self._posterior_coef_start = self.betas * prev.sqrt() / one
        self._posterior_coef_t = (1 - prev) * (1 - self.betas).sqrt() / one

    def alpha(self, t: Tensor) -> Tensor:
        return self._alpha.to(t.device)[t]

    def sigma(self, t: Tensor) -> Tensor:
        return self._sigma.to(t.device)[t]

    def draw_t(self, u: Tensor) -> Tensor:
        return (u * self.num_train_timesteps).long().clamp_(max=self.num_train_timesteps - 1)

    def timesteps(self, num_steps: int, quadratic: bool = False) -> tuple[float, ...]:
        """See `Process.timesteps`. On a quadratic grid, steps too short for integer timesteps
        become 1.

        Source: `space_timesteps` of the official DiT code with one section, whose rounding of a
        running sum it repeats; that function would call a single step at t = 0.
        """
        last = self.num_train_timesteps - 1
        if not 1 <= num_steps <= last + 1:
            raise ConfigError(
                f"num_steps must lie in 1…{last + 1}, the number of diffusion timesteps; got "
                f"{num_steps}"
            )
        if num_steps == 1:
            return (last,)
        if quadratic:
            return tuple(
                max(i, round(last * (i / (num_steps - 1)) ** 2)) for i in range(num_steps)
            )[::-1]
        stride = last / (num_steps - 1)
        return tuple(round(t) for t in accumulate([0.0] + [stride] * (num_steps - 1)))[::-1]

    def _at(self, table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """Entries of a float64 table as (N, 1, 1, 1) in the dtype and on the device of `like`."""
        return _per_image(table.to(t.device)[t], like)

    def posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (N, C, H, W) and log variance (N, 1, 1, 1) of q(x_{t-1} | x_t, x_start)."""
        mean = (
            self._at(self._posterior_coef_start, t, x_t) * x_start
            + self._at(self._posterior_coef_t, t, x_t) * x_t
        )
        return mean, self._at(self._posterior_log_var, t, x_t)

    def log_variance(self, interpolation: Tensor, t: Tensor) -> Tensor:
        """Learned log variance (N, C, H, W): `interpolation` in [-1, 1] runs from the posterior's
        to beta's."""
        low = self._at(self._posterior_log_var, t, interpolation)
        high = self._at(self.betas.log(), t, interpolation)
        frac = (interpolation + 1) / 2
        return frac * high + (1 - frac) * low

    def vb_terms(
        self, eps: Tensor, interpolation: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """Variational bound per sample in bits a dimension: KL for t > 0, discretised likelihood at
        t = 0. (N,).

        Gradients reach `interpolation` only if `eps` is detached, as the hybrid loss does.
        """
        true_mean, true_log_var = self.posterior(x_start, x_t, t)
        mean, _ = self.posterior(self.predict_x_start(x_t, t, eps), x_t, t)
        log_var = self.log_variance(interpolation, t)
        kl = 0.5 * (
            -1.0
            + log_var
            - true_log_var
            + torch.exp(true_log_var - log_var)
            + (true_mean - mean) ** 2 * torch.exp(-log_var)
        )
        nll = -_discretized_log_likelihood(x_start, mean, 0.5 * log_var)
        terms = torch.where(t.view(-1, *(1,) * (x_t.ndim - 1)) == 0, nll, kl)
        return terms.flatten(1).mean(dim=1) / math.log(2.0)  # (N,)


class VPSDE(Process):
    """The continuous-time process of Song et al.: dx = -β(s)/2 x ds + sqrt(β(s)) dw, s in [0, 1], β
    linear in s.

    The network is called at t = (num_train_timesteps - 1) · s, a fraction. It trains no variance:
    unexpected output channels are ignored.

    Args:
        beta_min: β at s = 0.
        beta_max: β at s = 1.
        num_train_timesteps: scale of the network's time.

    Source: Song et al. 2021, eq. 11 and appendix C; baofff/U-ViT, `sde.py` (its pixel-space
    CIFAR-10 and CelebA models: β 0.1 … 20, network time 999·s, sampling from s = 1 to 1e-3 and then
    to 0).
    """

    time_dtype = torch.float32
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

    def _integral(self, t: Tensor) -> Tensor:
        """∫β ds from data to t, float64."""
        s = t.double() / self.t_max
        return self.beta_min * s + 0.5 * (self.beta_max - self.beta_min) * s**2

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def draw_t(self, u: Tensor) -> Tensor:
        return (u * self.t_max).to(self.time_dtype)

    def timesteps(self, num_steps: int, quadratic: bool = False) -> tuple[float, ...]:
        if num_steps < 1:
            raise ConfigError(
                f"num_steps must be at least 1; got {num_steps}; U-ViT takes 1000 Euler-Maruyama "
                "steps"
            )
        power = 2 if quadratic else 1
        s = torch.linspace(1.0, self.s_min ** (1 / power), num_steps, dtype=torch.float64) ** power
        return tuple((s * self.t_max).tolist())


def make_diffusion(config: DiffusionConfig) -> Process:
    """The forward process of a study file.

    Raises:
        ConfigError: a beta schedule that the process does not have, or too few timesteps.
    """
    if config.process == "discrete":
        return Diffusion(config.beta_schedule, config.num_train_timesteps)
    if config.beta_schedule != "linear":
        raise ConfigError(
            f"the vp-sde process has linear betas only; got {config.beta_schedule!r}; leave "
            "beta_schedule out"
        )
    return VPSDE(num_train_timesteps=config.num_train_timesteps)


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    """(N,) float64 as (N, 1, 1, 1) in the dtype and on the device of `like`."""
    return values.to(like).view(-1, *(1,) * (like.ndim - 1))


def _approx_normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log likelihood of 8-bit images rescaled to [-1, 1] under a Gaussian, integrated over each
    grey level."""
    inv = torch.exp(-log_scale)
    plus = _approx_normal_cdf(inv * (x - mean + 1 / 255))
    minus = _approx_normal_cdf(inv * (x - mean - 1 / 255))
    inner = (plus - minus).clamp(min=1e-12).log()
    upper = (1 - minus).clamp(min=1e-12).log()
    lower = plus.clamp(min=1e-12).log()
    return torch.where(x < -0.999, lower, torch.where(x > 0.999, upper, inner))
