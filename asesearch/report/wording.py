"""Scores in words: how numbers are written, and the answer of a study in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Context, Decimal

import numpy as np
import pandas as pd

from asesearch.report import tables
from asesearch.score import EvaluationResult, Protocol
from asesearch.study.records import NOT_CONFIRMED, StudyResults, left_out
from asesearch.study.timing import UNEXPLAINED

#: Relative sampling time, or FLOPs, that the headline looks for.
WORTHWHILE_TIME = 0.75
#: A loss that can't be ruled out counts as told up to this share of the full network's score.
TOLD_LOSS = 0.25
UNKNOWN = "spread unknown (one repeat)"
TWO_REPEATS = (
    "From two repeats the interval of a difference reaches 12.7 standard errors either way, from "
    "three 4.3: more repeats (evaluation, confirm) would tell more schedules from the full network."
)


_TIES_UP = Context(prec=400, rounding=ROUND_HALF_UP)  # digits of the largest float, and more
_FOUR_DIGITS = Context(prec=4, rounding=ROUND_HALF_UP)


def fixed(value: float, digits: int) -> str:
    """A number with so many digits behind the point, ties away from zero, as `toFixed` of
    JavaScript has it in the page: 0.625 is "0.63"."""
    if not math.isfinite(value):
        return f"{value}"
    exact = Decimal(value)  # what the float is, of which few are ties
    return f"{exact.quantize(Decimal(1).scaleb(-digits), context=_TIES_UP):f}"


def percent(frac: float) -> str:
    """`0.312` as "31 %", with a space that does not break."""
    return f"{100 * frac:.0f}\N{NO-BREAK SPACE}%".replace("-", "−")


def relative(frac: float, spread: float = math.nan) -> str:
    """A relative cost: `0.6` as "0.60×", with its spread as "0.598 ± 0.004×"; "–" if missing."""
    if math.isnan(frac):
        return "–"
    if math.isnan(spread) or spread == 0:
        return f"{fixed(frac, 2)}×"
    return f"{fixed(frac, 3)} ± {fixed(spread, 3)}×"


def speed_up(frac: float) -> str:
    """What a relative cost comes to: `0.6` as "1.67×"; "–" if missing."""
    return f"{fixed(1 / frac, 2)}×" if frac > 0 else "–"


def number(value: float, std_error: float = math.nan) -> str:
    """A score to two digits of its standard error where there is one, else to four digits; "–" if
    missing."""
    if math.isnan(value):
        return "–"
    if math.isnan(std_error) or std_error <= 0:
        text = f"{float(_FOUR_DIGITS.create_decimal_from_float(value)):#.4g}".rstrip(".")
    else:
        decimals = max(0, 1 - math.floor(math.log10(std_error)))
        text = fixed(value, decimals)
    return text.replace("-", "−")


def plus_minus(value: float, std_error: float) -> str:
    """ "8.647 ± 0.052", or the bare score where the spread is unknown."""
    if math.isnan(value) or math.isnan(std_error):
        return number(value)
    return f"{number(value, std_error)} ± {number(std_error, std_error)}"


def signed(value: float, text: str) -> str:
    """A difference as it is written, with a plus where it is above 0: "+0.35 ± 0.12"."""
    return f"+{text}" if value > 0 else text


def repeatability(results: StudyResults) -> str:
    """What it takes for another search to give the same trials, in a sentence."""
    if results.most_at_once > 1:
        return (
            f"Another search by this study file need not give the same trials: up to "
            f"{results.most_at_once} workers were at it at once, and what each proposes depends on "
            "which trials have ended by then."
        )
    text = "The same study file, seeds and device give the same trials"
    if results.cost == "time":
        text += (
            " to searches that share the latency table, which each study directory measures once "
            "and keeps"
        )
    if (budget := results.config.get("search", {}).get("budget")) is not None:
        text += f"; how many fit into the budget of {budget} depends on the time they take"
    return f"{text}."


@dataclass(frozen=True)
class Headline:
    """The answer.

    Attributes:
        answer: one sentence.
        details: the scores it rests on, and what it leaves open, a sentence each.
        success: a schedule is fast enough at a score that is not worse, with no larger loss left
            open than TOLD_LOSS of the full network's score, by a measured time that its block calls
            can explain, or a predicted one, or, before any is measured in a study of FLOPs, by
            those.
        chosen: number of the trial it speaks of; None if there is none.
    """

    answer: str
    details: tuple[str, ...]
    success: bool = False
    chosen: int | None = None


def headline(results: StudyResults) -> Headline:
    """What the study found, from its data alone."""
    kind = tables.kind_of(results)
    points = tables.points(results, kind)
    failed, stopped = (
        sum(r.state == state for r in results.records) for state in ("failed", "stopped")
    )
    counts = (
        f"{len(results.complete)} of {len(results.records)} trials gave a score; {failed} failed"
    )
    counts += f", and {stopped} were stopped at their low-fidelity score" if stopped else ""
    asked = results.config.get("search", {})
    if asked.get("budget") is None and len(results.records) < asked.get("num_trials", 0):
        counts += f"; the study asks for {asked['num_trials']} trials"
    counts += "."
    if points.empty:
        return Headline("No trial has given a score yet.", (counts,))
    status = _status(results, kind)
    if kind == "confirmed":
        counts += _not_confirmed(results)
    baseline = points[points["verdict"] == tables.REFERENCE]
    others = points[points["verdict"] != tables.REFERENCE].sort_values(
        "credited_frac", kind="stable", ignore_index=True
    )
    records = tables.by_number(results)
    weights = np.array([results.has_weights(records[n]) for n in others["number"]], dtype=bool)
    gone = others[~weights] if weights.any() else others[:0]
    others = others.drop(gone.index).reset_index(drop=True)
    if baseline.empty:
        return Headline(
            "There is nothing to compare with: the full network has no score of this kind.",
            (status, counts),
        )
    if others.empty:
        return Headline("Only the full network has a score so far.", (status, counts))
    protocol = tables.protocol_of(results, kind)
    if others["difference_se"].isna().all():
        found = _unknown_spread(others)
    else:
        partly = kind == "confirmed" and bool(results.unconfirmed)
        found = _verdict(others, gone, partly, _told_loss(baseline.iloc[0], protocol))
    notes = (TWO_REPEATS,) if protocol is not None and len(protocol.seeds) == 2 else found.details
    compared = _compared(others, baseline.iloc[0], found.chosen)
    beside = _beside(others, found.chosen, tables.scores_of(results, kind))
    deep = {n for n, r in records.items() if r.schedule.is_full}
    alone = _sampler_alone(others, found.chosen, deep)
    details = (compared, *alone, *beside, *_disturbed(others), status, counts)
    return Headline(found.answer, (*notes, *details), found.success, found.chosen)


def _status(results: StudyResults, kind: tables.Kind) -> str:
    """What the scores are worth: how far the front is confirmed."""
    left = results.unconfirmed
    if kind == "confirmed" and not left:
        return "Confirmed on fresh seeds, with measured sampling time."
    again = "The same search again goes on with it."
    if kind == "confirmed":
        names = ", ".join(f"trial {r.number}" for r in left)
        done = len(results.confirmations)
        return (
            f"Confirmed on fresh seeds, with measured sampling time, so far {done} of "
            f"{done + len(left)} points; not yet {names}. {again}"
        )
    costs = "FLOPs" if results.cost == "flops" else "predicted times"
    status = f"Scores and {costs} of the search: the best of many is flattered, and "
    if results.confirmations:
        return f"{status}only the full network is confirmed yet. {again}"
    return f"{status}nothing is confirmed yet."


def _not_confirmed(results: StudyResults) -> str:
    """What is to be said of points of the search's front that were not worth confirming, or could
    not be confirmed."""
    if results.full is None:
        return ""
    done = {c.number for c in results.confirmations}
    out = [r for r in left_out(results.front(), results.full) if r.number not in done]
    names = ", ".join(f"trial {r.number}" for r in out)
    told = f" {NOT_CONFIRMED.format(names).capitalize()}." if out else ""
    for number, why in sorted(results.unconfirmable.items()):
        told += f" Trial {number} could not be confirmed: {why}."
    return told


def _name(row: pd.Series) -> str:
    return (
        str(row["label"])
        .replace("#", "trial ")
        .replace("full, ", "the full network, ")
        .replace(", ", " in ")
    )


def _takes(row: pd.Series) -> str:
    time = row["credited_frac"]
    shown = relative(time)
    if time > WORTHWHILE_TIME and shown == relative(WORTHWHILE_TIME):  # the digits that tell it
        digits = next(d for d in range(3, 20) if fixed(time, d) != fixed(WORTHWHILE_TIME, d))
        shown = f"{fixed(time, digits)}×"
    if time != row["time_frac"]:
        return (
            f"runs {shown} of the block calls, which make it {speed_up(time)} as fast at "
            f"best (the time measured is {UNEXPLAINED}),"
        )
    if row["cost"] == tables.FLOPS:
        return f"takes {shown} the FLOPs"
    predicted = row["kind"] == "search"
    if time > 1 and shown != relative(1.0):
        return f"{'is predicted to be' if predicted else 'is'} slower ({shown} the time)"
    verb = "is predicted to take" if predicted else "takes"
    return f"{verb} {shown} the time ({speed_up(time)} as fast)"


def _beside(
    others: pd.DataFrame, chosen: int | None, scores: Mapping[int, EvaluationResult]
) -> tuple[str, ...]:
    """The lowest score among the measured times that can't be told apart from the chosen one's, if
    it is lower than the chosen one's, and no more shown to be worse than the full network's. What
    block calls can't explain is no measured time."""
    row = others[others["number"] == chosen].iloc[0]
    sound = others[others["credited_frac"] == others["time_frac"]]
    if chosen not in set(sound["number"]):
        return ()
    apart = (sound["time_frac"] - row["time_frac"]).abs()
    tied = sound[apart <= sound["time_spread"] + row["time_spread"]]  # not where it is predicted
    tied = tied[tied["quality"] < row["quality"]]
    if row["verdict"] != "worse":
        tied = tied[tied["verdict"] != "worse"]
    if tied.empty:
        return ()
    best = tied.iloc[int(tied["quality"].to_numpy().argmin())]
    score = plus_minus(best["quality"], best["std_error"])
    mine, own = scores[int(best["number"])], scores[int(row["number"])]
    better = tables.verdict(mine.minus(own)[0], mine.margin(own)) == "better"
    told = "has a better" if better else "has a lower, not told apart,"
    time = relative(best["time_frac"], best["time_spread"])
    chosen_time = relative(row["time_frac"], row["time_spread"])
    return (
        f"At a time that can't be told apart from that ({time} beside {chosen_time}) {_name(best)} "
        f"{told} {best['metric']}: {score}.",
    )


