"""Tables: against brute force, and never across protocols."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from asesearch.errors import EvaluationError, StudyError
from asesearch.point import Point
from asesearch.report import evidence, exhibits, opinions, tables
from asesearch.report.attainment import volume
from asesearch.report.grids import confirmation_grid, cost_grid, retrained_grid, spaces_grid
from asesearch.report.page import render_page
from asesearch.report.plots import drawings
from asesearch.report.wording import (
    headline,
    number,
    percent,
    plus_minus,
    relative,
    repeatability,
    speed_up,
)
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule
from asesearch.score import EvaluationResult, PrecisionRecall
from asesearch.study.picking import pick
from asesearch.study.records import Confirmation, shortened
from tests.report.conftest import OWN, no_more


def dominated(p, points):
    return any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)


@pytest.mark.parametrize("kind", ["search", "confirmed"])
def test_front_is_what_nothing_dominates(study, kind):
    results = study(30, seed=3)
    table = tables.points(results, kind)
    pairs = list(zip(table["credited_frac"], table["quality"], strict=True))
    assert list(table["on_front"]) == [not dominated(p, pairs) for p in pairs]
    assert table["credited_frac"].is_monotonic_increasing


def test_front_stands_on_confirmed_figures_where_there_are_any(study):
    results = study(30)
    assert set(tables.front(results)["kind"]) == {"confirmed"}
    unconfirmed = replace(results, confirmations=())
    table = tables.front(unconfirmed)
    assert set(table["kind"]) == {"search"}
    assert list(table["number"]) == [r.number for r in unconfirmed.front()]


def test_hypervolume_agrees_with_monte_carlo():
    rng = np.random.default_rng(0)
    darts = rng.uniform(0, 1, (200_000, 2))
    for n in (1, 4, 15):
        found = rng.uniform(0, 1.2, (n, 2))
        hit = (found[None] <= darts[:, None]).all(axis=2).any(axis=1).mean()
        assert volume(found, (1.0, 1.0)) == pytest.approx(hit, abs=0.005)


def test_hypervolume_of_known_shapes():
    assert volume(np.empty((0, 2)), (1.0, 1.0)) == 0
    assert volume(np.array([[0.25, 0.5]]), (1.0, 1.0)) == 0.375
    assert volume(np.array([[0.25, 0.5], [0.5, 0.25], [0.5, 0.25]]), (1.0, 1.0)) == 0.5
    outside = np.array([[1.0, 0.0], [0.0, 1.5]])
    assert volume(outside, (1.0, 1.0)) == 0


def test_hypervolume_never_falls_and_states_its_reference(study):
    results = study(30)
    table = tables.hypervolume(results)
    assert (np.diff(table["hypervolume"]) >= -1e-12).all() and table["hypervolume"].iloc[-1] > 0
    assert set(table["reference_time_frac"]) == {1.1} and set(table["scale"]) == {"log"}
    assert table["reference_quality"].iloc[0] == pytest.approx(2 * results.full.quality.value)


def test_hypervolume_of_figures_that_are_not_positive_is_linear(study):
    results = study(6, failed=(), metric="kid")
    low = replace(
        results.records[3],
        quality=replace(results.records[3].quality, values=(-0.1, 0.0, 0.1 - 1e-3)),
    )
    table = tables.hypervolume(replace(results, records=(*results.records[:3], low)))
    assert set(table["scale"]) == {"linear"} and np.isfinite(table["hypervolume"]).all()


@pytest.mark.parametrize(
    "make", [tables.trials, tables.front, tables.hypervolume, exhibits.schedule_matrix]
)
def test_figures_of_two_protocols_share_no_table(study, make):
    results = study(6, failed=(), confirm=False)
    make(results)  # negative control: one protocol is fine
    other = replace(results.records[3].quality.protocol, num_samples=5000)
    odd = replace(
        results.records[3], quality=EvaluationResult(other, results.records[3].quality.values)
    )
    mixed = replace(results, records=(*results.records[:3], odd, *results.records[4:]))
    with pytest.raises(EvaluationError, match="num_samples: 1000 and 5000"):
        make(mixed)


def test_confirmations_of_two_protocols_share_no_table(study):
    results = study(12)
    first, *rest = results.confirmations
    other = replace(first.quality.protocol, cfg_scale=4.0)
    mixed = replace(
        results,
        confirmations=(replace(first, quality=replace(first.quality, protocol=other)), *rest),
    )
    for make in (tables.front, tables.confirmation):
        with pytest.raises(EvaluationError, match="cfg_scale"):
            make(mixed)


def test_confirmation_of_an_unknown_trial_is_refused(study):
    results = study(12)
    stray = replace(results.confirmations[0], number=99)
    with pytest.raises(StudyError, match="99"):
        tables.points(replace(results, confirmations=(stray,)), "confirmed")


def test_confirmation_puts_both_figures_side_by_side(study):
    results = study(24)
    table = tables.confirmation(results).set_index("number")
    assert set(table.index) == {c.number for c in results.confirmations}
    [full] = [c for c in results.confirmations if c.number == results.full.number]
    for c in results.confirmations:
        row = table.loc[c.number]
        record = results.records[c.number]
        assert (
            row["search_quality"] == record.quality.value
            and row["confirmed_quality"] == c.quality.value
        )
        if c is full:
            assert math.isnan(row["selection_bias"])  # the reference, which was not chosen
            continue
        after = c.quality.minus(full.quality)
        before = record.quality.minus(results.full.quality)
        assert row["selection_bias"] == pytest.approx(after[0] - before[0])
        assert row["selection_bias_se"] == pytest.approx(math.hypot(after[1], before[1]))
        assert (row["predicted_time_frac"], row["measured_time_frac"]) == (
            record.time_frac,
            c.measured_time_frac,
        )


def test_precision_and_recall_stand_beside_a_confirmed_score_where_they_were_measured(study):
    results = study(confirm=True)
    assert "precision" not in confirmation_grid(results).head
    first, *rest = results.confirmations
    found = replace(first, precision_recall=PrecisionRecall((0.6, 0.7, 0.8), (0.4, 0.5, 0.6)))
    kept = json.loads(json.dumps(found.to_dict()))
    assert Confirmation.from_dict(kept) == found
    del kept["precision_recall"]  # as earlier releases wrote it
    assert Confirmation.from_dict(kept) == first
    results = replace(results, confirmations=(found, *rest))
    row = tables.confirmation(results).set_index("number").loc[first.number]
    assert row["precision"] == pytest.approx(0.7) and row["recall"] == pytest.approx(0.5)
    assert row["precision_se"] == pytest.approx(0.1 / math.sqrt(3)) == row["recall_se"]
    grid = confirmation_grid(results)
    at = grid.head.index("precision")
    shown = {line[0]: line[at : at + 2] for line in grid.rows}
    assert grid.head[at + 1] == "recall"
    assert shown.pop("full network") == ("0.700 ± 0.058", "0.500 ± 0.058")
    assert set(shown.values()) == {("–", "–")}


def test_training_seeds_have_an_error_and_a_verdict_of_their_own(study):
    results = study(confirm=True)
    assert opinions.retrained(results).empty  # one seed each
    again = tuple(
        replace(
            c,
            retrained=tuple(
                EvaluationResult(c.quality.protocol, tuple(v + shift for v in c.quality.values))
                for shift in ((0.3, -0.1) if c.number == results.full.number else (1.3, 1.1))
            ),
        )
        for c in results.confirmations
    )
    results = replace(results, confirmations=again)
    table = opinions.retrained(results).set_index("number")
    assert len(table) == len(again) and set(table["training_seeds"]) == {3}
    for c in again:
        row = table.loc[c.number]
        assert row["quality"] == pytest.approx(
            np.mean([c.quality.value, *(q.value for q in c.retrained)])
        )
        assert row["sampling_se"] == pytest.approx(c.quality.std_error)
        assert row["training_se"] == pytest.approx(c.trained.std_error)
    assert table.loc[results.full.number, "verdict"] == "the reference"
    grid = retrained_grid(results)
    assert len(grid.rows) == len(again) and grid.rows[0][1] == "3"


def test_further_feature_spaces_are_compared_each_by_itself(study):
    results = study(confirm=True)
    assert opinions.feature_spaces(results).empty
    other = replace(results.confirmations[0].quality.protocol, extractor="another")
    also = tuple(
        replace(c, also=(EvaluationResult(other, tuple(9 * v for v in c.quality.values)),))
        for c in results.confirmations
    )
    results = replace(results, confirmations=also)
    table = opinions.feature_spaces(results).set_index("number")
    own = tables.points(results, "confirmed").set_index("number")
    assert len(table) == len(also) and set(table["metric"]) == {"Fréchet distance (another)"}
    assert table["difference"].to_dict() == pytest.approx((9 * own["difference"]).to_dict())
    assert table["verdict"].to_dict() == own["verdict"].to_dict()
    assert len(spaces_grid(results).rows) == len(also)


def test_no_selection_bias_where_more_than_the_seeds_differ(study):
    results = study(12)
    larger = [
        replace(
            c, quality=replace(c.quality, protocol=replace(c.quality.protocol, num_samples=50_000))
        )
        for c in results.confirmations
    ]
    assert (
        tables.confirmation(replace(results, confirmations=tuple(larger)))["selection_bias"]
        .isna()
        .all()
    )


@pytest.mark.parametrize(
    ("difference", "margin", "words"),
    [
        (0.1, 0.1, "can't be told apart"),
        (-0.1, 0.1, "can't be told apart"),
        (0.11, 0.1, "worse"),
        (-0.11, 0.1, "better"),
        (0.1, None, "spread unknown (one repeat)"),
        (math.nan, None, "no score of the full network"),
    ],
)
def test_verdict(difference, margin, words):
    assert tables.verdict(difference, margin) == words


@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_one_null_difference_in_twenty_is_called_better_or_worse(study, repeats):
    """Schedules exactly as good as the full network, with noise that both share and noise of their
    own."""
    rng = np.random.default_rng(repeats)
    cases = 4000
    protocol = study(1, repeats=repeats, confirm=False).full.quality.protocol

    def called(offset):
        shared = 9 + rng.normal(0, 1, (cases, repeats))
        full, other = (shared + rng.normal(0, 0.1, (cases, repeats)) for _ in range(2))
        pairs = [
            [EvaluationResult(protocol, tuple(row)) for row in table.tolist()]
            for table in (full, other + offset)
        ]
        words = [tables.verdict(b.minus(a)[0], b.margin(a)) for a, b in zip(*pairs, strict=True)]
        return {word: words.count(word) for word in ("better", "worse", "can't be told apart")}

    null = called(0.0)
    low, high = scipy.stats.binom.ppf([5e-6, 1 - 5e-6], cases, 0.025)
    # one standard error calls a third to a half
    assert low <= null["better"] <= high and low <= null["worse"] <= high
    # differences of sixty times their noise are found, on the right side
    assert called(6.0)["worse"] > 0.99 * cases and called(-6.0)["better"] > 0.99 * cases


@pytest.mark.parametrize(
    # of three repeats: mean 0.2 · size, standard error 0.1 / √3 = 0.0577, times 4.303
    ("differences", "word"),
    [
        ((0.1, 0.2, 0.3), "can't be told apart"),
        ((0.2, 0.3, 0.4), "worse"),
        ((-0.2, -0.3, -0.4), "better"),
    ],
)
def test_the_verdict_of_a_point_is_that_of_the_interval(study, differences, word):
    results = study(2, failed=(), confirm=False)
    full, rival = results.records
    values = tuple(v + d for v, d in zip(full.quality.values, differences, strict=True))
    rival = replace(rival, quality=replace(rival.quality, values=values))
    row = (
        tables.points(replace(results, records=(full, rival)), "search")
        .set_index("number")
        .loc[rival.number]
    )
    assert row["verdict"] == word and row["confidence"] == 0.95
    # Student's t, table value
    assert row["difference_margin"] == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-5)
    assert row["difference_se"] == pytest.approx(0.1 / math.sqrt(3))


def test_trials_holds_every_record(study):
    results = study(12, failed=(7, 9))
    table = tables.trials(results)
    assert list(table["number"]) == list(range(12))
    assert (
        list(table.loc[table["state"] == "failed", "number"]) == [7, 9] and table.loc[7, "failure"]
    )
    record = results.records[4]
    assert tuple(table.loc[4, ["repeat_1", "repeat_2", "repeat_3"]]) == record.quality.values
    assert [c for c in table.columns if c.endswith("_s")] == [
        "finetune_s",
        "sample_s",
        "evaluate_s",
    ]
    figures = table["quality"].to_numpy()
    assert list(table["best_quality"]) == [np.nanmin(figures[: i + 1]) for i in range(12)]


def test_schedule_matrix_is_the_schedule_at_every_timestep(study):
    results = study(12)
    uneven = ExitSchedule(28, 1000, (0, 130, 777, 1000), (28, 9, 4))
    fast = replace(results.records[3], point=Point(uneven, OWN), time_frac=0.01)
    results = replace(
        results, records=(*results.records[:3], fast, *results.records[4:]), confirmations=()
    )
    table = exhibits.schedule_matrix(results)
    assert table["number"].iloc[0] == 3 and "full network" in set(table["label"])
    starts = np.array([int(c[1:]) for c in table.columns if c.startswith("t")])
    column = np.searchsorted(starts, np.arange(1000), side="right") - 1
    for _, row in table.iterrows():
        blocks = row[[f"t{t}" for t in starts]].to_numpy()[column]
        assert (
            blocks == results.records[row["number"]].schedule.exit_depth_at(np.arange(1000))
        ).all()


def test_losses_keep_their_mean_and_count_the_study_files_steps(study):
    results = study(12)
    results = replace(results, config={**results.config, "train": {"num_steps": 4000}})
    table = exhibits.losses(results)
    assert table["step"].max() <= 4000 and table["step"].max() > 3900
    assert len(set(table["number"])) <= 6 and (table.groupby("number").size() <= 80).all()
    mine = table[table["number"] == 0]
    assert mine["loss"].mean() == pytest.approx(np.mean(results.records[0].losses), rel=0.02)


def test_samples_name_the_pixels_they_show(study):
    images = np.arange(10 * 16, dtype=np.uint8).reshape(10, 1, 4, 4)
    table = exhibits.samples(study(12, samples=images))
    assert (
        table["image"].max() == 7
        and len(set(table["number"])) <= 6
        and "full network" in set(table["label"])
    )
    assert table.groupby("image")["sha256"].nunique().eq(1).all() and table["sha256"].nunique() == 8
    with pytest.raises(StudyError, match="uint8"):
        exhibits.samples(study(12, samples=images.astype(np.float32)))


def test_difference_is_taken_repeat_by_repeat(study):
    full = study(1).full.quality
    shifted = replace(full, values=tuple(v + 0.5 for v in full.values))
    difference, error = shifted.minus(full)
    assert difference == pytest.approx(0.5) and error == pytest.approx(0, abs=1e-12)
    uneven = replace(
        full, values=tuple(v + d for v, d in zip(full.values, (0.4, 0.5, 0.6), strict=True))
    )
    assert uneven.minus(full)[1] == pytest.approx(0.1 / math.sqrt(3))
    with pytest.raises(EvaluationError, match="solver"):
        full.minus(replace(full, protocol=replace(full.protocol, solver="ddpm")))


# -- in words
# ---------------------------------------------------------------------------------------


def with_figures(results, figures):
    """The study's first trials with these (time, values); the first is the full network."""
    records = []
    for record, (time, values) in zip(results.records, figures, strict=False):
        records.append(
            replace(record, time_frac=time, quality=replace(record.quality, values=values))
        )
    return replace(results, records=tuple(records))


