"""Fronts of several studies on one scale: hypervolume, attainment over repeats, and where each
wins. Only what was measured alike is compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from asesearch.errors import ConfigError, EvaluationError, StudyError
from asesearch.report import attainment, tables
from asesearch.report.wording import percent
from asesearch.score import CONFIDENCE, EvaluationResult, Protocol
from asesearch.study.records import REFERENCE_QUALITY, REFERENCE_TIME, StudyResults

Array = npt.NDArray[np.float64]
ALONE = "no other has a point as fast"
APART = "every repeat is better"
OVERLAP = "repeats overlap"
FEW_STUDIES = "ranges don't overlap, which so few studies can't tell from chance"
FEW = "fewer than half of the repeats have a point as fast"
TOLD_APART = "told apart"
TIMES = "times can't be told apart"
CLEAR = (ALONE, APART, TOLD_APART)
#: Of a time whose spread is not known, predicted or measured once, this share counts as one.
UNKNOWN_SPREAD = 0.02


@dataclass(frozen=True)
class Member:
    """A study of a comparison.

    Attributes:
        name: as it is shown; a study's name, and its place where several share it.
        group: repeats of one method share a group.
        results: of the study.
        points: see `claimed`.
    """

    name: str
    group: str
    results: StudyResults
    points: pd.DataFrame

    @property
    def front(self) -> pd.DataFrame:
        """Its points that are not dominated, fastest first."""
        return self.points[self.points["on_front"].astype(bool)]

    @property
    def corners(self) -> Array:
        """(n, 2) time and score of its front."""
        return self.front[["time_frac", "quality"]].to_numpy(dtype=np.float64)

    def best_within(self, time: float, slowest: float = -math.inf) -> pd.Series | None:
        """The point of the lowest score in this time; None if it has no point as fast.

        Args:
            time: relative to the full network's.
            slowest: points count too that are as fast as this, where their time less its spread is.
        """
        times = self.points["time_frac"]
        least = times - _spread(self.points)
        inside = self.points[(times <= time) | (least <= slowest)]
        return None if inside.empty else inside.iloc[int(inside["quality"].to_numpy().argmin())]

    def score_of(self, point: pd.Series) -> EvaluationResult:
        """The score of one of its points, repeat by repeat."""
        number = int(point["number"])
        if point["kind"] == "search":
            quality = tables.by_number(self.results)[number].quality
            assert quality is not None
            return quality
        return next(c.quality for c in self.results.confirmations if c.number == number)


@dataclass(frozen=True)
class Comparison:
    """What studies under one protocol say of each other.

    Attributes:
        kind: "confirmed" where every study's front is confirmed whole, else "search".
        protocol: that all scores share.
        members: the studies, in the order given.
        studies: one row a study: its group, trials, the full network's score, `hypervolume`, and
            its `share` of the area that all studies together dominate.
        groups: one row a group: number of studies, mean, least and largest hypervolume, and the
            part of the time axis on which it `wins`, each budget judged on its own.
        points: every point of every study, see `claimed`.
        attained: see `asesearch.report.attainment.surfaces`, for groups of two studies or more.
        wins: stretches of the time axis (budgets): who reaches the lowest score within it, if that
            is told apart from noise there, else an empty `winner`; the lead of the lowest over the
            next; and why. Empty where there is one group.
        reference: time and score of the reference point.
        scale: "log" where areas are taken over the logarithm of the score, else "linear".
    """

    kind: tables.Kind
    protocol: Protocol
    members: tuple[Member, ...]
    studies: pd.DataFrame
    groups: pd.DataFrame
    points: pd.DataFrame
    attained: pd.DataFrame
    wins: pd.DataFrame
    reference: tuple[float, float]
    scale: str

    @property
    def cost(self) -> str:
        """What its relative costs are of, see `asesearch.report.tables.points`; where that is
        FLOPs, whatever is called a time is of them."""
        return str(self.points["cost"].iloc[0])

    @property
    def unit(self) -> str:
        """See `asesearch.report.tables.unit_of`."""
        return tables.unit_of(self.cost)

    def to_dict(self) -> dict[str, Any]:
        """What it comes to, as plain data for JSON."""
        wins = tables.written(self.wins, self.cost)
        found = {"studies": self.studies, "groups": self.groups, "wins": wins}
        return {
            "kind": self.kind,
            "metric": self.protocol.metric_name,
            "reference": list(self.reference),
            "scale": self.scale,
            **{
                name: table.astype(object).where(table.notna(), None).to_dict("records")
                for name, table in found.items()
            },
        }

    @property
    def caveat(self) -> str:
        """How far its wins can be trusted, in a sentence without its full stop; empty where there
        is nothing to add."""
        if self.wins.empty:
            return ""
        sizes = [int(n) for n in self.groups["studies"]]
        if max(sizes) == 1:
            return (
                f"Each budget is judged on its own, at {tables.LEVEL}, and by one search of each: "
                "over many budgets some are won by chance, and another search may find another "
                "front"
            )
        if FEW_STUDIES not in set(self.wins["verdict"]):
            return ""
        pairs = {
            f"{a} and {b}": None
            for a, b in combinations(sorted(sizes, reverse=True), 2)
            if a > 1 and not _are_enough(a, b)
        }
        return (
            f"Some ranges don't overlap, but of groups of {' or '.join(pairs)} studies that "
            "happens too often by chance to be a win; four of each are enough, three and five, or "
            "two and eight"
        )

    def __str__(self) -> str:
        lines = []
        told = "clearly" if self.groups["studies"].max() > 1 else "told apart as"
        for _, row in self.groups.sort_values("hypervolume", ascending=False).iterrows():
            repeats = f" ({row['studies']} studies)" if row["studies"] > 1 else ""
            wins = f"{told} the lowest score on {percent(row['wins'])} of the {self.unit} budgets"
            line = f"{row['group']}{repeats}: hypervolume {row['hypervolume']:.4g}"
            lines.append(line if self.wins.empty else f"{line}, {wins}")
        return "\n".join([*lines, *filter(None, [self.caveat])])


def claimed(points: pd.DataFrame) -> pd.DataFrame:
    """Points of `asesearch.report.tables.points` at the times that may be claimed of them.

    `time_frac` is the bound of the block calls where the measured time is better than they can
    explain, and `measured_frac` what was measured.
    """
    out = points.rename(columns={"time_frac": "measured_frac"})
    out.insert(list(points.columns).index("time_frac"), "time_frac", points["credited_frac"])
    return out


def compare_results(
    results: Sequence[StudyResults], groups: Sequence[str] | None = None
) -> Comparison:
    """Put the fronts of studies on one scale.

    Args:
        results: of two studies or more.
        groups: of each study the group that it is a repeat in; default: its name.

    Raises:
        ConfigError: fewer than two studies, another number of groups, or a group's name that is not
            UTF-8.
        EvaluationError: the studies were measured in different ways; names the field and both
            values.
        StudyError: a study has no score.
    """
    if len(results) < 2:
        raise ConfigError(f"a comparison takes two studies or more; got {len(results)}; add one")
    if groups is not None and len(groups) != len(results):
        raise ConfigError(
            f"one group per study is needed, in the same order; got {len(groups)} for "
            f"{len(results)} studies; give --group once for each"
        )
    for group in groups or ():
        if any("\ud800" <= c <= "\udfff" for c in group):
            raise ConfigError(f"a group's name must be UTF-8; got {group!r}; give it another")
    confirmed = all(r.confirmations and not r.unconfirmed for r in results)
    kind: tables.Kind = "confirmed" if confirmed else "search"
    names = _names(results)
    protocol = _one_protocol(results, names, kind)
    members = tuple(
        Member(name, group, one, claimed(tables.points(one, kind)))
        for name, group, one in zip(
            names, groups or [r.name for r in results], results, strict=True
        )
    )
    reference, scale = _reference(members)
    studies = _studies(members, reference, scale)
    wins = _wins(members)
    return Comparison(
        kind,
        protocol,
        members,
        studies,
        _groups(studies, wins),
        pd.concat([m.points.assign(study=m.name, group=m.group) for m in members])[
            ["study", "group", *members[0].points.columns]
        ].reset_index(drop=True),
        _attained(members),
        wins,
        reference,
        scale,
    )


def _names(results: Sequence[StudyResults]) -> list[str]:
    """Names that tell the studies apart."""
    names = [r.name for r in results]
    out = []
    for i, name in enumerate(names):
        own = f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name
        out.append(own)
    return out


def _one_protocol(
    results: Sequence[StudyResults], names: Sequence[str], kind: tables.Kind
) -> Protocol:
    """The protocol that all share.

    Raises:
        EvaluationError, StudyError: see `compare_results`.
    """
    first: Protocol | None = None
    for one, name in zip(results, names, strict=True):
        protocol = tables.protocol_of(one, kind)
        if protocol is None:
            raise StudyError(
                f"a comparison needs scores; {name} has none; run `asesearch search` first"
            )
        if first is None:
            first = protocol
            continue
        try:
            first.require_same(protocol)
        except EvaluationError as error:
            raise EvaluationError(f"{names[0]} and {name}: {error}") from error
        _check_unit_of_cost(results[0], one, (names[0], name), kind)
    assert first is not None
    return first


def _check_unit_of_cost(
    a: StudyResults, b: StudyResults, names: tuple[str, str], kind: tables.Kind
) -> None:
    """Costs are relative to the full network's under the study's own sampler: both must be the
    same, and so must be what the costs of the search are of.

    Raises:
        EvaluationError: naming the field that differs and both values.
    """
    facts = []
    for one in (a, b):
        schedule = one.complete[0].schedule
        facts.append(
            {
                "own sampler": str(one.own_sampler),
                "depth": schedule.depth,
                "num_train_timesteps": schedule.num_train_timesteps,
                "backbone.kind": one.config.get("backbone", {}).get("kind"),
            }
        )
    differ = [
        f"{key}: {value!r} and {facts[1][key]!r}"
        for key, value in facts[0].items()
        if value != facts[1][key]
    ]
    costs = [tables.cost_of(one, kind) for one in (a, b)]
    if costs[0] != costs[1]:
        raise EvaluationError(
            f"{names[0]} and {names[1]}: scores of the search are compared beside costs of one "
            f"kind; got {costs[0]} and {costs[1]}; search both with one search.cost, or confirm "
            "both whole, which measures times"
        )
    if differ:
        raise EvaluationError(
            f"{names[0]} and {names[1]}: sampling times are relative to the full network's under "
            f"the study's own sampler, so they are compared only where these are equal; they "
            f"differ in {'; '.join(differ)}; search both alike"
        )


def _reference(members: Sequence[Member]) -> tuple[tuple[float, float], str]:
    """One reference point for all: 1.1 times the full network's time, twice the highest of the full
    networks' scores; where there is none, the highest score seen."""
    values = np.concatenate([m.points["quality"].to_numpy(dtype=np.float64) for m in members])
    full = [q for m in members if not math.isnan(q := _full_score(m))]
    positive = bool((values > 0).all())
    limit = REFERENCE_QUALITY * max(full) if positive and full else float(values.max())
    return (REFERENCE_TIME, limit), "log" if positive else "linear"


