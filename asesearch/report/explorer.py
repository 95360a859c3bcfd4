"""The data of the interactive front: what `report.js` shows of each point, samples included."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from asesearch.report import evidence, tables
from asesearch.score import student_factor
from asesearch.study.records import StudyResults, TrialRecord

SHOWN = 8  # images of each point
#: PNG bytes of all samples in a page. Those of the front are made smaller until they fit, the
#: other trials' fill what is left.
IMAGE_BYTES = 2_000_000
SMALLEST = 32  # pixels of a side, below which images are not made smaller
TITLES = {"confirmed": "Confirmed on fresh seeds", "search": "As the search saw it"}
COSTS = {
    tables.MEASURED: "Sampling time, measured",
    tables.PREDICTED: "Sampling time, predicted",
    tables.FLOPS: "FLOPs",
}


def scripts() -> dict[str, str]:
    """The page's own script and the plotting library with its licence, as they go into the page."""
    folder = resources.files("asesearch.report")
    names = {
        "script": "templates/report.js",
        "plotly": "vendor/plotly-basic.min.js",
        "plotly_licence": "vendor/plotly.LICENSE",
    }
    return {key: folder.joinpath(name).read_text(encoding="utf-8") for key, name in names.items()}


def embedded(results: StudyResults, chosen: int | None) -> str:
    """The data as JSON for a script element: nothing in it can end the element.

    Args:
        results: of the study; at least one trial has a score.
        chosen: number of the trial that is shown first; None for the front's first.
    """
    text = json.dumps(_payload(results, chosen), ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", " ").replace("\u2029", " ")


def _payload(results: StudyResults, chosen: int | None) -> dict[str, Any]:
    kinds: list[tables.Kind] = ["confirmed", "search"] if results.stands_confirmed else ["search"]
    found = {kind: _kind(results, kind) for kind in kinds}
    full = results.full
    if chosen is None:
        points = found[kinds[0]]["points"]
        chosen = next(p["number"] for p in points if p["front"])
    return {
        "full": None if full is None else full.number,
        "chosen": chosen,
        "trials": _trials(results),
        "kinds": found,
        "images": _images(results, chosen),
    }


def _kind(results: StudyResults, kind: tables.Kind) -> dict[str, Any]:
    protocol = tables.protocol_of(results, kind)
    assert protocol is not None
    repeats = len(protocol.seeds)
    cost = tables.cost_of(results, kind)
    scores = tables.scores_of(results, kind)
    points = [
        {
            "number": int(row["number"]),
            "time": _short(row["time_frac"]),
            "spread": _short(row["time_spread"]),
            "credited": _short(row["credited_frac"]),
            "quality": _short(row["quality"]),
            "error": _short(row["std_error"]),
            "difference": _short(row["difference"]) if row["verdict"] != tables.REFERENCE else None,
            "margin": _short(row["difference_margin"]),
            "verdict": row["verdict"],
            "front": bool(row["on_front"]),
            "values": [_short(v) for v in scores[int(row["number"])].values],
        }
        for row in tables.points(results, kind).dropna(subset=["time_frac"]).to_dict("records")
    ]
    attained = evidence.attained(results, kind)
    return {
        "title": TITLES[kind],
        "cost": COSTS[cost],
        "unit": tables.unit_of(cost),
        "metric": protocol.metric_name,
        "factor": student_factor(repeats) if repeats > 1 else None,
        "points": points,
        "attained": {
            level: [
                [_short(v) for v in mine["time_frac"]],
                [_short(v) for v in mine["quality"]],
            ]
            for level, mine in attained.groupby("level", sort=False)
        },
    }


def _short(value: float) -> float | None:
    """Six digits are more than a page shows."""
    return None if math.isnan(value) else float(f"{value:.6g}")


def _trials(results: StudyResults) -> dict[int, dict[str, Any]]:
    return {
        r.number: {
            "label": tables.label(r, results),
            "sampler": str(r.sampler),
            "schedule": str(r.schedule),
            "depth": r.schedule.depth,
            "depths": list(r.schedule.exit_depths),
            "edges": list(r.schedule.boundaries),
            "blocks": None if r.block_frac is None else _short(r.block_frac),
            "predicted": None if r.time_frac is None else _short(r.time_frac),
            "kept": results.has_weights(r),
            "command": f"asesearch export runs/{results.name} --out {results.name}-bundle --trial "
            f"{r.number}",
        }
        for r in results.complete
    }


# -- samples -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Strip:
    """Images side by side.

    Attributes:
        png: the file.
        difference: mean distance from the full network's images, of the whole range; None without.
    """

    png: bytes
    difference: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        src = f"data:image/png;base64,{base64.b64encode(self.png).decode()}"
        return {"src": src, "difference": self.difference}


def _images(results: StudyResults, chosen: int) -> dict[str, Any]:
    """Samples of the front, the full network and the chosen point, as large as they fit; then of
    other trials, the best first."""
    full = results.full
    first = [*tables.front(results)["number"], chosen, *(r.number for r in results.front())]
    if full is not None:
        first.insert(0, full.number)
    have = [n for n in dict.fromkeys(map(int, first)) if n in results.samples]
    if not have:
        return {"count": 0, "strips": {}}
    smaller = 1
    while True:
        strips = {n: _strip(results, n, smaller) for n in have}
        size = sum(len(s.png) for s in strips.values())
        side = min(results.samples[have[0]].shape[2:]) // smaller
        if size <= IMAGE_BYTES or side < 2 * SMALLEST:
            break
        smaller *= 2
    rest = (r for r in results.complete if r.number in results.samples)
    for record in sorted((r for r in rest if r.number not in strips), key=_score):
        if size > IMAGE_BYTES:
            break
        strips[record.number] = _strip(results, record.number, smaller)
        size += len(strips[record.number].png)
    count = min(SHOWN, len(results.samples[have[0]]))
    return {"count": count, "strips": {n: s.to_dict() for n, s in strips.items()}}


def _score(record: TrialRecord) -> float:
    assert record.quality is not None
    return record.quality.value


def _strip(results: StudyResults, number: int, smaller: int) -> _Strip:
    images = results.samples[number][:SHOWN]
    difference = None
    full = results.full
    if full is not None and number != full.number and full.number in results.samples:
        others = results.samples[full.number][:SHOWN]
        if others.shape == images.shape:
            away = np.abs(images.astype(np.float64) - others).mean() / 255
            difference = float(f"{away:.3g}")
    return _Strip(_png(side_by_side(images, smaller)), difference)


def side_by_side(images: npt.NDArray[np.uint8], smaller: int = 1) -> npt.NDArray[np.uint8]:
    """Images in a row, each pixel the mean of `smaller` × `smaller`: (N, C, H, W) -> (h, N w, C).

    What is left over at the right and lower edges is cut off.
    """
    n, c, height, width = images.shape
    h, w = height // smaller, width // smaller
    cut = images[:, :, : h * smaller, : w * smaller].astype(np.float64)
    small = cut.reshape(n, c, h, smaller, w, smaller).mean(axis=(3, 5))
    row = small.transpose(2, 0, 3, 1).reshape(h, n * w, c)
    return np.asarray(row.round().astype(np.uint8))


def _png(row: npt.NDArray[np.uint8]) -> bytes:
    """(H, W, 1 or 3) as a PNG file."""
    file = io.BytesIO()
    image = Image.fromarray(row[..., 0] if row.shape[2] == 1 else row)
    image.save(file, "PNG", optimize=True)
    return file.getvalue()