FULL = (1.0, (9.0, 9.1, 9.2))


@pytest.mark.parametrize(
    ("figures", "words", "success"),
    [
        (
            [FULL, (0.69, (9.05, 9.0, 9.3))],
            "D3-DiT is predicted to take 0.69× the time (1.45× as fast) at a FID that can't be "
            "told apart from the full network's (95 % confidence: the difference lies between "
            "−0.242 and +0.275).",
            True,
        ),
        (
            [FULL, (0.69, (8.0, 8.1, 8.3))],
            "0.69× the time (1.45× as fast) at a better FID than the full network's",
            True,
        ),
        (
            [FULL, (0.88, (9.05, 9.0, 9.3))],
            "No schedule takes at most 0.75× the time at a FID that can't be told",
            False,
        ),
        (
            [FULL, (0.88, (9.05, 9.0, 9.3))],
            "the best was D3-DiT, which is predicted to take 0.88× the time",
            False,
        ),
        (
            [FULL, (0.5, (10.0, 10.1, 10.4))],
            "the closest was D3-DiT, which is predicted to take 0.50× the time",
            False,
        ),
        (
            [FULL, (0.754, (9.1, 9.1, 9.1))],
            "the best was D3-DiT, which is predicted to take 0.754× the time",
            False,
        ),
        (
            [FULL, (1.6, (8.0, 8.0, 8.1))],
            "the closest was D3-DiT, which is predicted to be slower (1.60× the time) and is "
            "better by 1.067",
            False,
        ),
        (
            [FULL, (1.6, (9.1, 9.1, 9.1))],
            "is predicted to be slower (1.60× the time) and can't be told apart from it.",
            False,
        ),
        (  # all as good as the full network: it is the time that is missed
            [FULL, (1.6, (8.9, 9.1, 9.1)), (1.02, (9.0, 9.05, 9.2))],
            "the closest was D4-DiT, which is predicted to be slower (1.02× the time) and can't",
            False,
        ),
        (
            [FULL, (1.001, (9.1, 9.1, 9.1))],
            "the closest was D3-DiT, which is predicted to take 1.00× the time (1.00× as fast) and",
            False,
        ),
        (
            [FULL, (1.6, (9.5, 9.6, 9.7)), (1.02, (10.0, 10.1, 10.2))],
            "the closest was D3-DiT, which is predicted to be slower (1.60× the time) and is worse",
            False,
        ),
        ([FULL], "Only the full network has a score so far.", False),
        (
            [FULL, (0.6, (9.1, 9.1, 9.1)), (0.5, (9.0, 9.15, 9.19))],
            "D4-DiT is predicted to take 0.50× the time",
            True,
        ),
    ],
)
def test_headline_says_what_the_data_say(study, figures, words, success):
    answer = headline(with_figures(study(4, failed=(), confirm=False), figures))
    assert words in answer.answer.replace("\N{NO-BREAK SPACE}", " ")
    assert answer.success is success