def _sampler_alone(others: pd.DataFrame, chosen: int | None, deep: set[int]) -> tuple[str, ...]:
    """What a sampler gives without a schedule: the fastest point of full depth (`deep`) that is
    faster than the full network and not worse, so that its gain is not taken for the schedule's."""
    row = others[others["number"] == chosen].iloc[0]
    known = others["verdict"].isin(("better", "can't be told apart"))
    alone = others[others["number"].isin(deep) & known & (others["credited_frac"] < 1)]
    if chosen in deep or alone.empty:
        return ()
    best = alone.iloc[0]  # fastest first
    return (
        f"Full depth under {best['sampler']} alone has {best['metric']} "
        f"{plus_minus(best['quality'], best['std_error'])} at {_cost(best)}, beside {_cost(row)} "
        f"of {_name(row)}: that much is to be had without a schedule.",
    )


def _cost(row: pd.Series) -> str:
    """What may be claimed of a point's time, or FLOPs: "0.598 ± 0.004× the time"."""
    if row["credited_frac"] != row["time_frac"]:
        return f"{relative(row['credited_frac'])} the block calls"
    unit = tables.unit_of(row["cost"])
    return f"{relative(row['time_frac'], row['time_spread'])} the {unit}"


def _disturbed(others: pd.DataFrame) -> tuple[str, ...]:
    """What is to be said of measured times that block calls can't explain."""
    found = others[others["credited_frac"] > others["time_frac"]]
    if found.empty:
        return ()
    times = ", ".join(
        f"{_name(row)} {relative(row['time_frac'], row['time_spread'])} "
        f"(block calls {relative(row['block_frac'])})"
        for _, row in found.iterrows()
    )
    return (
        f"Measured at a time {UNEXPLAINED}: {times}. What is claimed of such a point is the bound "
        "of its block calls. To measure again, set another confirm.time_repeats and run the same "
        "search on a quiet machine.",
    )


