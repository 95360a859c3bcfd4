"""Token merging: patches that are alike go through attention as one.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461; Bolya and
Hoffman, "Token Merging for Fast Stable Diffusion", CVPR 2023 workshops, arXiv 2303.17604. As in the
second, tokens are merged before attention and taken apart behind it, in every block by a matching
of its own, and perceptrons see them all. Where we differ: the token of each 2 x 2 that others are
merged into is always the first (there a random one), so an image depends on its seed alone; and
tokens are compared as attention gets them, behind the norm. The authors' library, tomesd 0.1.3,
knows the blocks of Stable Diffusion's U-Net only, so all of it is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asesearch.backbones.acceleration import Begin, Mix, as_tokens, led, plain_blocks
from asesearch.backbones.base import Backbone
from asesearch.backbones.dit import DiT
from asesearch.backbones.uvit import UViT
from asesearch.errors import ConfigError
from asesearch.sampler import LIMITS


@dataclass(frozen=True)
class Merging:
    """Which part of the patches is merged before attention.

    Tokens that are no patches (U-ViT's label and time) are neither merged nor merged into.

    Attributes:
        ratio: merged patches over all, 0 to 0.5, rounded down to whole tokens.

    Raises:
        ConfigError: another ratio.
    """

    ratio: float

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= LIMITS["merge"]:
            raise ConfigError(
                f"token merging takes 0 to {LIMITS['merge']:g} of the patches; got {self.ratio!r}; "
                "choose less"
            )

    @property
    def num_calls(self) -> None:
        return None

    @contextmanager
    def attached(self, net: Backbone) -> Iterator[Begin]:
        blocks = plain_blocks(net)
        if not isinstance(net, DiT | UViT):
            raise ConfigError(
                "token merging needs a DiT or U-ViT, whose tokens are a grid of patches; got "
                f"{type(net).__name__}; leave the acceleration out"
            )
        extras = net.extras if isinstance(net, UViT) else 0
        grid = Grid(net.input_size // net.patch_size, extras, self.ratio)

        def through(module: nn.Module) -> Callable[..., Any]:
            forward = module.forward

            def call(x: Tensor) -> Tensor:
                merge, take_apart = grid.match(x)
                return take_apart(as_tokens(forward(merge(x))))

            return call

        modules = [] if grid.num_merged == 0 else [_attention(block) for block in blocks]
        with led({m: through(m) for m in modules}):
            yield lambda call: None

    def most(self, net: Backbone) -> Merging:
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "merge", "ratio": self.ratio}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Merging:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: a missing or unknown key, or a ratio that is no number in range.
        """
        if set(data) != {"kind", "ratio"} or type(data["ratio"]) not in (int, float):
            raise ConfigError(
                f"token merging has the keys kind and ratio, a number; got {str(data)[:80]}; "
                "calibrate it again"
            )
        return cls(float(data["ratio"]))

    def mix(self, net: Backbone, exit_depths: Sequence[int], apart: bool = False) -> list[Mix]:
        return [((1.0, depth, True),) for depth in exit_depths]


class Grid:
    """Which tokens may be merged into which: the first of each 2 x 2 patches takes others in.

    Args:
        side: patches in a row and in a column.
        extras: tokens before the patches.
        ratio: see `Merging`.

    Attributes:
        num_merged: patches that are merged into another.
    """

    def __init__(self, side: int, extras: int, ratio: float) -> None:
        places = torch.arange(side * side)
        first = (places // side % 2 == 0) & (places % side % 2 == 0)
        self.extras = extras
        self.into = extras + places[first]  # (T,) of the tokens
        self.sources = extras + places[~first]  # (S,)
        # in the shortest decimal that was asked for: 0.3 of 10 are 3
        self.num_merged = min(len(self.sources), int(ratio * side * side + 1e-9))

    def match(self, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """How each image's tokens are merged, (N, L, D) -> (N, L', D), and taken apart again.

        Each source is matched with what it is most like (cosine) among the tokens that take others
        in; of all sources those most like theirs are merged, to their mean.
        """
        into = self.into.to(x.device, non_blocking=True)
        sources = self.sources.to(x.device, non_blocking=True)
        n = len(x)
        unit = F.normalize(x, dim=-1)
        likeness = unit[:, sources] @ unit[:, into].transpose(1, 2)  # (N, S, T)
        most, partner = likeness.max(dim=-1)  # (N, S)
        order = most.argsort(dim=-1, descending=True, stable=True)
        gone = order[:, : self.num_merged]  # (N, R)
        stay = order[:, self.num_merged :]
        target = partner.gather(1, gone)  # (N, R) of T
        # the new tokens: those before the patches, sources that stay, those that took others in
        fixed = torch.arange(self.extras, device=x.device).expand(n, -1)
        kept = torch.cat([fixed, sources[stay], into.expand(n, -1)], dim=1)  # (N, L')
        start = kept.shape[1] - len(into)
        numbers = torch.arange(start + len(into), device=x.device).expand(n, -1)
        place = torch.empty(x.shape[:2], dtype=torch.long, device=x.device)  # (N, L) of L'
        place.scatter_(1, kept, numbers)
        place.scatter_(1, sources[gone], start + target)
        # a matrix product adds in one order on every device, as scattered sums do not
        chosen = torch.arange(len(into), device=x.device)[None, :, None] == target[:, None]
        weights = chosen.to(x.dtype)  # (N, T, R)
        count = 1 + weights.sum(dim=-1, keepdim=True)  # (N, T, 1)

        def merge(tokens: Tensor) -> Tensor:
            rows = _rows(tokens, kept)  # (N, L', D)
            taken = weights @ _rows(tokens, sources[gone])  # (N, T, D)
            means = (rows[:, start:] + taken) / count
            return torch.cat([rows[:, :start], means], dim=1)

        return merge, lambda tokens: _rows(tokens, place)


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Each image's tokens at its own places: (N, L, D), (N, K) -> (N, K, D)."""
    n, length, dim = tokens.shape
    flat = index + length * torch.arange(n, device=index.device)[:, None]
    return tokens.reshape(n * length, dim).index_select(0, flat.flatten()).view(n, -1, dim)


def _attention(block: nn.Module) -> nn.Module:
    attn = block.attn
    assert isinstance(attn, nn.Module)
    return attn
