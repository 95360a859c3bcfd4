"""Two sets of weights of one network: which makes which call, what is trained, shared and saved."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from asesearch.backbones import DiT, UViT, inspect_checkpoint, load_backbone, save_backbone
from asesearch.backbones.base import Backbone
from asesearch.backbones.compiled import TOLERANCE, compiled
from asesearch.backbones.exit_weights import EXITS, ExitWeights
from asesearch.config import BackboneConfig, DataConfig, DiffusionConfig, TrainConfig
from asesearch.data import open_data
from asesearch.diffusion import make_diffusion
from asesearch.errors import CheckpointError, ScheduleError
from asesearch.finetuning import Trainer, finetune
from asesearch.finetuning.batches import draw_batch, strata_below
from asesearch.sampling import sample
from asesearch.schedule import ElasticDepths, ExitSchedule
from tests.shapes import SHAPE

MIXED = ExitSchedule.from_string("3 3 3 3 3 3 3 3 2 1", 3)
UVIT = {"img_size": 28, "patch_size": 14, "in_chans": 1, "embed_dim": 16, "num_classes": 11}
MAKERS = {
    "dit": lambda: DiT(**SHAPE),
    "uvit": lambda: UViT(**UVIT, depth=6, num_heads=2, has_null_label=True),
}


def random_network(kind: str, seed: int) -> Backbone:
    gen = torch.Generator().manual_seed(seed)
    net = MAKERS[kind]()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=gen) * 0.2
    return net.eval()


@pytest.fixture(params=MAKERS)
def two(request) -> ExitWeights:
    return ExitWeights(random_network(request.param, 0), random_network(request.param, 1)).eval()


def inputs(n: int = 5):
    gen = torch.Generator().manual_seed(2)
    x_t = torch.randn(n, 1, 28, 28, generator=gen)
    return x_t, torch.randint(1000, (n,), generator=gen), torch.arange(n)


@torch.no_grad()
def test_full_depth_is_the_first_weights_call_and_any_other_the_second_s(two) -> None:
    args = inputs()
    assert torch.equal(two(*args), two.full(*args))
    for depth in range(1, two.depth):
        assert torch.equal(two(*args, exit_depth=depth), two.exits(*args, exit_depth=depth))
    depths = torch.tensor([two.depth, 1, two.depth, 2, 1])
    mixed = two(*args, exit_depth=depths)
    for i, depth in enumerate(depths.tolist()):
        row = tuple(a[i : i + 1] for a in args)
        assert torch.allclose(mixed[i : i + 1], two(*row, exit_depth=depth), atol=1e-5)


def test_a_file_gives_both_back_and_holds_what_they_share_once(two, tmp_path) -> None:
    x_t, t, y = inputs()
    before = [two(x_t, t, y, exit_depth=d).detach() for d in range(1, two.depth + 1)]
    two.share_unused(x_t[:1], t[:1], y[:1], 1)
    save_backbone(two, tmp_path / "two.safetensors", {"made": "by a test"})
    kind = "dit" if isinstance(two.full, DiT) else "uvit"
    own = BackboneConfig(kind=kind, checkpoint=str(tmp_path / "two.safetensors"))
    read = load_backbone(own).eval()
    assert isinstance(read, ExitWeights)
    assert torch.equal(read(x_t, t, y, exit_depth=1), before[0])
    assert torch.equal(read(x_t, t, y), before[-1])
    stored = load_file(tmp_path / "two.safetensors")
    last = two.depth - 1
    name = f"{'blocks' if kind == 'dit' else 'out_blocks'}.{last}.mlp.fc1.weight"
    assert name in stored and f"{EXITS}{name}" not in stored
    assert read.exits.get_parameter(name) is read.full.get_parameter(name)
    numbers = sum(p.numel() for p in read.parameters())
    assert numbers == sum(v.numel() for v in stored.values() if v.is_floating_point())
    assert numbers < 2 * sum(p.numel() for p in two.full.parameters())
    info = inspect_checkpoint(tmp_path / "two.safetensors")
    assert info.metadata == {"made": "by a test"} and "weights of their own" in info.notes[-1]


def test_what_early_exits_read_is_never_shared(two) -> None:
    args = inputs()
    for deepest in range(two.depth - 1, 0, -1):
        before = [two(*args, exit_depth=d).detach() for d in range(1, deepest + 1)]
        two.share_unused(*(a[:1] for a in args), deepest)
        after = [two(*args, exit_depth=d).detach() for d in range(1, deepest + 1)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_weights_that_are_the_same_are_a_plain_network_s_file(tmp_path) -> None:
    net = random_network("dit", 0)
    save_backbone(ExitWeights(net, net), tmp_path / "same.safetensors")
    read = load_backbone(BackboneConfig(checkpoint=str(tmp_path / "same.safetensors")))
    assert type(read) is DiT


def test_a_second_tensor_that_the_network_does_not_have_is_refused(tmp_path) -> None:
    net = random_network("dit", 0)
    path = tmp_path / "odd.safetensors"
    save_backbone(net, path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    save_file(load_file(path) | {f"{EXITS}blocks.7.odd": torch.zeros(2)}, path, about)
    with pytest.raises(CheckpointError, match=r"blocks\.7\.odd"):
        load_backbone(BackboneConfig(checkpoint=str(path)))


@pytest.fixture(scope="module")
def data():
    return open_data(DataConfig(kind="fashion-mnist", split="test"))


def settings(**changes) -> TrainConfig:
    return TrainConfig.model_validate({"num_steps": 3, "batch_size": 8, "lr": 1e-2, **changes})


PROCESSES = {
    "discrete": DiffusionConfig(),
    "vp-sde": DiffusionConfig(process="vp-sde"),
}


@pytest.mark.parametrize("process", PROCESSES)
def test_only_timesteps_of_early_exits_are_drawn_and_evenly(data, process) -> None:
    diffusion = make_diffusion(PROCESSES[process])
    net = random_network("dit", 0)
    strata = strata_below(3, diffusion, MIXED.exit_depth_at)
    config = settings(batch_size=400)
    seen = torch.cat(
        [draw_batch(data, net, config, diffusion, s, (0, 1), strata).t for s in range(3)]
    ).double()
    assert (MIXED.exit_depth_at(seen.numpy()) < 3).mean() > 0.999
    assert abs(seen.mean() - 900) < 2 and seen.min() < 802 and seen.max() > 998


def test_a_schedule_that_drops_nothing_leaves_nothing_to_train(data) -> None:
    diffusion = make_diffusion(DiffusionConfig())
    net = random_network("dit", 0)
    full = ExitSchedule.full(3)
    with pytest.raises(ScheduleError, match="runs all blocks everywhere"):
        Trainer(net, data, diffusion, full, settings(), exits_only=True)


def test_fine_tuning_changes_the_weights_of_early_exits_alone(data, tmp_path) -> None:
    diffusion = make_diffusion(DiffusionConfig())
    net = random_network("dit", 0)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    result = finetune(ExitWeights(net, net), data, diffusion, MIXED, settings(), tmp_path)
    tuned = result.backbone
    assert isinstance(tuned, ExitWeights) and tuned.full is net
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    own = tuned.own_tensors()
    assert any(k.startswith("blocks.0") for k in own) and any(k.startswith("blocks.1") for k in own)
    assert not any(k.startswith("blocks.2") for k in own)  # no exit of the schedule reads it
    again = finetune(ExitWeights(net, net), data, diffusion, MIXED, settings(), tmp_path)
    with pytest.raises(
        CheckpointError, match="differs in its exits only"
    ):  # nor taken by a plain run
        finetune(net, data, diffusion, MIXED, settings(distill_frac=0.0), tmp_path)
    args = inputs()
    assert torch.equal(again.backbone(*args, exit_depth=1), tuned(*args, exit_depth=1))
    full = ExitSchedule.full(3)
    plain, same, early = (
        sample(
            network,
            "ddim",
            schedule,
            diffusion=diffusion,
            num_steps=4,
            seeds=[0, 1],
            y=torch.tensor([0, 1]),
        ).images
        for network, schedule in ((net, full), (tuned, full), (tuned, MIXED))
    )
    assert torch.equal(plain, same) and not torch.equal(plain, early)


def test_the_elastic_depths_of_early_exits_never_reach_all_blocks() -> None:
    t = np.repeat(np.arange(0, 1000, 50), 200)
    u = np.tile((np.arange(200) + 0.5) / 200, 20)
    for shape in ("uniform", "noise-easy"):
        depths = ElasticDepths(18, 1000, 2, shape, 0.0, 17)
        drawn = depths.draw(t, u)
        assert (drawn.min(), drawn.max()) == (2, 17) == depths.exit_depths
        plain = ElasticDepths(18, 1000, 2, shape, 0.0)
        assert plain.draw(t, u).max() == 18 and "max_exit_depth" not in plain.to_dict()
    with pytest.raises(ScheduleError, match="max_exit_depth must lie in 1…1; got 0"):
        ElasticDepths(1, 1000, 1, "uniform", 0.0, 0)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_of_both_agree_with_eager_ones() -> None:
    two = ExitWeights(random_network("dit", 0), random_network("dit", 1)).eval()
    args = inputs()
    eager = [two(*args, exit_depth=d) for d in (1, 2, 3)]
    with compiled(two):
        for d, want in zip((1, 2, 3), eager, strict=True):
            assert (two(*args, exit_depth=d) - want).abs().max() < TOLERANCE * want.abs().max()
