"""A study in the middle of its confirmation: nothing is claimed of what is not confirmed yet."""

import html
import json
from dataclasses import replace

import pytest

from asesearch.report import tables
from asesearch.report.comparison import compare_results
from asesearch.report.explorer import embedded
from asesearch.report.page import render_page
from asesearch.report.wording import headline
from asesearch.study import answers
from asesearch.study.picking import pick_and_tell, scored_points, told_unconfirmed
from asesearch.study.records import Confirmation, left_out
from tests.report.conftest import build


@pytest.fixture(scope="module")
def whole():
    results = build(16, failed=())
    confirm = {**results.config["confirm"], "max_points": 50}
    return replace(results, config={**results.config, "confirm": confirm})


def single(quality):
    """A score of one repeat."""
    protocol = replace(quality.protocol, seeds=quality.protocol.seeds[:1])
    return replace(quality, protocol=protocol, values=quality.values[:1])


def begun(results, count):
    """The study with so many of its confirmations."""
    return replace(results, confirmations=results.confirmations[:count])


def test_nothing_is_to_be_confirmed_before_it_begins_and_after_it_is_whole(whole):
    assert not whole.unconfirmed and not begun(whole, 0).unconfirmed
    assert whole.stands_confirmed and not begun(whole, 0).stands_confirmed
    assert told_unconfirmed(whole) == told_unconfirmed(begun(whole, 0)) == ""
    assert "so far" not in " ".join(headline(whole).details)


def test_a_front_confirmed_in_part_says_so_and_denies_nothing(whole):
    worse = tuple(  # than the full network, so that no schedule is worth its time so far
        c if i == 0 else replace(c, quality=replace(c.quality, values=(90.0, 91.0, 92.0)))
        for i, c in enumerate(whole.confirmations)
    )
    part = begun(replace(whole, confirmations=worse), 3)
    left = [r.number for r in part.unconfirmed]
    assert sorted([*left, *(c.number for c in part.confirmations)]) == sorted(
        c.number for c in whole.confirmations
    )
    found = headline(part)
    assert found.answer.startswith("Of what is confirmed so far no schedule takes at most 0.75×")
    names = ", ".join(f"trial {n}" for n in left)
    said = f"so far 3 of {len(whole.confirmations)} points; not yet {names}."
    assert any(said in d for d in found.details)
    assert headline(replace(whole, confirmations=worse)).answer.startswith("No schedule takes")
    assert {p.record.number for p in scored_points(part)} == {c.number for c in part.confirmations}
    told = f"still to be confirmed by the same `asesearch search`, {names}, and not picked from"
    assert pick_and_tell(part, "best-quality")[1] == [told]
    assert said in render_page(part, [])


def test_the_full_network_alone_is_no_confirmed_front(whole):
    part = begun(whole, 1)
    assert tables.kind_of(part) == "search"
    found = headline(part)
    assert found.chosen is not None and found.chosen != part.full.number
    assert any("only the full network is confirmed yet" in d for d in found.details)
    assert not any(a.point.confirmed for a in answers(part))
    shown = json.loads(embedded(part, found.chosen))
    assert list(shown["kinds"]) == ["search"] and shown["chosen"] == found.chosen
    once = replace(
        part,
        records=tuple(replace(r, quality=r.quality and single(r.quality)) for r in part.records),
    )
    assert "Here it can't be decided" in html.unescape(render_page(once, []))
    assert told_unconfirmed(part).endswith(": picked by the search's scores")


def test_a_search_that_goes_on_says_how_many_trials_it_asks_for(whole):
    def counts(**search):
        config = {**whole.config, "search": {**whole.config["search"], **search}}
        return headline(replace(whole, config=config)).details[-1]

    assert len(whole.records) == 16
    assert counts(num_trials=17).endswith("0 failed; the study asks for 17 trials.")
    assert counts(num_trials=16).endswith("16 of 16 trials gave a score; 0 failed.")
    assert counts(num_trials=17, budget="2h").endswith("0 failed.")


def test_a_trial_that_joins_the_front_is_to_be_confirmed(whole):
    first = whole.front()[0]
    new = replace(first, number=99, time_frac=0.5 * first.time_frac, origin="tpe")
    assert [r.number for r in replace(whole, records=(*whole.records, new)).unconfirmed] == [99]


def test_a_point_that_cannot_be_confirmed_is_not_waited_for(whole):
    part = begun(whole, len(whole.confirmations) - 1)
    (missing,) = part.unconfirmed
    failed = replace(part, unconfirmable={missing.number: "its images are not finite"})
    assert not failed.unconfirmed
    said = f"Trial {missing.number} could not be confirmed: its images are not finite."
    assert any(said in d for d in headline(failed).details)


