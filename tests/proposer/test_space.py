"""The search space: every schedule it can hold has parameters, and every set of parameters is a
schedule in it."""

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asesearch.diffusion import Diffusion
from asesearch.errors import ScheduleError
from asesearch.point import Point
from asesearch.proposer.space import Space, has_short_names
from asesearch.sampler import Sampler
from asesearch.schedule import PUBLISHED, ExitSchedule

OWN = Sampler("ddim", 50)
OTHER = Sampler("unipc-quadratic", 10)


@given(st.data(), st.booleans(), st.integers(1, 12), st.integers(1, 28), st.booleans())
def test_round_trip(data, noise_easy, num_intervals, depth, several):
    low = data.draw(st.integers(1, depth))
    depths = data.draw(
        st.lists(st.integers(low, depth), min_size=num_intervals, max_size=num_intervals)
    )
    if noise_easy:
        depths.sort(reverse=True)
    samplers = (OWN, OTHER) if several else (OWN,)
    point = Point(
        ExitSchedule.uniform_intervals(depths, depth), data.draw(st.sampled_from(samplers))
    )
    space = Space(depth, samplers, 1000, num_intervals, noise_easy, low)
    params = space.encode(point)
    assert set(params) == set(space.distributions())
    again = space.decode(params)
    assert again == point and again.schedule == point.schedule
    assert all(
        dist._contains(dist.to_internal_repr(params[name]))
        for name, dist in space.distributions().items()
    )


@given(st.floats(0.1, 3.0), st.integers(1, 10), st.booleans(), st.data())
def test_round_trip_over_unequal_intervals(power, num_intervals, noise_easy, data):
    space = Space(12, (OWN,), 10_000, num_intervals, noise_easy, interval_power=power)
    depths = st.lists(st.integers(1, 12), min_size=num_intervals, max_size=num_intervals)
    point = Point(space.schedule(sorted(data.draw(depths), reverse=True)), OWN)
    assert space.decode(space.encode(point)) == point
    assert point.schedule.boundaries == space.boundaries


def test_every_call_of_a_quadratic_grid_can_have_a_depth_of_its_own():
    steps = Diffusion().timesteps(6, 2.0)

    def own_depths(power):
        edges = Space(18, (OWN,), interval_power=power).boundaries[1:-1]
        return len(set(np.searchsorted(edges, steps, side="right").tolist()))

    assert (own_depths(2.0), own_depths(1.0)) == (6, 5)  # 40 and 0 share one


def test_an_interval_without_a_timestep_is_refused():
    with pytest.raises(ScheduleError, match="leaves one without; lower it"):
        Space(4, (OWN,), 100, 20, interval_power=4.0)
    with pytest.raises(ScheduleError, match="intervals between 0, 10, 40"):
        published = ExitSchedule.from_string("D3-DiT", 12)
        Space(12, (OWN,), interval_power=2.0).encode(Point(published, OWN))


def test_a_schedule_over_equal_intervals_is_told_how_it_is_written_over_the_spaces_own():
    space = Space(3, (OWN,), 1000, 4, interval_power=2.0)
    with pytest.raises(ScheduleError) as error:
        space.encode(Point(ExitSchedule.from_string("3 2 1 1", 3), OWN))
    written = str(error.value).split('"')[1]
    assert written == "DEPTHS @ 0 62 250 562 1000"
    point = Point(ExitSchedule.from_string(written.replace("DEPTHS", "3 2 1 1"), 3), OWN)
    assert space.decode(space.encode(point)) == point


