"""Compiled blocks: one graph for all blocks and depths, the same outputs, nothing left behind."""

import copy

import numpy as np
import pytest
import torch

from asesearch.backbones import DiT, UViT
from asesearch.backbones import compiled as module
from asesearch.backbones.compiled import TOLERANCE, compiled
from asesearch.backbones.diffusers_adapter import DiffusersBackbone
from asesearch.config import TrainConfig
from asesearch.data import ImageArray
from asesearch.diffusion import Diffusion
from asesearch.errors import ConfigError
from asesearch.finetuning import finetune
from asesearch.schedule import ExitSchedule
from tests.conftest import TINY_DIT

UVIT = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 4, "num_heads": 2}


def random_net(cls, seed=0, **args):
    """Every parameter random, so that each block counts."""
    generator = torch.Generator().manual_seed(seed)
    net = cls(**args).eval()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.2
    return net


def inputs(net, count, device="cpu"):
    x_t = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))
    y = torch.arange(count) % net.num_classes if net.num_classes else None
    t = torch.arange(count) * 10
    return [None if v is None else v.to(device) for v in (x_t, t, y)]


def largest_difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.thorough
@torch.no_grad()
@pytest.mark.parametrize(("cls", "args"), [(DiT, {**TINY_DIT, "depth": 28}), (UViT, UVIT)])
def test_all_blocks_and_depths_share_one_graph(cls, args, only_traced):
    net = random_net(cls, **args)
    with compiled(net):
        for depth in range(net.min_exit_depth, net.depth + 1):
            given = inputs(net, 2 + depth % 3)
            net(*given, exit_depth=depth)
        depths = torch.tensor([net.depth, net.depth, 1])  # never one image alone
        net(*inputs(net, 3), exit_depth=depths)
    assert only_traced() == 1
    with compiled(net):  # again, and another network of these sizes
        net(*inputs(net, 5))
    other = random_net(cls, 1, **{**args, "depth": 2})
    with compiled(other):
        compiled_out = other(*inputs(other, 5))
    assert only_traced() == 1
    assert torch.equal(compiled_out, other(*inputs(other, 5)))  # and not the first one's weights


@pytest.mark.thorough
@torch.no_grad()
def test_a_second_graph_would_be_counted(only_traced):
    """Negative control of the count: one image, other arithmetic and another width have their
    own."""
    net = random_net(DiT, **TINY_DIT)
    with compiled(net):
        net(*inputs(net, 3))
        net(*inputs(net, 1))
        assert only_traced() == 2
        with torch.autocast("cpu", torch.bfloat16):
            net(*inputs(net, 3))
        assert only_traced() == 3
    wide = random_net(DiT, **{**TINY_DIT, "hidden_size": 32})
    with compiled(wide):
        wide(*inputs(wide, 3))
    assert only_traced() == 4


