"""Rungs, samplers and time spent, in tables, figures and page."""

import math
from dataclasses import replace

import pytest
from scipy.stats import spearmanr

from asesearch.point import Point
from asesearch.report import ladder, page, tables
from asesearch.report.plots import drawings
from asesearch.sampler import Sampler
from asesearch.score import EvaluationResult
from asesearch.study.records import LowFidelity
from tests.report.conftest import protocol

LOW_FIDELITY = protocol(2, num_samples=100)
FAST = Sampler("dpm++2m", 8)


@pytest.fixture
def climbed(study):
    """A study whose every fifth trial was stopped and every seventh is sampled in 8 steps."""
    results = study(20, failed=(7,))
    records = []
    for r in results.records:
        if r.state == "failed":
            records.append(r)
            continue
        stopped = r.number % 5 == 4
        values = tuple(2 * v + 0.01 * r.number for v in r.quality.values[:2])
        low_fidelity = LowFidelity(
            EvaluationResult(LOW_FIDELITY, values),
            not stopped,
            0.1 if stopped else 0.8,
            "by its probability",
        )
        changes = {
            "low_fidelity": low_fidelity,
            "gflops": {"low_fidelity": 1.0, "finetune": 10.0},
            "seconds": {**r.seconds, "low_fidelity": 2.0},
        }
        if stopped:
            changes |= {
                "state": "stopped",
                "quality": None,
                "seconds": {"low_fidelity": 2.0},
                "gflops": {"low_fidelity": 1.0},
            }
        if r.number % 7 == 6:
            changes |= {"point": Point(r.schedule, FAST)}
        records.append(replace(r, **changes))
    kept = [c for c in results.confirmations if records[c.number].state == "complete"]
    warm_up = {
        "seconds": {"elastic": 120.0, "map": 30.0},
        "gflops": {"elastic": 50.0, "map": 5.0},
        "losses": [],
    }
    return replace(results, records=tuple(records), confirmations=tuple(kept), warm_up=warm_up)


def test_low_fidelity_scores_have_a_table_of_their_own(climbed):
    table = ladder.rungs(climbed)
    assert len(table) == 19 and set(table["low_fidelity_num_samples"]) == {100}
    stopped = table[~table["promoted"].astype(bool)]
    assert list(stopped["number"]) == [4, 9, 14, 19] and stopped["high_fidelity_score"].isna().all()
    both = table.dropna(subset=["high_fidelity_score"])
    expected = spearmanr(both["low_fidelity_score"], both["high_fidelity_score"]).statistic
    assert ladder.rank_correlation(table) == pytest.approx(expected) and expected > 0.5
    assert math.isnan(ladder.rank_correlation(table.head(2)))
    # none of them is on a front, or in a table of other figures
    for kind in ("search", "confirmed"):
        assert not set(tables.points(climbed, kind)["number"]) & set(stopped["number"])
    assert len(tables.hypervolume(climbed)) == len(climbed.complete)


def test_time_spent_adds_up_to_what_is_on_record(climbed):
    table = ladder.spending(climbed).set_index("part")
    trials = sum(sum(r.seconds.values()) for r in climbed.records)
    assert table["seconds"].sum() == pytest.approx(150 + trials)
    assert table.loc["elastic", "seconds"] == 120 and table.loc["low_fidelity", "seconds"] == 2 * 19
    assert table.loc["low_fidelity", "gflops"] == 19 and table.loc["finetune", "gflops"] == 10 * 15


def test_page_names_samplers_rungs_and_spending(climbed):
    shown = {d.name for d in drawings(climbed)}
    assert {"rungs", "fidelity", "spending"} <= shown
    html = page.render_page(climbed, [])
    assert (
        str(FAST) in html
        and "ddim-50" in html
        and "4 were stopped at their low-fidelity score" in html
    )
    assert "1 failed" in html and html.count("by its probability") == 19
    fast = next(r for r in climbed.complete if r.sampler == FAST)
    assert tables.label(fast, climbed) == f"#{fast.number}, 8 steps"


@pytest.mark.thorough
def test_figures_of_the_ladder_can_be_drawn(climbed, tmp_path):
    for drawing in drawings(climbed):
        if drawing.name in ("rungs", "fidelity", "spending", "front_search"):
            assert (
                b"<svg" in drawing.save(tmp_path) and (tmp_path / f"{drawing.name}.csv").is_file()
            )


def test_competing_samplers_are_said_to_be_part_of_the_point(climbed):
    free = protocol(3, solver=None, num_steps=None)
    records = tuple(
        r if r.quality is None else replace(r, quality=EvaluationResult(free, r.quality.values))
        for r in climbed.records
    )
    html = page.render_page(replace(climbed, records=records, confirmations=()), [])
    assert html.count("any: part of the point") == 2


def test_decoding_and_evaluating_are_part_of_sampling(climbed):
    first, *_ = climbed.records
    slow = replace(
        first,
        seconds={
            "finetune": 1.0,
            "sample": 2.0,
            "decode": 30.0,
            "evaluate": 400.0,
            "other": 5000.0,
        },
    )
    parts = ladder.spending(
        replace(climbed, records=(slow,), confirmations=(), warm_up={})
    ).set_index("part")["seconds"]
    assert parts.to_dict() == {"finetune": 1.0, "sample": 432.0, "other": 5000.0}