@given(st.integers(1, 28), st.integers(1, 12), st.integers(0, 2**31))
def test_every_proposal_is_noise_easy_and_in_range(depth, num_intervals, seed):
    space = Space(depth, (OWN,), 1000, num_intervals, True, max(1, depth // 3))
    study = optuna.create_study(
        directions=["minimize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=seed)
    )
    schedule = space.suggest(study.ask()).schedule
    assert schedule.is_noise_easy and len(schedule.exit_depths) == num_intervals
    assert max(1, depth // 3) <= min(schedule.exit_depths)


def test_random_proposals_cover_all_budgets():
    """Independent sorted depths would crowd around half of the blocks (their mean varies by 0.09
    only)."""
    space = Space(12, (OWN,))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    fracs = [space.suggest(study.ask()).schedule.block_frac() for _ in range(300)]
    for low in (0.1, 0.3, 0.5, 0.7):
        assert sum(low <= f < low + 0.2 for f in fracs) > 15


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedules_lie_in_the_default_space(name):
    point = Point(ExitSchedule.published(name, depth=12), OWN)
    space = Space(12, (OWN,))
    assert space.decode(space.encode(point)) == point


@pytest.mark.parametrize(
    ("space", "schedule", "rule"),
    [
        (Space(12, (OWN,)), ExitSchedule.full(6), "12 blocks"),
        (Space(12, (OWN,)), ExitSchedule.from_string("12 11 10", depth=12), "10 equal intervals"),
        (Space(12, (OWN,)), ExitSchedule.uniform_intervals([3] * 5 + [4] * 5, 12), "noise-easy"),
        (
            Space(12, (OWN,), min_exit_depth=4),
            ExitSchedule.uniform_intervals([3], 12),
            "at least 4",
        ),
    ],
)
def test_schedules_outside_are_refused(space, schedule, rule):
    with pytest.raises(ScheduleError, match=rule):
        space.encode(Point(schedule, OWN))


def test_an_empty_space_is_refused():
    with pytest.raises(ScheduleError, match="min_exit_depth must lie in 1…4; got 5; lower it"):
        Space(4, (OWN,), min_exit_depth=5)
    with pytest.raises(ScheduleError, match="min_exit_depth must lie in 1…4; got 0; raise it"):
        Space(4, (OWN,), min_exit_depth=0)
    with pytest.raises(ScheduleError, match="at least one sampler"):
        Space(4, ())


def test_a_sampler_that_does_not_compete_is_refused():
    with pytest.raises(ScheduleError, match="samplers are ddim-50; got unipc-quadratic-10"):
        Space(4, (OWN,)).encode(Point(ExitSchedule.full(4), OTHER))


def params_of(data, noise, *between):
    shares = {f"between {i + 1}": share for i, share in enumerate(between)}
    return {"depth at data": data, "depth at noise": noise} | shares


def test_depths_between_the_ends_are_rounded_to_the_nearest():
    # 1 + 3.6, 1 + 2.4, 1 + 0.8 blocks
    params = params_of(5, 1, 0.9, 0.6, 0.2)
    assert Space(6, (OWN,), num_intervals=5).decode(params).schedule.exit_depths == (5, 5, 3, 2, 1)
    # the ends and the shares in any order
    swapped = params_of(1, 5, 0.2, 0.9, 0.6)
    assert Space(6, (OWN,), num_intervals=5).decode(swapped).schedule.exit_depths == (5, 5, 3, 2, 1)


def test_names_can_be_read_and_studies_of_earlier_releases_keep_theirs():
    free = Space(6, (OWN, OTHER), num_intervals=3, noise_easy=False)
    names = ["depth t 0-333", "depth t 333-666", "depth t 666-1000", "sampler"]
    assert list(free.distributions()) == names
    old = Space(6, (OWN,), num_intervals=4, short_names=True)
    assert list(old.distributions()) == ["high", "low", "u1", "u2"]
    assert list(Space(6, (OWN,), 1000, 2, False, short_names=True).distributions()) == ["d0", "d1"]
    new = Space(6, (OWN,), num_intervals=4)
    for space in (old, new):
        study = optuna.create_study(directions=["minimize"] * 2)
        assert not has_short_names(study)
        point = space.suggest(study.ask())
        assert has_short_names(study) is space.short_names
        assert space.decode(space.encode(point)) == point
        study = optuna.create_study(directions=["minimize"] * 2)
        study.enqueue_trial(space.encode(point))
        assert has_short_names(study) is space.short_names
