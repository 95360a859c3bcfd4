"""Forward process, hybrid loss and timestep grids. Everything is computed from float64 tables.

Source: Ho et al. 2020 (DDPM); Nichol & Dhariwal 2021 (learned variance, hybrid loss), and the official DiT code's
`diffusion/` (facebookresearch/DiT), which the numbers match.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from asesearch.errors import ConfigError

BETA_SCHEDULES = ("linear", "scaled_linear")


def make_betas(beta_schedule: str = "linear", num_train_timesteps: int = 1000) -> Tensor:
    """Noise added per step: (num_train_timesteps,) float64.

    `linear` is DDPM's and DiT's (1e-4 … 0.02 at 1000 steps, scaled to other lengths); `scaled_linear` is Stable
    Diffusion's (0.00085 … 0.012, linear in the square root), which the latent U-ViTs use.

    Raises:
        ConfigError: unknown schedule or a chain shorter than two.
    """
    if num_train_timesteps < 2:
        raise ConfigError(f"num_train_timesteps must be at least 2; got {num_train_timesteps}; DiT uses 1000")
    scale = 1000 / num_train_timesteps
    if beta_schedule == "linear":
        betas = torch.linspace(scale * 1e-4, scale * 0.02, num_train_timesteps, dtype=torch.float64)
    elif beta_schedule == "scaled_linear":
        ends = (math.sqrt(scale * 0.00085), math.sqrt(scale * 0.012))
        betas = torch.linspace(*ends, num_train_timesteps, dtype=torch.float64) ** 2
    else:
        raise ConfigError(f"unknown beta_schedule {beta_schedule!r}; choose one of {', '.join(BETA_SCHEDULES)}")
    if float(betas.max()) >= 1:
        raise ConfigError(f"num_train_timesteps = {num_train_timesteps} gives a beta of 1 or more; use at least 21")
    return betas


class Diffusion:
    """A discrete-time variance-preserving chain: x_t = sqrt(ᾱ_t) x_start + sqrt(1 - ᾱ_t) noise.

    Attributes:
        num_train_timesteps: length of the chain, t in 0 … num_train_timesteps - 1, 0 nearest to data.
        betas, alphas_cumprod: (num_train_timesteps,) float64, on the CPU.
    """

    def __init__(self, beta_schedule: str = "linear", num_train_timesteps: int = 1000) -> None:
        self.beta_schedule, self.num_train_timesteps = beta_schedule, num_train_timesteps
        self.betas = make_betas(beta_schedule, num_train_timesteps)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        prev = F.pad(self.alphas_cumprod[:-1], (1, 0), value=1.0)
        one = 1 - self.alphas_cumprod
        self._posterior_var = self.betas * (1 - prev) / one
        # the posterior variance is 0 at t = 0: its logarithm is clipped to the next one, as in the official code
        self._posterior_log_var = torch.cat([self._posterior_var[1:2], self._posterior_var[1:]]).log()
        self._posterior_coef_start = self.betas * prev.sqrt() / one
        self._posterior_coef_t = (1 - prev) * (1 - self.betas).sqrt() / one

    def _at(self, table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """Entries of a float64 table as (N, 1, 1, 1) in the dtype and on the device of `like`."""
        return table.to(device=t.device)[t].to(like).view(-1, *(1,) * (like.ndim - 1))

    def snr(self) -> Tensor:
        """Signal-to-noise ratio ᾱ / (1 - ᾱ) of each timestep: (num_train_timesteps,) float64."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noise clean images: (N, C, H, W), (N,) integer, (N, C, H, W) -> x_t (N, C, H, W)."""
        return (
            self._at(self.alphas_cumprod.sqrt(), t, x_start) * x_start
            + self._at((1 - self.alphas_cumprod).sqrt(), t, x_start) * noise
        )

    def predict_x_start(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Clean image that (x_t, eps) implies: (N, C, H, W)."""
        return (
            self._at((1 / self.alphas_cumprod).sqrt(), t, x_t) * x_t
            - self._at((1 / self.alphas_cumprod - 1).sqrt(), t, x_t) * eps
        )

    def posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (N, C, H, W) and log variance (N, 1, 1, 1) of q(x_{t-1} | x_t, x_start)."""
        mean = self._at(self._posterior_coef_start, t, x_t) * x_start + self._at(self._posterior_coef_t, t, x_t) * x_t
        return mean, self._at(self._posterior_log_var, t, x_t)

    def log_variance(self, interpolation: Tensor, t: Tensor) -> Tensor:
        """Learned log variance (N, C, H, W): `interpolation` in [-1, 1] runs from the posterior's to beta's."""
        low = self._at(self._posterior_log_var, t, interpolation)
        high = self._at(self.betas.log(), t, interpolation)
        frac = (interpolation + 1) / 2
        return frac * high + (1 - frac) * low

    def vb_terms(self, eps: Tensor, interpolation: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Variational bound per sample in bits a dimension: KL for t > 0, discretised likelihood at t = 0. (N,).

        Gradients reach `interpolation` only if `eps` is detached, as the hybrid loss does.
        """
        true_mean, true_log_var = self.posterior(x_start, x_t, t)
        mean, _ = self.posterior(self.predict_x_start(x_t, t, eps), x_t, t)
        log_var = self.log_variance(interpolation, t)
        kl = 0.5 * (
            -1.0 + log_var - true_log_var + torch.exp(true_log_var - log_var) + (true_mean - mean) ** 2 * torch.exp(-log_var)
        )
        nll = -_discretized_log_likelihood(x_start, mean, 0.5 * log_var)
        terms = torch.where(t.view(-1, *(1,) * (x_t.ndim - 1)) == 0, nll, kl)
        return terms.flatten(1).mean(dim=1) / math.log(2.0)  # (N,)

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
            x_start, x_t, noise: (N, C, H, W).
            t: (N,) integer timesteps.
            target: (N, C, H, W), what eps should be; `noise` by default (distillation mixes the teacher in).

        Returns:
            (mse, vb), each (N,); their sum is the official hybrid loss. vb is 0 without a learned variance.

        Source: Nichol & Dhariwal 2021, eq. 16; official DiT code (mean square plus unscaled bound).
        """
        channels = x_start.shape[1]
        eps = output[:, :channels].float()
        mse = ((noise if target is None else target) - eps).pow(2).flatten(1).mean(dim=1)  # (N,)
        if output.shape[1] == channels:
            return mse, torch.zeros_like(mse)
        return mse, self.vb_terms(eps.detach(), output[:, channels:].float(), x_start, x_t, t)


def _approx_normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log likelihood of 8-bit images rescaled to [-1, 1] under a Gaussian, integrated over each grey level."""
    inv = torch.exp(-log_scale)
    plus = _approx_normal_cdf(inv * (x - mean + 1 / 255))
    minus = _approx_normal_cdf(inv * (x - mean - 1 / 255))
    inner = (plus - minus).clamp(min=1e-12).log()
    upper = (1 - minus).clamp(min=1e-12).log()
    lower = plus.clamp(min=1e-12).log()
    return torch.where(x < -0.999, lower, torch.where(x > 0.999, upper, inner))
