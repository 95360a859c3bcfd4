"""ExitSchedule: rules, queries, text forms."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asesearch.errors import ScheduleError
from asesearch.schedule import PUBLISHED, ElasticDepths, ExitSchedule


@st.composite
def schedules(draw):
    depth = draw(st.integers(1, 30))
    chain = draw(st.integers(10, 1000))
    inner = draw(st.lists(st.integers(1, chain - 1), max_size=8, unique=True))
    bounds = (0, *sorted(inner), chain)
    depths = draw(st.lists(st.integers(1, depth), min_size=len(bounds) - 1, max_size=len(bounds) - 1))
    return ExitSchedule(depth, chain, bounds, tuple(depths))


@given(schedules())
def test_json_round_trip_and_hash(schedule):
    again = ExitSchedule.from_json(schedule.to_json())
    assert again == schedule and hash(again) == hash(schedule)


@given(schedules(), st.data())
def test_exit_depth_at_agrees_with_the_definition(schedule, data):
    t = data.draw(st.integers(0, schedule.num_train_timesteps - 1))
    expected = next(d for d, end in zip(schedule.exit_depths, schedule.boundaries[1:], strict=True) if t < end)
    assert schedule.exit_depth_at(t) == expected
    assert schedule.exit_depth_at(np.full((2, 3), t)).tolist() == [[expected] * 3] * 2


@given(schedules())
def test_merged_is_the_same_function_and_canonical(schedule):
    merged, t = schedule.merged(), np.arange(schedule.num_train_timesteps)
    assert (merged.exit_depth_at(t) == schedule.exit_depth_at(t)).all()
    assert merged.merged() == merged
    assert all(a != b for a, b in zip(merged.exit_depths, merged.exit_depths[1:], strict=False))


@given(schedules(), st.integers(1, 40))
def test_rescaling_keeps_order_and_range(schedule, depth):
    rescaled = schedule.rescaled(depth)
    assert rescaled.depth == depth and min(rescaled.exit_depths) >= 1 and max(rescaled.exit_depths) <= depth
    assert not schedule.is_noise_easy or rescaled.is_noise_easy
    assert schedule.rescaled(schedule.depth) == schedule


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedules_are_noise_easy_and_of_ten_intervals(name):
    schedule = ExitSchedule.published(name)
    assert schedule.is_noise_easy and len(schedule.exit_depths) == 10 and schedule.num_train_timesteps == 1000
    assert ExitSchedule.from_string(name) == schedule


@pytest.mark.parametrize(
    ("name", "frac"), [("D2-DiT", 220 / 280), ("D3-DiT", 200 / 280), ("D4-DiT", 182 / 280), ("D7-DiT", 170 / 280)]
)
def test_block_frac_of_the_paper_schedules(name, frac):
    """The bound behind the paper's speed-ups: D3 1.40x, D4 1.54x."""
    schedule = ExitSchedule.published(name)
    assert schedule.block_frac() == pytest.approx(frac, abs=1e-12)
    assert schedule.block_calls([0, 999]) == schedule.exit_depths[0] + schedule.exit_depths[-1]


def test_d3_rescaled_to_twelve_blocks():
    assert str(ExitSchedule.published("D3-DiT", depth=12)) == "12 12 10 10 9 9 7 7 5 5"


def test_full_is_the_whole_network():
    full = ExitSchedule.full(12)
    assert full.is_full and full.is_noise_easy and full.block_frac() == 1.0
    assert not ExitSchedule.from_string("12 11").is_full


def test_data_easy_is_not_noise_easy():
    assert not ExitSchedule.from_string("4 8 12").is_noise_easy


def test_string_forms():
    schedule = ExitSchedule.from_string("12, 9 6 3", depth=28)
    assert schedule.exit_depths == (12, 9, 6, 3) and schedule.depth == 28 and schedule.boundaries == (0, 250, 500, 750, 1000)
    assert str(schedule) == "12 9 6 3"
    assert str(ExitSchedule(4, 10, (0, 3, 10), (4, 2))) == "4 2 @ 0 3 10"


