"""The batch of a step, which follows from (seed, step) alone.

Timesteps are stratified over the batch, which the released code of Moon et al. 2024 does not do.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asesearch.backbones import conditioning
from asesearch.backbones.base import Backbone, own_labels
from asesearch.backbones.conditioning import Conditioning
from asesearch.config import TrainConfig
from asesearch.data import DataSource, read_ahead, workers_of
from asesearch.diffusion import Process
from asesearch.errors import ScheduleError

DepthAt = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.int64]]


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream depends on all of `key`, and on nothing else."""
    words = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


@dataclass(eq=False)
class Batch:
    """What one process needs for one step, on the CPU. `u` (N,) in [0, 1) draws the depth where a
    distribution does."""

    x_start: Tensor
    y: Conditioning | None
    t: Tensor
    noise: Tensor
    u: Tensor


def draw_batch(
    data: DataSource,
    backbone: Backbone,
    config: TrainConfig,
    diffusion: Process,
    step: int,
    part: tuple[int, int],
    strata: Tensor | None = None,
) -> Batch:
    """The batch of step `step`, or the share of process `part` = (rank, number of processes) of it.

    Images are drawn without replacement within an epoch; timesteps are stratified (one in each of
    batch_size equal strata of the diffusion timesteps, shuffled); labels are dropped with
    `class_dropout_prob` where the network has a null label. `strata` keeps the timesteps to some of
    their range, see `strata_below`.
    """
    return _labelled(_drawn(data, config, diffusion, part, strata, step), backbone)


def strata_below(depth: int, diffusion: Process, exit_depth_at: DepthAt) -> Tensor:
    """The timesteps at which fewer than `depth` blocks run, as numbers of the strata of one
    timestep each that uniform draws fall in: (K,).

    Args:
        depth: that is not to be reached.
        diffusion: forward process.
        exit_depth_at: blocks to run at timesteps (N,).

    Raises:
        ScheduleError: there are none.
    """
    count = diffusion.num_train_timesteps
    t = diffusion.draw_t((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    found = torch.from_numpy(exit_depth_at(t.numpy()) < depth).nonzero()[:, 0]
    if not len(found):
        raise ScheduleError(
            f"training for early exits alone needs timesteps with fewer than {depth} blocks; got a "
            "schedule that runs all blocks everywhere; train the whole network"
        )
    return found


def batches(
    data: DataSource,
    backbone: Backbone,
    config: TrainConfig,
    diffusion: Process,
    part: tuple[int, int],
    steps: range,
    strata: Tensor | None = None,
) -> Generator[Batch, None, None]:
    """The batches of many steps, each as `draw_batch` gives it, read ahead: see `read_ahead`."""
    draw = partial(_drawn, data, config, diffusion, part, strata)
    with closing(read_ahead(draw, steps, workers_of(data))) as drawn:
        for batch, dropped in drawn:
            yield _labelled((batch, dropped), backbone)


def _drawn(
    data: DataSource,
    config: TrainConfig,
    diffusion: Process,
    part: tuple[int, int],
    strata: Tensor | None,
    step: int,
) -> tuple[Batch, Tensor]:
    """A batch with the data's own labels, and which of these are to be dropped (N,): what needs no
    network, and so can be drawn in another process."""
    rank, world = part
    size = config.batch_size
    gen = seeded_generator(config.seed, step, 1)
    indices = _epoch_indices(len(data), size, step, config.seed)
    place = _spread(size, gen)
    if strata is not None:
        place = place.double() * len(strata)
        place = (strata[place.long()] + place.frac()) / diffusion.num_train_timesteps
    t = diffusion.draw_t(place)
    noise = torch.randn(size, *data.shape, generator=gen, dtype=torch.float32)
    dropped = torch.rand(size, generator=gen, dtype=torch.float32) < config.class_dropout_prob
    mine = slice(rank * size // world, (rank + 1) * size // world)
    x_start, y = data.batch(indices[mine], seeded_generator(config.seed, step, 2, rank))
    depth_gen = seeded_generator(config.seed, step, 4)
    u = _spread(size, depth_gen)
    return Batch(x_start, y, t[mine], noise[mine], u[mine]), dropped[mine]


def _spread(size: int, generator: torch.Generator) -> Tensor:
    """A uniform number in each of as many equal parts of [0, 1), in random order: (N,)."""
    order = torch.randperm(size, generator=generator)
    found = (order + torch.rand(size, generator=generator, dtype=torch.float32)) / size
    return found.clamp_(max=1 - torch.finfo(found.dtype).eps / 2)  # float32 may round up to 1


def _labelled(drawn: tuple[Batch, Tensor], backbone: Backbone) -> Batch:
    """The batch with the labels that the network takes."""
    batch, dropped = drawn
    y = own_labels(backbone, batch.y, len(batch.x_start))
    if y is not None and backbone.has_null_label:
        y, null = conditioning.matched(y, backbone.null_labels(y))
        y = conditioning.where(dropped, null, y)
    return replace(batch, y=y)


@lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def _epoch_order(total: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch, 3]).permutation(total)


def _epoch_indices(total: int, size: int, step: int, seed: int) -> list[int]:
    first = step * size
    indices: list[int] = []
    while len(indices) < size:
        epoch, offset = divmod(first + len(indices), total)
        order = _epoch_order(total, seed, epoch)
        indices += order[offset : offset + size - len(indices)].tolist()
    return indices