def test_headline_of_two_repeats_says_how_wide_their_interval_is(study):
    two, three = (headline(study(6, repeats=n, confirm=False)) for n in (2, 3))
    assert any("12.7 standard errors" in d for d in two.details) and not any(
        "12.7" in d for d in three.details
    )
    assert (
        "95\N{NO-BREAK SPACE}% confidence" in two.answer
        and "95\N{NO-BREAK SPACE}% confidence" in three.answer
    )


@pytest.mark.parametrize(
    ("metric", "values", "words", "success"),
    [
        (
            "frechet",
            (19.0, 29.0),
            "D3-DiT is predicted to take 0.50× the time (2.00× as fast), but too little is "
            "measured to tell at what FID: a loss of up to 77.2 can't be ruled out (95 % "
            "confidence: the difference lies between −47.4 and +77.2).",
            False,
        ),
        ("frechet", (9.05, 9.15), "0.50× the time (2.00× as fast) at a FID that can't be", True),
        ("kid", (19.0, 29.0), "at a KID that can't be told apart", True),  # no share of it
    ],
)
def test_a_loss_that_is_not_told_is_no_success(study, metric, values, words, success):
    """Two repeats of which noise alone makes the interval wide had been the headline's success."""
    made = study(4, repeats=2, failed=(), confirm=False, metric=metric)
    answer = headline(with_figures(made, [(1.0, (9.0, 9.2)), (0.5, values)]))
    assert words in answer.answer.replace("\N{NO-BREAK SPACE}", " ")
    assert answer.success is success and answer.chosen == 1


