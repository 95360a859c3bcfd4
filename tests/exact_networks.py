"""What the tests of solvers and of `sample` share: the official DiT, and a network whose answer is
exact."""

import json
import math
from itertools import pairwise
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from asesearch.backbones import Backbone, DiT
from asesearch.diffusion import Process
from asesearch.solvers import SOLVERS

DATA = Path(__file__).parent / "data"


def load(name: str) -> tuple[DiT, dict[str, Tensor], dict[str, str]]:
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        data = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    net = DiT(**json.loads(metadata["config"]))
    net.load_state_dict(
        {k.removeprefix("state."): v for k, v in data.items() if k.startswith("state.")}
    )
    return net.eval(), data, metadata


class Gaussian(Backbone):
    """The exact noise prediction for data N(mean, std²); unconditional, and keeps a note of its
    calls."""

    depth = 4
    in_channels = 1
    input_size = 8
    num_classes = 0
    has_null_label = False
    learn_sigma = False
    guided_channels = 1

    def __init__(self, process: Process, mean: float = 0.3, std: float = 0.5) -> None:
        super().__init__()
        self.process = process
        self.mean = mean
        self.std = std
        self.calls: list[tuple[float, object, int]] = []

    def eps(self, x_t: Tensor, t: float) -> Tensor:
        alpha, sigma = self.process.level(t)
        return sigma * (x_t - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)

    def forward(
        self, x_t: Tensor, t: Tensor, y: Tensor | None = None, *, exit_depth: object = None
    ) -> Tensor:
        assert y is None and t.dtype == self.process.time_dtype and bool((t == t[0]).all())
        self.calls.append((float(t[0]), exit_depth, len(x_t)))
        return self.eps(x_t, t[0].item())

    def flow(self, x: Tensor, t_from: float, t_to: float) -> Tensor:
        """Exact solution of the probability-flow ODE."""
        a, s = self.process.level(t_from)
        b, u = self.process.level(t_to)
        scale = math.sqrt((b**2 * self.std**2 + u**2) / (a**2 * self.std**2 + s**2))
        return b * self.mean + scale * (x - a * self.mean)


def grid_of(solver: str, process: Process, num_steps: int) -> tuple[float, ...]:
    return process.timesteps(num_steps, SOLVERS[solver].power)


def pairs_of(process: Process, num_steps: int, solver: str = "ddim") -> list[tuple[float, float]]:
    return list(pairwise((*grid_of(solver, process, num_steps), process.t_clean)))


def no_noise() -> Tensor:
    raise AssertionError("a deterministic solver draws no noise")
