"""Clocks: of one call, and of two samplings in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from asesearch.errors import EvaluationError

Timer = Callable[[Callable[[], object]], float]  # runs a call, gives its milliseconds


def half_iqr(values: npt.ArrayLike, axis: int | None = None) -> Any:
    """Half the distance between the quartiles."""
    low, high = np.quantile(np.asarray(values), [0.25, 0.75], axis=axis)
    return (high - low) / 2


def call_timer(device: torch.device) -> Timer:
    """CUDA events between synchronisations on a GPU, the wall clock elsewhere."""

    def wall(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    def events(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end))

    return events if device.type == "cuda" else wall


@dataclass(frozen=True)
class TimeRatio:
    """How long A takes over how long B takes.

    Attributes:
        median: of the pairs' ratios.
        spread: half-IQR of the ratios.
        pairs: (A, B) in seconds, in the order measured.
    """

    median: float
    spread: float
    pairs: tuple[tuple[float, float], ...]


def compare_sampling_time(
    run_a: Callable[[], object],
    run_b: Callable[[], object],
    repeats: int = 5,
    timer: Timer | None = None,
    *,
    warm: bool = False,
) -> TimeRatio:
    """Time two samplings in turn, A B, B A, A B, …, after one untimed run of each.

    Args:
        run_a: makes a number of images.
        run_b: makes the same number.
        repeats: pairs.
        timer: runs a call and gives its milliseconds; by default the wall clock, with the GPU
            synchronised.
        warm: nothing is left that only a first run does: leave the untimed ones out.

    Raises:
        EvaluationError: no repeats.
    """
    if repeats < 1:
        raise EvaluationError(f"repeats must be at least 1; got {repeats}; 5 give a spread")
    clock = timer or _synchronised_wall
    if not warm:
        run_a()
        run_b()
    pairs = []
    for repeat in range(repeats):
        if repeat % 2 == 0:
            a = clock(run_a)
            b = clock(run_b)
        else:
            b = clock(run_b)
            a = clock(run_a)
        pairs.append((a / 1e3, b / 1e3))
    ratios = [a / b for a, b in pairs]
    return TimeRatio(float(np.median(ratios)), float(half_iqr(ratios)), tuple(pairs))


def _synchronised_wall(call: Callable[[], object]) -> float:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3