def test_a_score_that_is_told_comes_before_a_faster_one_that_is_not(study):
    made = study(4, failed=(), confirm=False)
    figures = [FULL, (0.5, (5.0, 9.0, 16.0)), (0.6, (9.05, 9.0, 9.3))]
    answer = headline(with_figures(made, figures))
    assert answer.success and answer.chosen == 2


def test_what_the_sampler_alone_gives_stands_beside_the_schedule(study):
    made = with_figures(
        study(4, failed=(), confirm=False),
        [FULL, (0.5, (9.05, 9.0, 9.3)), (0.6, (9.0, 9.15, 9.19)), (0.4, (12.0, 12.1, 12.2))],
    )
    assert not any("without a schedule" in d for d in headline(made).details)
    sampler = Sampler("unipc-quadratic", 6)
    full, first, second, last = made.records
    deep = replace(second, point=Point(full.schedule, sampler))
    worse = replace(last, point=Point(full.schedule, Sampler("unipc-quadratic", 4)))
    answer = headline(replace(made, records=(full, first, deep, worse)))
    assert answer.chosen == 1
    (said,) = (d for d in answer.details if "without a schedule" in d)
    score = plus_minus(deep.quality.value, deep.quality.std_error)
    words = f"Full depth under {sampler} alone has FID {score} at 0.60× the time, beside 0.50×"
    assert words in said
    # where it is itself what the headline speaks of there is nothing to add
    fastest = headline(replace(made, records=(full, replace(deep, time_frac=0.3), worse)))
    assert fastest.chosen == 2
    assert not any("without a schedule" in d for d in fastest.details)


