"""Measuring the difficulty map: how wrong a network is at each noise
level if it stops after each of its blocks.

It costs one pass over a few thousand images and no sampling, and says where a schedule may be
shallow.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice

import torch
from torch import Tensor

from asesearch.backbones import conditioning
from asesearch.backbones.base import Backbone, evaluating, own_labels
from asesearch.backbones.conditioning import Conditioning
from asesearch.backbones.digests import weights_fingerprint
from asesearch.config import MapConfig
from asesearch.data import DataSource
from asesearch.diffusion import Process
from asesearch.errors import ConfigError, DataError, EvaluationError
from asesearch.finetuning import check_fit, seeded_generator
from asesearch.schedule import ExitSchedule
from asesearch.study.difficulty import TABLES, DifficultyMap


def measure_map(
    backbone: Backbone,
    data: DataSource,
    diffusion: Process,
    config: MapConfig,
    reference: Backbone | None = None,
    batch_size: int = 128,
    on_bin: Callable[[int, int], object] | None = None,
) -> DifficultyMap:
    """Measure the map of a network, trained or not, on its device.

    Image i of bin b, its timestep, noise and augmentation follow from `config.seed`, b and i alone:
    networks measured with one seed see the same. Within a bin images are drawn without replacement,
    and timesteps one in each of `num_images` equal parts; the standard errors leave out what that
    gains. If there are fewer images than `num_images`, all are taken in turn with noise of their
    own, and the standard errors do not see how much other images might differ.

    Args:
        backbone: run in eval mode and then as it was.
        data: images that the network was not trained on.
        diffusion: the process the network was trained with.
        config: bins, images per bin, seed.
        reference: the network whose full-depth prediction `error_full` is counted from; by default
            the backbone itself.
        batch_size: images at a time; has no influence on what is drawn.
        on_bin: called as (bins done, of all) after each.

    Raises:
        ConfigError: a network that does not predict noise, more bins than timesteps, a reference of
            another kind.
        DataError: fewer than two images, or images that do not fit the network.
        EvaluationError: the network gives numbers that are not finite.
    """
    reference = backbone if reference is None else reference
    check_map(backbone, reference, data, diffusion, config, batch_size)
    end = diffusion.num_train_timesteps
    bins = config.num_bins
    edges = tuple(i * end // bins for i in range(bins + 1))
    tables: list[list[tuple[float, ...]]] = [[] for _ in TABLES]
    with evaluating(backbone, reference):
        reuse = _reusable(backbone, _Draws(data, diffusion, config, 0, edges[:2]))
        for b in range(bins):
            draws = _Draws(data, diffusion, config, b, edges[b : b + 2])
            for table, row in zip(
                tables, _bin_rows(backbone, reference, draws, batch_size, reuse), strict=True
            ):
                table.append(row)
            if on_bin is not None:
                on_bin(b + 1, bins)
    full, full_se, noise, noise_se = map(tuple, tables)
    prints = weights_fingerprint(backbone), weights_fingerprint(reference)
    return DifficultyMap(
        end,
        edges,
        full,
        full_se,
        noise,
        noise_se,
        config.num_images,
        data.name,
        data.digest,
        *prints,
    )


def _bin_rows(
    backbone: Backbone, reference: Backbone, draws: _Draws, batch_size: int, reuse: bool
) -> list[tuple[float, ...]]:
    """One bin's row of each of `TABLES`: (depth,) each."""
    count = len(draws.indices)
    parts = [slice(first, first + batch_size) for first in range(0, count, batch_size)]
    errors = torch.cat(
        [_errors(backbone, reference, draws, part, reuse) for part in parts], dim=1
    )  # (2, num_images, depth)
    if not bool(torch.isfinite(errors).all()):
        where = f"t in [{draws.ends[0]}, {draws.ends[1]})"
        raise EvaluationError(
            f"a map needs finite predictions; got others at {where}; check the network's weights"
        )
    # (2, depth) each
    mean = errors.mean(dim=1)
    spread = errors.std(dim=1) / math.sqrt(count)
    return [tuple(row.tolist()) for row in (mean[0], spread[0], mean[1], spread[1])]


def map_seconds(
    backbone: Backbone,
    data: DataSource,
    diffusion: Process,
    config: MapConfig,
    reference: Backbone | None = None,
) -> float:
    """Estimate of what `measure_map` takes, from a few images of the network's own; arguments and
    errors are the same."""
    check_map(backbone, backbone if reference is None else reference, data, diffusion, config, 1)
    on_gpu = next(backbone.parameters(), torch.empty(0)).is_cuda
    # a GPU takes a batch in the time of an image
    few = min(config.num_images, 128 if on_gpu else 8)
    ended: list[float] = []
    trial = config.model_copy(update={"num_bins": 2, "num_images": few})
    measure_map(
        backbone,
        data,
        diffusion,
        trial,
        reference,
        on_bin=lambda *_: ended.append(time.perf_counter()),
    )
    # the first bin warms up
    return (ended[1] - ended[0]) * config.num_bins * config.num_images / few


