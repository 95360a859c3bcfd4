"""Samplers: `sample` makes images with a solver and an exit schedule.

A solver is a function that reads as its algorithm, over pairs (t_cur, t_next) of which the last
t_next is `t_clean`. It sees the network as `model(x, t)` and knows neither schedule nor guidance.

No solver is taken from diffusers: its schedulers keep integer timesteps and float32 betas, so they
have no VP-SDE, and its DDIM takes a uniform stride. The tests compare with them where they do
apply.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from asesearch.backbones import conditioning
from asesearch.backbones.base import Backbone, check_schedule
from asesearch.backbones.conditioning import Conditioning, labels_of
from asesearch.diffusion import VPSDE, Diffusion, Process
from asesearch.errors import ConfigError
from asesearch.schedule import ExitSchedule

Model = Callable[[Tensor, float], Tensor]
"""(N, C, H, W) at a timestep -> the network's output, (N, C or 2·C, H, W)."""
Noise = Callable[[], Tensor]
"""Fresh (N, C, H, W) standard normal noise."""
Pairs = Sequence[tuple[float, float]]


def ddpm(model: Model, x: Tensor, pairs: Pairs, diffusion: Process, noise: Noise) -> Tensor:
    """Ancestral sampling on a process respaced to the timesteps called.

    The variance is learned where the network has 2·C output channels, else the posterior's ("fixed
    small").

    Source: Ho et al. 2020, algorithm 2; Nichol & Dhariwal 2021, eq. 15 and section 4; official DiT
    code, `p_sample`.
    """
    channels = x.shape[1]
    for t_cur, t_next in pairs:
        output = model(x, t_cur)
        alpha, sigma = diffusion.level(t_cur)
        alpha_next, sigma_next = diffusion.level(t_next)
        step_alpha = (alpha / alpha_next) ** 2  # 1 - beta of the respaced process
        beta = 1 - step_alpha
        x_start = (x - sigma * output[:, :channels]) / alpha
        coef_start = alpha_next * beta / sigma**2
        coef_t = math.sqrt(step_alpha) * (sigma_next / sigma) ** 2
        x = coef_start * x_start + coef_t * x
        if t_next == diffusion.t_clean:
            break
        # of the posterior; beta is the learned one's upper end
        std: float | Tensor = math.sqrt(beta) * sigma_next / sigma
        if output.shape[1] > channels:
            frac = (output[:, channels:] + 1) / 2
            std = std * (sigma / sigma_next) ** frac
        x = x + std * noise()
    return x


def ddim(model: Model, x: Tensor, pairs: Pairs, diffusion: Process, noise: Noise) -> Tensor:
    """Deterministic DDIM (eta = 0): the first-order solver of the probability-flow ODE.

    Source: Song et al. 2021 (DDIM), eq. 12.
    """
    for t_cur, t_next in pairs:
        eps = model(x, t_cur)[:, : x.shape[1]]
        alpha, sigma = diffusion.level(t_cur)
        alpha_next, sigma_next = diffusion.level(t_next)
        x_start = (x - sigma * eps) / alpha
        x = alpha_next * x_start + sigma_next * eps
    return x


def dpmpp_2m(model: Model, x: Tensor, pairs: Pairs, diffusion: Process, noise: Noise) -> Tensor:
    """DPM-Solver++(2M): second order, one call per step.

    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2. First order at the first step and at the
    last two: into `t_clean`, where log(alpha / sigma) is infinite, and into the last timestep,
    where on an even grid it grows several times as much
    as in the step before: extrapolating that far makes 25 steps up to ten times worse on Gaussian
    mixtures, whose exact denoiser is known. On these an even grid, as the paper's DPM-25 has, gains
    little on DDIM below 50 steps unless the data are smooth; a quadratic one (`dpm++2m-quadratic`)
    is several times closer at 10 to 50, but spends more of its steps near data, where schedules are
    deepest.
    """
    last = None
    for i, (t_cur, t_next) in enumerate(pairs):
        eps = model(x, t_cur)[:, : x.shape[1]]
        alpha, sigma = diffusion.level(t_cur)
        alpha_next, sigma_next = diffusion.level(t_next)
        x_start = (x - sigma * eps) / alpha
        if t_next == diffusion.t_clean:
            return x_start
        h = math.log(alpha_next / sigma_next) - math.log(alpha / sigma)
        d = x_start
        if last is not None and i < len(pairs) - 2:
            h_last, x_start_last = last
            d = x_start + (x_start - x_start_last) * (0.5 * h / h_last)
        x = sigma_next / sigma * x - alpha_next * math.expm1(-h) * d
        last = h, x_start
    return x


