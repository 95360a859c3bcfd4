"""A network cut at its droppable blocks: what comes before, one block, what comes after.

Compiled formats are made of these: every block computes the same with other weights, so one
compiled block serves all of them and every depth. Nothing of a network's forward is repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asesearch.backbones.base import Backbone
from asesearch.backbones.dit import DiT
from asesearch.backbones.uvit import UViT
from asesearch.errors import ConfigError

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Part:
    """A function of tensors and weights.

    Attributes:
        compute: gives one tensor or a tuple of them; called as `compute(*tensors)`.
        module: whose weights it uses.
        prefix: what their names in the network begin with.
        others: how the names of weights begin that it does not use.
    """

    compute: Callable[..., Tensor | Tensors]
    module: nn.Module
    prefix: str = ""
    others: tuple[str, ...] = ()

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by their name in `module`."""
        found = [*self.module.named_parameters(), *self.module.named_buffers()]
        return {k: v.detach() for k, v in found if not k.startswith(self.others)}

    def pure(self) -> PurePart:
        """As a function of its weights too."""
        return PurePart(self)


class PurePart(nn.Module):
    """`forward(*tensors, weights)`: a part that holds no weights, so that an exporter sees them as
    inputs.

    Attributes:
        names: of the weights, in the order they are given.
    """

    def __init__(self, part: Part) -> None:
        super().__init__()
        # in a tuple, or the weights would be this module's own
        self._held = (_Calling(part.compute, part.module),)
        self.names = [f"module.{name}" for name in part.weights()]
        self.eval()

    def forward(self, *given: Tensor | Sequence[Tensor]) -> Tensor | Tensors:
        *tensors, weights = given
        named = dict(zip(self.names, weights, strict=True))
        out: Tensor | Tensors = torch.func.functional_call(self._held[0], named, tuple(tensors))
        return out


class _Calling(nn.Module):
    """A function as the forward of a module that has the weights."""

    def __init__(self, compute: Callable[..., Tensor | Tensors], module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._held = (compute,)  # in a tuple, for it may be the module itself

    def forward(self, *tensors: Tensor) -> Tensor | Tensors:
        return self._held[0](*tensors)


@dataclass(frozen=True)
class Parts:
    """A network cut at its blocks.

    `before` gives the tokens x (N, L, D), then what every block and `after` are given besides, then
    one skip for each block where there is a `merge`. Block i is x = block(x, *fixed), after
    x = merge(x, skip i), which runs whether or not the block does.

    Attributes:
        inputs: an example of each of the network's inputs by name, in order, N first.
        before: of the inputs.
        blocks: droppable, first to run first; one is as the other but for its weights.
        after: of x and the fixed tensors.
        num_fixed: number of fixed tensors.
        merges: what takes the skips in, one for each block; empty where the network has none.
    """

    inputs: Mapping[str, Tensor]
    before: Part
    blocks: Sequence[Part]
    after: Part
    num_fixed: int
    merges: Sequence[Part] = ()


def cut(net: Backbone, time_dtype: torch.dtype = torch.int64, batch: int = 2) -> Parts:
    """A network in parts; it stays as it is, and the parts have its weights.

    Args:
        net: a DiT or U-ViT.
        time_dtype: of a timestep, see `asesearch.diffusion.Process`.
        batch: N of the example inputs.

    Raises:
        ConfigError: a network that is not cut here.
    """
    inputs = {
        "x_t": torch.zeros(batch, net.in_channels, net.input_size, net.input_size),
        "timestep": torch.zeros(batch, dtype=time_dtype),
    }
    if net.num_classes:
        inputs["y"] = torch.zeros(batch, dtype=torch.int64)
    check_cuts(net)
    if isinstance(net, DiT):
        return _cut_dit(net, inputs)
    assert isinstance(net, UViT)
    return _cut_uvit(net, inputs)


def check_cuts(net: Backbone) -> None:
    """Refuse a network that `cut` does not know.

    Raises:
        ConfigError: naming it.
    """
    if not isinstance(net, (DiT, UViT)):
        raise ConfigError(
            f"compiled formats are made of DiT and U-ViT networks; got {type(net).__name__}; "
            "export it as a bundle"
        )


def _cut_dit(net: DiT, inputs: dict[str, Tensor]) -> Parts:
    def after(x: Tensor, c: Tensor) -> Tensor:
        return net.unpatchify(net.final_layer(x, c))

    return Parts(
        inputs=inputs,
        before=Part(net._embed, net, others=("blocks.", "final_layer.")),
        blocks=[Part(net.block_at(i), net.block_at(i), f"blocks.{i}.") for i in range(net.depth)],
        after=Part(after, net.final_layer, "final_layer."),
        num_fixed=1,
    )


def _cut_uvit(net: UViT, inputs: dict[str, Tensor]) -> Parts:
    def before(x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensors:
        x, skips = net._encode(net._embed(x_t, t, y))
        return (x, *reversed(skips))

    def block(i: int) -> Part:
        return Part(net.block_at(i), net.block_at(i), f"out_blocks.{i}.", ("skip_linear.",))

    def merge(i: int) -> Part:
        others = ("norm", "attn.", "mlp.")
        return Part(net.block_at(i).merge, net.block_at(i), f"out_blocks.{i}.", others)

    rest = ("in_blocks.", "mid_block.", "patch_embed.", "time_embed.", "label_emb.", "pos_embed")
    has_skips = net.block_at(0).skip_linear is not None
    return Parts(
        inputs=inputs,
        before=Part(before, net, others=("out_blocks.", "norm.", "decoder_pred.", "final_layer.")),
        blocks=[block(i) for i in range(net.depth)],
        after=Part(net._head, net, others=("out_blocks.", *rest)),
        num_fixed=0,
        merges=[merge(i) for i in range(net.depth)] if has_skips else [],
    )
