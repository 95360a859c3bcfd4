"""A DiT that is made deeper computes what it did, and its new blocks can learn."""

import importlib.util
from pathlib import Path

import pytest
import torch

from asesearch.backbones import load_backbone
from asesearch.config import BackboneConfig, load_study

STUDIES = Path(__file__).parents[1] / "studies"


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("grow_dit", STUDIES / "grow_dit.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("depth", [5, 6, 8, 11])
def test_the_deeper_network_gives_the_same_outputs(module, tiny_dit, depth):
    deeper = module.grow(tiny_dit, depth).eval()
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 1, 250, 500, 750, 999])
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    with torch.no_grad():
        assert torch.equal(deeper(x, t, y), tiny_dit.eval()(x, t, y))
    assert deeper.depth == depth and deeper.config["depth"] == depth


def test_the_new_blocks_learn(module, tiny_dit):
    deeper = module.grow(tiny_dit, 6)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    deeper(x, torch.tensor([10, 900]), torch.tensor([0, 1])).square().sum().backward()
    new = set(range(6)) - set(module.places_of(4, 6))
    assert len(new) == 2
    for index in new:
        assert deeper.block_at(index).adaLN_modulation[1].weight.grad.abs().max() > 0


def test_a_network_is_never_made_shallower(module, tiny_dit):
    with pytest.raises(SystemExit, match="over the 4 blocks"):
        module.grow(tiny_dit, 4)


@pytest.mark.parametrize(("kind", "name", "depth"), [("dit", "dit-18", 18), ("uvit", "uvit", 8)])
def test_networks_trained_on_a_gpu_are_kept_in_half_precision_and_compute_in_float32(
    kind, name, depth
):
    assert load_study(STUDIES / f"fashion-mnist-{name}.toml").backbone.kind == kind
    net = load_backbone(BackboneConfig(kind=kind, checkpoint=f"shipped:fashion-mnist-{name}"))
    assert net.depth == depth
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    linear = net.block_at(0).mlp.fc1.weight
    assert torch.equal(linear, linear.half().float())
