"""Fronts of cost against quality, lower being better in both: optimal schedules, expected
improvement, who is on the front.

No torch and no optuna in here.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def optimal_schedules(
    errors: npt.ArrayLike, costs: npt.ArrayLike, *, noise_easy: bool = True, min_exit_depth: int = 1
) -> list[tuple[int, ...]]:
    """For every budget of block calls the schedule with the least total error; only non-dominated
    ones, fewest calls first.

    Dynamic programming from data to noise over (depth of the interval, block calls so far); exact,
    no budget is rounded. Time and memory grow with intervals · depth · (depth · calls).

    Args:
        errors: (intervals, depth) additive error of running d blocks in an interval, column d - 1;
            any finite numbers.
        costs: (intervals,) whole network calls in each interval. One without calls takes another's
            depth, see `stand_ins`: its error counts nothing.
        noise_easy: whether depths must never rise from data to noise.
        min_exit_depth: the fewest blocks.

    Returns:
        Exit depths, one per interval.
    """
    table = np.asarray(errors, dtype=np.float64)
    calls = np.asarray(costs, dtype=np.int64)
    called = np.flatnonzero(calls > 0)
    if not len(called):
        return [(min_exit_depth,) * len(calls)]
    depths = np.arange(min_exit_depth, table.shape[1] + 1)
    total, choices = _forward(
        table[called, min_exit_depth - 1 :], calls[called], depths, noise_easy
    )
    best = total.min(axis=0)  # by budget
    before = np.minimum.accumulate(np.concatenate(([np.inf], best[:-1])))
    budgets = np.flatnonzero(best < before)
    found = _backward(total, choices, budgets, calls[called], depths)
    return [tuple(row) for row in found[:, np.searchsorted(called, stand_ins(calls))].tolist()]


def stand_ins(calls: Integers) -> Integers:
    """(intervals,) calls -> the interval whose depth each takes: itself, or without calls the
    nearest that has some.

    Nearest towards data, towards noise if there is none. At least one interval must have calls.
    """
    called = np.flatnonzero(calls > 0)
    return called[np.maximum(np.searchsorted(called, np.arange(len(calls)), side="right") - 1, 0)]


def _forward(
    errors: Array, calls: Integers, depths: Integers, noise_easy: bool
) -> tuple[Array, list[Integers]]:
    """Least error (depth, budget) after the last interval, and per interval the (depth, budget) ->
    row of the one before."""
    budgets = int((calls * depths[-1]).sum()) + 1
    total = np.full((len(depths), budgets), np.inf)
    total[np.arange(len(depths)), calls[0] * depths] = errors[0]
    choices = []
    for error, count in zip(errors[1:], calls[1:], strict=True):
        # the least over all depths at least as deep: a running minimum from the deepest
        if noise_easy:
            least = total.copy()
            row = np.repeat(np.arange(len(depths))[:, None], budgets, axis=1)
            for d in range(len(depths) - 2, -1, -1):
                better = least[d + 1] < least[d]
                least[d, better] = least[d + 1, better]
                row[d, better] = row[d + 1, better]
        else:
            row = np.broadcast_to(total.argmin(axis=0), total.shape)
            least = np.broadcast_to(total.min(axis=0), total.shape)
        total = np.full_like(total, np.inf)
        for d, blocks in enumerate(count * depths):
            total[d, blocks:] = least[d, : budgets - blocks] + error[d]
        choices.append(row)
    return total, choices


def _backward(
    total: Array, choices: list[Integers], budgets: Integers, calls: Integers, depths: Integers
) -> Integers:
    """(budgets, intervals) depths that reach the least error at each budget."""
    row = total[:, budgets].argmin(axis=0)
    left = budgets.copy()
    out = [depths[row]]
    for choice, count in zip(reversed(choices), calls[:0:-1], strict=True):
        left = left - count * depths[row]
        row = choice[row, left]
        out.append(depths[row])
    return np.stack(out[::-1], axis=1)


def _staircase(costs: Array, draws: Array) -> tuple[Array, Array]:
    """Costs sorted (known,), and (size, known) the least draw up to each cost."""
    order = np.argsort(costs, kind="stable")
    return costs[order], np.minimum.accumulate(draws[:, order], axis=1)


def expected_hypervolume_improvement(
    known_costs: Array,
    known_draws: Array,
    costs: Array,
    means: Array,
    std: Array,
    reference: tuple[float, float],
) -> Array:
    """By how much each candidate alone is expected to enlarge the dominated area.

    Costs are exact. Per draw of the known points the front is a staircase F over cost, and a
    candidate of quality q adds the integral of max(0, F(x) - q) over x from its cost to the
    reference's. With q Gaussian given the draw, each stair has a closed expectation, so that only
    the known points are drawn, not the candidates.

    Args:
        known_costs: (known,) of evaluated and pending points.
        known_draws: (size, known) joint draws of their quality.
        costs: (candidates,).
        means: (size, candidates) of a candidate's quality given the draw.
        std: (candidates,) its standard deviation given the draw.
        reference: cost and quality that bound the area.

    Returns:
        (candidates,) improvement, at least 0.

    Source: Daulton et al. 2021 (noisy expected hypervolume improvement; pending points are drawn
    with the others, section 4), Emmerich et al. 2011 (closed form in two dimensions). We differ in
    that one objective is known.
    """
    sorted_costs, stairs = _staircase(known_costs, np.minimum(known_draws, reference[1]))
    out = np.zeros(len(costs))
    scale = np.maximum(std, 1e-9)
    for stair, mean in zip(stairs, means, strict=True):
        height = np.concatenate(([reference[1]], stair))
        start = np.concatenate(([-math.inf], sorted_costs))
        new = np.concatenate(([True], height[1:] < height[:-1]))
        height = height[new]
        start = np.minimum(start[new], reference[0])
        end = np.append(start[1:], reference[0])
        for low, high, level in zip(start, end, height, strict=True):
            at = np.flatnonzero((costs < high) & (mean < level + 5 * scale))
            z = (level - mean[at]) / scale[at]
            gain = scale[at] * (z * ndtr(z) + np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi))
            out[at] += (high - np.maximum(costs[at], low)) * np.maximum(gain, 0.0)
    return out / max(1, len(stairs))


def probability_on_front(
    known_costs: Array,
    known_draws: Array,
    costs: Array,
    means: Array,
    std: Array,
    limit: float = math.inf,
) -> Array:
    """Probability that no known point is at least as good as a candidate in both objectives;
    arguments as above.

    Args:
        limit: a quality that the candidate must also beat.

    Returns:
        (candidates,) in [0, 1].
    """
    sorted_costs, stairs = _staircase(known_costs, known_draws)
    # (size, 1 + known)
    stairs = np.minimum(np.column_stack((np.full(len(stairs), limit), stairs)), limit)
    beaten = stairs[:, np.searchsorted(sorted_costs, costs, side="right")]  # (size, candidates)
    return np.asarray(ndtr((beaten - means) / np.maximum(std, 1e-9)).mean(axis=0))
