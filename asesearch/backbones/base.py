"""What every network that asesearch drives has in common: the backbone contract.

A backbone takes `exit_depth` and knows no schedule, loss or solver.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from asesearch.backbones.conditioning import (
    Conditioning,
    conditioning_of,
    labels_of,
    prompt_of,
)
from asesearch.errors import ConfigError, ScheduleError
from asesearch.schedule import ElasticDepths, ExitSchedule

ExitDepth = int | Tensor | None


class Backbone(nn.Module):
    """Base class of the networks.

    Attributes:
        depth: number of blocks that may be dropped.
        min_exit_depth: fewest blocks that must run.
        in_channels: C of `x_t`.
        input_size: H = W of `x_t`.
        num_classes: number of class labels, 0 for an unconditional network. Label `num_classes` is
            the null label of classifier-free guidance where `has_null_label`.
        learn_sigma: True if the output has 2·C channels: eps, then the interpolation of the
            variance.
        guided_channels: classifier-free guidance acts on the first so many output channels.
        prediction_type: `epsilon` (noise) or `flow` (velocity of rectified flow).
        takes_prompt: conditioned on a prompt's tensors rather than class labels.
        null_condition: what stands for "no prompt": tensors with leading dimension 1, on the CPU;
            None where not known.
        capturable: a call waits for nothing on the host, so that a CUDA graph can hold it.
        config: the constructor arguments, so that `type(net)(**net.config)` makes the same network.
    """

    depth: int
    min_exit_depth: int = 1
    in_channels: int
    input_size: int
    num_classes: int
    has_null_label: bool
    learn_sigma: bool
    guided_channels: int
    prediction_type: str = "epsilon"
    takes_prompt: bool = False
    capturable: bool = False
    null_condition: dict[str, Tensor] | None = None
    config: dict[str, Any]

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """A published network by name, such as `"DiT-XL/2"`; keyword arguments override its
        constructor arguments.

        Raises:
            ConfigError: unknown name.
        """
        return cls(**{**cls.preset_args(name), **changes})

    @staticmethod
    def preset_args(name: str) -> dict[str, Any]:
        """The constructor arguments that a published name fixes.

        Raises:
            ConfigError: unknown name.
        """
        raise ConfigError(f"this kind of network has no presets; got {name!r}; give a checkpoint")

    def forward(
        self, x_t: Tensor, t: Tensor, y: Tensor | None = None, *, exit_depth: ExitDepth = None
    ) -> Tensor:
        """Predict the noise (and the variance where learned).

        Args:
            x_t: (N, C, H, W) float.
            t: (N,) timesteps in [0, num_train_timesteps).
            y: (N,) class labels; None only for an unconditional network.
            exit_depth: blocks to run: one int for the batch, a LongTensor (N,) with one count a
                sample (on the CPU, to spare a device synchronisation), or None for all.

        Returns:
            (N, C or 2·C, H, W) float.

        Raises:
            ScheduleError: exit_depth outside min_exit_depth…depth or of another shape.
        """
        raise NotImplementedError

    def all_exits(self, x_t: Tensor, t: Tensor, y: Conditioning | None = None) -> Iterator[Tensor]:
        """The outputs at the exit depths min_exit_depth…depth, ascending, to the last bit those of
        `forward`.

        Networks that know how run each block once; here each depth is a pass of its own. Nothing
        is computed before it is asked for.

        Raises:
            ConfigError: as `forward`.
        """
        for exit_depth in range(self.min_exit_depth, self.depth + 1):
            yield self(x_t, t, y, exit_depth=exit_depth)

    def time_embedder(self) -> nn.Module | None:
        """The module that embeds t, which ASE fine-tuning may freeze; None if it has no
        parameters."""
        raise NotImplementedError

    def block_at(self, index: int) -> nn.Module:
        """Droppable block `index`, 0 first to run."""
        raise NotImplementedError

    def transformer_blocks(self) -> list[nn.Module]:
        """All transformer blocks, also those that can't be dropped."""
        return [self.block_at(i) for i in range(self.depth)]

    @property
    def fixed_blocks(self) -> int:
        """Transformer blocks that run in every call, beside the `depth` that may be dropped."""
        return 0

    def droppable_blocks(self) -> list[nn.Module]:
        """All blocks that may be dropped, of every set of weights."""
        return [self.block_at(i) for i in range(self.depth)]

    def null_labels(self, y: Conditioning) -> Conditioning:
        """What takes the place of `y` in the unconditional half of classifier-free guidance, of the
        same kind and N.

        Raises:
            ConfigError: the network has no null label, or was given none.
        """
        labels = labels_of(y)
        if not self.has_null_label or labels is None:
            raise ConfigError(
                "guidance needs class labels and a network with a null label; got neither; use "
                "cfg_scale 1"
            )
        return torch.full_like(labels, self.num_classes)

    def check_conditioning(self, y: Conditioning | None, batch: int) -> None:
        """Refuse what `forward` can't take as `y` of a batch.

        Raises:
            ConfigError: labels for prompts or the reverse, missing, unexpected, or of another
                shape.
        """
        if not self.takes_prompt:
            return check_labels(self, y, batch)
        sizes = {k: len(v) for k, v in (prompt_of(conditioning_of(y)) or {}).items()}
        if set(sizes.values()) != {batch}:
            got = sizes or type(y).__name__
            raise ConfigError(
                f"y must be a prompt's tensors of leading dimension {batch}, one per image; got "
                f"{got}; repeat it"
            )

    def check_exit_depth(self, exit_depth: ExitDepth, batch: int) -> int | list[int]:
        """Validate `exit_depth`; an int for the whole batch, or one per image.

        Raises:
            ScheduleError: outside min_exit_depth…depth, or not one count per sample.
        """
        if exit_depth is None:
            return self.depth
        if isinstance(exit_depth, Tensor):
            if (
                exit_depth.shape != (batch,)
                or exit_depth.is_floating_point()
                or exit_depth.dtype == torch.bool
            ):
                raise ScheduleError(
                    f"exit_depth must be an integer tensor of shape ({batch},), one count a "
                    f"sample; got {exit_depth.dtype} of shape {tuple(exit_depth.shape)}; pass "
                    "ExitSchedule.exit_depth_at(t)"
                )
            depths: list[int] = exit_depth.tolist()
            low, high = (min(depths), max(depths)) if depths else (self.depth, self.depth)
            result: int | list[int] = high if low == high else depths
        else:
            try:
                low = high = result = operator.index(exit_depth)
            except TypeError as error:
                raise ScheduleError(
                    f"exit_depth must be an integer; got {exit_depth!r}; round it"
                ) from error
        if low < self.min_exit_depth or high > self.depth:
            raise ScheduleError(
                f"exit_depth must lie in {self.min_exit_depth}…{self.depth} for this network; got "
                f"{low}…{high}; rescale the schedule to the network's depth"
            )
        return result


