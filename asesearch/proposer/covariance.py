"""The quality model's prior: its hyperparameters, and the covariance of scores that they give."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds

from asesearch.proposer.encoder import NUM_BINS, NUM_WEIGHTS, Inputs

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
SHAPE_LOG_PRIOR = (0.0, 0.0, -2.0)
#: Hyperparameters, all on log scale (correlation: logit): prior mean and standard deviation.
#: weight: common noise-level weight, in log score per typical map error; spread: of the weights
#: around it, relative;
#: residual: standard deviation of g; length: its length in root mean square depth fraction; ratio:
#: low over high effect;
#: correlation: of the two levels' residuals (within one budget, ranks agree by 0.3 to 0.5:
#: benchmarks/low_fidelity.py);
#: training: standard deviation of the high-fidelity score from fine-tuning alone.
PRIOR = {
    "weight": (0.0, 1.0),
    "spread": (np.log(0.7), 0.7),
    "residual": (np.log(0.25), 0.7),
    "length": (np.log(0.4), 0.5),
    "ratio": (0.0, 0.4),
    "correlation": (0.5, 1.0),
    "training": (np.log(0.05), 0.7),
}
MEAN, STD = (np.array(column) for column in zip(*PRIOR.values(), strict=True))
BOUNDS = Bounds(MEAN - 4 * STD, MEAN + 4 * STD)
COMMON_SPREAD = 0.5  # of the common weight, relative
WEIGHT_LENGTH = 2.0  # knots over which weights vary
LEVEL_STD = 3.0  # intercepts: a level's, and a sampler's own at one level
LEVEL_SAMPLER_STD = 0.2
# score over log number of calls, and samplers around that line
STEPS_SLOPE = -0.5
STEPS_STD = 0.5
SAMPLER_STD = 0.4
SAMPLER_CORRELATION = 0.8  # of residuals under two samplers
LOW_NOISE = 0.02  # of a log score: what the low level's model can't say


class Blocks:
    """Covariance of two lists of points, in the parts that hyperparameters scale. All (n, m)."""

    def __init__(self, a: Inputs, b: Inputs, shape: int) -> None:
        phi = a.features[shape]
        psi = b.features[shape]
        self._common = COMMON_SPREAD**2 * np.outer(phi.sum(axis=1), psi.sum(axis=1))
        self._smooth = phi @ SMOOTH @ psi.T
        square = (
            (a.profile**2).sum(axis=1)[:, None]
            + (b.profile**2).sum(axis=1)
            - 2 * a.profile @ b.profile.T
        )
        # Matérn's root of 5 included
        self._distance = np.sqrt(np.maximum(square, 0.0) * 5 / NUM_BINS)
        self._same = (a.sampler[:, None] == b.sampler).astype(float)
        self._alike = SAMPLER_CORRELATION + (1 - SAMPLER_CORRELATION) * self._same
        self._steps = (
            STEPS_STD**2 * np.outer(a.log_calls, b.log_calls) + SAMPLER_STD**2 * self._same
        )

    def evaluate(self, theta: Array) -> dict[str, Array]:
        """Covariance from the weights, the residual (Matérn 5/2) and the sampler."""
        scaled = self._distance / np.exp(theta[3])
        residual = (
            np.exp(2 * theta[2]) * self._alike * (1 + scaled + scaled**2 / 3) * np.exp(-scaled)
        )
        weights = np.exp(2 * theta[0]) * (self._common + np.exp(2 * theta[1]) * self._smooth)
        return {"weights": weights, "residual": residual, "sampler": self._steps}

    def spread(self, theta: Array) -> Array:
        """Half the derivative by log spread."""
        return np.asarray(np.exp(2 * theta[0] + 2 * theta[1]) * self._smooth)

    def length(self, theta: Array) -> Array:
        """Derivative by log length."""
        scaled = self._distance / np.exp(theta[3])
        return np.asarray(
            np.exp(2 * theta[2]) * self._alike * scaled**2 / 3 * (1 + scaled) * np.exp(-scaled)
        )

    def intercepts(self, low: npt.NDArray[np.bool_], others: npt.NDArray[np.bool_]) -> Array:
        """Covariance of the level's and the level's sampler's intercepts."""
        same_level = low[:, None] == others[None, :]
        return np.asarray(same_level * (LEVEL_STD**2 + LEVEL_SAMPLER_STD**2 * self._same))


SMOOTH = np.exp(
    -0.5 * ((np.arange(NUM_WEIGHTS)[:, None] - np.arange(NUM_WEIGHTS)) / WEIGHT_LENGTH) ** 2
)


def variances(noise: Array, low: npt.NDArray[np.bool_], theta: Array) -> Array:
    """(n,) variances of the values: the score's own, and what its level adds."""
    return np.asarray(noise + np.where(low, LOW_NOISE**2, np.exp(2 * theta[6])))


def scale_of(theta: Array, low: npt.NDArray[np.bool_]) -> Array:
    return np.asarray(np.where(low, np.exp(theta[4]), 1.0))


def level_factors(
    theta: Array, low: npt.NDArray[np.bool_], others: npt.NDArray[np.bool_]
) -> tuple[Array, Array]:
    """Coregionalisation: the ratio of effects, and the residuals' correlation, 1 within a level."""
    correlation = 1 / (1 + np.exp(-theta[5]))
    scales = scale_of(theta, low)[:, None] * scale_of(theta, others)
    return scales, np.where(low[:, None] == others, 1.0, correlation)


def cholesky(cov: Array) -> Array:
    """Lower Cholesky factor; where rounding leaves none, as little as needed is added to the
    diagonal."""
    size = max(float(np.diag(cov).mean()), 1e-12) if len(cov) else 1.0
    for exponent in range(-10, 1):
        try:
            return np.asarray(np.linalg.cholesky(cov + size * 10.0**exponent * np.eye(len(cov))))
        except np.linalg.LinAlgError:
            continue
    return np.diag(np.sqrt(np.maximum(np.diag(cov), 1e-12)))
