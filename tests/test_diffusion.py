"""Forward processes, hybrid loss, timestep grids: identities, then parity with the official DiT
code."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from asesearch.backbones import DiT
from asesearch.config import DiffusionConfig
from asesearch.diffusion import VPSDE, Diffusion, Process, make_diffusion
from asesearch.errors import ConfigError
from asesearch.solvers.noise import make_betas

DATA = Path(__file__).parent / "data"
PROCESSES = {
    "linear": Diffusion(),
    "scaled_linear": Diffusion("scaled_linear"),
    "short": Diffusion(num_train_timesteps=50),
    "vp-sde": VPSDE(),
}


@pytest.fixture(params=PROCESSES.values(), ids=PROCESSES.keys())
def process(request: pytest.FixtureRequest) -> Process:
    return request.param


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def all_t(process: Process) -> torch.Tensor:
    return torch.arange(process.num_train_timesteps)


# -- every process ---------------------------------------------------------------------------------


def test_the_process_preserves_variance(process: Process) -> None:
    total = process.alpha(all_t(process)) ** 2 + process.sigma(all_t(process)) ** 2
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


def test_noise_grows_with_t(process: Process) -> None:
    assert bool((process.snr().diff() < 0).all())
    assert bool((process.alpha(all_t(process)).diff() < 0).all())


def test_sampling_ends_at_clean_data(process: Process) -> None:
    assert process.level(process.t_clean) == (1.0, 0.0)
    assert process.t_clean < process.timesteps(10)[-1]


def test_levels_are_those_of_the_tensors(process: Process) -> None:
    t = process.timesteps(50)
    at = torch.tensor(t, dtype=torch.float64 if isinstance(process, VPSDE) else torch.int64)
    alphas, sigmas = zip(*map(process.level, t), strict=True)
    assert alphas == pytest.approx(process.alpha(at).tolist(), rel=1e-14)
    assert sigmas == pytest.approx(process.sigma(at).tolist(), rel=1e-14)


def test_predict_x_start_undoes_q_sample(process: Process) -> None:
    x_start = randn(6, 2, 4, 4)
    noise = randn(6, 2, 4, 4, seed=1)
    t = process.draw_t(torch.tensor([0.001, 0.1, 0.3, 0.5, 0.7, 0.8]))
    x_t = process.q_sample(x_start, t, noise)
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(process.predict_x_start(x_t, t, noise), x_start, rtol=0, atol=1e-4)


def test_training_timesteps_fill_the_range(process: Process) -> None:
    u = torch.cat(
        [
            torch.rand(4000, generator=torch.Generator().manual_seed(0)),
            torch.tensor([0.0, 1 - 2**-24]),
        ]
    )
    t = process.draw_t(u)
    assert t.dtype == process.time_dtype and t.shape == u.shape
    assert (
        float(t.min()) == 0
        and process.num_train_timesteps - 1.01 < float(t.max()) < process.num_train_timesteps
    )
    tenths = torch.histc(t.float(), 10, 0, process.num_train_timesteps)
    assert bool((tenths > 300).all() and (tenths < 500).all())


@pytest.mark.parametrize("num_steps", [1, 2, 3, 20, 49])
def test_grids_descend_from_the_noise_end_in_even_steps(process: Process, num_steps: int) -> None:
    grid = process.timesteps(num_steps)
    assert len(grid) == num_steps and grid[0] == process.num_train_timesteps - 1
    strides = -np.diff(grid)
    assert np.all(strides > 0)
    assert num_steps < 2 or np.ptp(strides) <= 1.0 + 1e-9
    assert num_steps == 1 or grid[-1] == pytest.approx(
        process.s_min * 999 if isinstance(process, VPSDE) else 0
    )


@pytest.mark.parametrize("num_steps", [1, 2, 3, 20, 49])
def test_quadratic_grids_are_denser_near_data(process: Process, num_steps: int) -> None:
    grid = process.timesteps(num_steps, power=2.0)
    even = process.timesteps(num_steps)
    assert (len(grid), grid[0]) == (num_steps, even[0]) and grid[-1] == pytest.approx(even[-1])
    assert np.all(np.diff(grid) < 0) and np.all(np.array(grid) <= np.array(even) + 1e-9)
    # rounding, in a short chain
    assert num_steps < 3 or np.ptp(np.diff(np.sqrt(grid[: num_steps // 2 + 1]))) < 0.3


@pytest.mark.parametrize("num_steps", [3, 20])
def test_the_power_moves_a_grid_towards_data_or_noise(process: Process, num_steps: int) -> None:
    grids = [np.array(process.timesteps(num_steps, power)) for power in (0.5, 1.0, 1.5, 2.0, 3.0)]
    for noisier, cleaner in pairwise(grids):
        assert np.all(noisier >= cleaner - 1e-9) and noisier.sum() > cleaner.sum()
        assert (noisier[0], noisier[-1]) == pytest.approx((cleaner[0], cleaner[-1]))


@pytest.mark.parametrize("power", [0.1, 0.5, 1.25, 2.0, 4.0])
def test_grids_of_any_length_do_not_repeat(power: float) -> None:
    for num_steps in (*range(1, 1000, 27), 1000):
        grid = Diffusion().timesteps(num_steps, power)
        assert len(set(grid)) == num_steps and (grid[0], grid[-1]) == (
            999,
            0 if num_steps > 1 else 999,
        )


@pytest.mark.parametrize("num_steps", [0, -3])
def test_a_grid_needs_a_step(process: Process, num_steps: int) -> None:
    with pytest.raises(ConfigError, match=f"got {num_steps}"):
        process.timesteps(num_steps)


def test_loss_is_the_mean_square_and_target_replaces_noise(process: Process) -> None:
    x_start = randn(3, 2, 4, 4)
    noise = randn(3, 2, 4, 4, seed=1)
    output = randn(3, 2, 4, 4, seed=2)
    t = process.draw_t(torch.tensor([0.1, 0.5, 0.9]))
    mse, vb = process.hybrid_loss(output, x_start, process.q_sample(x_start, t, noise), t, noise)
    torch.testing.assert_close(mse, ((output - noise) ** 2).mean((1, 2, 3)))
    assert mse.shape == vb.shape == (3,) and bool((vb == 0).all())
    mse, _ = process.hybrid_loss(output, x_start, x_start, t, noise, target=output)
    assert bool((mse == 0).all())


# -- the chain -------------------------------------------------------------------------------------


def test_every_step_of_the_chain_is_a_grid() -> None:
    assert Diffusion().timesteps(1000) == tuple(range(999, -1, -1))
    with pytest.raises(ConfigError, match="1…1000.*got 1001"):
        Diffusion().timesteps(1001)


@pytest.mark.parametrize("steps", [20, 50])
def test_grid_is_the_official_one(steps: int) -> None:
    with safe_open(DATA / f"dit_ddim_{steps}.safetensors", "pt") as file:
        official = file.get_tensor("timesteps").tolist()
    assert list(Diffusion().timesteps(steps)[::-1]) == official


def test_grid_rounds_a_running_sum_as_the_official_code() -> None:
    """At 181 of 250 steps the sum falls on the other side of a half than the product does."""
    grid = Diffusion(num_train_timesteps=250).timesteps(181)[::-1]
    assert 41 in grid and 42 not in grid
    assert grid != tuple(round(i * 249 / 180) for i in range(181))


@pytest.mark.parametrize("args", [("cosine", 1000), ("linear", 1), ("linear", 20)])
def test_bad_betas_are_refused(args: tuple[str, int]) -> None:
    with pytest.raises(ConfigError):
        make_betas(*args)


def test_scaled_linear_is_stable_diffusions() -> None:
    betas = torch.from_numpy(make_betas("scaled_linear"))
    assert betas[0] == pytest.approx(0.00085) and betas[-1] == pytest.approx(0.012)
    torch.testing.assert_close(
        betas.sqrt().diff(), betas.sqrt().diff()[:1].expand(999), rtol=1e-6, atol=0
    )


def test_posterior_of_the_truth_has_no_divergence() -> None:
    """With the right eps and the posterior's own variance the bound is 0 for every t > 0."""
    d = Diffusion()
    x_start = randn(4, 2, 4, 4)
    noise = randn(4, 2, 4, 4, seed=1)
    t = torch.tensor([1, 50, 500, 999])
    x_t = d.q_sample(x_start, t, noise)
    exact = d.vb_terms(noise, -torch.ones_like(noise), x_start, x_t, t)
    torch.testing.assert_close(exact, torch.zeros(4), rtol=0, atol=1e-5)
    assert bool((d.vb_terms(noise, torch.ones_like(noise), x_start, x_t, t)[:2] > 1e-4).all())


