"""Attainment: how far every repeat got, half of them, and the luckiest; and the area that fronts
dominate.

Source: Grunert da Fonseca, Fonseca & Hall 2001 (attainment function); computed by moocore. Lower
is better in both objectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import moocore
import numpy as np
import numpy.typing as npt
import pandas as pd

Array = npt.NDArray[np.float64]
COLUMNS = ["level", "attained_by", "time_frac", "quality"]


def surfaces(fronts: Sequence[Array]) -> pd.DataFrame:
    """What the best repeat, at least half of them, and all of them attained.

    Args:
        fronts: of each repeat its points (n, 2), time and score; dominated ones may be among them.

    Returns:
        Corners of the surfaces, fastest first: `level` ("best", "median", "worst"), the number of
        repeats that attained it, `time_frac` and `quality`. Empty below two repeats.
    """
    count = len(fronts)
    if count < 2:
        return pd.DataFrame(columns=COLUMNS)
    stacked = np.concatenate(fronts)
    owners = np.concatenate([np.full(len(front), i) for i, front in enumerate(fronts)])
    rows = []
    for level, by in (("best", 1), ("median", -(-count // 2)), ("worst", count)):
        found = moocore.eaf(stacked, owners, percentiles=[100 * by / count])
        for time, quality in sorted(found[:, :2].tolist()):
            rows.append({"level": level, "attained_by": by, "time_frac": time, "quality": quality})
    return pd.DataFrame(rows, columns=COLUMNS)


def volume(points: Array, reference: tuple[float, float]) -> float:
    """Area that points (n, 2) dominate below a reference point."""
    return float(moocore.hypervolume(points, ref=list(reference))) if len(points) else 0.0


def along(corners: pd.DataFrame, edges: Array, before: float) -> Array:
    """The score that a surface has from each edge on; `before` where it has not begun."""
    place = np.searchsorted(corners["time_frac"].to_numpy(), edges, side="right") - 1
    scores = corners["quality"].to_numpy()
    return np.where(place < 0, before, scores[np.maximum(place, 0)])