def _full_score(member: Member) -> float:
    full = member.points[member.points["label"] == tables.FULL]
    return float(full["quality"].iloc[0]) if len(full) else math.nan


def _studies(members: Sequence[Member], reference: tuple[float, float], scale: str) -> pd.DataFrame:
    def area(points: Array) -> float:
        if scale == "linear":
            return attainment.volume(points, reference)
        logs = np.column_stack((points[:, 0], np.log(points[:, 1])))
        return attainment.volume(logs, (reference[0], math.log(reference[1])))

    everything = area(np.concatenate([m.corners for m in members]))
    return pd.DataFrame(
        [
            {
                "study": m.name,
                "group": m.group,
                "trials": len(m.results.records),
                "points": len(m.points),
                "full_quality": _full_score(m),
                "hypervolume": (own := area(m.corners)),
                "share": own / everything if everything else math.nan,
            }
            for m in members
        ]
    )


def _groups(studies: pd.DataFrame, wins: pd.DataFrame) -> pd.DataFrame:
    width = float((wins["time_to"] - wins["time_from"]).sum())
    rows = []
    for name in dict.fromkeys(studies["group"]):
        mine = studies[studies["group"] == name]["hypervolume"]
        won = wins[wins["winner"] == name]
        rows.append(
            {
                "group": name,
                "studies": len(mine),
                "hypervolume": float(mine.mean()),
                "hypervolume_min": float(mine.min()),
                "hypervolume_max": float(mine.max()),
                "wins": float((won["time_to"] - won["time_from"]).sum()) / width if width else 0.0,
            }
        )
    return pd.DataFrame(rows)


