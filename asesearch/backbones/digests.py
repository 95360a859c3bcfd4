"""What tells one set of weights from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def weights_digest(
    net: nn.Module, config: Mapping[str, Any] | None = None, *, earlier: bool = False
) -> str:
    """SHA-256 over names, types, shapes and values of all tensors, however they are spread over
    files.

    Args:
        net: any network.
        config: what else makes it what it is, hashed before the tensors.
        earlier: name, type and shape are written as they were for VAEs and text encoders at first.
    """
    sha = hashlib.sha256()
    if config is not None:
        sha.update(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(net.state_dict().items()):
        about = (name, value.dtype, tuple(value.shape))
        sha.update((" ".join(map(str, about)) if earlier else repr(about)).encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def weights_fingerprint(net: nn.Module) -> str:
    """SHA-256 over the first 1,024 numbers of every parameter: tells two sets of weights apart, at
    no cost for large ones."""
    sha = hashlib.sha256()
    for name, p in sorted(net.named_parameters()):
        sha.update(f"{name} {tuple(p.shape)}".encode())
        sha.update(p.detach().flatten()[:1024].float().cpu().numpy().tobytes())
    return sha.hexdigest()
