"""The difficulty map: known errors are found, every depth sees the same images, and blocks that are
reused change nothing."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

from asesearch.backbones import Backbone, DiT, UViT
from asesearch.backbones.diffusers_adapter import DiffusersBackbone
from asesearch.backbones.digests import weights_fingerprint
from asesearch.config import MapConfig
from asesearch.data import ImageArray
from asesearch.diffusion import VPSDE, Diffusion
from asesearch.errors import ConfigError, DataError, EvaluationError, StudyError
from asesearch.search import mapping
from asesearch.search.mapping import map_seconds, measure_map
from asesearch.study.difficulty import TABLES, DifficultyMap
from tests.conftest import TINY_DIT

DIFFUSION = Diffusion()
SMALL = MapConfig(num_bins=3, num_images=5)


def dark(count=96, channels=1, classes=3):
    """Images of which every pixel is -1, so that x_t tells its noise."""
    labels = np.arange(count) % classes if classes else None
    return ImageArray(np.zeros((count, channels, 8, 8), np.uint8), labels, "dark")


def noise_in(x_t, t, process=DIFFUSION):
    alpha, sigma = (v(t).float().view(-1, 1, 1, 1) for v in (process.alpha, process.sigma))
    return (x_t + alpha) / sigma


class Known(Backbone):
    """Predicts `factor` times the noise in `dark` images plus an offset, by exit depth;
    unconditional, and notes its calls."""

    depth = 3
    in_channels = 1
    input_size = 8
    num_classes = 0
    has_null_label = False
    learn_sigma = False
    guided_channels = 1

    def __init__(self, offsets=(0.5, 0.3, 0.1), factor=1.0, process=DIFFUSION):
        super().__init__()
        self.offsets = offsets
        self.factor = factor
        self.process = process
        self.calls = []

    def forward(self, x_t, t, y=None, *, exit_depth=None):
        assert y is None and not self.training and not torch.is_grad_enabled()
        self.calls.append((x_t, t, exit_depth))
        return self.factor * noise_in(x_t, t, self.process) + self.offsets[exit_depth - 1]


def randomised(net, scale=0.2):
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=generator) * scale
    return net.eval()


def errors_of(found):
    return np.array([getattr(found, name) for name in TABLES])  # (4, bins, depth)


# -- what is measured ----------------------------------------------------------------------------


@pytest.mark.parametrize("process", [DIFFUSION, VPSDE()], ids=["discrete", "vp-sde"])
def test_known_errors_are_found(process):
    net = Known(process=process)
    found = measure_map(net, dark(), process, MapConfig(num_bins=4, num_images=6))
    assert (found.depth, found.num_bins, found.edges) == (3, 4, (0, 250, 500, 750, 1000))
    full, full_se, noise, noise_se = errors_of(found)
    assert np.allclose(full, [[0.16, 0.04, 0.0]] * 4, atol=1e-4) and np.allclose(
        noise, [[0.25, 0.09, 0.01]] * 4, atol=1e-4
    )
    assert full_se.max() < 1e-4 and noise_se.max() < 1e-4
    # the full network against itself: exactly 0
    assert not full[:, -1].any() and not full_se[:, -1].any()
    t = torch.cat([t for x_t, t, exit_depth in net.calls if len(x_t) == 6 and exit_depth == 3])
    assert t.dtype == process.time_dtype and float(t.max()) <= 999
    # to each sixth's beginning
    gaps = t.double().view(4, 6).sort(dim=1).values - torch.arange(24).view(4, 6) * 250 / 6
    rounding = 0.01 if t.is_floating_point() else 1.0
    # one timestep in each sixth of each bin
    assert float(gaps.min()) > -rounding and float(gaps.max()) < 250 / 6
    assert bool((t.view(4, 6) >= torch.arange(4).view(4, 1) * 250).all())


def test_standard_errors_agree_with_theory_and_with_repetition():
    """Against the noise, predicting nothing errs by the mean square of 64 normal numbers: 1, of
    variance 2 / 64."""
    images = 16
    theory = math.sqrt(2 / 64 / 16)
    net = Known((0.0, 0.0, 0.0), factor=0.0)
    tables = [
        errors_of(
            measure_map(net, dark(), DIFFUSION, MapConfig(num_bins=4, num_images=images, seed=s))
        )
        for s in range(25)
    ]
    # (seeds, bins) each
    means = np.array([t[2, :, 0] for t in tables])
    said = np.array([t[3, :, 0] for t in tables])
    assert abs(means.mean() - 1) < 4 * theory / 10  # 100 means
    assert 0.8 * theory < means.std(ddof=1) < 1.2 * theory
    assert 0.9 * theory < said.mean() < 1.1 * theory


def recorded(net, data, config, **options):
    """A map, and the inputs (x_t, t, y) of the full-depth call of each bin."""
    seen = []

    def hook(module, args, kwargs):
        if len(args[0]) == config.num_images and kwargs["exit_depth"] == net.depth:
            seen.append(args)

    handle = net.register_forward_pre_hook(hook, with_kwargs=True)
    found = measure_map(net, data, DIFFUSION, config, **options)
    handle.remove()
    return found, seen


@torch.no_grad()
def test_it_equals_the_errors_image_by_image(tiny_dit):
    found, seen = recorded(tiny_dit, dark(), SMALL)
    for (low, high), (x_t, t, y), *rows in zip(
        pairwise(found.edges), seen, *errors_of(found), strict=True
    ):
        assert bool(((t >= low) & (t < high)).all())
        noise = noise_in(x_t, t)
        expected = np.empty((2, 5, 4))
        for i, exit_depth in np.ndindex(5, 4):
            one = x_t[[i]], t[[i]], y[[i]]
            # first channel: no variance
            eps, full = (tiny_dit(*one, exit_depth=d)[:, :1] for d in (exit_depth + 1, 4))
            expected[:, i, exit_depth] = [
                float(((eps - target) ** 2).mean()) for target in (full, noise[[i]])
            ]
        mean = expected.mean(axis=1)
        se = expected.std(axis=1, ddof=1) / math.sqrt(5)
        assert np.allclose(rows, [mean[0], se[0], mean[1], se[1]], rtol=1e-4, atol=1e-7)


def test_labels_are_the_images_own(tiny_dit, tiny_images):
    _, seen = recorded(tiny_dit, tiny_images, MapConfig(num_bins=1, num_images=96))
    (_, _, y) = seen[0]
    # without replacement: every image once
    assert torch.equal(y.bincount(), torch.tensor([32, 32, 32]))
    _, seen = recorded(
        tiny_dit,
        ImageArray(tiny_images.images[:3].numpy(), np.arange(3), "few"),
        MapConfig(num_bins=1, num_images=7),
    )
    (_, _, y) = seen[0]
    assert torch.equal(y.bincount().sort().values, torch.tensor([2, 2, 3]))  # too few: in turn


def test_a_seed_gives_the_same_draws_for_every_network_and_batch(tiny_dit):
    rng = np.random.default_rng(0)
    data = ImageArray(
        rng.integers(0, 256, (20, 1, 8, 8)).astype(np.uint8),
        np.arange(20) % 3,
        "flipped",
        flip=True,
    )
    first, seen = recorded(tiny_dit, data, SMALL)
    assert recorded(tiny_dit, data, SMALL)[0] == first
    _, other = recorded(randomised(DiT(**TINY_DIT)), data, SMALL)
    assert all(
        torch.equal(a, b)
        for x, z in zip(seen, other, strict=True)
        for a, b in zip(x, z, strict=True)
    )
    in_twos = measure_map(tiny_dit, data, DIFFUSION, SMALL, batch_size=2)
    assert np.allclose(errors_of(in_twos), errors_of(first), rtol=1e-4, atol=1e-9)
    reseeded = measure_map(tiny_dit, data, DIFFUSION, SMALL.model_copy(update={"seed": 1}))
    assert not np.allclose(errors_of(reseeded), errors_of(first), rtol=1e-2)


def test_against_a_reference(tiny_dit, tiny_images):
    other = randomised(DiT(**TINY_DIT))
    own = measure_map(tiny_dit, tiny_images, DIFFUSION, SMALL)
    found = measure_map(tiny_dit, tiny_images, DIFFUSION, SMALL, other)
    assert found.error_noise == own.error_noise and found.error_full != own.error_full
    assert min(row[-1] for row in found.error_full) > 0
    assert (found.weights, found.reference_weights) == (
        weights_fingerprint(tiny_dit),
        weights_fingerprint(other),
    )
    assert (
        own.weights == own.reference_weights == found.weights
        and found.data_digest == tiny_images.digest
    )
    (back,) = {
        tuple(
            row[-1]
            for row in measure_map(other, tiny_images, DIFFUSION, SMALL, tiny_dit).error_full
        )
    }
    # at full depth it does not matter which is which
    assert np.allclose(back, [row[-1] for row in found.error_full])


def test_exits_below_the_least_have_its_errors(tiny_dit, tiny_images):
    plain = errors_of(measure_map(tiny_dit, tiny_images, DIFFUSION, SMALL))
    tiny_dit.min_exit_depth = 3
    assert np.array_equal(
        errors_of(measure_map(tiny_dit, tiny_images, DIFFUSION, SMALL)), plain[:, :, [2, 2, 2, 3]]
    )


# -- every kind of network, and running blocks once ----------------------------------------------


class Prompts:
    """Noise as latents, with prompts."""

    name = "prompts"
    shape = (4, 8, 8)
    num_classes = 0
    digest = "0"

    def __len__(self):
        return 10

    def batch(self, indices, generator=None):
        rows = [torch.Generator().manual_seed(i) for i in indices]
        x = torch.stack([torch.randn(4, 8, 8, generator=g) for g in rows])
        mask = torch.ones(len(rows), 3, dtype=torch.int64)
        mask[:, -1] = torch.tensor([i % 2 for i in indices])
        hidden = torch.stack([torch.randn(3, 12, generator=g) for g in rows])
        return x, {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}


def network(name):
    heads = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 4,
        "sample_size": 8,
        "in_channels": 4,
    }
    torch.manual_seed(0)
    if name == "dit":
        return randomised(DiT(**TINY_DIT)), dark()
    if name == "uvit":
        shape = {
            "img_size": 8,
            "patch_size": 4,
            "in_chans": 1,
            "embed_dim": 16,
            "depth": 8,
            "num_heads": 2,
            "num_classes": -1,
        }
        return randomised(UViT(**shape)), dark(classes=0)
    if name == "diffusers dit":
        return DiffusersBackbone(
            randomised(DiTTransformer2DModel(**heads, out_channels=8, num_embeds_ada_norm=10))
        ), dark(channels=4)
    pixart = PixArtTransformer2DModel(
        **heads, out_channels=8, cross_attention_dim=16, caption_channels=12
    )
    return DiffusersBackbone(randomised(pixart)), Prompts()


@pytest.mark.parametrize("name", ["dit", "uvit", "diffusers dit", "pixart"])
def test_a_block_runs_once_a_batch_and_nothing_changes(name, monkeypatch):
    net, data = network(name)
    calls = []
    block = net.block_at(0)
    attention = next(
        m for name, m in block.named_modules() if "attn" in name and isinstance(m, torch.nn.Linear)
    )
    attention.register_forward_hook(lambda *_: calls.append(1))
    before = vars(block).keys()
    found = measure_map(net, data, DIFFUSION, SMALL)
    # full depth and one more a bin; the trial
    assert len(calls) == SMALL.num_bins * 2 + 1 + net.depth
    assert vars(block).keys() == before  # the block is what it was
    monkeypatch.setattr(mapping, "_reusable", lambda *_: False)
    calls.clear()
    assert measure_map(net, data, DIFFUSION, SMALL) == found
    assert len(calls) == SMALL.num_bins * net.depth
    errors = np.array(found.error_full)
    assert (errors[:, :-1] > 0).all() and not errors[:, -1].any() and len({*errors[0]}) == net.depth


class Recalling(DiT):
    """A DiT whose third block adds what the first one gave."""

    def __init__(self, **args):
        super().__init__(**args)
        self.block_at(0).register_forward_hook(lambda _m, _a, out: setattr(self, "first", out))
        self.block_at(2).register_forward_hook(lambda _m, _a, out: out + self.first)


class Doubling(DiT):
    """A DiT that changes `forward` and not `all_exits`: exits that reuse blocks would be wrong."""

    def forward(self, x_t, t, y=None, *, exit_depth=None):
        return 2 * super().forward(x_t, t, y, exit_depth=exit_depth)


def test_blocks_run_once_only_where_that_changes_nothing(monkeypatch):
    recalling = randomised(Recalling(**TINY_DIT))
    doubling = randomised(Doubling(**TINY_DIT))
    found = [measure_map(net, dark(), DIFFUSION, SMALL) for net in (recalling, doubling)]
    monkeypatch.setattr(mapping, "_reusable", lambda *_: False)
    for net, before in zip((recalling, doubling), found, strict=True):
        assert measure_map(net, dark(), DIFFUSION, SMALL) == before
    monkeypatch.setattr(mapping, "_reusable", lambda *_: True)
    assert measure_map(recalling, dark(), DIFFUSION, SMALL) == found[0]
    assert measure_map(doubling, dark(), DIFFUSION, SMALL) != found[1]  # the trial was needed


# -- manners -------------------------------------------------------------------------------------


def test_the_training_mode_is_as_it_was(tiny_dit, tiny_images):
    tiny_dit.train()
    tiny_dit.block_at(1).eval()
    modes = [m.training for m in tiny_dit.modules()]
    measure_map(tiny_dit, tiny_images, DIFFUSION, SMALL)
    assert [m.training for m in tiny_dit.modules()] == modes
    with pytest.raises(ZeroDivisionError):
        measure_map(tiny_dit, tiny_images, DIFFUSION, SMALL, on_bin=lambda *_: 1 / 0)
    assert [m.training for m in tiny_dit.modules()] == modes and "forward" not in vars(
        tiny_dit.block_at(0)
    )


def test_progress_and_estimate(tiny_dit, tiny_images):
    seen = []
    measure_map(tiny_dit, tiny_images, DIFFUSION, SMALL, on_bin=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    one, ten = (
        map_seconds(tiny_dit, tiny_images, DIFFUSION, MapConfig(num_bins=b, num_images=8))
        for b in (1, 1000)
    )
    assert 0 < one < ten


class Flow(Known):
    prediction_type = "flow"


WRONG = {
    "flow": (Flow(), dark(), SMALL, {}, ConfigError, "predict noise; got one that predicts 'flow'"),
    "one image": (Known(), dark(1), SMALL, {}, DataError, "at least 2 images .*; got 1 in dark"),
    "shape": (Known(), dark(channels=3), SMALL, {}, DataError, "takes images of shape"),
    "bins": (
        Known(),
        dark(),
        MapConfig(num_bins=1001),
        {},
        ConfigError,
        "num_bins must be at most .*1000; got 1001",
    ),
    "batch": (
        Known(),
        dark(),
        SMALL,
        {"batch_size": 0},
        ConfigError,
        "batch_size must be at least 1",
    ),
    "reference": (
        Known(),
        dark(),
        SMALL,
        {"reference": DiT(**TINY_DIT)},
        ConfigError,
        "got depth 4 for 3, num_classes 3 for 0",
    ),
    "not finite": (
        Known((0.0, math.nan, 0.0)),
        dark(),
        SMALL,
        {},
        EvaluationError,
        r"others at t in \[0, 333\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_can_not_be_measured_is_refused(name):
    net, data, config, options, error, message = WRONG[name]
    with pytest.raises(error, match=message) as caught:
        measure_map(net, data, DIFFUSION, config, **options)
    assert "\n" not in str(caught.value) and str(caught.value).count(";") >= 2


# -- the value object ----------------------------------------------------------------------------


def simple(full, chain=100, bins=2):
    edges = tuple(i * chain // bins for i in range(bins + 1))
    same = tuple(tuple(0.5 for _ in row) for row in full)
    return DifficultyMap(chain, edges, full, same, same, same, 8, "dark", "ab", "cd", "ef")


def test_between_the_middles_the_logarithm_is_linear():
    found = simple(((1e-4, 0.0, 0.2), (1e-2, 0.4, 0.0)))  # middles: 24.5 and 74.5
    errors = found.error_at([0, 24.5, 49.5, 74.5, 99, 100])
    assert errors.shape == (6, 3)
    assert np.array_equal(errors[[0, 1]], np.array(found.error_full)[[0, 0]])
    assert np.array_equal(errors[[3, 4, 5]], np.array(found.error_full)[[1, 1, 1]])
    # geometric mean; arithmetic where one of the two is 0
    assert np.allclose(errors[2], [1e-3, 0.2, 0.1])
    assert np.allclose(found.error_at(30, "noise"), [[0.5, 0.5, 0.5]])


def test_bins_of_one_timestep_are_exact_there():
    values = tuple((float(i), 0.0) for i in range(5))
    assert np.array_equal(simple(values, 5, 5).error_at(range(5)), np.array(values))
    assert np.array_equal(simple(((0.1, 0.0),), 50, 1).error_at([0, 30.5]), [[0.1, 0.0]] * 2)


@pytest.mark.parametrize("t", [-1, 101, [5, math.nan]])
def test_timesteps_outside_the_chain_are_refused(t):
    with pytest.raises(ConfigError, match=r"timesteps must lie in \[0, 100\]"):
        simple(((1.0,), (1.0,))).error_at(t)


def test_json_gives_an_equal_map_back(tiny_dit, tiny_images):
    found = measure_map(tiny_dit, tiny_images, DIFFUSION, SMALL)
    assert DifficultyMap.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def without(key):
    return lambda d: d.pop(key)


def changed(**values):
    return lambda d: d.update(values)


CORRUPT = {
    "format": (changed(format="other"), "format must be"),
    "version": (changed(version=2), "reads version 1 .*got 2"),
    "missing": (without("weights"), "keys must be"),
    "unexpected": (changed(extra=1), "keys must be"),
    "edges": (
        changed(edges=[0, 60, 50, 100]),
        "edges must strictly increase from 0 to num_train_timesteps = 100",
    ),
    "edges end": (changed(edges=[0, 50, 90]), "edges must strictly increase"),
    "fractions": (changed(edges=[0, 50.5, 100]), "integers"),
    "no list": (changed(error_full=0.5), "lists of lists"),
    "bins": (changed(error_noise=[[0.5, 0.5]]), "error_noise must have 2 bins"),
    "ragged": (changed(error_full_se=[[0.5, 0.5], [0.5]]), "error_full_se must have 2 bins"),
    "empty": (changed(error_full=[[], []]), "error_full must have 2 bins"),
    "negative": (
        changed(error_full=[[0.5, -0.1], [0.5, 0.5]]),
        "error_full must be finite and not negative; got",
    ),
    "nan": (changed(error_noise=[[0.5, math.nan], [0.5, 0.5]]), "error_noise must be finite"),
    "text": (changed(error_noise=[[0.5, "0.5"], [0.5, 0.5]]), "error_noise must be finite"),
    "images": (changed(num_images=1), "num_images must be at least 2"),
    "name": (changed(data=None), "must be text"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_map_is_refused(name):
    change, message = CORRUPT[name]
    data = json.loads(json.dumps(simple(((0.5, 0.0), (0.25, 0.0))).to_dict()))
    change(data)
    with pytest.raises(StudyError, match=message) as caught:
        DifficultyMap.from_dict(data)
    assert "delete it to measure again" in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "map", 3])
def test_something_else_is_no_map(data):
    with pytest.raises(StudyError, match="format must be"):
        DifficultyMap.from_dict(data)


def test_a_map_is_checked_when_it_is_made():
    with pytest.raises(StudyError, match="num_images"):
        replace(simple(((1.0,), (1.0,))), num_images=0)