def unipc(model: Model, x: Tensor, pairs: Pairs, diffusion: Process, noise: Noise) -> Tensor:
    """UniPC: a second-order predictor, and a corrector that makes it third order and asks the
    network nothing new.

    One call per step: the network's answer at a point also corrects the step that led there. Lower
    order where history is short; the step to `t_clean` takes the predicted image. On an even grid
    the step into the last timestep is extrapolated much too far (see `dpmpp_2m`), so there is none.

    Source: Zhao et al. 2023 (UniPC), algorithms 5 and 6 with B2(h) = e^h - 1 and data prediction.
    """
    # log(alpha / sigma) of the points called, the predicted images there beside
    levels: list[float] = []
    images: list[Tensor] = []
    # the point that the last step left from, corrected, and its sigma
    before: tuple[Tensor, float] | None = None
    for t_cur, t_next in pairs:
        eps = model(x, t_cur)[:, : x.shape[1]]
        alpha, sigma = diffusion.level(t_cur)
        alpha_next, sigma_next = diffusion.level(t_next)
        levels.append(math.log(alpha / sigma))
        images.append((x - sigma * eps) / alpha)
        if before is not None:
            x = _unipc_step(*before, levels[-3:], images[-3:], alpha, sigma, corrected=True)
        if t_next == diffusion.t_clean:
            return images[-1]
        before = x, sigma
        x = _unipc_step(
            x,
            sigma,
            [*levels[-2:], math.log(alpha_next / sigma_next)],
            images[-2:],
            alpha_next,
            sigma_next,
        )
    return x


def _unipc_step(
    x: Tensor,
    sigma: float,
    levels: Sequence[float],
    images: Sequence[Tensor],
    alpha_next: float,
    sigma_next: float,
    corrected: bool = False,
) -> Tensor:
    """From the last point but one of `levels` to the last; `images` ends there if the step is
    `corrected`."""
    h = levels[-1] - levels[-2]
    here = images[len(levels) - 2]
    others = [i for i in range(len(images)) if i != len(levels) - 2]
    ratios = np.array([(levels[i] - levels[-2]) / h for i in others])
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
    model: Model, x: Tensor, pairs: Pairs, diffusion: Process, noise: Noise
) -> Tensor:
    """Euler-Maruyama on the reverse VP-SDE; no noise in the step to data.

    Source: Song et al. 2021 (score SDE), eq. 6; baofff/U-ViT, `sde.py`.
    """
    assert isinstance(diffusion, VPSDE)
    for t_cur, t_next in pairs:
        eps = model(x, t_cur)[:, : x.shape[1]]
        beta = diffusion.beta(t_cur)
        _, sigma = diffusion.level(t_cur)
        ds = (t_cur - t_next) / diffusion.t_max
        x = x + ds * beta * (0.5 * x - eps / sigma)
        if t_next != diffusion.t_clean:
            x = x + math.sqrt(beta * ds) * noise()
    return x


@dataclass(frozen=True)
class Solver:
    """A solver by name.

    Attributes:
        name: what reports and study files call it.
        integrate: from x_t at the first timestep to the image; calls `model` once per pair.
        processes: the kinds of forward process it is for.
        quadratic: its timesteps are denser near data, see `Process.timesteps`.
    """

    name: str
    integrate: Callable[[Model, Tensor, Pairs, Process, Noise], Tensor]
    processes: tuple[type[Process], ...] = (Diffusion, VPSDE)
    quadratic: bool = False


SOLVERS = {
    solver.name: solver
    for solver in (
        Solver("ddpm", ddpm, (Diffusion,)),
        Solver("ddim", ddim),
        Solver("dpm++2m", dpmpp_2m),
        Solver("dpm++2m-quadratic", dpmpp_2m, quadratic=True),
        Solver("unipc-quadratic", unipc, quadratic=True),
        Solver("euler-maruyama", euler_maruyama, (VPSDE,)),
    )
}