def test_the_bound_trains_only_the_variance() -> None:
    d = Diffusion()
    t = torch.tensor([0, 400])
    x_start = randn(2, 1, 4, 4)
    noise = randn(2, 1, 4, 4, seed=1)
    output = randn(2, 2, 4, 4, seed=2).requires_grad_()
    _, vb = d.hybrid_loss(output, x_start, d.q_sample(x_start, t, noise), t, noise)
    (grad,) = torch.autograd.grad(vb.sum(), output)
    assert bool((grad[:, :1] == 0).all()) and bool((grad[:, 1:] != 0).any())


def losses(process: Process) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(ours, official) of the fixture's quantities."""
    with safe_open(DATA / "dit_losses.safetensors", "pt") as file:
        data = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        net = DiT(**json.loads(file.metadata()["config"]))
    net.load_state_dict(
        {k.removeprefix("state."): v for k, v in data.items() if k.startswith("state.")}
    )
    x_t = process.q_sample(data["x_start"], data["t"], data["noise"])
    with torch.no_grad():
        output = net(x_t, data["t"], data["y"])
    mse, vb = process.hybrid_loss(output, data["x_start"], x_t, data["t"], data["noise"])
    return {"x_t": x_t, "mse": mse, "vb": vb, "loss": mse + vb}, data


