"""How good a schedule will be: a Gaussian process over log scores, with the difficulty map as its
mean.

    log score = intercept(level, sampler) + sum_k w_k φ_k(point) + g(point) + noise

φ_k is the map's error at the sampler's calls near noise level k. The noise-level weights w are
unknown: near noise an error of the network may matter much or hardly, and the map can't say. Their
prior is one common positive value that varies smoothly over noise levels; trials make a posterior
of it. The residual g sees only the depth profile, so that it overrules a map that misleads. Two
levels, scores under the elastic weights ("low") and after the brief fine-tuning ("high"), share
the weights up to a ratio, while their residuals are correlated; both are learned
(coregionalisation).

Source: Rasmussen & Williams 2006, sections 2.7 (explicit basis functions) and 5.4 (marginal
likelihood); Bonilla et al. 2008 (coregionalisation). We differ in taking the hyperparameters where
marginal likelihood times prior is largest. No torch and no optuna in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve, solve_triangular
from scipy.optimize import minimize

from asesearch.point import Point
from asesearch.proposer.covariance import (
    BOUNDS,
    COMMON_SPREAD,
    LEVEL_SAMPLER_STD,
    LEVEL_STD,
    MEAN,
    PRIOR,
    SAMPLER_STD,
    SHAPE_LOG_PRIOR,
    SMOOTH,
    STEPS_SLOPE,
    STEPS_STD,
    Array,
    Blocks,
    Integers,
    cholesky,
    level_factors,
    scale_of,
    variances,
)
from asesearch.proposer.encoder import NUM_WEIGHTS, SHAPES, Encoder, Inputs
from asesearch.proposer.evidence import Evidence

Level = Literal["low", "high"]

# of a log score: unknown standard error
DEFAULT_ERROR = 0.05
POOL_WEIGHT = 4.0  # a reported variance (few repeats) counts one, the mean over all counts this
FIT_SIZE = 200  # observations that hyperparameters are fitted to; the posterior takes them all


@dataclass(frozen=True)
class Observation:
    """A score on record: its log, and the standard error of the log (standard error / score; nan
    = unknown)."""

    point: Point
    level: Level
    log_quality: float
    std_error: float


class QualityModel:
    """The posterior given observations; fitted when made, and the same for the same observations.

    Args:
        encoder: the difficulty map, ready to be asked.
        observations: scores on record, any number from none.

    Attributes:
        shape: of `SHAPES`, the one chosen.
        hyperparameters: by name, as in `PRIOR`, on their natural scale.
    """

    def __init__(self, encoder: Encoder, observations: Sequence[Observation] = ()) -> None:
        self.encoder = encoder
        self._inputs = encoder.encode([o.point for o in observations])
        self._low = np.array([o.level == "low" for o in observations], dtype=bool)
        values = np.array([o.log_quality for o in observations], dtype=np.float64)
        self._offset = {c: _offset(values, self._low, c) for c in (True, False)}
        self._y = values - np.where(self._low, self._offset[True], self._offset[False])
        self._noise = _noise(
            np.array([o.std_error for o in observations], dtype=np.float64), self._low
        )
        self._fit()

    # -- fitting ---------------------------------------------------------------------------------

    def _fit(self) -> None:
        """Maximise marginal likelihood times prior over hyperparameters, for each shape, then
        choose.

        The marginal likelihood is that of at most FIT_SIZE observations, spread over the record:
        it takes cubic time, a hundred times over, and seven hyperparameters need no more.
        """
        best = -np.inf
        index = 0
        self._theta = MEAN.copy()
        part = Evidence(self._inputs, self._y, self._noise, self._low, _spread(self._low))
        # the map says little, the depth profile much
        unlike = MEAN + np.array([-2.0, 0.5, 0.7, 0.0, 0.0, 0.0, 0.0])
        starts = [(0, MEAN), (0, unlike), (1, MEAN), (2, MEAN)] if len(self._y) > 2 else []
        for i, start in starts:
            found = minimize(
                part.objective,
                start,
                (i,),
                "L-BFGS-B",
                True,
                bounds=BOUNDS,
                tol=1e-6,
                options={"maxiter": 40},
            )
            value = SHAPE_LOG_PRIOR[i] - float(found.fun)
            if np.isfinite(value) and value > best:
                best = value
                self._theta = np.asarray(found.x)
                index = i
        self._index = index
        self.shape = SHAPES[index]
        natural = np.exp(self._theta)
        self.hyperparameters = dict(zip(PRIOR, natural.tolist(), strict=True))
        self.hyperparameters["correlation"] = float(natural[5] / (1 + natural[5]))
        cov = self._cov(Blocks(self._inputs, self._inputs, index), self._low, self._low)
        self._factor = cholesky(cov + np.diag(variances(self._noise, self._low, self._theta)))
        self._alpha = cho_solve((self._factor, True), self._y - self._mean(self._inputs, self._low))

    # -- asking ----------------------------------------------------------------------------------

    def _mean(self, inputs: Inputs, low: npt.NDArray[np.bool_]) -> Array:
        total = (
            np.exp(self._theta[0]) * inputs.features[self._index].sum(axis=1)
            + STEPS_SLOPE * inputs.log_calls
        )
        return np.asarray(scale_of(self._theta, low) * total)

    def _cov(
        self, blocks: Blocks, low: npt.NDArray[np.bool_], others: npt.NDArray[np.bool_]
    ) -> Array:
        parts = blocks.evaluate(self._theta)
        scales, alike = level_factors(self._theta, low, others)
        coupled = scales * (parts["weights"] + parts["sampler"] + alike * parts["residual"])
        return np.asarray(coupled + blocks.intercepts(low, others))

    def _whitened(self, inputs: Inputs, level: Level) -> tuple[Array, Array]:
        """(observations, n) cross covariance over the factor of the observations', and the (n,)
        posterior mean."""
        low = np.full(len(inputs), level == "low")
        cross = self._cov(Blocks(self._inputs, inputs, self._index), self._low, low)
        mean = self._mean(inputs, low) + cross.T @ self._alpha + self._offset[level == "low"]
        return np.asarray(
            solve_triangular(self._factor, cross, lower=True, check_finite=False)
        ), mean

    def posterior(
        self, points: Sequence[Point] | Inputs, level: Level = "high"
    ) -> tuple[Array, Array]:
        """Mean (n,) and covariance (n, n) of the log score, free of noise, at one level."""
        inputs = points if isinstance(points, Inputs) else self.encoder.encode(points)
        white, mean = self._whitened(inputs, level)
        low = np.full(len(inputs), level == "low")
        return mean, self._cov(Blocks(inputs, inputs, self._index), low, low) - white.T @ white

    def conditional_draws(
        self,
        rng: np.random.Generator,
        known: Inputs,
        candidates: Inputs,
        size: int,
        level: Level = "high",
    ) -> tuple[Array, Array, Array]:
        """Joint draws of the known points' log score at one level, and what each draw says of each
        candidate.

        Candidates need no joint draw: a candidate is compared with the known points, never with
        another candidate, so its Gaussian given the draw is all there is to know. That spares the
        covariance of candidates and their Monte Carlo noise.

        Returns:
            (size, known) draws; (size, candidates) means given the draw; (candidates,) standard
            deviations given any draw.
        """
        white, mean = self._whitened(candidates, level)
        known_mean, cov = self.posterior(known, level)
        a = np.full(len(known), level == "low")
        b = np.full(len(candidates), level == "low")
        cross = (
            self._cov(Blocks(known, candidates, self._index), a, b)
            - self._whitened(known, level)[0].T @ white
        )
        factor = cholesky(cov)
        # (known, candidates)
        gain = solve_triangular(factor, cross, lower=True, check_finite=False)
        normal = rng.standard_normal((size, len(known)))
        variance = (
            self._prior_variance(candidates, b) - (white**2).sum(axis=0) - (gain**2).sum(axis=0)
        )
        return (
            known_mean + normal @ factor.T,
            mean + normal @ gain,
            np.sqrt(np.maximum(variance, 1e-12)),
        )

    def _prior_variance(self, inputs: Inputs, low: npt.NDArray[np.bool_]) -> Array:
        """(n,) diagonal of the prior covariance."""
        phi = inputs.features[self._index]
        own = np.einsum("nk,kl,nl->n", phi, self._weight_cov(), phi)
        own += np.exp(2 * self._theta[2]) + STEPS_STD**2 * inputs.log_calls**2 + SAMPLER_STD**2
        return np.asarray(
            scale_of(self._theta, low) ** 2 * own + LEVEL_STD**2 + LEVEL_SAMPLER_STD**2
        )

    def _weight_cov(self) -> Array:
        return np.asarray(
            np.exp(2 * self._theta[0]) * (COMMON_SPREAD**2 + np.exp(2 * self._theta[1]) * SMOOTH)
        )

    def weights(self) -> tuple[Array, Array]:
        """Mean (NUM_WEIGHTS,) and covariance of the high level's noise-level weights; not
        clipped."""
        prior = self._weight_cov()
        # (weights, observations)
        cross = prior @ self._inputs.features[self._index].T * scale_of(self._theta, self._low)
        white = solve_triangular(self._factor, cross.T, lower=True, check_finite=False)
        return np.exp(self._theta[0]) + cross @ self._alpha, prior - white.T @ white

    def draw_weights(self, rng: np.random.Generator, size: int) -> Array:
        """(size, NUM_WEIGHTS) draws of the noise-level weights, negative ones set to zero."""
        mean, cov = self.weights()
        return np.asarray(
            np.maximum(mean + rng.standard_normal((size, NUM_WEIGHTS)) @ cholesky(cov).T, 0.0)
        )


def _spread(low: npt.NDArray[np.bool_]) -> Integers:
    """At most FIT_SIZE indices, evenly over the record: half of each level, or more where one has
    few."""
    levels = [np.flatnonzero(low), np.flatnonzero(~low)]
    half = FIT_SIZE // 2
    sizes = [
        min(len(own), max(half, FIT_SIZE - len(other))) for own, other in (levels, levels[::-1])
    ]
    parts = [
        own[np.linspace(0, len(own) - 1, size).round().astype(np.int64)]
        for own, size in zip(levels, sizes, strict=True)
    ]
    return np.sort(np.concatenate(parts))


def _offset(values: Array, low: npt.NDArray[np.bool_], level: bool) -> float:
    """Mean score of a level, of the other where it has none, else zero."""
    own = values[low == level]
    return float(own.mean()) if len(own) else float(values.mean()) if len(values) else 0.0


def _noise(std_errors: Array, low: npt.NDArray[np.bool_]) -> Array:
    """Variances, each drawn to the mean of its level: a standard error from two repeats is off by a
    factor easily."""
    out = np.empty_like(std_errors)
    for level in (True, False):
        own = std_errors[low == level] ** 2
        known = own[np.isfinite(own)]
        pooled = float(known.mean()) if len(known) else DEFAULT_ERROR**2
        out[low == level] = (np.where(np.isfinite(own), own, pooled) + POOL_WEIGHT * pooled) / (
            1 + POOL_WEIGHT
        )
    return out