@contextmanager
def evaluating(*nets: nn.Module) -> Iterator[None]:
    """Inside there are no gradients and the networks are in eval mode; afterwards every part of
    them is in the mode it was in."""
    before = [(module, module.training) for net in nets for module in net.modules()]
    for net in nets:
        net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def check_labels(net: Backbone, y: Conditioning | None, batch: int) -> None:
    """Refuse labels of another shape, or none where the network needs them.

    Raises:
        ConfigError: y missing, unexpected, a prompt's tensors, or not of shape (N,).
    """
    y = conditioning_of(y)
    if (prompt := prompt_of(y)) is not None:
        raise ConfigError(
            f"this network takes no prompts; got y with {', '.join(prompt)}; pass class "
            "labels, or none"
        )
    if net.num_classes == 0:
        if y is not None:
            raise ConfigError(
                "this network is unconditional and takes no labels; got y; leave y out"
            )
    elif (labels := labels_of(y)) is None:
        raise ConfigError(
            f"this network needs class labels 0…{net.num_classes - 1}; got none; pass y of shape "
            f"({batch},)"
        )
    elif labels.shape != (batch,):
        raise ConfigError(
            f"y must have shape ({batch},); got {tuple(labels.shape)}; pass one label per image"
        )


def own_labels(net: Backbone, y: Conditioning | None, batch: int) -> Conditioning | None:
    """What a data set gives with `batch` images, as the network takes it.

    An unconditional network has no use for labels or prompts. One with a single class, which is how
    the official DiT is trained unconditionally, takes every image as of that class.
    """
    if net.takes_prompt:
        return y
    if net.num_classes == 0:
        return None
    return torch.zeros(batch, dtype=torch.long) if net.num_classes == 1 else y