def test_losses_are_the_official_ones() -> None:
    ours, official = losses(Diffusion())
    torch.testing.assert_close(Diffusion().betas, official["betas"], rtol=0, atol=1e-15)
    torch.testing.assert_close(
        Diffusion().alphas_cumprod, official["alphas_cumprod"], rtol=0, atol=1e-15
    )
    for name, value in ours.items():
        torch.testing.assert_close(value, official[name], rtol=1e-4, atol=1e-4, msg=name)


def test_losses_of_other_betas_are_not() -> None:
    ours, official = losses(Diffusion("scaled_linear"))
    for name, value in ours.items():
        assert float((value - official[name]).abs().max()) > 1e-3, name


# -- the SDE ---------------------------------------------------------------------------------------


def test_marginals_solve_the_sde() -> None:
    """d log alpha / ds = -beta / 2, by central differences."""
    sde = VPSDE()
    ds = 1e-5
    for s in (0.01, 0.3, 0.9):
        ends = torch.tensor([s - ds, s + ds], dtype=torch.float64) * 999
        slope = float(sde.alpha(ends).log().diff()) / (2 * ds)
        assert slope == pytest.approx(-0.5 * sde.beta(s * 999), rel=1e-6)


def test_the_chain_is_the_sde_in_steps() -> None:
    """DDPM's betas 1e-4 … 0.02 are beta(s) / 1000; timestep t of the chain stands for s = (t + 1) /
    1000."""
    chain = Diffusion()
    t = (all_t(chain).double() + 1) / 1000 * 999
    assert float((VPSDE().alpha(t) - chain.alpha(all_t(chain))).abs().max()) < 2e-3
    assert float((VPSDE(beta_max=10).alpha(t) - chain.alpha(all_t(chain))).abs().max()) > 0.1


def test_sigma_keeps_its_digits_near_data() -> None:
    t = torch.tensor([1e-6], dtype=torch.float64)
    assert float(VPSDE().sigma(t)) == pytest.approx((0.1 * 1e-6 / 999) ** 0.5, rel=1e-6)


def test_the_sde_ignores_a_learned_variance() -> None:
    sde = VPSDE()
    t = torch.tensor([10.5, 700.25])
    x_start = randn(2, 1, 4, 4)
    noise = randn(2, 1, 4, 4, seed=1)
    output = randn(2, 2, 4, 4, seed=2)
    mse, vb = sde.hybrid_loss(output, x_start, sde.q_sample(x_start, t, noise), t, noise)
    torch.testing.assert_close(mse, ((output[:, :1] - noise) ** 2).mean((1, 2, 3)))
    assert bool((vb == 0).all())


@pytest.mark.parametrize("args", [(0.0, 20.0, 1000), (5.0, 1.0, 1000), (0.1, 20.0, 1)])
def test_a_bad_sde_is_refused(args: tuple[float, float, int]) -> None:
    with pytest.raises(ConfigError, match="0.1, 20 and 1000"):
        VPSDE(*args)


# -- from a study file -----------------------------------------------------------------------------


def test_make_diffusion_builds_what_the_study_says() -> None:
    chain = make_diffusion(DiffusionConfig(beta_schedule="scaled_linear", num_train_timesteps=400))
    assert isinstance(chain, Diffusion)
    torch.testing.assert_close(chain.betas, torch.from_numpy(make_betas("scaled_linear", 400)))
    sde = make_diffusion(DiffusionConfig(process="vp-sde"))
    assert isinstance(sde, VPSDE) and (sde.beta_min, sde.beta_max, sde.num_train_timesteps) == (
        0.1,
        20.0,
        1000,
    )


def test_the_sde_has_no_beta_schedule_to_choose() -> None:
    with pytest.raises(ConfigError, match="scaled_linear"):
        make_diffusion(DiffusionConfig(process="vp-sde", beta_schedule="scaled_linear"))