def _attained(members: Sequence[Member]) -> pd.DataFrame:
    found = []
    for name in dict.fromkeys(m.group for m in members):
        surfaces = attainment.surfaces([m.corners for m in members if m.group == name])
        found.append(surfaces.assign(group=name))
    kept = [table for table in found if not table.empty] or found[:1]
    return pd.concat(kept, ignore_index=True)[["group", *attainment.COLUMNS]]


def _wins(members: Sequence[Member]) -> pd.DataFrame:
    """Stretches between the times at which a front has a corner; neighbours with the same answer
    are one."""
    columns = ["time_from", "time_to", "winner", "lead_min", "lead_max", "verdict"]
    if len({m.group for m in members}) == 1:
        return pd.DataFrame(columns=columns)
    times = sorted({float(t) for m in members for t in m.corners[:, 0]})
    end = max(1.0, times[-1])
    edges = [*times, end] if times[-1] < end else times
    rows: list[dict[str, Any]] = []
    for begin, stop in pairwise(edges):
        winner, lead, verdict = _winner(members, begin)
        before = rows[-1] if rows else {}
        if (winner, verdict) == (before.get("winner"), before.get("verdict")):
            before["time_to"] = stop
            before["lead_min"] = np.fmin(before["lead_min"], lead)
            before["lead_max"] = np.fmax(before["lead_max"], lead)
            continue
        rows.append(
            {
                "time_from": begin,
                "time_to": stop,
                "winner": winner,
                "lead_min": lead,
                "lead_max": lead,
                "verdict": verdict,
            }
        )
    return pd.DataFrame(rows, columns=columns)