def _told_loss(full: pd.Series, protocol: Protocol | None) -> float:
    """The largest loss that may be left open where a schedule is called a success; of a metric that
    may be 0 or less by chance (KID) no share means anything, and any may."""
    if protocol is not None and protocol.metric == "kid":
        return math.inf
    return TOLD_LOSS * abs(float(full["quality"]))


def _verdict(others: pd.DataFrame, gone: pd.DataFrame, partly: bool, told: float) -> Headline:
    """With a known spread: the fastest schedule that is not worse, or the closest.

    Args:
        others: points that may be chosen, fastest first.
        gone: further points, whose weights are deleted.
        partly: more of the front is still to be confirmed.
        told: see `_told_loss`.
    """
    metric = others["metric"].iloc[0]
    matching = _as_good(others, faster_than=1.0)
    if not matching.empty:
        explained = matching["credited_frac"] == matching["time_frac"]
        fast = matching["credited_frac"] <= WORTHWHILE_TIME
        firm = matching["difference"] + matching["difference_margin"] <= told
        kinds = (explained & fast & firm, fast & firm, explained & fast)
        best = next((matching[k] for k in kinds if k.any()), matching).iloc[0]  # fastest first
        if best["credited_frac"] <= WORTHWHILE_TIME:
            takes = _takes(best)
            at = _at(best, told)
            answer = f"{_name(best)} {takes.rstrip(',') if at[0] == ',' else takes}{at}."
            answer = answer[0].upper() + answer[1:]
            return Headline(answer, (), bool(kinds[0].any()), int(best["number"]))
        rest = f"the best was {_name(best)}, which {_takes(best)}"
    else:
        faster = others[others["credited_frac"] < 1]
        as_good = _as_good(others)
        if faster.empty and not as_good.empty:
            best = as_good.iloc[0]  # what they miss is the time
        else:
            pool = others if faster.empty else faster
            best = pool.iloc[int(pool["difference"].to_numpy().argmin())]
        rest = f"the closest was {_name(best)}, which {_takes(best)} and {_apart(best)}"
    unit = tables.unit_of(others["cost"].iloc[0])
    lost = _as_good(gone)
    lost = lost[lost["credited_frac"] <= WORTHWHILE_TIME]
    none = "Of what is confirmed so far no schedule" if partly else "No schedule"
    none += "" if lost.empty else " whose weights are kept"
    answer = (
        f"{none} takes at most {relative(WORTHWHILE_TIME)} the {unit} at a {metric} that "
        "can't be told apart from the "
    )
    answer += f"full network's ({tables.LEVEL})"
    if not lost.empty:
        answer += f"; {_name(lost.iloc[0])} does, but its weights are deleted"
    return Headline(f"{answer}; {rest}.", (), False, int(best["number"]))


