"""Points and samplers as values: equality is what they run, and what is written reads back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asesearch.errors import ConfigError, ScheduleError
from asesearch.point import Point
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule

ACCELERATED = [
    "",
    "cache-attn-0",
    "cache-mlp-0.05",
    "cache-block-1.5",
    "cache-attn-12",
    "cache-mlp-adjusted-0.2",
    "merge-0.5",
    "deediff-0.05",
]
SAMPLERS = st.builds(
    Sampler,
    st.sampled_from(["ddim", "ddpm", "dpm++2m", "dpm++2m-quadratic", "euler-maruyama"]),
    st.integers(1, 999_999),
    st.sampled_from(ACCELERATED),
)
DEPTHS = st.lists(st.integers(1, 6), min_size=1, max_size=8)


@given(SAMPLERS)
def test_a_sampler_reads_back(sampler):
    assert Sampler.from_string(str(sampler)) == sampler


NO_SAMPLERS = ["", "ddim", "ddim-0", "ddim-", "-5", "ddim-1.5", "DDIM-5", " ddim-5", "ddim-05"]


@pytest.mark.parametrize("text", [*NO_SAMPLERS, "ddim-1000000", "ddim-" + "9" * 5000])
def test_what_is_no_sampler_is_refused(text):
    with pytest.raises(ConfigError, match="SOLVER-STEPS"):
        Sampler.from_string(text)


@pytest.mark.parametrize(
    "name",
    ["cache-attn", "cache-attn-", "cache-attn-0.10", "cache-attn-.1", "cache-attn-1e-3"]
    + [
        "merge-0.50",
        "cache-adjusted-0.1",
        "cache-head-0.1",
        "cache-attn--1",
        "cache-attn-0.1-0.2",
        "cache-attn-100",
        "cache-attn-00",
        "guide",
        "guide-100",
        "guide-0100-700",
        "guide-100-0700",
        "guide-700-700",
        "guide-00-700",
        "guide-100-700.5",
        "guide-100-700-900",
        "guide--1-700",
    ],
)
def test_an_acceleration_has_one_spelling(name):
    with pytest.raises(ConfigError, match="acceleration|SOLVER-STEPS"):
        Sampler.from_string(f"ddim-50+{name}")
    with pytest.raises(ConfigError, match="acceleration"):
        Sampler("ddim", 50, name)


def test_the_plus_of_a_solver_is_no_acceleration():
    assert Sampler.from_string("dpm++2m-20") == Sampler("dpm++2m", 20)
    accelerated = Sampler.from_string("dpm++2m-20+cache-attn-0.1")
    assert accelerated == Sampler("dpm++2m", 20, "cache-attn-0.1")
    assert accelerated.plain == Sampler("dpm++2m", 20)


@pytest.mark.parametrize("how", [("ddim", 0), ("ddim", 2.0), ("ddim", True), ("", 5), ("a b", 5)])
def test_an_invalid_sampler_is_never_made(how):
    with pytest.raises(ConfigError, match="got"):
        Sampler(*how)


@given(DEPTHS, SAMPLERS)
def test_a_point_reads_back(depths, sampler):
    point = Point(ExitSchedule.uniform_intervals(depths, 6), sampler)
    again = [
        Point.from_string(str(point), 6),
        Point.from_json(point.to_json()),
        Point.from_dict(point.to_dict()),
    ]
    for one in again:
        assert one == point and one.schedule.exit_depths == point.schedule.exit_depths


@pytest.mark.thorough
@given(DEPTHS, DEPTHS, SAMPLERS, SAMPLERS)
def test_points_are_equal_exactly_if_they_run_the_same(one, other, a, b):
    first = Point(ExitSchedule.uniform_intervals(one, 6), a)
    second = Point(ExitSchedule.uniform_intervals(other, 6), b)
    times = range(1000)
    same = (first.schedule.exit_depth_at(times) == second.schedule.exit_depth_at(times)).all()
    assert (first == second) == (same and a == b) == (len({first, second}) == 1)
    assert (first.slug == second.slug) == (first == second)
    assert (first.weights_key == second.weights_key) == same


def test_cuts_between_equal_neighbours_do_not_count():
    fine = Point(ExitSchedule.uniform_intervals([6, 6, 3, 3], 6), Sampler("ddim", 5))
    coarse = Point(ExitSchedule.uniform_intervals([6, 3], 6), Sampler("ddim", 5))
    assert fine == coarse and hash(fine) == hash(coarse) and fine.key == coarse.key
    assert str(fine) == "6 6 3 3 under ddim-5"  # as it was written
    assert fine != "6 6 3 3 under ddim-5"


DATA = Point(ExitSchedule.uniform_intervals([6, 3], 6), Sampler("ddim", 5)).to_dict()


@pytest.mark.parametrize(
    "changed",
    [
        {"format": "asesearch.schedule"},
        {"version": 2},
        {"sampler": "ddim"},
        {"sampler": 5},
        {"schedule": None},
        {"more": 1},
    ],
)
def test_another_format_or_a_broken_value_is_refused(changed):
    with pytest.raises(ScheduleError, match="got"):
        Point.from_dict({**DATA, **changed})
    with pytest.raises(ScheduleError):
        Point.from_json(json.dumps({**DATA, **changed}))


@pytest.mark.parametrize("text", ["{", "[]", "null", "6 3 under ddim-5", "[" * 100_000])
def test_what_is_no_point_in_json_is_refused(text):
    with pytest.raises(ScheduleError, match="point"):
        Point.from_json(text)


def test_a_key_twice_is_refused():
    text = json.dumps(DATA)
    assert Point.from_json(text) == Point.from_dict(DATA)
    with pytest.raises(ScheduleError, match=r"must be JSON; got .*it has the key 'sampler' twice"):
        Point.from_json(text.replace('"sampler"', '"sampler": "ddim-9", "sampler"'))


def test_a_point_needs_its_sampler_in_words():
    with pytest.raises(ScheduleError, match="under"):
        Point.from_string("6 3", 6)
    with pytest.raises(ConfigError, match="SOLVER-STEPS"):
        Point.from_string("6 3 under ddim", 6)
