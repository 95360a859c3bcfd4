"""Solvers: parity with independent implementations, order and bias on Gaussians."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from asesearch.backbones import DiT
from asesearch.config import parse_study
from asesearch.diffusion import VPSDE, Diffusion, Process
from asesearch.errors import ConfigError
from asesearch.sampling import guided, image_noise
from asesearch.solvers import SOLVERS, find_solver
from tests.exact_networks import Gaussian, load, no_noise, pairs_of

STUDY = {
    "name": "grids",
    "backbone": {"kind": "dit", "checkpoint": "none"},
    "data": {"kind": "fashion-mnist"},
}


@pytest.fixture(scope="module")
def net() -> DiT:
    """The official DiT of the fixtures: 4 blocks, 4 channels of 8 x 8, 10 classes and a null label,
    learned variance."""
    return load("dit")[0]


# -- parity ----------------------------------------------------------------------------------------


def ddim_error(steps: int, pairs: list[tuple[float, float]]) -> float:
    net, data, _ = load(f"dit_ddim_{steps}")

    def model(x: Tensor, t: float) -> Tensor:
        return net(x, torch.full((len(x),), t), data["y"])

    with torch.no_grad():
        x_0 = SOLVERS["ddim"].integrate(model, data["z"], pairs, Diffusion(), no_noise)
    return float((x_0 - data["x_0"]).abs().max())


@pytest.mark.parametrize("steps", [20, 50])
def test_ddim_is_the_official_trajectory(steps: int) -> None:
    assert ddim_error(steps, pairs_of(Diffusion(), steps)) < 1e-3


def test_ddim_on_another_grid_is_not() -> None:
    strided = [*range(950, -1, -50), -1]  # the DDIM paper's stride
    assert ddim_error(20, list(pairwise(strided))) > 1e-2


def cfg_error(net: DiT, first: slice | None = None) -> float:
    _, data, metadata = load("dit")
    half = len(data["cfg.t"]) // 2
    with torch.no_grad():
        ours = guided(
            net,
            data["cfg.x_t"][:half],
            data["cfg.t"][:half],
            data["cfg.y"][:half],
            float(metadata["cfg_scale"]),
        )
    return float((ours - data["cfg.out"][:half]).abs().max())


def test_guidance_is_the_official_one(net: DiT) -> None:
    assert cfg_error(net) < 1e-4


@pytest.mark.parametrize("channels", [2, 4, 8])
def test_guidance_on_other_channels_is_not(channels: int) -> None:
    net = load("dit")[0]
    net.guided_channels = channels
    assert cfg_error(net) > 1e-3


def diffusers_states(
    scheduler: object, model: Callable, x: Tensor, steps: int, drop: bool = False, **options: object
) -> Tensor:
    scheduler.set_timesteps(timesteps=list(Diffusion().timesteps(steps)))
    for i, t in enumerate(scheduler.timesteps.tolist()):
        if i == steps - 2 and drop:
            scheduler.lower_order_nums = 0  # first order into the last timestep
        x = scheduler.step(model(x, t), t, x, **options).prev_sample
    return x


def model_of(net: DiT, learned: bool, y: Tensor) -> Callable[[Tensor, float], Tensor]:
    def model(x: Tensor, t: float) -> Tensor:
        output = net(x, torch.full((len(x),), t), y)
        return output if learned else output[:, :4]

    return model


@pytest.mark.parametrize("steps", [2, 12])  # it adds noise at the end of a single step
@pytest.mark.parametrize("learned", [True, False])
def test_ddpm_agrees_with_diffusers(net: DiT, learned: bool, steps: int) -> None:
    """Respaced ancestral steps with the same noise, learned variance or the posterior's."""
    seeds = (3, 4)
    model = model_of(net, learned, torch.tensor([1, 2]))
    scheduler = DDPMScheduler(
        trained_betas=Diffusion().betas.numpy(),
        clip_sample=False,
        variance_type="learned_range" if learned else "fixed_small",
    )
    noise = image_noise(seeds, (4, 8, 8), torch.device("cpu"))
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    with torch.no_grad():
        x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generators])
        theirs = diffusers_states(scheduler, model, x, steps, generator=generators)
        ours = SOLVERS["ddpm"].integrate(
            model, noise(), pairs_of(Diffusion(), steps), Diffusion(), noise
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


# inside diffusers
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [2, 3, 6, 20])
@pytest.mark.parametrize(("solver", "drop"), [("dpm++2m", True), ("dpm++2m-order2", False)])
def test_dpmpp_2m_agrees_with_diffusers(net: DiT, solver: str, drop: bool, steps: int) -> None:
    model = model_of(net, False, torch.tensor([1, 2]))
    scheduler = DPMSolverMultistepScheduler(
        trained_betas=Diffusion().betas.numpy(), final_sigmas_type="zero"
    )
    x = image_noise((3, 4), (4, 8, 8), torch.device("cpu"))()
    with torch.no_grad():
        theirs = diffusers_states(scheduler, model, x, steps, drop)
        ours = SOLVERS[solver].integrate(
            model, x, pairs_of(Diffusion(), steps), Diffusion(), no_noise
        )
        first = SOLVERS["ddim"].integrate(
            model, x, pairs_of(Diffusion(), steps), Diffusion(), no_noise
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert steps < 4 or float((first - theirs).abs().max()) > 0.01  # the second order is seen


# inside diffusers
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [1, 2, 3, 6, 20])
def test_unipc_agrees_with_diffusers(net: DiT, steps: int) -> None:
    model = model_of(net, False, torch.tensor([1, 2]))
    scheduler = UniPCMultistepScheduler(
        trained_betas=Diffusion().betas.numpy(), final_sigmas_type="zero"
    )
    pairs = pairs_of(Diffusion(), steps, "unipc-quadratic")
    timesteps = [int(t) for t, _ in pairs]
    scheduler.set_timesteps(steps)
    scheduler.timesteps = torch.tensor(timesteps)  # it has no quadratic grid of its own
    noise_to_data = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()[timesteps]
    scheduler.sigmas = torch.cat([noise_to_data, torch.zeros(1)])
    x = theirs = image_noise((3, 4), (4, 8, 8), torch.device("cpu"))()
    with torch.no_grad():
        for t in timesteps:
            theirs = scheduler.step(model(theirs, t), t, theirs).prev_sample
        ours = SOLVERS["unipc-quadratic"].integrate(model, x, pairs, Diffusion(), no_noise)
        second = SOLVERS["dpm++2m"].integrate(model, x, pairs, Diffusion(), no_noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert steps < 3 or float((second - theirs).abs().max()) > 0.01  # the corrector is seen


def test_a_ddpm_step_of_the_whole_chain_is_the_posterior(net: DiT) -> None:
    """Mean and learned variance of diffusion.py, which the hybrid loss trains."""
    d = Diffusion()
    t = torch.tensor([400, 400])
    x_t = image_noise((0, 1), (4, 8, 8), torch.device("cpu"))()
    with torch.no_grad():
        output = net(x_t, t, t % 10)
        step = SOLVERS["ddpm"].integrate(
            lambda x, t: output, x_t, [(400, 399)], d, lambda: torch.ones_like(x_t)
        )
    mean, _ = d.posterior(d.predict_x_start(x_t, t, output[:, :4]), x_t, t)
    torch.testing.assert_close(
        step, mean + torch.exp(0.5 * d.log_variance(output[:, 4:], t)), rtol=1e-5, atol=1e-5
    )


# -- order and bias --------------------------------------------------------------------------------


def slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """Order of convergence: minus the slope of log error over log steps."""
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def flow_errors(solver: str, steps: Sequence[int]) -> list[float]:
    """Error of the image against the exact flow to the last timestep followed by the exact
    denoiser, in float64."""
    sde = VPSDE()
    net = Gaussian(sde)
    errors = []
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    for n in steps:
        pairs = pairs_of(sde, n, solver)
        t_last = pairs[-1][0]
        alpha, sigma = sde.level(t_last)
        end = net.flow(x, pairs[0][0], t_last)
        exact = (end - sigma * net.eps(end, t_last)) / alpha
        ours = SOLVERS[solver].integrate(net.eps, x, pairs, sde, no_noise)
        errors.append(float((ours - exact).abs().max()))
    return errors


@pytest.mark.parametrize(
    ("solver", "order", "steps"),
    [
        ("ddim", 1, (50, 100, 200)),
        ("dpm++2m", 2, (250, 500, 1000)),
        ("dpm++2m-quadratic", 2, (100, 200, 400)),
        ("dpm++2m-order2", 2, (250, 500, 1000)),
        ("unipc-quadratic", 3, (100, 200, 400)),
    ],
)
def test_order_of_convergence(solver: str, order: int, steps: tuple[int, ...]) -> None:
    assert slope(steps, flow_errors(solver, steps)) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("solver", ["dpm++2m", "dpm++2m-quadratic", "unipc-quadratic"])
def test_higher_order_pays_at_few_steps(solver: str) -> None:
    for n in (20, 25, 50):
        assert flow_errors(solver, [n])[0] < 0.5 * flow_errors("ddim", [n])[0]


def test_extrapolating_into_the_last_timestep_does_harm() -> None:
    """Why dpm++2m is first order there: with one more step after it, that step is extrapolated as
    any other."""
    sde = VPSDE()
    net = Gaussian(sde, mean=0.0)
    x = torch.full((1, 1, 1, 1), 1.5, dtype=torch.float64)
    pairs = pairs_of(sde, 20)
    t_last = pairs[-1][0]
    exact = net.flow(x, pairs[0][0], t_last)
    good = SOLVERS["dpm++2m"].integrate(
        net.eps, x, [*pairs[:-1], (t_last, t_last * 0.99)], sde, no_noise
    )
    bad = SOLVERS["dpm++2m"].integrate(
        net.eps, x, [*pairs[:-1], (t_last, t_last * 0.99), (1.0, 0.99)], sde, no_noise
    )
    assert float((good - exact).abs()) < 0.3 * float((bad - exact).abs())


def moments(solver: str, process: Process, num_steps: int, net: Gaussian) -> tuple[float, float]:
    """Exact mean and standard deviation of the images a solver makes from a linear network, without
    sampling.

    The image is linear in the noises drawn: image k of the batch gets a unit for its k-th noise and
    0 for the others.
    """
    draws = iter(torch.eye(num_steps + 1, dtype=torch.float64))

    def noise() -> Tensor:
        return next(draws).view(-1, 1, 1, 1)

    out = (
        SOLVERS[solver]
        .integrate(net.eps, noise(), pairs_of(process, num_steps, solver), process, noise)
        .flatten()
    )
    # the last row's noise is never drawn
    return float(out[-1]), float((out[:-1] - out[-1]).square().sum().sqrt())


@pytest.mark.parametrize(
    ("solver", "process"), [("ddpm", Diffusion()), ("euler-maruyama", VPSDE())], ids=["ddpm", "em"]
)
def test_bias_of_the_stochastic_solvers_falls_as_the_first_order(
    solver: str, process: Process
) -> None:
    net = Gaussian(process)
    steps = (125, 250, 500)
    means, stds = zip(*(moments(solver, process, n, net) for n in steps), strict=True)
    assert slope(steps, [abs(s - net.std) for s in stds]) == pytest.approx(1, abs=0.35)
    assert abs(means[-1] - net.mean) < 2e-3 and abs(stds[-1] - net.std) < 1e-2


# -- grids by name ---------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ddim", "dpm++2m", "dpm++2m-order2", "unipc"])
@pytest.mark.parametrize("power", [0.5, 1.5, 3])
def test_a_solvers_name_tells_the_power_of_its_grid(algorithm: str, power: float) -> None:
    solver = find_solver(f"{algorithm}-power{power}", Diffusion())
    assert solver.power == power
    assert solver.integrate is find_solver(f"{algorithm}-quadratic", Diffusion()).integrate
    load_solver = parse_study({"sampling": {"solver": solver.name}, **STUDY}, "test")
    assert load_solver.sampling.solver == solver.name


@pytest.mark.parametrize(
    "name",
    [
        "unipc-order2",
        "ddim-order2",
        "dpm++2m-quadratic-order2",
        "ddim-power2",
        "ddim-power1",
        "ddim-power1.50",
        "ddim-power0",
        "ddim-power5",
    ]
    + ["ddpm-power1.5", "euler-maruyama-quadratic", "dpm-power1.5", "ddim-power1.5-quadratic"],
)
def test_a_grid_has_one_name_and_a_solver_that_takes_it(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown solver"):
        find_solver(name, Diffusion())
    with pytest.raises(ConfigError, match=r"sampling\.solver.*-powerX"):
        parse_study({"sampling": {"solver": name}, **STUDY}, "test")
    with pytest.raises(ConfigError, match=r"search\.samplers.*-powerX"):
        parse_study({"search": {"samplers": [f"{name}-6"]}, **STUDY}, "test")


@pytest.mark.parametrize(
    "name",
    [
        *("ddim-power0.7", "ddim-power1.5", "ddim-power3"),
        *("dpm++2m-order2", "unipc", "unipc-power1.5"),
    ],
)
def test_every_grid_converges(name: str) -> None:
    """On a Gaussian, whose denoiser is exact."""
    net = Gaussian(Diffusion())
    solver = find_solver(name, Diffusion())
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = net.flow(x, 999, -1)
    errors = []
    for num_steps in (12, 96):
        pairs = list(pairwise((*Diffusion().timesteps(num_steps, solver.power), -1.0)))
        found = solver.integrate(net.eps, x, pairs, Diffusion(), no_noise)
        errors.append(float((found - exact).abs().mean()))
    assert errors[1] < errors[0] / 3
