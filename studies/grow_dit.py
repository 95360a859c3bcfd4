"""Deepen a DiT without changing what it computes: identity blocks between the trained ones.

A DiT block whose adaLN modulation is zero is the identity (Peebles & Xie 2023, adaLN-Zero), so the
deeper network starts from the shallower one's outputs, bit for bit, and training goes on there.

    python studies/grow_dit.py shipped:fashion-mnist-dit --depth 18 --out deeper.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from asesearch.backbones import load_backbone, save_backbone
from asesearch.backbones.dit import DiT
from asesearch.config import BackboneConfig


def places_of(shallow: int, deep: int) -> list[int]:
    """Where the trained blocks stand among the `deep` ones: evenly spread, the last at the end."""
    return [round((i + 1) * deep / shallow) - 1 for i in range(shallow)]


def grow(source: DiT, depth: int, seed: int = 0) -> DiT:
    """A DiT of `depth` blocks with the outputs of `source`, its blocks spread evenly."""
    if depth <= source.depth:
        raise SystemExit(
            f"--depth must be over the {source.depth} blocks of the source; got {depth}"
        )
    torch.manual_seed(seed)
    deeper = DiT(**(source.config | {"depth": depth}))
    places = places_of(source.depth, depth)
    state = deeper.state_dict()
    for name, value in source.state_dict().items():
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            name = f"blocks.{places[int(index)]}.{rest}"
        state[name] = value
    deeper.load_state_dict(state)
    return deeper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    source = load_backbone(BackboneConfig(kind="dit", checkpoint=args.source))
    assert isinstance(source, DiT)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_backbone(grow(source, args.depth), args.out)


if __name__ == "__main__":
    main()