def check_network(net: Backbone, faster: str, *, half: bool = False) -> None:
    """Refuse what is no network, or one whose weights are not float32.

    Args:
        net: the network.
        faster: the setting that computes in bfloat16, for the message.
        half: weights in float16 or bfloat16 are taken too, as under autocast they can be.

    Raises:
        ConfigError: as said.
    """
    if not isinstance(net, Backbone):
        raise ConfigError(
            f"the network must be a Backbone; got {type(net).__name__}; of a bundle take its "
            ".backbone, and put a transformer of diffusers into DiffusersBackbone"
        )
    taken = {torch.float32} | ({torch.float16, torch.bfloat16} if half else set())
    for name, value in net.named_parameters():
        if value.is_floating_point() and value.dtype not in taken:
            raise ConfigError(
                f"the network's weights must be float32; got {value.dtype} in {name}; make them so "
                f"with .float(), and set {faster} for faster arithmetic"
            )


def check_schedule(
    backbone: Backbone,
    num_train_timesteps: int,
    schedule: ExitSchedule | ElasticDepths,
    *,
    elastic: bool = False,
) -> None:
    """Refuse a schedule that was made for another network or number of timesteps, or is none;
    `elastic` allows the distribution of a warm-up.

    Raises:
        ScheduleError: depth, number of diffusion timesteps or smallest exit depth do not fit, or it
            is something else.
    """
    if not isinstance(schedule, (ExitSchedule, ElasticDepths) if elastic else ExitSchedule):
        fix = f"make one of text by ExitSchedule.from_string(text, {backbone.depth})"
        if hasattr(schedule, "schedule"):
            fix = "give its .schedule"
        got = repr(schedule)[:60] if isinstance(schedule, str) else type(schedule).__name__
        raise ScheduleError(f"the schedule must be an ExitSchedule; got {got}; {fix}")
    if schedule.depth != backbone.depth:
        raise ScheduleError(
            f"the schedule is for a network of {schedule.depth} blocks; got one of "
            f"{backbone.depth}; use rescaled({backbone.depth})"
        )
    if schedule.num_train_timesteps != num_train_timesteps:
        raise ScheduleError(
            f"the schedule is for {schedule.num_train_timesteps} diffusion timesteps; got "
            f"{num_train_timesteps}"
        )
    if min(schedule.exit_depths) < backbone.min_exit_depth:
        raise ScheduleError(
            f"this network must run at least {backbone.min_exit_depth} blocks; got "
            f"{min(schedule.exit_depths)} in the schedule"
        )


def run_blocks(
    blocks: Sequence[Callable[[Tensor, Tensor], Tensor]],
    x: Tensor,
    c: Tensor,
    exit_depth: int | list[int],
) -> Tensor:
    """Run blocks 1…exit_depth of each sample; a sample that is done costs nothing in later blocks.

    The batch is sorted by depth, deepest first, and shrinks as samples leave; the order is restored
    at the end.

    Args:
        blocks: callables (x, c) -> x.
        x: (N, L, D) tokens.
        c: (N, D) condition.
        exit_depth: one count for the batch, or one per sample.

    Returns:
        (N, L, D) tokens, in the order given.
    """
    if isinstance(exit_depth, int):
        for block in blocks[:exit_depth]:
            x = block(x, c)
        return x
    order = sorted(range(len(exit_depth)), key=lambda i: -exit_depth[i])
    index = torch.tensor(order).to(x.device, non_blocking=True)
    x = x[index]
    c = c[index]
    done: list[Tensor] = []  # shallowest first
    for i in range(max(exit_depth)):
        active = sum(d > i for d in exit_depth)
        if active < x.shape[0]:
            done.append(x[active:])
            x = x[:active]  # (N', L, D), N' the samples that go on
            c = c[:active]
        x = blocks[i](x, c)
    x = torch.cat([x, *reversed(done)])  # (N, L, D), deepest first
    back = torch.empty_like(index)
    back[index] = torch.arange(len(order), device=x.device)
    return x[back]
