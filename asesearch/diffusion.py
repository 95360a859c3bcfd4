"""Forward processes and the hybrid loss. Everything is computed in float64 and cast at the end.

Noise levels and timestep grids alone, which need no torch, are in `asesearch.solvers.noise`.

Source: Ho et al. 2020 (DDPM); Nichol & Dhariwal 2021 (learned variance, hybrid loss), and the
official DiT code's `diffusion/` (facebookresearch/DiT), which the numbers match.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from asesearch.config import DiffusionConfig
from asesearch.errors import ConfigError
from asesearch.solvers.noise import (
    DiscreteLevels,
    NoiseLevels,
    VPSDELevels,
    make_betas,
    make_levels,
)


class Process(NoiseLevels):
    """A variance-preserving forward process on tensors, and what training needs of it.

    Attributes:
        beta_schedule: name of the noise schedule; with `num_train_timesteps` it says all about the
            process.
        time_dtype: type of a timestep: integer in discrete time, float32 in continuous time.
    """

    beta_schedule: str
    time_dtype: torch.dtype

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


class Diffusion(DiscreteLevels, Process):
    """Discrete time.

    Attributes:
        betas, alphas_cumprod: (num_train_timesteps,) float64, on the CPU.
    """

    time_dtype = torch.int64

    def __init__(self, beta_schedule: str = "linear", num_train_timesteps: int = 1000) -> None:
        super().__init__(beta_schedule, num_train_timesteps)
        self.betas = torch.from_numpy(make_betas(beta_schedule, num_train_timesteps))
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
        return self._alpha.to(t.device, non_blocking=True)[t]

    def sigma(self, t: Tensor) -> Tensor:
        return self._sigma.to(t.device, non_blocking=True)[t]

    def draw_t(self, u: Tensor) -> Tensor:
        return (u * self.num_train_timesteps).long().clamp_(max=self.num_train_timesteps - 1)

    def _at(self, table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """Entries of a float64 table as (N, 1, 1, 1) in the dtype and on the device of `like`."""
        return _per_image(table.to(t.device, non_blocking=True)[t], like)

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


class VPSDE(VPSDELevels, Process):
    """Continuous time.

    It trains no variance: unexpected output channels are ignored.
    """

    time_dtype = torch.float32

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


def check_process(diffusion: Process) -> None:
    """Refuse what is no forward process.

    Raises:
        ConfigError: as said.
    """
    if not isinstance(diffusion, Process):
        raise ConfigError(
            f"diffusion must be a process; got {type(diffusion).__name__}; make one by "
            "make_diffusion(DiffusionConfig(...)), or give Diffusion() or VPSDE()"
        )


def make_diffusion(config: DiffusionConfig) -> Process:
    """The forward process of a study file.

    Raises:
        ConfigError: a beta schedule that the process does not have, or too few timesteps.
    """
    levels = make_levels(config)
    if isinstance(levels, DiscreteLevels):
        return Diffusion(config.beta_schedule, config.num_train_timesteps)
    return VPSDE(levels.beta_min, levels.beta_max, config.num_train_timesteps)


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
