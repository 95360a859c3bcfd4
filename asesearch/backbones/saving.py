"""Writing a network: safetensors that carry their own architecture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from safetensors.torch import save_file

from asesearch.backbones.base import Backbone
from asesearch.backbones.checkpoints import BACKBONES, NULL, RESERVED, VERSION
from asesearch.backbones.exit_weights import EXITS, ExitWeights, weight_sets
from asesearch.backbones.files import FORMAT
from asesearch.errors import ConfigError
from asesearch.files import replacing


def save_backbone(
    backbone: Backbone, path: str | os.PathLike[str], extra: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that `load_backbone` needs no preset or args for.

    Args:
        backbone: a DiT, U-ViT or diffusers network, or one with weights of its own for early exits;
            its null condition goes into the file too.
        path: written atomically; folders are made.
        extra: text to keep with the weights; `inspect_checkpoint` gives it back.

    Raises:
        ConfigError: another network, or a reserved key in `extra`.
    """
    full = weight_sets(backbone)[0]
    kind = next((k for k, cls in BACKBONES.items() if type(full) is cls), None)
    # as `DiffusersBackbone`, without importing diffusers
    if kind is None and backbone.config.keys() == {"transformer"}:
        kind = "diffusers"
    if kind is None:
        raise ConfigError(
            f"only DiT, U-ViT and diffusers networks can be saved; got {type(full).__name__}; "
            "use one"
        )
    taken = set(RESERVED) & (extra or {}).keys()
    if taken:
        raise ConfigError(
            f"extra must not use the keys {', '.join(RESERVED)}; got {', '.join(sorted(taken))}; "
            "rename it"
        )
    own = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "config": json.dumps(backbone.config),
    }
    own_exits = backbone.own_tensors() if isinstance(backbone, ExitWeights) else {}
    tensors = full.state_dict() | {f"{EXITS}{k}": v for k, v in own_exits.items()}
    tensors |= {f"{NULL}{k}": v for k, v in (backbone.null_condition or {}).items()}
    with replacing(path, shared=True) as part:
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
            part,
            {**own, **(extra or {})},
        )
