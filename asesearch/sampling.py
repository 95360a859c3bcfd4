"""`sample` makes images with a solver of `asesearch.solvers` and an exit schedule."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from asesearch.backbones import conditioning
from asesearch.backbones.acceleration import Acceleration, Begin
from asesearch.backbones.base import Backbone, check_network, check_schedule, evaluating
from asesearch.backbones.compiled import compiled
from asesearch.backbones.conditioning import Conditioning, Given, conditioning_of, labels_of
from asesearch.backbones.device import cpu_by_default, device_of, own_casts, tf32
from asesearch.backbones.exit_weights import attached
from asesearch.backbones.guidance import GuidanceInterval, check_guided
from asesearch.config import SamplingConfig
from asesearch.diffusion import Process, check_process
from asesearch.errors import ConfigError
from asesearch.sampler import passes_per_call
from asesearch.schedule import ExitSchedule
from asesearch.solvers import Noise, Solver, find_solver, seeds_of

#: A sampling changes how the process computes and what the network's blocks do, and then changes
#: it back.
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True, eq=False)
class SampleResult:
    """Images and what they cost.

    Attributes:
        images: (N, C, H, W) float32 on the CPU, not clamped, in the order of the seeds.
        timesteps: where the network was called, descending.
        nfe: network calls per image; guidance makes two of each, where it acts.
        block_calls: transformer blocks an image that really ran, also those that run in every call,
            in the mean over the images, of which each may have its own exits. A block of which a
            part is reused, or that sees merged tokens, has run (a study's `block_frac` counts what
            that saves).
        seconds: time spent making all the images, noise included, the device synchronised.
    """

    images: Tensor
    timesteps: tuple[float, ...]
    nfe: int
    block_calls: float
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
    both = conditioning.join(conditioning.matched(y, backbone.null_labels(y)))  # 2·N conditions
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
        acceleration: Acceleration | None = None,
        begin: Begin | None = None,
    ) -> None:
        self.backbone = backbone
        self.schedule = schedule
        self.diffusion = diffusion
        self.y = y
        self.cfg_scale = cfg_scale
        self.acceleration = acceleration
        self.begin = begin
        self.timesteps: list[float] = []
        self.nfe = self.block_calls = 0

    def __call__(self, x: Tensor, t_cur: float) -> Tensor:
        exit_depth = int(self.schedule.exit_depth_at(t_cur))
        call = len(self.timesteps)
        if self.begin is not None:
            self.begin(call)
        t = torch.full(x.shape[:1], t_cur, dtype=self.diffusion.time_dtype, device=x.device)
        output = guided(self.backbone, x, t, self.y, self.cfg_scale, exit_depth)
        how = self.acceleration
        alone = isinstance(how, GuidanceInterval) and not how.inside[call]
        passes = 1 if alone else passes_per_call(self.cfg_scale)
        self.timesteps.append(t_cur)
        self.nfe += passes
        self.block_calls += passes * (self.backbone.fixed_blocks + exit_depth)
        return output.float()


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Inside, networks compute as `SamplingConfig.precision` says.

    Raises:
        ConfigError: it says nothing of the kind.
    """
    known = get_args(SamplingConfig.model_fields["precision"].annotation)
    if precision not in known:
        raise ConfigError(
            f"precision must be one of {', '.join(known)}; got {precision!r}; choose one of them"
        )
    with (
        own_casts(),
        tf32(precision == "tf32" and device.type == "cuda"),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        yield


def image_noise(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Noise:
    """Noise whose image i follows from seeds[i] alone: one CPU generator per image, the same on
    every device; each call gives fresh (N, *shape) float32."""
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def noise() -> Tensor:
        draws = torch.empty(
            len(generators), *shape, dtype=torch.float32, pin_memory=device.type == "cuda"
        )
        for generator, row in zip(generators, draws, strict=True):
            torch.randn(shape, generator=generator, dtype=torch.float32, out=row)
        return draws.to(device, non_blocking=True)

    return noise


@cpu_by_default()
def sample(
    backbone: Backbone,
    solver: str | Solver,
    schedule: ExitSchedule,
    *,
    diffusion: Process,
    num_steps: int,
    seeds: Iterable[int],
    y: Given | None = None,
    cfg_scale: float = 1.0,
    batch_size: int = 100,
    precision: str = "float32",
    compile: bool = False,
    acceleration: Acceleration | None = None,
    device: torch.device | str | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> SampleResult:
    """Make one image a seed.

    An image depends on its seed and label only, not on the batch it is made in.

    Args:
        backbone: run in eval mode; moved to `device`.
        solver: a name in `solvers.SOLVERS`, or a solver of your own.
        schedule: blocks to run at each timestep.
        diffusion: the process the network was trained with.
        num_steps: calls of the network an image (twice as many under guidance).
        seeds: one int from 0 to 2^32 - 1 an image.
        y: (N,) labels, as a tensor, list or array, or a prompt's tensors with leading dimension N;
            None for an unconditional network.
        cfg_scale: strength of classifier-free guidance, 1 = none.
        batch_size: images at a time; under guidance the network sees twice as many.
        precision: of the network's arithmetic, see `SamplingConfig`; the solver's is float32.
        compile: run the network's blocks as compiled code, see `backbones.compiled`; the first call
            takes seconds more. Images differ from those of eager blocks by rounding.
        acceleration: what makes the network's calls cheaper beside the schedule; made for as many
            calls as the sampler makes.
        device: by default where the network is.
        on_batch: called as (images done, of all) after each batch; its time is not counted.

    Raises:
        ConfigError: arguments that do not fit the network or each other; blocks that can't be
            compiled here, or compiled blocks with an acceleration.
        ScheduleError: a schedule for another network or number of timesteps.
    """
    solver, timesteps = check_sampling(backbone, solver, diffusion, num_steps, cfg_scale, precision)
    seeds = seeds_of(seeds)
    y = conditioning_of(y)
    check_images(backbone, seeds, y, batch_size)
    check_schedule(backbone, diffusion.num_train_timesteps, schedule)
    check_acceleration(acceleration, len(timesteps), compile, cfg_scale)
    pairs = list(pairwise((*timesteps, diffusion.t_clean)))
    place = next(backbone.parameters(), torch.empty(0)).device
    if device is not None:
        place = device_of(device)
    shape = (backbone.in_channels, backbone.input_size, backbone.input_size)
    images = torch.empty(len(seeds), *shape, dtype=torch.float32)
    seconds = 0.0
    with _prepared(backbone, place, precision, compile, acceleration) as (begin, counted):
        for first in range(0, len(seeds), batch_size):
            part = slice(first, min(first + batch_size, len(seeds)))
            start = _now(place)
            own = conditioning.to(conditioning.take(y, part), place)
            model = _ScheduledModel(
                backbone, schedule, diffusion, own, cfg_scale, acceleration, begin
            )
            noise = image_noise(seeds[part], shape, place)
            images[part] = solver.integrate(model, noise(), pairs, diffusion, noise).cpu()
            seconds += _now(place) - start
            if on_batch is not None:
                on_batch(part.stop, len(seeds))
    calls = model.block_calls if acceleration is None else counted[0] / len(seeds)
    return SampleResult(images, tuple(model.timesteps), model.nfe, calls, seconds)


@contextmanager
def _prepared(
    backbone: Backbone,
    place: torch.device,
    precision: str,
    compile: bool,
    acceleration: Acceleration | None,
) -> Iterator[tuple[Begin | None, list[int]]]:
    """Inside, the network is on its device and runs as `sample` was asked to; no other sampling of
    the process does.

    Yields:
        What the acceleration wants to hear before each call, and the count of `_counting`.
    """
    with (
        _ONE_AT_A_TIME,
        evaluating(backbone.to(place)),
        arithmetic(precision, place),
        compiled(backbone, compile),
        nullcontext() if acceleration is None else attached(acceleration, backbone) as begin,
        _counting(backbone, acceleration) as counted,
    ):
        yield begin, counted


@contextmanager
def _counting(backbone: Backbone, acceleration: Acceleration | None) -> Iterator[list[int]]:
    """Inside, blocks that run under an acceleration are counted, once an image each."""
    counted = [0]

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        counted[0] += len(args[0])

    blocks = [] if acceleration is None else backbone.transformer_blocks()
    # a block that is led elsewhere as a whole is called all the same, what is in it is not
    whole = isinstance(acceleration, GuidanceInterval)
    places = [
        block if whole else getattr(block, "attn1" if hasattr(block, "attn1") else "attn")
        for block in blocks
    ]
    hooks = [place.register_forward_pre_hook(count) for place in places]
    try:
        yield counted
    finally:
        for hook in hooks:
            hook.remove()


def check_sampling(
    backbone: Backbone,
    solver: str | Solver,
    diffusion: Process,
    num_steps: int,
    cfg_scale: float,
    precision: str = "float32",
) -> tuple[Solver, tuple[float, ...]]:
    """Refuse a sampler that the network can't be sampled with, before anything is trained for it.

    Returns:
        The solver, and the timesteps it calls the network at.

    Raises:
        ConfigError: solver, process, network, steps and guidance do not fit each other, or are
            something else; a network whose weights are not float32, nor in half precision where
            `precision` is bf16.
    """
    check_network(backbone, "precision = 'bf16'", half=precision == "bf16")
    check_process(diffusion)
    if backbone.prediction_type != "epsilon":
        raise ConfigError(
            "these solvers need a network that predicts noise (epsilon); got "
            f"{backbone.prediction_type!r}; sample it with its own diffusers pipeline"
        )
    if isinstance(solver, str):
        solver = find_solver(solver, diffusion)
    elif isinstance(solver, Solver):
        solver.check_process(diffusion)
    else:
        raise ConfigError(
            f"solver must be the name of one, or a Solver; got {type(solver).__name__}; "
            + ("give its .solver and .num_steps" if hasattr(solver, "solver") else "give a name")
        )
    number = isinstance(cfg_scale, (int, float, np.integer, np.floating))
    if not (number and math.isfinite(cfg_scale) and cfg_scale >= 0):
        raise ConfigError(
            f"cfg_scale must be a finite number of at least 0; got {cfg_scale!r}; 1 means no "
            "guidance"
        )
    if cfg_scale != 1.0 and not backbone.has_null_label:
        raise ConfigError(
            "guidance needs a network with a null label or null condition, as training with "
            f"dropped labels or prompts makes; this one has none; got cfg_scale {cfg_scale}; use 1"
        )
    return solver, diffusion.timesteps(num_steps, solver.power)


def check_acceleration(
    acceleration: Acceleration | None, num_calls: int, compile: bool, cfg_scale: float
) -> None:
    """Refuse an acceleration that does not go with the rest.

    Raises:
        ConfigError: one made for another number of network calls, beside compiled blocks, or of
            guidance where there is none; a name alone.
    """
    if acceleration is None:
        return
    if not hasattr(acceleration, "attached"):
        raise ConfigError(
            "acceleration must be what was calibrated for a sampler, not its name; got "
            f"{str(acceleration)[:60]!r}; take the .acceleration of a bundle"
        )
    check_eager(compile)
    if isinstance(acceleration, GuidanceInterval):
        check_guided(cfg_scale)
    if acceleration.num_calls not in (None, num_calls):
        raise ConfigError(
            f"the acceleration was made for {acceleration.num_calls} network calls; got a sampler "
            f"of {num_calls}; keep the number of steps, or make one for this sampler"
        )


def check_eager(compile: bool) -> None:
    """Refuse compiled blocks, where there is an acceleration.

    Raises:
        ConfigError: `compile`.
    """
    if compile:
        raise ConfigError(
            "an acceleration leads calls of the network or of its blocks elsewhere, which compiled "
            "blocks are not made for; got compile with one; leave compile or the acceleration out"
        )


def check_images(
    backbone: Backbone, seeds: Sequence[int], y: Conditioning | None, batch_size: int
) -> None:
    """The errors of `sample` about what to make; `seeds` are those of `seeds_of`."""
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise ConfigError(
            "batch_size must be an integer of at least 1; got "
            f"{batch_size!r}; 100 suits most networks"
        )
    backbone.check_conditioning(y, len(seeds))
    top = backbone.num_classes - 1 + backbone.has_null_label
    labels = labels_of(y)
    if labels is None:
        return
    integers = labels.dtype in (torch.int32, torch.int64)
    if not integers or int(labels.min()) < 0 or int(labels.max()) > top:
        null = f" ({top} is the null label)" if backbone.has_null_label else ""
        ends = "" if labels.is_complex() else f" from {labels.min()} to {labels.max()}"
        raise ConfigError(
            f"labels must be integers in 0…{top}{null}; got {labels.dtype}{ends}; correct them"
        )


def _now(device: torch.device) -> float:
    """Seconds on the clock once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
