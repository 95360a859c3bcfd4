"""The front of points with several objectives, lower being better in each: what is not
dominated."""

from __future__ import annotations

import math
from collections.abc import Sequence


def non_dominated(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Indices of the points that no other is at least as good as in all objectives and better in
    one (lower is better).

    Of equal points the first is kept.
    """
    if all(len(p) == 2 and p[0] == p[0] and p[1] == p[1] for p in points):
        return _sweep(points)
    keep = []
    for i, p in enumerate(points):
        beaten = any(
            all(a <= b for a, b in zip(q, p, strict=True)) and (q != p or j < i)
            for j, q in enumerate(points)
            if j != i
        )
        if not beaten:
            keep.append(i)
    return keep


def _sweep(points: Sequence[tuple[float, ...]]) -> list[int]:
    """`non_dominated` of numbers in two objectives, in n log n."""
    keep: list[int] = []
    best = math.inf
    for i in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        if points[i][1] < best or not keep:
            keep.append(i)
            best = points[i][1]
    return sorted(keep)