def _as_good(points: pd.DataFrame, faster_than: float = math.inf) -> pd.DataFrame:
    """Those that are not shown to be worse than the full network."""
    as_good = points["difference"] <= points["difference_margin"]
    return points[as_good & (points["credited_frac"] < faster_than)]


def _at(row: pd.Series, told: float) -> str:
    """At which score, after the time it takes: of a point that is not worse than the full
    network."""
    metric = row["metric"]
    between = f"{tables.LEVEL}: {_interval(row)}"
    if (loss := row["difference"] + row["difference_margin"]) > told:
        return (
            f", but too little is measured to tell at what {metric}: a loss of up to "
            f"{number(loss, row['difference_se'])} can't be ruled out ({between})"
        )
    if row["difference"] < -row["difference_margin"]:
        return f" at a better {metric} than the full network's ({between})"
    return f" at a {metric} that can't be told apart from the full network's ({between})"


def _apart(row: pd.Series) -> str:
    """How its score stands to the full network's."""
    if row["verdict"] not in ("better", "worse"):
        return "can't be told apart from it"
    return f"is {row['verdict']} by {number(abs(row['difference']))}"


def _interval(row: pd.Series) -> str:
    """Between what the true difference lies: "the difference lies between −0.21 and +0.48"."""
    low = row["difference"] - row["difference_margin"]
    high = row["difference"] + row["difference_margin"]
    error = row["difference_se"]
    return (
        f"the difference lies between {signed(low, number(low, error))} and "
        f"{signed(high, number(high, error))}"
    )


def _unknown_spread(others: pd.DataFrame) -> Headline:
    """From one repeat nothing can be told apart: name the best score that is fast enough."""
    metric = others["metric"].iloc[0]
    fast = others[others["credited_frac"] <= WORTHWHILE_TIME]
    best = others.iloc[0] if fast.empty else fast.iloc[int(fast["quality"].to_numpy().argmin())]
    side = "above" if best["difference"] >= 0 else "below"
    answer = (
        f"{_name(best)} {_takes(best)} at a {metric} {number(abs(best['difference']))} "
        f"{side} the full network's; {UNKNOWN}."
    )
    answer = answer[0].upper() + answer[1:]
    note = (
        "Whether that difference is more than noise can't be said: several repeats "
        "(evaluation, confirm) would tell."
    )
    return Headline(answer, (note,), False, int(best["number"]))


def _compared(others: pd.DataFrame, full: pd.Series, chosen: int | None) -> str:
    row = others[others["number"] == chosen].iloc[0]
    text = f"{full['metric']} {plus_minus(row['quality'], row['std_error'])} against the full "
    text += f"network's {plus_minus(full['quality'], full['std_error'])}"
    if not math.isnan(row["difference_se"]):
        difference = number(row["difference"], row["difference_se"])
        text += f" (difference {signed(row['difference'], difference)}, "
        text += f"standard error {number(row['difference_se'], row['difference_se'])})"
    return f"{text}. Blocks run, data to noise: {row['schedule']}, sampled by {row['sampler']}."
