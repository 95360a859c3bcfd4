"""`sample`: one contract for every solver, and what it refuses. The solvers' mathematics:
test_solvers.py."""

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from asesearch.backbones import Backbone, DiT
from asesearch.backbones.merging import Merging
from asesearch.config import DiffusionConfig
from asesearch.diffusion import VPSDE, Diffusion, Process
from asesearch.errors import ConfigError, ScheduleError
from asesearch.point import Point
from asesearch.sampler import Sampler
from asesearch.sampling import SampleResult, arithmetic, guided, image_noise, sample
from asesearch.schedule import ElasticDepths, ExitSchedule
from asesearch.solvers import SOLVERS, Solver
from tests.exact_networks import Gaussian, grid_of, load, pairs_of

CASES = [
    ("ddpm", Diffusion()),
    ("ddim", Diffusion()),
    ("dpm++2m", Diffusion()),
    ("dpm++2m-quadratic", Diffusion()),
    ("unipc-quadratic", Diffusion()),
    ("ddim", VPSDE()),
    ("dpm++2m", VPSDE()),
    ("dpm++2m-quadratic", VPSDE()),
    ("unipc-quadratic", VPSDE()),
    ("euler-maruyama", VPSDE()),
]
IDS = [f"{name} {type(process).__name__}" for name, process in CASES]
every_solver = pytest.mark.parametrize(("solver", "process"), CASES, ids=IDS)
SCHEDULE = ExitSchedule.from_string("4 3 3 1", 4)


@pytest.fixture(scope="module")
def net() -> DiT:
    """The official DiT of the fixtures: 4 blocks, 4 channels of 8 x 8, 10 classes and a null label,
    learned variance."""
    return load("dit")[0]


def make(
    net: Backbone, solver: str, process: Process, seeds: Sequence[int], **changes: object
) -> SampleResult:
    labelled = net.num_classes and "y" not in changes
    y = torch.tensor([s % 10 for s in seeds]) if labelled else None
    schedule = ExitSchedule.from_string(
        "4 3 3 1", 4, num_train_timesteps=process.num_train_timesteps
    )
    options = {"diffusion": process, "num_steps": 5, "y": y, "schedule": schedule, **changes}
    return sample(net, solver, options.pop("schedule"), seeds=seeds, **options)


# -- contract of every solver ----------------------------------------------------------------------


@every_solver
def test_images_have_the_datas_moments(solver: str, process: Process) -> None:
    net = Gaussian(process)
    images = make(net, solver, process, range(64), num_steps=250).images  # 4096 independent pixels
    assert float(images.mean()) == pytest.approx(net.mean, abs=4 * net.std / math.sqrt(4096) + 2e-3)
    assert float(images.std()) == pytest.approx(
        net.std, abs=4 * net.std / math.sqrt(2 * 4096) + 1.5e-2
    )


