"""The marginal likelihood of the quality model's hyperparameters, with its gradient."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve

from asesearch.proposer.covariance import (
    MEAN,
    STD,
    STEPS_SLOPE,
    Array,
    Blocks,
    Integers,
    cholesky,
    level_factors,
    scale_of,
    variances,
)
from asesearch.proposer.encoder import SHAPES, Inputs


class Evidence:
    """Marginal likelihood times prior of some of the observations, as hyperparameters vary.

    Args:
        inputs, y, noise, low: of all observations; `y` and `noise` (n,) are values and variances.
        chosen: indices of those that count.
    """

    def __init__(
        self,
        inputs: Inputs,
        y: Array,
        noise: Array,
        low: npt.NDArray[np.bool_],
        chosen: Integers,
    ) -> None:
        self._inputs = inputs.take(chosen)
        self._y = y[chosen]
        self._noise = noise[chosen]
        self._low = low[chosen]
        self._blocks = [Blocks(self._inputs, self._inputs, i) for i in range(len(SHAPES))]

    def objective(self, theta: Array, shape: int) -> tuple[float, Array]:
        """Minus log (marginal likelihood times prior), and its gradient.

        Source: Rasmussen & Williams 2006, equations 5.8 and 5.9, with the mean's dependence added.
        """
        blocks = self._blocks[shape]
        low = self._low
        parts = blocks.evaluate(theta)
        scales, alike = level_factors(theta, low, low)
        coupled = scales * (parts["weights"] + parts["sampler"] + alike * parts["residual"])
        cov = coupled + blocks.intercepts(low, low)
        factor = cholesky(cov + np.diag(variances(self._noise, low, theta)))
        total = self._inputs.features[shape].sum(axis=1)
        slope = scale_of(theta, low) * np.exp(theta[0]) * total  # d mean / d log weight
        steps = scale_of(theta, low) * STEPS_SLOPE * self._inputs.log_calls
        rest = self._y - slope - steps
        alpha = cho_solve((factor, True), rest)
        inverse = cho_solve((factor, True), np.eye(len(rest)))
        outer = np.outer(alpha, alpha) - inverse  # 2 d likelihood / d cov
        inner = scales * outer
        own = scales * alike * outer
        either = low[:, None].astype(float) + low[None, :]
        odds = 1 / (1 + np.exp(theta[5]))  # 1 - correlation
        mixed = np.where(low[:, None] != low[None, :], odds, 0.0)
        gradient = np.array(
            [
                (inner * parts["weights"]).sum() + alpha @ slope,
                (inner * blocks.spread(theta)).sum(),
                (own * parts["residual"]).sum(),
                0.5 * (own * blocks.length(theta)).sum(),
                0.5 * (outer * coupled * either).sum() + alpha @ ((slope + steps) * low),
                0.5 * (own * parts["residual"] * mixed).sum(),
                np.exp(2 * theta[6]) * np.diag(outer)[~low].sum(),
            ]
        )
        away = (theta - MEAN) / STD
        value = 0.5 * rest @ alpha + np.log(np.diag(factor)).sum() + 0.5 * away @ away
        return float(value), away / STD - gradient
