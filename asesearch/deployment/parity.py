"""Inputs and outputs that a bundle keeps of its network, so that whoever loads it knows that it
computes the same there.

The file has `x_t` (N, C, H, W), `t` (N,), labels `y` (N,) or a prompt's tensors `y.NAME` (N, …)
where the network takes them, and `out.D` (N, C or 2·C, H, W) float32 for every exit depth D that
the schedule uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from asesearch.backbones.base import Backbone
from asesearch.backbones.device import plain_torch, tf32
from asesearch.deployment.recorded import OUTPUT, PROMPT, parity_count, prompts_of
from asesearch.errors import CheckpointError
from asesearch.schedule import ExitSchedule

TOLERANCE = 2e-3  # of the largest output; float32 on another processor stays far below


def make_parity(
    net: Backbone,
    schedule: ExitSchedule,
    num_train_timesteps: int,
    prompts: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """The tensors of the file: random images and timesteps, and what the network gives for them."""
    count = parity_count(prompts)
    generator = torch.Generator().manual_seed(0)
    shape = (count, net.in_channels, net.input_size, net.input_size)
    x_t = torch.randn(shape, generator=generator, dtype=torch.float32)
    t = torch.randint(num_train_timesteps, (count,), generator=generator)
    tensors = {"x_t": x_t, "t": t} | {f"{PROMPT}{k}": v for k, v in (prompts or {}).items()}
    if net.num_classes:
        tensors["y"] = torch.arange(count) % net.num_classes
    return tensors | _outputs(net, tensors, sorted(set(schedule.exit_depths)))


@plain_torch()
@torch.no_grad()
def _outputs(
    net: Backbone, tensors: Mapping[str, Tensor], depths: Sequence[int]
) -> dict[str, Tensor]:
    device = next(net.parameters()).device
    given = {k: v.to(device) for k, v in tensors.items() if not k.startswith(OUTPUT)}
    y = given.get("y") if "y" in given else prompts_of(given)
    # each block once, and the same to the last bit as a call for each depth
    exits = net.all_exits(given["x_t"], given["t"], y)
    outputs = zip(range(net.min_exit_depth, max(depths) + 1), exits, strict=False)
    with tf32(False):  # the exits are computed as they are asked for
        return {f"{OUTPUT}{d}": out.float().cpu().contiguous() for d, out in outputs if d in depths}


def parity_errors(net: Backbone, parity: Mapping[str, Tensor]) -> dict[int, float]:
    """Exit depth -> the largest difference from the outputs on record over the largest of them."""
    expected = {int(k.removeprefix(OUTPUT)): v for k, v in parity.items() if k.startswith(OUTPUT)}
    made = _outputs(net, parity, list(expected))
    return {
        depth: float(
            (made[f"{OUTPUT}{depth}"] - want).abs().max() / want.abs().max().clamp(min=1e-6)
        )
        for depth, want in expected.items()
    }


def refuse_errors(errors: Mapping[int, float], folder: object) -> None:
    """Refuse a network that computes something else than on record.

    Raises:
        CheckpointError: naming the exit depth.
    """
    for depth, error in errors.items():
        if not error <= TOLERANCE:
            raise CheckpointError(
                f"the network of {folder} computes something else here than where it was exported: "
                f"at exit depth {depth} it is off by {error:.2g} of the largest output "
                f"(tolerance {TOLERANCE:g}); check versions and device"
            )