@dataclass(frozen=True)
class SampleResult:
    """Images and what they cost.

    Attributes:
        images: (N, C, H, W) float32 on the CPU, not clamped, in the order of the seeds.
        timesteps: where the network was called, descending.
        nfe: network calls per image; guidance makes two of each.
        block_calls: droppable blocks run an image.
        seconds: time spent making all the images, noise included, the device synchronised.
    """

    images: Tensor
    timesteps: tuple[float, ...]
    nfe: int
    block_calls: int
    seconds: float


def guided(
    backbone: Backbone,
    x_t: Tensor,
    t: Tensor,
    y: Conditioning | None,
    cfg_scale: float,
    exit_depth: int | None = None,
) -> Tensor:
    """The network's output under classifier-free guidance; a single pass at cfg_scale 1.

    eps = uncond + cfg_scale · (cond - uncond) on the first `guided_channels` output channels; the
    others are the conditional pass's.

    Source: Ho & Salimans 2022, with the scale of the official DiT code (`forward_with_cfg`), which
    guides three channels.
    """
    if cfg_scale == 1.0:
        return backbone(x_t, t, y, exit_depth=exit_depth)  # type: ignore[no-any-return]
    assert y is not None
    both = conditioning.join([y, backbone.null_labels(y)])  # 2·N conditions
    cond, uncond = backbone(x_t.repeat(2, 1, 1, 1), t.repeat(2), both, exit_depth=exit_depth).chunk(
        2
    )
    eps = cond[:, : backbone.guided_channels]
    eps_null = uncond[:, : backbone.guided_channels]
    return torch.cat(
        [eps_null + cfg_scale * (eps - eps_null), cond[:, backbone.guided_channels :]], dim=1
    )


class _ScheduledModel:
    """The network as a solver sees it: adds labels, guidance and exit depth, and counts what was
    run for an image."""

    def __init__(
        self,
        backbone: Backbone,
        schedule: ExitSchedule,
        diffusion: Process,
        y: Conditioning | None,
        cfg_scale: float,
    ) -> None:
        self.backbone = backbone
        self.schedule = schedule
        self.diffusion = diffusion
        self.y = y
        self.cfg_scale = cfg_scale
        self.timesteps: list[float] = []
        self.nfe = self.block_calls = 0

    def __call__(self, x: Tensor, t_cur: float) -> Tensor:
        exit_depth = int(self.schedule.exit_depth_at(t_cur))
        t = torch.full(x.shape[:1], t_cur, dtype=self.diffusion.time_dtype, device=x.device)
        output = guided(self.backbone, x, t, self.y, self.cfg_scale, exit_depth)
        passes = 1 if self.cfg_scale == 1.0 else 2
        self.timesteps.append(t_cur)
        self.nfe += passes
        self.block_calls += passes * exit_depth
        return output.float()


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Inside, networks compute as `SamplingConfig.precision` says."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def image_noise(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Noise:
    """Noise whose image i follows from seeds[i] alone: one CPU generator per image, the same on
    every device."""
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def noise() -> Tensor:
        draws = torch.empty(len(generators), *shape, pin_memory=device.type == "cuda")
        for generator, row in zip(generators, draws, strict=True):
            torch.randn(shape, generator=generator, out=row)
        return draws.to(device, non_blocking=True)

    return noise