def test_headline_of_one_repeat_claims_nothing(study):
    answer = headline(study(6, repeats=1, confirm=False))
    assert "spread unknown (one repeat)" in answer.answer and not answer.success


def test_headline_speaks_of_measured_time_once_confirmed(study):
    answer = headline(study(24))
    assert "predicted" not in answer.answer and any("fresh seeds" in d for d in answer.details)


@pytest.mark.parametrize(
    ("search", "workers", "words"),
    [
        ({"cost": "flops"}, 1, "The same study file, seeds and device give the same trials."),
        ({"cost": "flops"}, 0, "The same study file, seeds and device give the same trials."),
        ({}, 1, "give the same trials to searches that share the latency table, which each study "),
        ({"budget": "2h"}, 1, "keeps; how many fit into the budget of 2h depends on the time they"),
        ({"cost": "flops"}, 3, "need not give the same trials: up to 3 workers were at it at once"),
    ],
)
def test_the_page_says_what_gives_the_same_trials(study, search, workers, words):
    made = study(4, confirm=False)
    config = {**made.config, "search": {**made.config["search"], **search}}
    found = replace(made, config=config, most_at_once=workers)
    assert words in repeatability(found) and repeatability(found) in render_page(found, [])


def measured(results, times):
    """The study with these (time, spread) of its first confirmed points after the full network;
    all of them as good as it is."""
    full, *others = results.confirmations
    again = [
        replace(c, quality=full.quality, measured_time_frac=time, measured_time_spread=spread)
        for c, (time, spread) in zip(others, times, strict=False)
    ]
    return no_more(results, (full, *again))


def test_a_time_that_block_calls_cannot_explain_is_no_claim_and_no_success(study):
    results = study(24)
    other = results.confirmations[1]
    blocks = results.records[other.number].block_frac
    assert blocks < 0.7
    answer = headline(measured(results, [(0.7 * blocks, 0.01)]))
    assert answer.chosen == other.number and not answer.success
    assert f"runs {blocks:.2f}× of the block calls" in answer.answer
    assert "better than its block calls can explain" in answer.answer
    assert f"{1 / blocks:.2f}× as fast at best" in answer.answer
    for claim in (f"{0.7 * blocks:.2f}×", f"{1 / (0.7 * blocks):.2f}×"):
        assert claim not in answer.answer
    assert any(f"{0.7 * blocks:.3f} ± 0.010×" in detail for detail in answer.details)
    # within its spread, or by nothing that shows, it is a measurement like any other
    for time, spread in ((0.7 * blocks, 0.2 * blocks), (0.99 * blocks, 0.0), (1.1 * blocks, 0.01)):
        sound = headline(measured(results, [(time, spread)]))
        assert sound.success and f"takes {time:.2f}× the time" in sound.answer
        assert not any("can explain" in d for d in (sound.answer, *sound.details))