def _winner(members: Sequence[Member], time: float) -> tuple[str, float, str]:
    """Who has the lowest score within a time budget, its lead, and its verdict; nobody, if that may
    be noise.

    A group stands by the median of its studies; one that has no point as fast counts as infinitely
    bad. The winner is ahead of every other group, and of what they reach in a time that can't be
    told apart from its own.
    """
    groups = {
        name: [m for m in members if m.group == name]
        for name in dict.fromkeys(m.group for m in members)
    }
    medians = {name: _median([m.best_within(time) for m in groups[name]]) for name in groups}
    first, *others = sorted(medians, key=medians.__getitem__)
    a, b = medians[first], medians[others[0]]
    if math.isinf(a):
        return "", math.nan, FEW
    mine = [point for m in groups[first] if (point := m.best_within(time)) is not None]
    reached = pd.DataFrame(mine)
    slowest = float((reached["time_frac"] + _spread(reached)).max())
    verdicts = [_verdict(groups[first], groups[name], time) for name in others]
    unclear = sorted((v for v in verdicts if v not in CLEAR), key=FEW_STUDIES.__eq__)
    verdict = unclear[0] if unclear else verdicts[0]
    if verdict in CLEAR:
        within = [_verdict(groups[first], groups[name], time, slowest) for name in others]
        verdict = verdict if all(v in CLEAR for v in within) else TIMES
    return (first if verdict in CLEAR else ""), b - a if b < math.inf else math.nan, verdict


def _spread(points: pd.DataFrame) -> pd.Series:
    """How far the time of each may be off; not the full network's, over which times are counted,
    nor FLOPs, which are counted."""
    unknown = UNKNOWN_SPREAD * (points["cost"] != tables.FLOPS)
    known = points["time_spread"].mask(points["label"] == tables.FULL, 0.0)
    return known.fillna(unknown * points["time_frac"])


def _median(points: Sequence[pd.Series | None]) -> float:
    """Of their scores; a point that there is not counts as infinitely bad."""
    return float(np.median([math.inf if p is None else p["quality"] for p in points]))


def chance_of_separation(first: int, second: int) -> float:
    """How often the ranges of so many studies each don't overlap where nothing but noise tells the
    studies apart: all orders are then alike, and two of them separate the groups."""
    return 2 / math.comb(first + second, first)


def _are_enough(first: int, second: int) -> bool:
    """Whether so many studies in each of two groups can tell ranges apart from chance."""
    return chance_of_separation(first, second) < 1 - CONFIDENCE


def _verdict(
    mine: Sequence[Member], theirs: Sequence[Member], time: float, slowest: float = -math.inf
) -> str:
    """Why one group is ahead of another within a time budget, or is not: two single studies by
    their scores repeat by repeat on the same seeds, others by their ranges, where there are enough
    studies; `slowest` see `Member.best_within`."""
    a = [m.best_within(time) for m in mine]
    b = [m.best_within(time, slowest) for m in theirs]
    reason = ALONE if all(point is None for point in b) else APART
    if len(a) > 1 or len(b) > 1:
        if max(_median([p]) for p in a) >= min(_median([p]) for p in b):
            return OVERLAP
        return reason if _are_enough(len(a), len(b)) else FEW_STUDIES
    if reason == ALONE:
        return ALONE
    (own,), (other,) = a, b
    assert own is not None and other is not None
    score, against = mine[0].score_of(own), theirs[0].score_of(other)
    verdict = tables.verdict(score.minus(against)[0], score.margin(against))
    return TOLD_APART if verdict == "better" else verdict
