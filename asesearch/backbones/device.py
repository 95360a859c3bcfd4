"""Where networks run."""

from __future__ import annotations

import os

import torch

from asesearch.errors import ConfigError


def default_device() -> torch.device:
    """The first visible GPU, or the CPU. Choose another GPU with CUDA_VISIBLE_DEVICES."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_memory(count: int, each: int, what: str, fix: str) -> None:
    """Refuse, before any of it is made, what all of this machine's memory could not hold.

    Args:
        count: how many there are.
        each: bytes that each takes, at least.
        what: their name.
        fix: what the user can do.

    Raises:
        ConfigError: as said.
    """
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # a system that does not tell
        return
    if count * each > total:
        raise ConfigError(
            f"{what} must fit this machine's {total / 2**30:.0f} GiB of memory; got {count:,} of "
            f"at least {each:,} bytes each; {fix}"
        )
