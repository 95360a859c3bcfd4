"""The quality model: exact gradients, honest spread, what it learns from trials, and scores nobody
would wish for."""

import math
import time
from itertools import product

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from asesearch.point import Point
from asesearch.proposer import quality_model as module
from asesearch.proposer.covariance import MEAN, PRIOR, STD, cholesky
from asesearch.proposer.encoder import NUM_WEIGHTS, SHAPES, Encoder
from asesearch.proposer.evidence import Evidence
from asesearch.proposer.quality_model import Observation, QualityModel
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule

DEPTH = 12
CHAIN = 1000
CALLS = tuple(np.linspace(999, 0, 15).round().tolist())  # DDIM-15
A = Sampler("a", 15)
B = Sampler("b", 8)
CALLS_OF = {A: CALLS, B: CALLS[::2]}


class FakeMap:
    """A map by formula: errors fall with depth, and from data to noise; reversed or shuffled, it
    misleads."""

    def __init__(self, seed=0, depth=DEPTH, error=0.0, reverse=False, shuffle=False):
        rng = np.random.default_rng(seed)
        slope, power = rng.uniform(1, 3, 2)
        self.knots = np.linspace(0, CHAIN, 9)
        left_out = 1 - np.arange(1, depth + 1) / depth
        rows = [
            np.exp(-slope * t / CHAIN) * left_out ** (power * (1 + 0.5 * t / CHAIN))
            for t in self.knots
        ]
        self.table = 0.01 * np.stack(rows) * np.exp(error * rng.normal(size=(9, depth)))
        if reverse:
            self.table = self.table[::-1]
        if shuffle:
            self.table = rng.permutation(self.table.ravel()).reshape(9, depth)

    def error_at(self, timesteps):
        return np.stack(
            [np.interp(timesteps, self.knots, column) for column in self.table.T], axis=1
        )


class Truth:
    """Log Fréchet distance = weights times true errors, plus a smooth residual."""

    def __init__(self, seed=0, depth=DEPTH, residual=0.05, samplers=CALLS_OF):
        rng = np.random.default_rng([seed, 1])
        self.encoder = Encoder(FakeMap(seed, depth), CHAIN, samplers)
        shape = np.linspace(-1, 1, NUM_WEIGHTS)
        self.weights = np.exp(
            0.3 + 0.6 * (rng.normal() * shape + rng.normal() * np.cos(np.pi * (shape + 1) / 2))
        )
        self.waves = rng.normal(0, 1, (6, 10))
        self.phases = rng.uniform(0, 2 * math.pi, 6)
        self.residual = residual

    def __call__(self, point):
        inputs = self.encoder.encode([point])
        wave = np.sin(self.waves @ inputs.profile[0] + self.phases).sum()
        return float(2 + inputs.features[0, 0] @ self.weights + self.residual * wave)


