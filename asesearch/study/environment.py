"""Machine and versions, as records and bundles carry them."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib import metadata
from typing import Any

LIBRARIES = (
    "asesearch",
    "torch",
    "torchvision",
    "torch-fidelity",
    "diffusers",
    "accelerate",
    "optuna",
    "numpy",
)


def versions() -> dict[str, str]:
    """Of Python and of the libraries that a score depends on, for records."""
    return {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}}


@cache
def _version(library: str) -> str:
    """As it was when first asked for: what is imported stays, whatever is installed later."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, Any]:
    """Machine and versions, for records."""
    import torch  # here, so that reading a study needs none

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": versions(),
        "platform": platform.platform(terse=True),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
    }
