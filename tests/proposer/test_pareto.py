"""Fronts of cost against quality: every answer equals that of the dullest method that could give
it."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asesearch.proposer.pareto import (
    expected_hypervolume_improvement,
    optimal_schedules,
    probability_on_front,
)


def by_brute_force(errors, costs, noise_easy, least):
    """Least error of each budget of block calls, over all schedules."""
    best = {}
    for depths in itertools.product(range(least, errors.shape[1] + 1), repeat=len(costs)):
        if noise_easy and any(a < b for a, b in itertools.pairwise(depths)):
            continue
        budget = int(np.dot(depths, costs))
        error = sum(errors[i, d - 1] for i, d in enumerate(depths) if costs[i])
        best[budget] = min(error, best.get(budget, math.inf))
    front = []
    least_error = math.inf
    for budget in sorted(best):
        if best[budget] < least_error - 1e-12:
            least_error = best[budget]
            front.append((budget, least_error))
    return front


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31), st.booleans(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)
)
def test_dynamic_programme_is_exact(seed, noise_easy, intervals, depth, least):
    rng = np.random.default_rng(seed)
    least = min(least, depth)
    errors = rng.normal(size=(intervals, depth))
    costs = rng.integers(0, 4, intervals)
    if not costs.any():
        costs[rng.integers(intervals)] = 1
    found = optimal_schedules(errors, costs, noise_easy=noise_easy, min_exit_depth=least)
    assert all(least <= d <= depth for schedule in found for d in schedule)
    if noise_easy:
        assert all(a >= b for schedule in found for a, b in itertools.pairwise(schedule))
    scores = [
        (int(np.dot(s, costs)), sum(errors[i, d - 1] for i, d in enumerate(s) if costs[i]))
        for s in found
    ]
    expected = by_brute_force(errors, costs, noise_easy, least)
    assert [b for b, _ in scores] == [b for b, _ in expected]
    assert [e for _, e in scores] == pytest.approx([e for _, e in expected])


@pytest.mark.parametrize("noise_easy", [True, False])
def test_dynamic_programme_is_exact_where_paths_meet(noise_easy):
    """Large enough for many schedules of one budget to end at one depth, of which only the best may
    go on."""
    for seed in range(25):
        rng = np.random.default_rng(seed)
        errors = rng.normal(size=(5, 4))
        costs = rng.integers(1, 3, 5)
        found = optimal_schedules(errors, costs, noise_easy=noise_easy)
        scores = [
            (int(np.dot(s, costs)), sum(errors[i, d - 1] for i, d in enumerate(s))) for s in found
        ]
        expected = by_brute_force(errors, costs, noise_easy, 1)
        assert [b for b, _ in scores] == [b for b, _ in expected]
        assert [e for _, e in scores] == pytest.approx([e for _, e in expected])


def test_intervals_without_calls_follow_their_neighbour():
    errors = np.array([[9.0, 0.0], [3.0, 0.0], [9.0, 0.0], [1.0, 0.0], [9.0, 0.0]])
    found = optimal_schedules(errors, [0, 1, 0, 2, 0])
    assert found == [(1, 1, 1, 1, 1), (2, 2, 2, 1, 1), (2, 2, 2, 2, 2)]
    assert optimal_schedules(errors, [0] * 5) == [(1,) * 5]


def test_dit_under_250_steps_is_exact_where_errors_separate():
    # a block is worth twice as much near data
    errors = np.array([1.0, 0.5])[:, None] * np.arange(27, -1, -1.0)
    found = optimal_schedules(errors, [125, 125])
    assert (
        len(found) == 28 * 2 - 1
        and found[0] == (1, 1)
        and found[27] == (28, 1)
        and found[-1] == (28, 28)
    )


def area(costs, values, reference):
    """Dominated area, rectangle by rectangle."""
    total = 0.0
    best = reference[1]
    for cost, value in sorted(zip(costs, values, strict=True)):
        if cost < reference[0] and value < best:
            total += (reference[0] - cost) * (best - value)
            best = value
    return total


@pytest.mark.parametrize("known", [0, 1, 2, 7])
def test_improvement_is_the_difference_of_hypervolumes(known):
    rng = np.random.default_rng(known)
    costs = rng.uniform(0.2, 1.3, known).round(1)  # ties, and costs beyond the reference
    draws = rng.normal(0, 1, (3, known))
    reference = (1.1, 0.8)
    asked = rng.uniform(0.1, 1.3, 9).round(1)
    means = rng.normal(0, 1, (3, 9))
    found = expected_hypervolume_improvement(costs, draws, asked, means, np.zeros(9), reference)
    for j in range(9):
        each = [
            area([*costs, asked[j]], [*draw, mean[j]], reference) - area(costs, draw, reference)
            for draw, mean in zip(draws, means, strict=True)
        ]
        assert found[j] == pytest.approx(np.mean(each), abs=1e-7)


def test_expected_improvement_is_the_mean_over_the_candidates_spread():
    rng = np.random.default_rng(0)
    costs = np.array([0.3, 0.5, 0.9])
    draws = np.array([[0.6, 0.2, -0.3]])
    reference = (1.1, 0.8)
    normal = rng.standard_normal(40_000)
    for cost, mean, std in [(0.2, 0.5, 0.3), (0.5, 0.4, 0.5), (0.95, -0.5, 0.1)]:
        one = [np.array([cost]), np.array([[mean]]), np.array([std])]
        (found,) = expected_hypervolume_improvement(costs, draws, *one, reference)
        heights = np.array([0.8, 0.6, 0.2, -0.3])  # of the front, from each of these costs on
        widths = np.diff(np.maximum([-9, *costs, 1.1], cost))
        each = (widths * np.maximum(heights - (mean + std * normal)[:, None], 0)).sum(axis=1)
        assert found == pytest.approx(each.mean(), rel=0.03)


def test_a_dominated_and_certain_candidate_improves_nothing():
    found = expected_hypervolume_improvement(
        np.array([0.5]),
        np.array([[0.0]]),
        np.array([0.6]),
        np.array([[0.1]]),
        np.array([1e-6]),
        (1.1, 1.0),
    )
    assert found == pytest.approx([0.0], abs=1e-9)


def test_probability_on_front_counts_draws_that_no_known_point_beats():
    rng = np.random.default_rng(1)
    costs = np.array([0.3, 0.6, 0.6, 0.9])
    draws = rng.normal(0, 1, (50, 4))
    asked = np.array([0.2, 0.6, 1.0])
    means = rng.normal(-0.5, 1, (50, 3))
    found = probability_on_front(costs, draws, asked, means, np.zeros(3), limit=0.5)
    for j, cost in enumerate(asked):
        on = [m[j] < min([0.5, *draw[costs <= cost]]) for draw, m in zip(draws, means, strict=True)]
        assert found[j] == pytest.approx(np.mean(on))
    assert 0 < found[1] < 1
    spread = probability_on_front(costs[:1], draws[:1], asked[1:2], draws[:1, :1], np.ones(1))
    assert spread == pytest.approx([0.5])  # as good as the other in expectation