def test_a_better_score_at_a_time_that_cannot_be_told_apart_is_said(study):
    results = study(24)
    full, first, second, *_ = results.confirmations
    better = replace(full.quality, values=tuple(v - 1 for v in full.quality.values))

    def found(spread, other=better):
        changed = measured(results, [(0.60, spread), (0.62, spread)])
        confirmed = [
            replace(c, quality=other) if c.number == second.number else c
            for c in changed.confirmations[:3]
        ]
        answer = headline(replace(changed, confirmations=tuple(confirmed)))
        assert answer.chosen == first.number
        return [d for d in answer.details if "can't be told apart from that" in d]

    (said,) = found(0.02)
    assert "(0.620 ± 0.020× beside 0.600 ± 0.020×)" in said
    assert f"has a better FID: {plus_minus(better.value, better.std_error)}." in said
    assert found(0.005) == []
    lower = tuple(v + d for v, d in zip(full.quality.values, (-0.3, 0.2, -0.3), strict=True))
    (said,) = found(0.02, replace(full.quality, values=lower))
    assert "has a lower, not told apart, FID: " in said


def test_a_sound_time_is_claimed_before_one_that_cannot_be_explained(study):
    results = study(24)
    first, second = (results.records[c.number] for c in results.confirmations[1:3])
    assert first.block_frac < second.block_frac < 0.7
    times = [(0.5 * first.block_frac, 0.01), (second.time_frac, 0.01)]
    answer = headline(measured(results, times))
    assert answer.success and answer.chosen == second.number
    assert any(f"{0.5 * first.block_frac:.3f} ± 0.010×" in d for d in answer.details)
    table = tables.points(measured(results, times), "confirmed").set_index("number")
    assert table.loc[first.number, "credited_frac"] == first.block_frac
    assert table.loc[second.number, "credited_frac"] == second.time_frac
    # what only a disturbed clock makes fast enough is not
    slow = replace(first, block_frac=0.8)
    records = tuple(slow if r is first else r for r in results.records)
    answer = headline(measured(replace(results, records=records), times[:1]))
    assert not answer.success and answer.answer.startswith("No schedule takes at most 0.75×")
    assert "runs 0.80× of the block calls" in answer.answer


@pytest.fixture
def disturbed(study):
    """A study whose first point was measured at 0.30× by a disturbed clock, though it runs 0.60× of
    the block calls; the second, a little worse, at 0.52× by a sound one."""
    results = study(24)
    full, first, second, *_ = results.confirmations
    blocks = {first.number: 0.6, second.number: 0.5}
    again = [full]
    for c, time, gain in ((first, 0.30, 0.2), (second, 0.52, 0.1)):
        values = tuple(v - gain for v in full.quality.values)
        quality = EvaluationResult(c.quality.protocol, values)
        again.append(
            replace(c, quality=quality, measured_time_frac=time, measured_time_spread=0.005)
        )
    records = tuple(
        replace(r, block_frac=blocks.get(r.number, r.block_frac)) for r in results.records
    )
    return no_more(replace(results, records=records), again), first, second


def test_the_front_is_of_times_that_may_be_claimed(disturbed):
    results, first, second = disturbed
    front = tables.front(results)
    assert list(front["number"]) == [second.number, first.number]
    assert list(front["credited_frac"]) == [0.52, 0.6] and front["time_frac"].iloc[1] == 0.3
    assert list(front["speed_up"]) == pytest.approx([1 / 0.52, 1 / 0.6])
    assert pick(results, "fastest-within", "+5%").number == front["number"].iloc[0]
    assert min(evidence.attained(results, "confirmed")["time_frac"]) == 0.52
    # a second point as good as the first is the only one: the first is as good, and slower
    better = replace(results.confirmations[2], quality=results.confirmations[1].quality)
    one = replace(results, confirmations=(*results.confirmations[:2], better))
    assert list(tables.front(one)["number"]) == [second.number]


def test_speed_ups_are_of_times_that_may_be_claimed(disturbed):
    results, first, second = disturbed
    names = {r.number: tables.label(r, results) for r in results.records}
    for grid in (confirmation_grid(results), cost_grid(results)):
        shown = {row[0]: row[-2:] for row in grid.rows}
        assert grid.head[-2:] == ("time measured", "speed-up")
        assert shown[names[second.number]] == ("0.520 ± 0.005×", "1.92×")
        assert shown[names[first.number]] == (
            "0.300 ± 0.005× (block calls explain 0.60×)",
            "1.67×",
        )
    # of an unconfirmed study it is of the predicted time
    search = replace(results, confirmations=())
    times = {names[r.number]: r.time_frac for r in results.complete}
    assert {row[0]: row[-1] for row in cost_grid(search).rows} == {
        name: speed_up(time) for name, time in times.items()
    }


def test_a_disturbed_time_is_not_the_same_as_a_sound_one(disturbed):
    results, first, second = disturbed
    near = replace(results.confirmations[1], measured_time_frac=0.523)
    results = replace(
        results, confirmations=(results.confirmations[0], near, results.confirmations[2])
    )
    answer = headline(results)
    assert answer.chosen == second.number
    assert not any("can't be told apart from that" in d for d in answer.details)
    # the control: block calls that explain it
    records = tuple(
        replace(r, block_frac=0.5) if r.number == first.number else r for r in results.records
    )
    sound = headline(replace(results, records=records))
    assert any("can't be told apart from that" in d for d in sound.details)


