"""Where networks run."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from asesearch.errors import ConfigError


def default_device() -> torch.device:
    """The first visible GPU, or the CPU. Choose another GPU with CUDA_VISIBLE_DEVICES."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def collect_cycles() -> None:
    """Free what only cycles of references hold. A compiled or mixed-precision training leaves its
    network, gradients and moments in such cycles, and the allocator of a GPU does not ask Python to
    collect them when its memory ends.
    """
    gc.collect()


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Inside, a GPU computes matrix products and convolutions of float32 in TF32, or else in
    float32; on its own it would take TF32 for convolutions. A CPU computes in float32 all the same.
    """
    products = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


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