def some_points(rng, count, sampler=A, depth=DEPTH, intervals=10):
    depths = np.sort(rng.integers(max(1, depth // 4), depth + 1, (count, intervals)), axis=1)[
        :, ::-1
    ]
    return [Point(ExitSchedule.uniform_intervals(row.tolist(), depth), sampler) for row in depths]


def observe(points, truth, rng, noise=0.02, level="high"):
    return [Observation(p, level, truth(p) + noise * rng.normal(), noise) for p in points]


def test_gradient_is_that_of_the_objective():
    rng = np.random.default_rng(0)
    truth = Truth()
    points = some_points(rng, 6) + some_points(rng, 6, B)
    observations = observe(points, truth, rng) + observe(points[3:], truth, rng, level="low")
    model = QualityModel(truth.encoder, observations)
    everything = np.arange(len(observations))
    parts = (model._inputs, model._y, model._noise, model._low)
    objective = Evidence(*parts, everything).objective
    for shape, _ in product(range(3), range(3)):
        theta = MEAN + rng.normal(size=len(PRIOR)) * STD
        _, gradient = objective(theta, shape)
        steps = 1e-5 * np.eye(len(PRIOR))
        differences = [
            (objective(theta + h, shape)[0] - objective(theta - h, shape)[0]) / 2e-5 for h in steps
        ]
        assert gradient == pytest.approx(differences, rel=1e-4, abs=1e-4)


def test_both_ways_to_encode_agree():
    rng = np.random.default_rng(0)
    encoder = Encoder(FakeMap(), CHAIN, CALLS_OF)
    points = some_points(rng, 5)
    bounds = points[0].schedule.boundaries
    many = encoder.encode_depths(np.array([p.schedule.exit_depths for p in points]), bounds, A)
    one_by_one = encoder.encode(points)
    for name in ("features", "profile", "log_calls", "sampler"):
        assert np.allclose(getattr(many, name), getattr(one_by_one, name))
    weights = rng.uniform(size=NUM_WEIGHTS)
    # the additive errors of the dynamic programme are the model's mean
    for i, shape in enumerate(SHAPES):
        table = encoder.interval_errors(weights, A, bounds, shape)
        sums = [sum(table[k, d - 1] for k, d in enumerate(p.schedule.exit_depths)) for p in points]
        assert sums == pytest.approx((many.features[i] @ weights).tolist())


def test_without_trials_the_map_ranks():
    model = QualityModel(Encoder(FakeMap(), CHAIN, CALLS_OF))
    full = ExitSchedule.full(DEPTH)
    half = ExitSchedule.uniform_intervals([6], DEPTH)
    mean, cov = model.posterior([Point(full, A), Point(half, A)])
    assert mean[0] < mean[1] and np.linalg.eigvalsh(cov).min() > 0
    easy = [12] * 5 + [6] * 5
    hard = [6] * 5 + [12] * 5
    mean, _ = model.posterior(
        [Point(ExitSchedule.uniform_intervals(d, DEPTH), A) for d in (easy, hard)]
    )
    assert mean[0] < mean[1]  # the map says that depth matters near data


@pytest.mark.parametrize("count", [4, 30])
def test_posterior_is_calibrated(count):
    scores = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        truth = Truth(seed)
        model = QualityModel(
            Encoder(FakeMap(seed, error=0.1), CHAIN, CALLS_OF),
            observe(some_points(rng, count), truth, rng),
        )
        asked = some_points(rng, 25)
        mean, cov = model.posterior(asked)
        scores += ((mean - [truth(p) for p in asked]) / np.sqrt(np.diag(cov))).tolist()
    inside = np.mean(np.abs(scores) < 1.645)
    assert 0.75 < inside <= 1.0  # 90 % intervals, over 6 truths


def test_predictions_beat_the_mean_of_the_trials():
    rng = np.random.default_rng(3)
    truth = Truth(3)
    seen = observe(some_points(rng, 15), truth, rng)
    asked = some_points(rng, 30)
    mean, _ = QualityModel(truth.encoder, seen).posterior(asked)
    target = np.array([truth(p) for p in asked])
    error = np.sqrt(np.mean((mean - target) ** 2))
    spread = np.std(target)
    assert error < 0.25 * spread


def test_weights_of_noise_levels_are_recovered():
    rng = np.random.default_rng(0)
    truth = Truth(0, residual=0.0)
    truth.weights = np.linspace(3.0, 0.5, NUM_WEIGHTS)
    depths = rng.integers(1, DEPTH + 1, (60, 10))  # free-form: every noise level for itself
    points = [Point(ExitSchedule.uniform_intervals(row.tolist(), DEPTH), A) for row in depths]
    model = QualityModel(truth.encoder, observe(points, truth, rng, noise=0.01))
    mean, cov = model.weights()
    assert model.shape == "log"
    assert np.all(np.abs(mean - truth.weights) < 4 * np.sqrt(np.diag(cov)) + 0.1)
    assert np.corrcoef(mean, truth.weights)[0, 1] > 0.9
    draws = model.draw_weights(rng, 2000)
    assert draws.min() >= 0 and draws.mean(axis=0) == pytest.approx(np.maximum(mean, 0), abs=0.2)


def test_low_fidelity_scores_help_the_high_level():
    alone = []
    helped = []
    spreads = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        truth = Truth(seed, residual=0.15)
        points = some_points(rng, 25)
        asked = some_points(rng, 20)
        high = observe(points[:5], truth, rng)
        low = [
            Observation(o.point, "low", 1 + 1.5 * o.log_quality, 0.03)
            for o in observe(points + asked, truth, rng)
        ]
        target = [truth(p) for p in asked]
        for scores, errors in ((high, alone), (high + low, helped)):
            mean, cov = QualityModel(truth.encoder, scores).posterior(asked)
            errors.append(np.sqrt(np.mean((mean - target) ** 2)))
            spreads.append(np.sqrt(np.diag(cov)).mean())
    assert np.mean(helped) < 0.7 * np.mean(alone)
    assert np.mean(spreads[1::2]) < np.mean(spreads[::2])


@pytest.mark.parametrize("how", ["reverse", "shuffle"])
def test_a_misleading_map_is_overruled(how):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        truth = Truth(seed)
        model = QualityModel(
            Encoder(FakeMap(seed, **{how: True}), CHAIN, CALLS_OF),
            observe(some_points(rng, 30), truth, rng),
        )
        asked = some_points(rng, 30)
        mean, _ = model.posterior(asked)
        target = np.array([truth(p) for p in asked])
        assert np.sqrt(np.mean((mean - target) ** 2)) < 0.5 * np.std(target)


def test_fewer_calls_are_dearer_in_quality_and_samplers_are_told_apart():
    rng = np.random.default_rng(0)
    truth = Truth()
    points = some_points(rng, 8)
    short = [Point(p.schedule, B) for p in points]
    model = QualityModel(truth.encoder, observe(points, truth, rng))
    assert np.all(model.posterior(short)[0] > model.posterior(points)[0])  # before any trial of it
    worse = [
        Observation(p, "high", truth(q) - 0.5, 0.02) for p, q in zip(short, points, strict=True)
    ]
    model = QualityModel(truth.encoder, observe(points, truth, rng) + worse)
    assert np.mean(model.posterior(short)[0] - model.posterior(points)[0]) == pytest.approx(
        -0.5, abs=0.1
    )


def test_conditional_draws_have_the_joint_posterior():
    rng = np.random.default_rng(0)
    truth = Truth()
    model = QualityModel(truth.encoder, observe(some_points(rng, 6), truth, rng))
    known = some_points(rng, 3)  # candidates are drawn apart, so one
    asked = some_points(rng, 1)
    mean, cov = model.posterior(known + asked)
    inputs = truth.encoder.encode(known), truth.encoder.encode(asked)
    draws, means, std = model.conditional_draws(rng, *inputs, 40_000)
    joint = np.column_stack((draws, means + std * rng.standard_normal((40_000, 1))))
    assert joint.mean(axis=0) == pytest.approx(mean, abs=4 * math.sqrt(cov.max() / 40_000))
    assert np.cov(joint.T) == pytest.approx(cov, abs=0.03 * cov.max())


def test_odd_figures_do_no_harm():
    rng = np.random.default_rng(0)
    truth = Truth()
    (point,) = some_points(rng, 1)
    same = [Observation(point, "high", 1.0, 0.0)] * 6 + [
        Observation(point, "high", 3.0, math.nan)
    ] * 6
    odd = [Observation(point, "high", 1e3, 1e3), Observation(point, "low", -1e3, 0.0)]
    for scores in ([], same, odd, odd[1:], [Observation(point, "high", 0.0, math.inf)]):
        model = QualityModel(truth.encoder, scores)
        mean, cov = model.posterior([point, point])
        assert np.isfinite(mean).all() and np.isfinite(cov).all() and np.diag(cov).min() > 0
        empty = truth.encoder.encode([])
        for drawn in model.conditional_draws(rng, empty, truth.encoder.encode([point]), 4):
            assert np.isfinite(drawn).all()
        assert model.posterior([])[0].shape == (0,)
    assert 1.0 < QualityModel(truth.encoder, same).posterior([point])[0][0] < 3.0


def test_a_map_without_errors_and_a_network_of_one_block():
    flat = FakeMap()
    flat.table = np.zeros((9, DEPTH))
    rng = np.random.default_rng(0)
    truth = Truth()
    points = some_points(rng, 12)
    mean, _ = QualityModel(Encoder(flat, CHAIN, CALLS_OF), observe(points, truth, rng)).posterior(
        points
    )
    assert np.corrcoef(mean, [truth(p) for p in points])[0, 1] > 0.9
    one = Point(ExitSchedule.full(1), A)
    model = QualityModel(
        Encoder(FakeMap(depth=1), CHAIN, CALLS_OF), [Observation(one, "high", 2.0, 0.1)]
    )
    assert model.posterior([one])[0] == pytest.approx([2.0], abs=0.1)


def test_cholesky_of_what_has_none():
    ones = np.ones((4, 4))
    assert cholesky(ones) @ cholesky(ones).T == pytest.approx(ones, abs=1e-4)
    assert (
        np.isfinite(cholesky(np.diag([1.0, -1e-3]))).all()
        and np.isfinite(cholesky(-np.eye(3))).all()
    )
    assert cholesky(np.zeros((0, 0))).shape == (0, 0)


def test_same_observations_same_model_in_any_order():
    rng = np.random.default_rng(0)
    truth = Truth()
    scores = observe(some_points(rng, 10), truth, rng)
    asked = some_points(rng, 3)
    first, again = (QualityModel(truth.encoder, scores).posterior(asked)[0] for _ in range(2))
    assert np.array_equal(first, again)
    assert QualityModel(truth.encoder, scores[::-1]).posterior(asked)[0] == pytest.approx(
        first, abs=1e-2
    )


# -- large studies -------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_large_study_is_fitted_to_a_part_and_believes_all_of_it(monkeypatch):
    """Hyperparameters of a part lie near those of all; the posterior takes every observation."""
    rng = np.random.default_rng(0)
    truth = Truth()
    points = some_points(rng, 260)
    observations = observe(points[:90], truth, rng)
    observations += observe(points, truth, rng, noise=0.05, level="low")
    quick = QualityModel(truth.encoder, observations)
    monkeypatch.setattr(module, "FIT_SIZE", 1000)
    thorough = QualityModel(truth.encoder, observations)
    for name in ("weight", "length", "ratio"):
        a = quick.hyperparameters[name]
        b = thorough.hyperparameters[name]
        assert a == pytest.approx(b, rel=0.25), name
    unseen = some_points(rng, 40)
    mean, cov = quick.posterior(unseen)
    other, _ = thorough.posterior(unseen)
    assert np.abs(mean - other).max() < 0.05
    errors = (mean - [truth(p) for p in unseen]) / np.sqrt(np.diag(cov))
    assert np.abs(errors).mean() < 1.5
    known, _ = quick.posterior(points[:90])  # also those that the fit left out
    assert np.abs(known - [truth(p) for p in points[:90]]).max() < 0.06


@pytest.mark.parametrize("counts", [(500, 500), (900, 12), (0, 700), (3, 0)])
def test_the_part_is_spread_over_levels_and_record(counts):
    low = np.array([True] * counts[0] + [False] * counts[1])
    chosen = module._spread(low)
    assert len(chosen) == len(set(chosen)) == min(sum(counts), module.FIT_SIZE)
    high = chosen[~low[chosen]]
    assert len(high) == min(counts[1], max(module.FIT_SIZE // 2, module.FIT_SIZE - counts[0]))
    if len(high) > 1:
        assert {high[0], high[-1]} == {counts[0], sum(counts) - 1}  # first and latest


@pytest.mark.thorough
def test_a_thousand_records_are_fitted_in_seconds():
    """Measured against the same fit of a fifth as many: cubic growth would make it 125 times."""

    def seconds(count):
        rng = np.random.default_rng(0)
        truth = Truth()
        points = some_points(rng, count)
        observations = observe(points[: count // 3], truth, rng)
        observations += observe(points, truth, rng, level="low")
        with threadpool_limits(1, user_api="blas"):
            begun = time.process_time()
            QualityModel(truth.encoder, observations)
            return time.process_time() - begun

    assert seconds(1000) < 12 * seconds(200)


def test_reported_errors_are_drawn_to_the_mean_of_their_level():
    """Variances of 0.01 and 0.09: a fifth their own, four fifths the mean, 0.05, which also stands
    in for unknown ones."""
    std_errors = np.array([0.1, 0.3, math.nan, 0.2])
    low = np.array([False, False, False, True])
    assert module._noise(std_errors, low) == pytest.approx([0.042, 0.058, 0.05, 0.04])
    # nothing known: 5 %
    assert module._noise(np.array([math.nan]), low[:1]) == pytest.approx([0.0025])


def test_each_level_is_centred_on_its_own_scores():
    values = np.array([1.0, 3.0, 10.0])
    low = np.array([True, True, False])
    assert (module._offset(values, low, True), module._offset(values, low, False)) == (
        2.0,
        10.0,
    )
    assert module._offset(values[:2], low[:2], False) == 2.0  # of the other where it has none
    assert module._offset(values[:0], low[:0], True) == 0.0