BAD = [
    (lambda: ExitSchedule(4, 1000, (0, 1000), (5,)), "must lie in 1…4"),
    (lambda: ExitSchedule(4, 1000, (0, 1000), (0,)), "must lie in 1…4"),
    (lambda: ExitSchedule(4, 1000, (0, 1000), (4, 4)), "one entry more"),
    (lambda: ExitSchedule(4, 1000, (0, 500, 500, 1000), (4, 3, 2)), "strictly increase"),
    (lambda: ExitSchedule(4, 1000, (0, 999), (4,)), "from 0 to num_train_timesteps = 1000"),
    (lambda: ExitSchedule(4, 1000, (1, 1000), (4,)), "from 0"),
    (lambda: ExitSchedule(4, 1000, (0, 1000), ()), "must not be empty"),
    (lambda: ExitSchedule(4, 1000, (0, 1000), (3.5,)), "whole numbers"),
    (lambda: ExitSchedule(4, 1000, (0, 1000), (True,)), "whole numbers"),
    (lambda: ExitSchedule(0, 1000, (0, 1000), (1,)), "depth must be at least 1"),
    (lambda: ExitSchedule.from_string("D9-DiT"), "published names are D2-DiT"),
    (lambda: ExitSchedule.from_string(""), "whole numbers"),
    (lambda: ExitSchedule.from_string("12 -3"), "whole numbers"),
    (lambda: ExitSchedule.from_string("28 28", depth=12), "rescale the schedule"),
    (lambda: ExitSchedule.published("D9"), "unknown published schedule"),
    (lambda: ExitSchedule.full(4).exit_depth_at(1000), "timesteps must lie in [0, 1000)"),
    (lambda: ExitSchedule.full(4).exit_depth_at(float("nan")), "timesteps must lie in"),
    (lambda: ExitSchedule.full(4).block_frac([]), "must not be empty"),
    (lambda: ExitSchedule.from_json("{"), "must be JSON"),
    (lambda: ExitSchedule.from_json("[]"), "JSON object"),
    (lambda: ExitSchedule.from_json('{"format": "x"}'), "format must be"),
]


@pytest.mark.parametrize(("make", "rule"), BAD, ids=range(len(BAD)))
def test_broken_rules_are_named(make, rule):
    with pytest.raises(ScheduleError) as caught:
        make()
    assert rule in str(caught.value) and "got" in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"extra": 1}, {"depth": None}, {"exit_depths": "4"}, {"boundaries": [0, "x"]}, {"depth": 3}]
)
def test_a_changed_file_is_refused(change):
    data = {**ExitSchedule.full(4).to_dict(), **change}
    with pytest.raises(ScheduleError):
        ExitSchedule.from_json(json.dumps(data))


def test_is_frozen():
    with pytest.raises(AttributeError):
        ExitSchedule.full(4).depth = 3


@pytest.mark.parametrize("law", ["uniform", "noise-easy"])
def test_elastic_depths_cover_their_range_by_their_law(law):
    depths = ElasticDepths(12, 1000, 3, law, full_frac=0.25)
    u = (np.arange(4000) + 0.5) / 4000
    near_data, near_noise = depths.draw(np.full(4000, 10), u), depths.draw(np.full(4000, 990), u)
    assert set(near_data) == set(near_noise) == set(range(3, 13))
    for drawn in (near_data, near_noise):
        assert (drawn == 12).mean() == pytest.approx(0.25 + 0.75 * (drawn[u < 0.75] == 12).mean(), abs=1e-3)
    if law == "uniform":
        counts = np.bincount(near_noise[u < 0.75], minlength=13)[3:]
        assert np.array_equal(near_data, near_noise) and counts.max() - counts.min() <= 1
    else:
        assert near_data.mean() > near_noise.mean() + 2


def test_elastic_depths_know_their_limits():
    with pytest.raises(ScheduleError, match="min_exit_depth must lie in 1…12"):
        ElasticDepths(12, 1000, 13)
    assert ElasticDepths(12, 1000, full_frac=1.0).is_full and not ElasticDepths(12, 1000).is_full
    assert (ElasticDepths(12, 1000, full_frac=1.0).draw([0, 999], [0.0, 0.999]) == 12).all()