def test_the_line_of_the_front_goes_by_times_that_may_be_claimed(disturbed):
    results, *_ = disturbed
    (front,) = (d for d in drawings(results) if d.name == "front")
    assert "the line goes by their bound" in front.caption
    line = front.draw().axes[0].lines[0]
    assert list(line.get_xdata()) == [0.52, 0.6]
    (control,) = (d for d in drawings(replace(results, confirmations=())) if d.name == "front")
    assert "their bound" not in control.caption


def test_headline_names_the_points_that_were_not_worth_confirming(study):
    results = study(24)
    fastest = results.front()[0]
    far = replace(fastest.quality, values=tuple(3 * v for v in results.full.quality.values))
    records = tuple(
        replace(r, quality=far, time_frac=0.01) if r is fastest else r for r in results.records
    )
    changed = replace(
        results,
        records=records,
        confirmations=tuple(c for c in results.confirmations if c.number != fastest.number),
    )
    (said,) = (d for d in headline(changed).details if "not confirmed" in d)
    assert f"2 times the full network's score: trial {fastest.number}." in said
    assert not any("but not confirmed" in d for d in headline(results).details)


def test_headline_without_the_full_network_or_any_score(study):
    no_full = replace(
        study(6, failed=()), confirmations=(), records=study(6, failed=()).records[1:]
    )
    assert "nothing to compare with" in headline(no_full).answer
    assert (
        headline(study(2, failed=(0, 1), confirm=False)).answer == "No trial has given a score yet."
    )


def test_numbers_are_written_to_the_digits_they_have():
    assert (
        plus_minus(8.64713, 0.0523) == "8.647 ± 0.052" and plus_minus(8.64713, math.nan) == "8.647"
    )
    assert number(-0.5) == "−0.5000" and number(math.nan) == "–" and number(12345.6) == "1.235e+04"
    assert percent(0.312) == "31\N{NO-BREAK SPACE}%"


@pytest.mark.parametrize(
    ("text", "wanted"),  # by toFixed and toPrecision of JavaScript, which the page writes with
    [
        (relative(0.625), "0.63×"),
        (relative(0.875), "0.88×"),
        (relative(0.615), "0.61×"),  # a little less than the tie
        (relative(0.5625, 0.0625), "0.563 ± 0.063×"),
        (speed_up(1 / 1.125), "1.13×"),
        (number(8.5625), "8.563"),
        (number(2.5, 10.0), "3"),
        (number(-0.125, 0.1), "−0.13"),
        (number(1e300, 1.0)[:3], "100"),
    ],
)
def test_ties_are_rounded_as_the_pages_script_rounds_them(text, wanted):
    assert text == wanted


def test_the_hypervolume_is_counted_from_its_reference_point(study):
    """A full network of score 8 at time 1, then one of score 4 at time 0.35, by hand: logarithms to
    base e."""
    results = with_figures(
        study(2, failed=(), confirm=False), [(1.0, (8.0, 8.0, 8.0)), (0.35, (4.0, 4.0, 4.0))]
    )
    table = tables.hypervolume(results)
    alone = 0.1 * math.log(2)  # up to time 1.1 and score 16
    assert list(table["hypervolume"]) == pytest.approx([alone, 0.75 * math.log(4)])


def test_the_hypervolume_of_scores_that_are_not_positive_is_counted_from_the_worst(study):
    results = with_figures(
        study(3, failed=(), confirm=False, metric="kid"),
        [
            (1.0, (0.02, 0.02, 0.02)),
            (0.6, (-0.03, -0.03, -0.03)),
            (0.5, (0.01, 0.01, 0.01)),
        ],
    )
    assert list(tables.hypervolume(results)["hypervolume"]) == pytest.approx(
        [0, 0.5 * 0.05, 0.5 * 0.05 + 0.1 * 0.01]
    )


def test_losses_lie_at_the_middle_of_their_stretch(study):
    results = with_figures(study(1, failed=(), confirm=False), [FULL])
    (full,) = results.records

    def steps(count, num_steps):
        record = replace(full, losses=tuple(range(count)))
        table = exhibits.losses(
            replace(
                results,
                records=(record,),
                config={**results.config, "train": {"num_steps": num_steps}},
            )
        )
        return list(table["step"]), list(table["loss"])

    assert steps(4, 4) == ([1, 2, 3, 4], [0, 1, 2, 3])
    assert steps(4, 8) == ([2, 4, 6, 8], [0, 1, 2, 3])
    middles, means = steps(160, 160)  # 80 stretches of two steps
    assert middles == [1.5 + 2 * i for i in range(80)] and means == [0.5 + 2 * i for i in range(80)]


