"""Where networks run."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from asesearch.errors import ConfigError

#: What launchers of several processes tell each of its number on its machine; MPI's first, whose
#: processes in a SLURM job have the number of the job's own process too.
_LOCAL_RANKS = (
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "PMI_LOCAL_RANK",
    "SLURM_LOCALID",
)


def default_device() -> torch.device:
    """The first visible GPU, or the CPU. Choose another GPU with CUDA_VISIBLE_DEVICES.

    Processes that `srun` or `mpirun` starts beside each other, where each sees all of several GPUs,
    take one each in turn: it is made this process's current GPU, which "cuda" means from then on.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = next((os.environ[name] for name in _LOCAL_RANKS if name in os.environ), "")
    count = torch.cuda.device_count()
    if count > 1 and rank.isdecimal():
        torch.cuda.set_device(int(rank) % count)
    return torch.device("cuda")


def device_of(device: torch.device | str) -> torch.device:
    """The device that a caller named.

    Raises:
        ConfigError: no device of torch's, or a GPU where there is none.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device must be one of torch's; got {device!r}; choose cuda or cpu"
        ) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"torch sees no GPU here; got the device {found}; choose cpu")
    return found


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
    before = tf32_state()
    if isinstance(before, _Older):
        _set(_Older("high" if on else "highest", on))
    else:
        _set(("tf32" if on else "ieee",) * len(before))
    try:
        yield
    finally:
        _set(before)


@contextmanager
def own_casts() -> Iterator[None]:
    """Inside, weights that the caller's autocast keeps in another type, as they once were, are not
    used; nor are those of inside, which may have no gradient, used outside."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def cpu_by_default() -> Iterator[None]:
    """Inside, new tensors are on the CPU where nothing else is said, whatever the process has set
    by `torch.set_default_device`."""
    if torch.get_default_device().type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield


@contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, networks compute and learn as in a program that has set nothing, whatever the caller
    is in: without autocast, with gradients, outside `torch.inference_mode`, and `cpu_by_default`.

    Of weights that autocast keeps in another type, see `own_casts`.
    """
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    with ExitStack() as stack:
        stack.enter_context(own_casts())
        stack.enter_context(cpu_by_default())
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


class _Older(NamedTuple):
    """PyTorch's older settings."""

    products: str
    convolutions: bool


def tf32_state() -> _Older | tuple[str, ...]:
    """How matrix products and convolutions are computed.

    By PyTorch's older settings, unless the process has used those of PyTorch 2.9: the older ones
    can't be read then. (Compiled code of PyTorch 2.9 and 2.10 reads the older ones, so the newer
    are not used before the process does.)
    """
    try:
        return _Older(torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        return tuple(place.fp32_precision for place in _newer_places())


def _newer_places() -> tuple[Any, ...]:
    cudnn: Any = torch.backends.cudnn
    return (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)


def _set(state: _Older | tuple[str, ...]) -> None:
    if isinstance(state, _Older):
        torch.set_float32_matmul_precision(state.products)
        torch.backends.cudnn.allow_tf32 = state.convolutions
        return
    for place, value in zip(_newer_places(), state, strict=True):
        place.fp32_precision = value


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