@pytest.mark.thorough
@torch.no_grad()
def test_many_widths_in_one_process_stay_compiled(only_traced):
    """torch refuses one function too many variants: each width has a function of its own."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for width in (8, 16, 24):
            net = random_net(DiT, **{**TINY_DIT, "depth": 1, "hidden_size": width})
            with compiled(net):
                net(*inputs(net, 2))
        assert only_traced() == 3
        with pytest.raises(ConfigError, match="can't be compiled"), compiled(net):
            net(*inputs(net, 1))


@torch.no_grad()
def test_the_network_is_as_before_afterwards(only_traced):
    net = random_net(DiT, **TINY_DIT)
    expected = net(*inputs(net, 2))
    names = list(net.state_dict())
    with pytest.raises(RuntimeError, match="stop"), compiled(net):
        twin = copy.deepcopy(net)
        assert list(net.state_dict()) == names
        raise RuntimeError("stop")
    with compiled(net, on=False):
        assert torch.equal(net(*inputs(net, 2)), expected)
    assert torch.equal(twin(*inputs(twin, 2)), expected)
    assert only_traced() == 0 and all(b._compiled_call_impl is None for b in net.blocks)


@torch.no_grad()
def test_blocks_that_cannot_be_compiled_are_refused_in_one_line(monkeypatch, num_graphs):
    net = random_net(DiT, **TINY_DIT)

    def broken(graph, example):
        raise OSError("no compiler\nfound here")

    monkeypatch.setattr(module, "BACKEND", broken)
    with (
        pytest.raises(ConfigError, match="can't be compiled here .*compile = false") as error,
        compiled(net),
    ):
        net(*inputs(net, 2))
    assert "\n" not in str(error.value)


@pytest.mark.slow
@torch.no_grad()
def test_blocks_of_diffusers_are_compiled_too(only_traced):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 4, "in_channels": 1}
    config = {**sizes, "_class_name": "DiTTransformer2DModel", "sample_size": 8, "out_channels": 2}
    net = random_net(DiffusersBackbone, transformer={**config, "num_embeds_ada_norm": 3})
    for depth in (4, 2, 1):
        for count in (3, 2):
            given = inputs(net, count)
            expected = net(*given, exit_depth=depth)
            with compiled(net):
                assert torch.equal(net(*given, exit_depth=depth), expected)
    assert only_traced() == 2  # the first block's input lies otherwise in memory


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("cls", "args"), [(DiT, TINY_DIT), (UViT, UVIT)])
def test_compiled_outputs_are_those_of_eager_blocks(cls, args, num_graphs):
    net = random_net(cls, **args)
    for count in (3, 1, 5):
        for depth in range(net.min_exit_depth, net.depth + 1):
            given = inputs(net, count)
            expected = net(*given, exit_depth=depth)
            with compiled(net):
                found = net(*given, exit_depth=depth)
            assert largest_difference(found, expected) < TOLERANCE
    assert num_graphs() == 2  # many images, and one
    with compiled(net):
        for exact, out in zip(net.all_exits(*given), _eager_exits(net, given), strict=True):
            assert largest_difference(exact, out) < TOLERANCE


def _eager_exits(net, given):
    blocks = net.transformer_blocks()
    twin = copy.deepcopy(net)
    assert len(blocks) == len(twin.transformer_blocks())
    return list(twin.all_exits(*given))


# -- on a GPU --------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@gpu
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("cls", "args"), [(DiT, TINY_DIT), (UViT, UVIT)])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_graphs_give_the_outputs_of_eager_calls(cls, args, precision, num_graphs):
    net = random_net(cls, **args).cuda()
    bf16 = precision == "bf16"
    for again in range(2):
        for count in (4, 1):
            for depth in range(net.min_exit_depth, net.depth + 1):
                given = inputs(net, count, "cuda")
                given[0] = given[0] + again
                with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                    expected = net(*given, exit_depth=depth).float()
                    with compiled(net):
                        found = net(*given, exit_depth=depth).float()
                assert largest_difference(found, expected) < (3e-2 if bf16 else TOLERANCE)
    made = module._GRAPHS[net]._made
    assert len(made) == 2 * (net.depth + 1 - net.min_exit_depth)  # captured once each
    # many images, and one; the decoder of U-ViT gets tokens of another type under bf16
    assert num_graphs() == (4 if bf16 and cls is UViT else 2)


@gpu
@pytest.mark.slow
@torch.no_grad()
def test_graphs_follow_weights(num_graphs):
    """Changed in place they count at once; moved elsewhere, graphs are made again."""
    net = random_net(DiT, **TINY_DIT).cuda()
    given = inputs(net, 2, "cuda")
    with compiled(net):
        net(*given)
    net.final_layer.linear.bias += 1
    for _ in range(2):
        with compiled(net):
            assert largest_difference(net(*given), _eager(net, given)) < TOLERANCE
        net.load_state_dict({k: v + 0.01 for k, v in net.state_dict().items()}, assign=True)
    other = copy.deepcopy(net)
    with compiled(other):
        assert largest_difference(other(*given), _eager(net, given)) < TOLERANCE


def _eager(net, given):
    return copy.deepcopy(net)(*given)


@pytest.mark.thorough
def test_training_runs_the_teachers_blocks_compiled_too(only_traced, monkeypatch):
    """And leaves them as they were. The student's are compiled by torch alone."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _self: None)
    net = random_net(DiT, **TINY_DIT)
    images = ImageArray(
        np.arange(12 * 64, dtype=np.uint8).reshape(12, 1, 8, 8), np.zeros(12, int), "grey"
    )
    losses = {}
    for on in (False, True):
        config = TrainConfig(num_steps=2, batch_size=4, distill_frac=1.0, compile=on)
        early = ExitSchedule.uniform_intervals([net.depth, 1], net.depth)
        trained = finetune(net, images, Diffusion(), early, config, teacher=net)
        losses[on] = trained.losses
    assert only_traced() > 0 and losses[True] == pytest.approx(losses[False])
    assert not any(part._compiled_call_impl for part in net.modules())