def check_map(
    backbone: Backbone,
    reference: Backbone,
    data: DataSource,
    diffusion: Process,
    config: MapConfig,
    batch_size: int,
) -> None:
    """Refuse what can't be measured, before anything expensive. Raises as `measure_map` says."""
    check_fit(
        backbone, data, diffusion, ExitSchedule.full(backbone.depth, diffusion.num_train_timesteps)
    )
    names = ("depth", "in_channels", "input_size", "num_classes", "takes_prompt", "prediction_type")
    pairs = [(name, getattr(reference, name), getattr(backbone, name)) for name in names]
    if differ := [f"{name} {theirs} for {ours}" for name, theirs, ours in pairs if theirs != ours]:
        raise ConfigError(
            f"the reference must be a network of the same kind; got {', '.join(differ)}; give the "
            "one it was fine-tuned from"
        )
    end = diffusion.num_train_timesteps
    if config.num_bins > end:
        raise ConfigError(
            f"num_bins must be at most the number of timesteps, {end}; got {config.num_bins}; "
            "lower it"
        )
    if len(data) < 2:
        raise DataError(
            f"a map needs at least 2 images for its standard errors; got {len(data)} in "
            f"{data.name}; give more"
        )
    if batch_size < 1:
        raise ConfigError(
            f"batch_size must be at least 1; got {batch_size}; 128 suits most networks"
        )


class _Draws:
    """What a bin is measured on: images by number, one timestep in each of `num_images` equal parts
    of the bin."""

    def __init__(
        self,
        data: DataSource,
        diffusion: Process,
        config: MapConfig,
        bin_: int,
        ends: tuple[int, ...],
    ) -> None:
        self.data = data
        self.diffusion = diffusion
        self.key = (config.seed, bin_)
        self.ends = ends
        count = config.num_images
        gen = seeded_generator(*self.key, 5)
        orders = [torch.randperm(len(data), generator=gen) for _ in range(-(-count // len(data)))]
        self.indices: list[int] = torch.cat(orders)[:count].tolist()
        parts = (
            torch.randperm(count, generator=gen)
            + torch.rand(count, generator=gen, dtype=torch.float64)
        ) / count
        last = diffusion.num_train_timesteps - 1  # where continuous time ends
        self.t = (ends[0] + (ends[1] - ends[0]) * parts).clamp(max=last).to(diffusion.time_dtype)

    def take(self, part: slice) -> tuple[Tensor, Tensor, Conditioning | None, Tensor]:
        """x_t, t, y and noise of some images: each with its own generator, whatever the batch."""
        numbers = range(len(self.indices))[part]
        generators = [seeded_generator(*self.key, 6, i) for i in numbers]
        images = [
            self.data.batch([self.indices[i]], g) for i, g in zip(numbers, generators, strict=True)
        ]
        x_start = torch.cat([x for x, _ in images])  # (N, C, H, W)
        y = conditioning.join([y for _, y in images])
        # (N, C, H, W)
        noise = torch.stack(
            [torch.randn(self.data.shape, generator=g, dtype=torch.float32) for g in generators]
        )
        t = self.t[part]
        return self.diffusion.q_sample(x_start, t, noise), t, y, noise


def _errors(
    backbone: Backbone, reference: Backbone, draws: _Draws, part: slice, reuse: bool
) -> Tensor:
    """Mean squares against the reference's full depth, and against the noise: (2, N, depth)
    float64, on the CPU."""
    x_t, t, y, noise = draws.take(part)
    output = reference(*_inputs(reference, x_t, t, y), exit_depth=reference.depth)
    full = _eps(output, x_t)
    own = reference is backbone  # then the last exit is `full` itself
    count = backbone.depth - _least_exit(backbone) + 1 - own
    above = islice(_exits(backbone, x_t, t, y, reuse), count)
    columns = []
    for eps in chain(above, [full] * own):
        squares = [
            (eps - target.to(eps.device)).pow(2).flatten(1).mean(dim=1) for target in (full, noise)
        ]
        columns.append(torch.stack(squares).double().cpu())  # (2, N)
    below = [columns[0]] * (backbone.depth - len(columns))
    return torch.stack(below + columns, dim=-1)  # (2, N, depth)


def _least_exit(net: Backbone) -> int:
    """The exit depth at which the map begins: a network that stops before its first block has no
    column."""
    return max(1, net.min_exit_depth)


def _exits(
    net: Backbone, x_t: Tensor, t: Tensor, y: Conditioning | None, reuse: bool
) -> Iterator[Tensor]:
    """Predicted noise of one batch at the exit depths from the least to the full, ascending.

    With `reuse` each block runs once: depth blocks in place of 1 + 2 + … + depth.
    """
    exits = net.all_exits if reuse else partial(Backbone.all_exits, net)
    outputs = exits(*_inputs(net, x_t, t, y))
    return (_eps(out, x_t) for out in islice(outputs, _least_exit(net) - net.min_exit_depth, None))


def _reusable(net: Backbone, draws: _Draws) -> bool:
    """Whether blocks need to run only once per batch: tried on two images, at every exit depth, to
    the last bit. It is not so for a network that inherits `all_exits` and changes `forward`."""
    x_t, t, y, _ = draws.take(slice(2))
    once, each = (list(_exits(net, x_t, t, y, reuse)) for reuse in (True, False))
    return all(torch.equal(a, b) for a, b in zip(once, each, strict=True))


def _inputs(
    net: Backbone, x_t: Tensor, t: Tensor, y: Conditioning | None
) -> tuple[Tensor, Tensor, Conditioning | None]:
    """Arguments of a network, on its device."""
    device = next(net.parameters(), torch.empty(0)).device
    own = conditioning.to(own_labels(net, y, len(x_t)), device)
    return x_t.to(device), t.to(device), own


def _eps(output: Tensor, x_t: Tensor) -> Tensor:
    """The predicted noise (N, C, H, W) in float32 of a network's output."""
    return output[:, : x_t.shape[1]].float()