def test_a_comparison_is_of_search_scores_while_a_front_is_confirmed_in_part(whole):
    other = replace(whole, name="other")
    assert compare_results([whole, other]).kind == "confirmed"
    found = compare_results([whole, begun(other, 2)])
    assert found.kind == "search"
    assert found.studies["points"].nunique() == 1  # none of the other's are left out


def test_no_multiple_of_a_score_that_may_be_zero_leaves_a_point_out(whole):
    def near(value, metric):
        protocol = replace(whole.full.quality.protocol, metric=metric)
        return replace(
            whole.full.quality, protocol=protocol, values=(value - 1e-6, value, value + 1e-6)
        )

    full = replace(whole.full, quality=near(1e-5, "kid"))
    points = tuple(
        replace(r, quality=near(value, "kid"))
        for r, value in zip(whole.front()[:2], (1e-5, 9e-5), strict=True)
    )
    assert left_out(points, full) == []
    far = [
        replace(r, quality=replace(r.quality, protocol=near(1.0, "frechet").protocol))
        for r in points
    ]
    one = replace(full, quality=near(1e-5, "frechet"))
    assert [r.number for r in left_out(tuple(far), one)] == [points[1].number]


def test_a_confirmed_point_is_not_called_left_out(whole):
    """It was confirmed as nothing better was on the front."""
    front = whole.front()
    far = replace(front[0], quality=replace(front[0].quality, values=(900.0, 901.0, 902.0)))
    records = tuple(far if r.number == far.number else r for r in whole.records)
    results = replace(whole, records=records)
    assert far.number in {c.number for c in results.confirmations}
    assert far in results.front()
    assert f"score: trial {far.number}" not in " ".join(headline(results).details)
    others = tuple(c for c in results.confirmations if c.number != far.number)
    told = headline(replace(results, confirmations=others)).details
    assert any(f"score: trial {far.number}" in d for d in told)


def test_deleted_weights_are_not_offered(whole):
    """With keep_weights = "front" those of a point that left it are gone."""
    search = {**whole.config["search"], "keep_weights": "front"}
    results = replace(whole, config={**whole.config, "search": search}, confirmations=())
    chosen = headline(results).chosen
    assert results.has_weights(tables.by_number(results)[chosen])
    front = {r.number for r in results.front()}
    assert chosen in front
    gone = next(r for r in results.complete if r.number not in front and r.origin != "full")
    assert not results.has_weights(gone)
    one = Confirmation(gone.number, whole.confirmations[0].quality, 0.01, 0.001)
    kept = (*whole.confirmations, one)
    assert headline(replace(results, confirmations=kept)).chosen != gone.number


def test_whose_weights_are_kept_is_worked_out_once(whole, monkeypatch):
    search = {**whole.config["search"], "keep_weights": "front"}
    results = replace(whole, config={**whole.config, "search": search})
    fronts = []
    front = type(results).front
    monkeypatch.setattr(type(results), "front", lambda self: fronts.append(1) or front(self))
    kept = {r.number for r in results.complete if results.has_weights(r)}
    shared = {r.point.weights_key for r in (*front(results), results.full)}
    assert kept == {r.number for r in results.complete if r.point.weights_key in shared}
    assert len(fronts) == 1 and len(kept) < len(results.complete)


def test_a_schedule_whose_weights_are_deleted_is_not_denied(whole):
    search = {**whole.config["search"], "keep_weights": "front"}
    results = replace(whole, config={**whole.config, "search": search, "confirm": {}})
    front = {r.number for r in results.front()}
    kept = next(r for r in results.front() if r.origin != "full")
    gone = next(r for r in results.complete if r.number not in front and r.origin != "full")
    full = whole.confirmations[0]
    far = replace(full.quality, values=tuple(v + 5 for v in full.quality.values))
    slow = replace(kept, block_frac=None)
    records = tuple(
        {kept.number: slow, gone.number: replace(gone, block_frac=0.5)}.get(r.number, r)
        for r in results.records
    )
    confirmed = (
        full,
        Confirmation(kept.number, far, 0.6, 0.001),
        Confirmation(gone.number, full.quality, 0.55, 0.001),
    )
    found = headline(replace(results, records=records, confirmations=confirmed))
    assert found.chosen == kept.number and not found.success
    assert "o schedule whose weights are kept takes at most 0.75× the time" in found.answer
    name = tables.label(gone, results).replace("#", "trial ")
    assert f"; {name} does, but its weights are deleted; the closest was" in found.answer
    denied = headline(replace(results, records=records, confirmations=confirmed[:2])).answer
    assert "weights" not in denied  # negative control