def sample(
    backbone: Backbone,
    solver: str | Solver,
    schedule: ExitSchedule,
    *,
    diffusion: Process,
    num_steps: int,
    seeds: Sequence[int],
    y: Conditioning | None = None,
    cfg_scale: float = 1.0,
    batch_size: int = 100,
    precision: str = "float32",
    device: torch.device | str | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> SampleResult:
    """Make one image a seed.

    An image depends on its seed and label only, not on the batch it is made in.

    Args:
        backbone: run in eval mode; moved to `device`.
        solver: a key of `SOLVERS`, or a solver of your own.
        schedule: blocks to run at each timestep.
        diffusion: the process the network was trained with.
        num_steps: calls of the network an image (twice as many under guidance).
        seeds: one int from 0 to 2^32 - 1 an image.
        y: (N,) labels, or a prompt's tensors with leading dimension N; None for an unconditional
            network.
        cfg_scale: strength of classifier-free guidance, 1 = none.
        batch_size: images at a time; under guidance the network sees twice as many.
        precision: of the network's arithmetic, see `SamplingConfig`; the solver's is float32.
        device: by default where the network is.
        on_batch: called as (images done, of all) after each batch; its time is not counted.

    Raises:
        ConfigError: arguments that do not fit the network or each other.
        ScheduleError: a schedule for another network or number of timesteps.
    """
    solver, timesteps = check_sampling(backbone, solver, diffusion, num_steps, cfg_scale)
    check_images(backbone, seeds, y, batch_size)
    check_schedule(backbone, diffusion.num_train_timesteps, schedule)
    pairs = list(pairwise((*timesteps, diffusion.t_clean)))
    place = torch.device(device or next(backbone.parameters(), torch.empty(0)).device)
    shape = (backbone.in_channels, backbone.input_size, backbone.input_size)
    images = torch.empty(len(seeds), *shape)
    seconds = 0.0
    with _evaluating(backbone.to(place)), arithmetic(precision, place):
        for first in range(0, len(seeds), batch_size):
            part = slice(first, min(first + batch_size, len(seeds)))
            start = _now(place)
            own = conditioning.to(conditioning.take(y, part), place)
            model = _ScheduledModel(backbone, schedule, diffusion, own, cfg_scale)
            noise = image_noise(seeds[part], shape, place)
            images[part] = solver.integrate(model, noise(), pairs, diffusion, noise).cpu()
            seconds += _now(place) - start
            if on_batch is not None:
                on_batch(part.stop, len(seeds))
    return SampleResult(images, tuple(model.timesteps), model.nfe, model.block_calls, seconds)


@contextmanager
def _evaluating(backbone: Backbone) -> Iterator[None]:
    """No gradients, and the network in eval mode until the end."""
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        backbone.train(was_training)


def check_sampling(
    backbone: Backbone, solver: str | Solver, diffusion: Process, num_steps: int, cfg_scale: float
) -> tuple[Solver, tuple[float, ...]]:
    """Refuse a sampler that the network can't be sampled with, before anything is trained for it.

    Returns:
        The solver, and the timesteps it calls the network at.

    Raises:
        ConfigError: solver, process, network, steps and guidance do not fit each other.
    """
    if backbone.prediction_type != "epsilon":
        raise ConfigError(
            "these solvers need a network that predicts noise (epsilon); got "
            f"{backbone.prediction_type!r}; sample it with its own diffusers pipeline"
        )
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise ConfigError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}")
        solver = SOLVERS[solver]
    if not isinstance(diffusion, solver.processes):
        kinds = " or ".join(kind.__name__ for kind in solver.processes)
        fit = ", ".join(s.name for s in SOLVERS.values() if isinstance(diffusion, s.processes))
        raise ConfigError(
            f"{solver.name} is for a {kinds} process; got {type(diffusion).__name__}; choose one "
            f"of {fit}"
        )
    if not (math.isfinite(cfg_scale) and cfg_scale >= 0):
        raise ConfigError(
            f"cfg_scale must be a finite number of at least 0; got {cfg_scale}; 1 means no guidance"
        )
    if cfg_scale != 1.0 and not backbone.has_null_label:
        raise ConfigError(
            "guidance needs a network with a null label or null condition, as training with "
            f"dropped labels or prompts makes; this one has none; got cfg_scale {cfg_scale}; use 1"
        )
    return solver, diffusion.timesteps(num_steps, solver.quadratic)


def check_images(
    backbone: Backbone, seeds: Sequence[int], y: Conditioning | None, batch_size: int
) -> None:
    """The errors of `sample` about what to make."""
    if len(seeds) == 0 or not all(
        isinstance(seed, (int, np.integer)) and 0 <= seed < 2**32 for seed in seeds
    ):
        raise ConfigError(
            "seeds must be integers from 0 to 2^32 - 1 (torch's CPU generator ignores higher "
            f"bits), one per image; got {list(seeds)[:5]} …; begin lower"
        )
    if batch_size < 1:
        raise ConfigError(
            f"batch_size must be at least 1; got {batch_size}; 100 suits most networks"
        )
    backbone.check_conditioning(y, len(seeds))
    top = backbone.num_classes - 1 + backbone.has_null_label
    labels = labels_of(y)
    if labels is not None and (
        labels.dtype not in (torch.int32, torch.int64)
        or int(labels.min()) < 0
        or int(labels.max()) > top
    ):
        null = f" ({top} is the null label)" if backbone.has_null_label else ""
        raise ConfigError(
            f"labels must be integers in 0…{top}{null}; got {labels.dtype} from {labels.min()} "
            f"to {labels.max()}; correct them"
        )


def _now(device: torch.device) -> float:
    """Seconds on the clock once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
