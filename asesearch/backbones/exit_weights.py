"""A network with weights of its own for early exits."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from asesearch.backbones import conditioning
from asesearch.backbones.acceleration import Acceleration, Begin
from asesearch.backbones.base import Backbone, ExitDepth
from asesearch.backbones.conditioning import Conditioning

#: Begins the names of the second weights in the files we write.
EXITS = "exits."


class ExitWeights(Backbone):
    """Two sets of weights of one network: one makes the calls at full depth, the other all calls
    that leave blocks out.

    So fine-tuning for early exits changes nothing where nothing is dropped. It costs memory for the
    second set; parameters that both share are held and saved once.

    Args:
        full: makes the calls at full depth.
        exits: makes the others; of the same class and size, or `full` itself.
    """

    def __init__(self, full: Backbone, exits: Backbone) -> None:
        super().__init__()
        for name in Backbone.__annotations__:
            if hasattr(full, name):
                setattr(self, name, getattr(full, name))
        self.full = full
        self.exits = exits

    def forward(
        self, x_t: Tensor, t: Tensor, y: Conditioning | None = None, *, exit_depth: ExitDepth = None
    ) -> Tensor:
        depth = self.check_exit_depth(exit_depth, len(x_t))
        if isinstance(depth, int):
            net = self.full if depth == self.depth else self.exits
            return net(x_t, t, y, exit_depth=depth)  # type: ignore[no-any-return]
        whole = [i for i, d in enumerate(depth) if d == self.depth]
        early = [i for i, d in enumerate(depth) if d < self.depth]
        if not whole:
            return self.exits(x_t, t, y, exit_depth=exit_depth)  # type: ignore[no-any-return]
        parts = []
        for net, rows in ((self.full, whole), (self.exits, early)):
            own = torch.tensor([depth[i] for i in rows])
            labels = conditioning.take(y, rows)
            parts.append(net(x_t[rows], t[rows], labels, exit_depth=own))
        out: Tensor = torch.cat(parts)  # (N, C or 2·C, H, W), those at full depth first
        back = torch.empty(len(depth), dtype=torch.long)
        back[whole + early] = torch.arange(len(depth))
        return out[back.to(out.device)]

    def all_exits(self, x_t: Tensor, t: Tensor, y: Conditioning | None = None) -> Iterator[Tensor]:
        early = self.exits.all_exits(x_t, t, y)
        for _ in range(self.min_exit_depth, self.depth):
            yield next(early)
        yield self.full(x_t, t, y)

    def time_embedder(self) -> nn.Module | None:
        return self.exits.time_embedder()

    def block_at(self, index: int) -> nn.Module:
        """Of the weights for full depth."""
        return self.full.block_at(index)

    def transformer_blocks(self) -> list[nn.Module]:
        """Of both sets of weights, each once."""
        blocks = [*self.full.transformer_blocks(), *self.exits.transformer_blocks()]
        return list(dict.fromkeys(blocks))

    @property
    def fixed_blocks(self) -> int:
        return self.full.fixed_blocks

    def droppable_blocks(self) -> list[nn.Module]:
        return list(dict.fromkeys([*self.full.droppable_blocks(), *self.exits.droppable_blocks()]))

    def null_labels(self, y: Conditioning) -> Conditioning:
        return self.full.null_labels(y)

    def check_conditioning(self, y: Conditioning | None, batch: int) -> None:
        self.full.check_conditioning(y, batch)

    def own_tensors(self) -> dict[str, Tensor]:
        """What the second weights hold that the first do not, by name."""
        full = self.full.state_dict()
        return {
            k: v for k, v in self.exits.state_dict().items() if not torch.equal(v, full[k].to(v))
        }

    def share_unused(self, x_t: Tensor, t: Tensor, y: Conditioning | None, deepest: int) -> None:
        """Let the second weights share, with the first, all parameters that no call of at most
        `deepest` blocks reads, so that they take no memory.

        Args:
            x_t, t, y: one example of the network's inputs, as `forward` takes them.
            deepest: the deepest early exit that will be asked for.
        """
        named = dict(self.exits.named_parameters())
        with torch.enable_grad():
            wanted = {k: p.detach().requires_grad_(True) for k, p in named.items()}
            out = torch.func.functional_call(
                self.exits, wanted, (x_t, t, y), {"exit_depth": deepest}
            )
            grads = torch.autograd.grad(out.sum(), list(wanted.values()), allow_unused=True)
        unused = {k for k, grad in zip(wanted, grads, strict=True) if grad is None}
        share(self.exits, self.full, unused)


def own_exits(net: Backbone) -> ExitWeights:
    """A network whose early exits are to have weights of their own, which begin as what it has."""
    return net if isinstance(net, ExitWeights) else ExitWeights(net, net)


def weight_sets(net: Backbone) -> tuple[Backbone, ...]:
    """The networks that a network is made of: itself, or that for full depth and that for early
    exits."""
    return (net.full, net.exits) if isinstance(net, ExitWeights) else (net,)


@contextmanager
def attached(acceleration: Acceleration, net: Backbone) -> Iterator[Begin]:
    """Inside, an acceleration acts on each set of weights apart: neither reuses what the other
    computed. Calls are announced as to `Acceleration.attached`."""
    with ExitStack() as stack:
        sets = dict.fromkeys(weight_sets(net))
        begins = [stack.enter_context(acceleration.attached(own)) for own in sets]

        def begin(call: int) -> None:
            for each in begins:
                each(call)

        yield begin


def share(net: nn.Module, other: nn.Module, names: Collection[str]) -> None:
    """Let a network's parameters of these names be the other's, who has the same names."""
    for name in names:
        place, _, last = name.rpartition(".")
        setattr(net.get_submodule(place), last, other.get_parameter(name))