@every_solver
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_an_image_depends_on_seed_and_label_only(
    net: DiT, solver: str, process: Process, cfg_scale: float
) -> None:
    seeds = [3, 11, 4, 25, 5]
    whole = make(net, solver, process, seeds, cfg_scale=cfg_scale).images
    scale = float(whole.abs().max())
    small = make(net, solver, process, seeds, cfg_scale=cfg_scale, batch_size=2).images
    other = make(net, solver, process, [seeds[3], 7, seeds[0]], cfg_scale=cfg_scale).images[[2, 0]]
    torch.testing.assert_close(small, whole, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(other, whole[[0, 3]], rtol=0, atol=1e-5 * scale)
    assert float((whole[0] - whole[1]).abs().max()) > 0.1  # another seed, another image


@every_solver
def test_the_label_matters_and_the_seed_repeats(net: DiT, solver: str, process: Process) -> None:
    a = make(net, solver, process, [1, 1, 1], y=torch.tensor([2, 2, 5])).images
    torch.testing.assert_close(a[0], a[1], rtol=0, atol=1e-5 * float(a.abs().max()))
    assert float((a[0] - a[2]).abs().max()) > 1e-3


@every_solver
@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_counts_are_what_was_really_run(
    net: DiT, solver: str, process: Process, cfg_scale: float, num_steps: int
) -> None:
    images_through_blocks: list[int] = []
    handles = [
        net.block_at(i).register_forward_hook(lambda *a: images_through_blocks.append(len(a[-1])))
        for i in range(4)
    ]
    result = make(
        net, solver, process, [0, 1, 2], num_steps=num_steps, cfg_scale=cfg_scale, batch_size=2
    )
    for handle in handles:
        handle.remove()
    passes = 1 if cfg_scale == 1 else 2
    assert result.nfe == passes * num_steps
    assert (
        result.block_calls
        == passes * SCHEDULE.block_calls(result.timesteps)
        == sum(images_through_blocks) / 3
    )
    assert (
        result.images.shape == (3, 4, 8, 8)
        and result.images.dtype == torch.float32
        and not result.images.requires_grad
    )
    assert result.seconds > 0


@every_solver
@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_the_network_is_called_at_the_published_timesteps_and_depths(
    solver: str, process: Process, num_steps: int
) -> None:
    net = Gaussian(process)
    result = make(net, solver, process, [0, 1], num_steps=num_steps)
    assert result.timesteps == grid_of(solver, process, num_steps)
    assert [c[0] for c in net.calls] == pytest.approx(result.timesteps, rel=1e-6)
    assert [c[1] for c in net.calls] == SCHEDULE.exit_depth_at(result.timesteps).tolist()
    assert all(type(c[1]) is int and c[2] == 2 for c in net.calls)
    assert all(a > b for a, b in pairwise(result.timesteps))
    assert all(0 <= t < process.num_train_timesteps for t in result.timesteps)


@every_solver
def test_the_full_schedule_is_the_plain_network(net: DiT, solver: str, process: Process) -> None:
    y = torch.tensor([3, 4])
    noise = image_noise((3, 4), (4, 8, 8), torch.device("cpu"))

    def plain(x: Tensor, t: float) -> Tensor:
        return net(x, torch.full((2,), t, dtype=process.time_dtype), y)

    with torch.no_grad():
        expected = SOLVERS[solver].integrate(
            plain, noise(), pairs_of(process, 5, solver), process, noise
        )
    full = make(net, solver, process, [3, 4], schedule=ExitSchedule.full(4)).images
    torch.testing.assert_close(full, expected, rtol=0, atol=0)
    short = make(net, solver, process, [3, 4]).images
    assert float((short - expected).abs().max()) > 1e-3


@every_solver
def test_nan_is_not_swallowed(solver: str, process: Process) -> None:
    net = Gaussian(process, std=math.nan)
    assert bool(make(net, solver, process, [0]).images.isnan().all())


@every_solver
def test_images_are_not_clamped(solver: str, process: Process) -> None:
    assert (
        float(make(Gaussian(process, mean=5.0), solver, process, [0], num_steps=100).images.mean())
        > 4
    )


# -- training and sampling agree -------------------------------------------------------------------


@pytest.mark.parametrize("process", [Diffusion(), VPSDE()], ids=["chain", "sde"])
def test_the_sampler_calls_the_network_that_was_trained(net: DiT, process: Process) -> None:
    """For the same (x_t, t) a training batch with one exit per sample gives what the sampler's call
    with an int gives."""
    t = process.draw_t(torch.tensor([0.95, 0.02, 0.4, 0.7, 0.1, 0.3]))
    y = torch.arange(6)
    noise = image_noise(range(12), (4, 8, 8), torch.device("cpu"))()
    x_t = process.q_sample(noise[:6], t, noise[6:])
    with torch.no_grad():
        trained = net(x_t, t, y, exit_depth=torch.from_numpy(SCHEDULE.exit_depth_at(t.numpy())))
        for i in range(6):
            depth = int(SCHEDULE.exit_depth_at(t[i].item()))
            sampled = guided(net, x_t[i : i + 1], t[i : i + 1], y[i : i + 1], 1.0, depth)
            torch.testing.assert_close(sampled[0], trained[i], rtol=0, atol=1e-5)


# -- sample ----------------------------------------------------------------------------------------


def test_guidance_without_strength_is_one_pass_and_zero_is_the_null_class(net: DiT) -> None:
    with torch.no_grad():
        x = torch.ones(2, 4, 8, 8)
        t = torch.tensor([9, 9])
        y = torch.tensor([1, 2])
        torch.testing.assert_close(guided(net, x, t, y, 1.0), net(x, t, y), rtol=0, atol=0)
        null = net(x, t, torch.full_like(y, 10))
        torch.testing.assert_close(guided(net, x, t, y, 0.0)[:, :3], null[:, :3], rtol=0, atol=1e-5)


def test_noise_can_be_made_again_from_a_seed() -> None:
    noise = image_noise([7, 2**32 - 1], (3, 4), torch.device("cpu"))
    first = noise()
    second = noise()
    generator = torch.Generator().manual_seed(7)
    for draw in (first, second):
        torch.testing.assert_close(draw[0], torch.randn(3, 4, generator=generator), rtol=0, atol=0)


def test_mode_is_restored_and_progress_told(net: DiT) -> None:
    told: list[tuple[int, int]] = []

    def on_batch(done: int, total: int) -> None:
        assert not net.training
        told.append((done, total))

    net.train()
    make(net, "ddim", Diffusion(), range(5), batch_size=2, on_batch=on_batch)
    assert net.training and told == [(2, 5), (4, 5), (5, 5)]
    net.guided_channels = 3
    with pytest.raises(RuntimeError):
        sample(
            net,
            Solver("broken", broken),
            SCHEDULE,
            diffusion=Diffusion(),
            num_steps=2,
            seeds=[0],
            y=torch.tensor([0]),
        )
    assert net.training
    net.block_at(0).eval()
    modes = [module.training for module in net.modules()]
    make(net, "ddim", Diffusion(), range(1))
    assert [module.training for module in net.modules()] == modes
    net.eval()


def broken(*args: object) -> Tensor:
    raise RuntimeError("broken")


def test_a_solver_of_your_own() -> None:
    def jump(
        model: Callable, x: Tensor, pairs: Sequence, diffusion: Process, noise: Callable
    ) -> Tensor:
        for t_cur, _ in pairs:
            x = x - model(x, t_cur)
        return x

    result = make(Gaussian(Diffusion()), Solver("jump", jump), Diffusion(), [0, 1], num_steps=3)
    assert result.nfe == 3 and result.timesteps == (999, 500, 0)


def test_numpy_seeds_and_a_network_without_parameters() -> None:
    net = Gaussian(Diffusion())
    a = make(net, "ddim", Diffusion(), np.arange(3)).images
    torch.testing.assert_close(a, make(net, "ddim", Diffusion(), [0, 1, 2]).images, rtol=0, atol=0)


def test_labels_in_any_list_and_seeds_of_a_generator(net: DiT) -> None:
    wanted = make(net, "ddim", Diffusion(), [4, 5], y=torch.tensor([1, 2])).images
    for y in ([1, 2], range(1, 3), (np.int64(1), 2), np.array([1, 2], np.uint8)):
        made = make(net, "ddim", Diffusion(), (s for s in (4, 5)), y=y)
        assert torch.equal(made.images, wanted)


BAD = {
    "solver": ({"solver": "heun"}, ConfigError, "unknown solver 'heun'.*ddpm, ddim"),
    "em on a chain": (
        {"solver": "euler-maruyama"},
        ConfigError,
        "vp-sde process; got discrete; choose one of ddpm, ddim, ",
    ),
    "ddpm on the sde": (
        {"solver": "ddpm", "diffusion": VPSDE()},
        ConfigError,
        "choose one of ddim, ",
    ),
    "no steps": ({"num_steps": 0}, ConfigError, "1…1000.*got 0"),
    "too many steps": ({"num_steps": 1001}, ConfigError, "1…1000.*got 1001"),
    "no steps of the sde": ({"num_steps": 0, "diffusion": VPSDE()}, ConfigError, "got 0"),
    "no seeds": ({"seeds": []}, ConfigError, "seeds"),
    "seed true": ({"seeds": [True]}, ConfigError, "must be integers .*; got True"),
    "seed of a tensor": ({"seeds": torch.tensor(3)}, ConfigError, "one for each image"),
    "seed of an array": ({"seeds": np.array(3)}, ConfigError, "one for each image"),
    "seeds in rows": ({"seeds": np.zeros((2, 1), int)}, ConfigError, r"integers .*got \[0\]"),
    "sampler": ({"solver": Sampler("ddim", 4)}, ConfigError, r"give its \.solver and \.num_steps"),
    "solver's number": ({"solver": 3}, ConfigError, "must be the name of one.*got int"),
    "text": ({"schedule": "4 4 3 2"}, ScheduleError, r"got '4 4 3 2'; make one of text by Exit"),
    "a point": ({"schedule": Point(SCHEDULE, Sampler("ddim", 4))}, ScheduleError, "its .schedule"),
    "elastic": ({"schedule": ElasticDepths(4, 1000)}, ScheduleError, "got ElasticDepths"),
    "settings": ({"diffusion": DiffusionConfig()}, ConfigError, "got DiffusionConfig; .*make_diff"),
    "guidance in text": ({"cfg_scale": "1.5"}, ConfigError, "finite number .*got '1.5'"),
    "acceleration's name": ({"acceleration": "cache-block-0.1"}, ConfigError, "not its name"),
    "device": ({"device": "gpu"}, ConfigError, "must be one of torch's; got 'gpu'"),
    "negative seed": ({"seeds": [0, -1]}, ConfigError, "seeds"),
    "seed torch cuts": ({"seeds": [0, 2**32]}, ConfigError, "2\\^32"),
    "fraction": ({"seeds": [0, 1.5]}, ConfigError, "must be integers"),
    "no labels": ({"y": None}, ConfigError, "needs class labels"),
    "shape of labels": ({"y": torch.zeros(3, dtype=torch.long)}, ConfigError, "shape"),
    "label too high": ({"y": torch.tensor([0, 11])}, ConfigError, "0…10"),
    "label too low": ({"y": torch.tensor([0, -1])}, ConfigError, "0…10"),
    "label not whole": (
        {"y": torch.tensor([0.0, 1.0])},
        ConfigError,
        "must be integers in 0…10 .10 is the null label.",
    ),
    "labels no list": ({"y": 3}, ConfigError, "y must be class labels, .*; got 3; pass"),
    "labels text": ({"y": ["1", "2"]}, ConfigError, r"y must be .*; got \['1', '2'\]; pass"),
    "labels none": ({"y": [None, None]}, ConfigError, "y must be class labels"),
    "labels empty": ({"y": []}, ConfigError, r"y must have shape \(2,\); got \(0,\)"),
    "labels huge": ({"y": [0, 2**70]}, ConfigError, "y must be class labels"),
    "labels complex": (
        {"y": torch.zeros(2, dtype=torch.complex64)},
        ConfigError,
        "must be integers in .*; got torch.complex64; correct",
    ),
    "prompt of numbers": ({"y": {"a": 1}}, ConfigError, "y must be class labels"),
    "seeds no list": ({"seeds": 3}, ConfigError, "seeds must be one for each image; got 3"),
    "seeds text": ({"seeds": ["1"]}, ConfigError, "must be integers .*; got '1'"),
    "seeds none": ({"seeds": [None]}, ConfigError, "must be integers .*; got None"),
    "batch size": ({"batch_size": 0}, ConfigError, "batch_size"),
    "half a batch": ({"batch_size": 1.5}, ConfigError, "batch_size must be .*; got 1.5;"),
    "batch size text": ({"batch_size": "2"}, ConfigError, "batch_size must be .*; got '2';"),
    "negative guidance": ({"cfg_scale": -1.0}, ConfigError, "cfg_scale"),
    "guidance not a number": ({"cfg_scale": math.nan}, ConfigError, "cfg_scale"),
    "depth": ({"schedule": ExitSchedule.full(5)}, ScheduleError, "rescaled"),
    "chain": ({"schedule": ExitSchedule.full(4, 500)}, ScheduleError, "for 500 diffusion"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_refused_before_the_network_is_called(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    net = load("dit")[0]
    net.register_forward_hook(lambda *a: pytest.fail("the network was called"))
    options = {
        "solver": "ddim",
        "seeds": [0, 1],
        "diffusion": Diffusion(),
        "y": torch.tensor([0, 1]),
        **changes,
    }
    with pytest.raises(error, match=message):
        make(net, options.pop("solver"), options.pop("diffusion"), options.pop("seeds"), **options)


def test_what_is_no_network_of_float32_is_refused(net: DiT) -> None:
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(ConfigError, match=f"must be float32; got {dtype} in .*'bf16' for fast"):
            make(copy.deepcopy(net).to(dtype), "ddim", Diffusion(), [0])
    with pytest.raises(ConfigError, match=r"must be float32; got torch.float64"):
        make(copy.deepcopy(net).double(), "ddim", Diffusion(), [0], precision="bf16")
    with pytest.raises(ConfigError, match=r"must be a Backbone; got SimpleNamespace; .*\.backbone"):
        make(SimpleNamespace(num_classes=0), "ddim", Diffusion(), [0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_the_memory_is_enough_where_the_arithmetic_is_bf16(net: DiT, dtype) -> None:
    options = {"solver": "ddim", "process": Diffusion(), "seeds": [0, 1], "precision": "bf16"}
    whole = make(net, **options).images
    half = make(copy.deepcopy(net).to(dtype), **options).images
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, whole, rtol=0, atol=0.05 * float(whole.abs().max()))


def test_casts_of_the_callers_autocast_are_not_used_nor_left_behind(net: DiT) -> None:
    net = copy.deepcopy(net)
    x_t = torch.randn(1, 4, 8, 8)
    given = {"y": torch.tensor([1]), "num_steps": 2, "precision": "bf16"}
    with torch.autocast("cpu", torch.bfloat16):
        net(x_t, torch.tensor([5]), given["y"])
        with torch.no_grad():
            net.final_layer.linear.weight.mul_(2)
        made = make(net, "ddim", Diffusion(), [0], **given).images
        net(x_t, torch.tensor([5]), given["y"]).sum().backward()
    assert torch.equal(made, make(net, "ddim", Diffusion(), [0], **given).images)
    assert net.final_layer.linear.weight.grad is not None


def test_another_default_device_changes_no_image(net: DiT) -> None:
    wanted = make(net, "dpm++2m", Diffusion(), [0, 1], cfg_scale=1.5, y=[1, 2]).images
    torch.set_default_device("meta")
    try:
        made = make(net, "dpm++2m", Diffusion(), [0, 1], cfg_scale=1.5, y=[1, 2]).images
    finally:
        torch.set_default_device(None)
    assert torch.equal(made, wanted)


def test_guidance_needs_a_null_label() -> None:
    with pytest.raises(ConfigError, match="null label"):
        make(Gaussian(Diffusion()), "ddim", Diffusion(), [0], cfg_scale=1.5)


def test_a_network_that_predicts_velocity_is_refused() -> None:
    net = Gaussian(Diffusion())
    net.prediction_type = "flow"
    with pytest.raises(ConfigError, match="predicts noise.*'flow'"):
        make(net, "ddim", Diffusion(), [0])


class Prompted(Gaussian):
    """Shifts the mean by what a prompt's tensors say; no prompt is 0."""

    has_null_label = takes_prompt = True

    def null_labels(self, y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(value) for name, value in y.items()}

    def forward(
        self, x_t: Tensor, t: Tensor, y: dict[str, Tensor], *, exit_depth: object = None
    ) -> Tensor:
        return self.eps(
            x_t - y["a"].view(-1, 1, 1, 1) - y["b"].sum(1).view(-1, 1, 1, 1), t[0].item()
        )


def test_prompts_are_cut_into_batches_and_guided() -> None:
    net = Prompted(Diffusion())
    seeds = [1, 2, 3]
    y = {
        "a": torch.tensor([0.5, 0.0, -0.5]),
        "b": torch.tensor([[0.1, 0.2], [0.0, 0.0], [1.0, 0.0]]),
    }
    whole = make(net, "ddim", Diffusion(), seeds, y=y, cfg_scale=1.5).images
    parts = make(net, "ddim", Diffusion(), seeds, y=y, cfg_scale=1.5, batch_size=2).images
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    scaled = {name: 1.5 * value for name, value in y.items()}  # this network is linear in y
    torch.testing.assert_close(
        make(net, "ddim", Diffusion(), seeds, y=scaled).images, whole, rtol=0, atol=1e-3
    )
    with pytest.raises(ConfigError, match="leading dimension 2.*'a': 3"):
        make(net, "ddim", Diffusion(), [1, 2], y=y)


def test_compiled_blocks_serve_every_step_and_batch(only_traced: Callable[[], int]) -> None:
    net = load("dit")[0]
    seeds = range(5)
    eager = make(net, "ddim", Diffusion(), seeds, cfg_scale=1.5, batch_size=2)
    made = make(net, "ddim", Diffusion(), seeds, cfg_scale=1.5, batch_size=2, compile=True)
    assert only_traced() == 1
    torch.testing.assert_close(made.images, eager.images, rtol=0, atol=1e-5)
    assert (made.nfe, made.block_calls) == (eager.nfe, eager.block_calls)


def test_bfloat16_changes_the_network_s_arithmetic_only() -> None:
    net = load("dit")[0]
    y = torch.tensor([0, 1])
    exact = make(net, "ddim", Diffusion(), [0, 1], y=y).images
    rough = make(net, "ddim", Diffusion(), [0, 1], y=y, precision="bf16").images
    assert (
        rough.dtype == torch.float32 and 0 < (rough - exact).abs().max() < 0.1 * exact.abs().max()
    )
    # nothing stays switched on
    assert torch.equal(make(net, "ddim", Diffusion(), [0, 1], y=y).images, exact)
    # no matrix product in this one
    same = make(Gaussian(Diffusion()), "ddim", Diffusion(), [0], precision="bf16").images
    assert torch.equal(same, make(Gaussian(Diffusion()), "ddim", Diffusion(), [0]).images)


def float32_state() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("precision", "inside"),
    [("float32", ("highest", False)), ("tf32", ("high", True)), ("bf16", ("highest", False))],
)
def test_a_precision_is_of_matrix_products_and_convolutions_and_ends_with_the_sampling(
    precision: str, inside: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # without a GPU
    before = float32_state()
    assert before[1]  # torch's default, which float32 is not
    with arithmetic(precision, torch.device("cuda")):
        assert float32_state() == inside
    assert float32_state() == before
    with arithmetic(precision, torch.device("cpu")):
        assert float32_state() == ("highest", False)
    assert float32_state() == before


NEWER = """
import sys, torch
from asesearch.backbones.device import tf32, tf32_state

where, value = sys.argv[1:]
places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
thing = torch.backends
for name in where.split("."):
    holder, thing = thing, getattr(thing, name)
setattr(holder, name, value)

def state():
    return [place.fp32_precision for place in places]

before = state()
for on in (False, True, False):
    with tf32(on):
        assert state() == ["tf32" if on else "ieee"] * 3, state()
        with tf32(not on):
            assert state() == ["ieee" if on else "tf32"] * 3, state()
        assert state() == ["tf32" if on else "ieee"] * 3, state()
    assert state() == before, (state(), before)
assert len({tf32_state()}) == 1
"""


@pytest.mark.slow  # a process for each, as these settings can't be taken back
@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="settings of PyTorch 2.9"
)
@pytest.mark.parametrize(
    ("where", "value"),  # what the older settings then refuse to read
    [
        ("fp32_precision", "tf32"),
        ("fp32_precision", "ieee"),
        ("cuda.matmul.fp32_precision", "tf32"),
        ("cudnn.fp32_precision", "ieee"),
        ("cudnn.conv.fp32_precision", "ieee"),
    ],
)
def test_pytorchs_newer_settings_of_tf32_may_be_used(where: str, value: str) -> None:
    command = [sys.executable, "-c", NEWER, where, value]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_threads_that_sample_one_network_get_their_own_images() -> None:
    net = load("dit")[0]
    merging = Merging(0.5)
    torch.set_float32_matmul_precision("high")
    try:
        before = float32_state()

        def images(seed: int) -> Tensor:
            y = torch.tensor([seed % 3])
            found = make(net, "ddim", Diffusion(), [seed], y=y, acceleration=merging)
            return found.images

        want = [images(seed) for seed in range(8)]
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(images, range(8)))
        assert float32_state() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("precision", ["bfloat16", "fp16", "", None])
def test_an_unknown_precision_is_refused(precision: str) -> None:
    net = load("dit")[0]
    y = torch.tensor([0])
    with pytest.raises(ConfigError, match="must be one of float32, tf32, bf16; got"):
        make(net, "ddim", Diffusion(), [0], y=y, precision=precision)


@pytest.mark.parametrize(
    ("seeds", "got"),
    [([], "got none; give at least one"), ([0, -1], "got -1; choose"), ([2**32], "got 4294967296")],
)
def test_the_seed_that_is_wrong_is_named(seeds: list[int], got: str) -> None:
    with pytest.raises(ConfigError, match=got):
        make(load("dit")[0], "ddim", Diffusion(), seeds)