def test_the_full_networks_losses_lie_at_the_steps_that_it_made(study):
    """With an elastic warm-up it is tuned for the steps of both, a schedule for its own."""
    results = study(2, failed=(), confirm=False)
    records = tuple(replace(r, losses=(3.0, 2.0, 1.0)) for r in results.records)
    config = {**results.config, "train": {"num_steps": 6}}

    def steps(elastic):
        made = replace(results, records=records, config={**config, "elastic": elastic})
        return exhibits.losses(made).groupby("number")["step"].agg(list).to_dict()

    assert steps({"num_steps": 30}) == {0: [12, 24, 36], 1: [2, 4, 6]}
    assert steps(None) == {0: [2, 4, 6], 1: [2, 4, 6]}


def test_the_line_through_latencies_has_its_fixed_part(study):
    table = exhibits.latency(replace(study(1), latency_ms=(5.0, 7.0, 9.0)))
    assert list(table["fit_ms"]) == pytest.approx([5, 7, 9]) and list(table["exit_depth"]) == [
        1,
        2,
        3,
    ]


def test_long_loss_curves_are_kept_as_means():
    kept = shortened([float(i) for i in range(1500)])
    assert kept == [3 * i + 1.0 for i in range(500)] and shortened([3.0, 1.0]) == [3.0, 1.0]


def test_the_search_front_is_fastest_first(study):
    front = study(30, seed=3).front()
    assert len(front) > 3 and [r.time_frac for r in front] == sorted(r.time_frac for r in front)
    # which is no order of trials
    assert [r.number for r in front] != sorted(r.number for r in front)


def test_full_networks_of_as_many_steps_are_told_by_their_samplers(study):
    """And of another number by that alone."""
    results = study(24)
    samplers = (Sampler("unipc-quadratic", 6), Sampler("dpm++2m", 6), Sampler("dpm++2m", 8))
    changed = list(results.records[-3:])
    full = [
        replace(r, origin=f"full {s}", point=Point(results.full.schedule, s))
        for r, s in zip(changed, samplers, strict=True)
    ]
    records = (*results.records[:-3], *full)
    results = replace(results, records=records, confirmations=())
    labels = list(tables.trials(results)["label"])
    assert labels[-3:] == ["full, unipc-quadratic-6", "full, dpm++2m-6", "full, 8 steps"]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("distill", "said"),
    [
        (1.0, "The full network learns the noise, the others what a teacher predicts: levels"),
        (0.5, "the others, for 50\N{NO-BREAK SPACE}% of the samples, what a teacher predicts"),
        (0.0, None),
    ],
)
def test_the_losses_say_whose_they_are(study, distill, said):
    results = study(24)
    train = {**results.config["train"], "distill_frac": distill}
    results = replace(results, config={**results.config, "train": train})
    caption = next(d.caption for d in drawings(results) if d.name == "losses")
    assert "and of the full network" in caption
    assert ("teacher" in caption) == bool(said) and (said or "") in caption
    untrained = tuple(replace(r, losses=()) if r is results.full else r for r in results.records)
    caption = next(
        d.caption for d in drawings(replace(results, records=untrained)) if d.name == "losses"
    )
    assert "full network" not in caption and "teacher" not in caption


def test_one_training_is_not_called_one_repeat(study):
    """Its further training seeds failed."""
    results = study(24)
    full, first, *others = results.confirmations
    failed = replace(first, retrained=("diverged", "diverged"))
    again = replace(full, retrained=(full.quality, full.quality))
    table = opinions.retrained(no_more(results, (again, failed, *others))).set_index("number")
    assert table.loc[first.number, "verdict"] == "spread unknown (one training)"


def test_one_repeat_is_not_called_one_training(study):
    full, first, *_ = study(8, repeats=1).confirmations
    several = [replace(c, retrained=(c.quality, c.quality)) for c in (full, first)]
    table = opinions.retrained(no_more(study(8, repeats=1), several)).set_index("number")
    assert table.loc[first.number, "training_seeds"] == 3
    assert table.loc[first.number, "verdict"] == "spread unknown (one repeat)"


@pytest.mark.parametrize(
    ("ours", "theirs", "pairs", "said"),  # which of the further trainings have a score
    [
        ((False, True), (True, False), 1, " over 1 common seed"),
        ((True, True), (True, False), 2, " over 2 common seeds"),
        ((True, False), (True, True), 2, " over 2 common seeds"),
        ((True, True), (True, True), 3, ""),
        ((True,), (True,), 2, ""),
    ],
)
def test_a_difference_over_common_training_seeds_says_so(study, ours, theirs, pairs, said):
    results = study(8)
    full, first, *_ = results.confirmations
    trained = [
        replace(c, retrained=tuple(c.quality if ended else "diverged" for ended in kept))
        for c, kept in ((full, theirs), (first, ours))
    ]
    results = no_more(results, trained)
    table = opinions.retrained(results).set_index("number")
    assert table.loc[first.number, "pairs"] == pairs
    told = next(row for row in retrained_grid(results).rows if row[0] != tables.FULL)[5]
    assert ("common" in told) == bool(said) and told.endswith(said)
