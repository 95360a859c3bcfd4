"""Bundles with a block compiled ahead of time: torch's images, one package for every block and
depth."""

import json
from dataclasses import replace

import pytest
import torch

from asesearch.backbones import DiT, UViT
from asesearch.backbones.exit_weights import ExitWeights
from asesearch.deployment import aoti, formats
from asesearch.deployment.aoti import load_aoti
from asesearch.deployment.manifest import file_entries
from asesearch.deployment.verify import verify
from asesearch.errors import CheckpointError
from asesearch.schedule import ExitSchedule
from tests.conftest import TINY_DIT
from tests.deployment.test_onnx import bundle_of, randomised

pytestmark = pytest.mark.slow  # compiling takes a minute


@pytest.fixture(scope="module")
def bundle():
    return bundle_of(randomised(DiT(**TINY_DIT)))


@pytest.fixture(scope="module")
def folder(bundle, tmp_path_factory):
    return formats.write(bundle, tmp_path_factory.mktemp("aoti") / "made", "aoti")


def gap(images, expected):
    return float((images - expected).abs().max() / expected.abs().max())


def test_every_block_depth_and_batch_runs_the_one_package(bundle, folder):
    loaded = load_aoti(folder)
    assert len(list(folder.glob("*.pt2"))) == 1
    calls = {block._compiled_call_impl._code for block in loaded.backbone.blocks}
    assert len(calls) == 1
    for count in (1, 2, 5):
        x_t = torch.randn(count, 1, 8, 8)
        t = torch.arange(count)
        y = t % 3
        for depth in (1, 2, 3, 4):
            with torch.no_grad():
                expected = bundle.backbone(x_t, t, y, exit_depth=depth)
                assert gap(loaded.backbone(x_t, t, y, exit_depth=depth), expected) < 1e-5


def test_the_images_are_the_bundles(bundle, folder):
    made = load_aoti(folder).sample([5, 2, 9])
    expected = bundle.sample([5, 2, 9])
    assert gap(made.images, expected.images) < 1e-4
    assert (made.nfe, made.block_calls) == (expected.nfe, expected.block_calls)


def test_its_weights_are_those_of_each_block(bundle, folder):
    """The negative control: a block with other weights computes something else."""
    loaded = load_aoti(folder)
    calls = [block._compiled_call_impl for block in loaded.backbone.blocks]
    for block, call in zip(loaded.backbone.blocks, reversed(calls), strict=True):
        block._compiled_call_impl = call
    assert gap(loaded.sample([5]).images, bundle.sample([5]).images) > 1e-2


def test_early_exits_with_weights_of_their_own(bundle, tmp_path):
    net = ExitWeights(bundle.backbone, randomised(DiT(**TINY_DIT), 0.15)).eval()
    made = replace(bundle, backbone=net)
    loaded = load_aoti(formats.write(made, tmp_path / "made", "aoti"))
    own = loaded.backbone
    assert isinstance(own, ExitWeights)
    codes = {block._compiled_call_impl._code for block in own.droppable_blocks()}
    assert len(codes) == 1 and len(own.droppable_blocks()) == 8
    assert gap(loaded.sample([5, 2]).images, made.sample([5, 2]).images) < 1e-4
    assert gap(loaded.sample([5, 2]).images, bundle.sample([5, 2]).images) > 1e-2


def test_u_vit(tmp_path):
    net = randomised(UViT(img_size=8, patch_size=4, embed_dim=16, depth=4, num_heads=2))
    made = bundle_of(net, "uvit", ExitSchedule.from_string("2 1", 2), cfg_scale=1.0)
    loaded = load_aoti(formats.write(made, tmp_path / "made", "aoti"))
    assert gap(loaded.sample([1, 2]).images, made.sample([1, 2]).images) < 1e-4


@pytest.mark.parametrize("kind", ["dit", "uvit"])
def test_under_autocast_blocks_compute_in_what_they_were_compiled_for(bundle, tmp_path, kind):
    """U-ViT's merging of skips hands them bfloat16."""
    if kind == "uvit":
        net = randomised(UViT(img_size=8, patch_size=4, embed_dim=16, depth=4, num_heads=2))
        bundle = bundle_of(net, "uvit", ExitSchedule.from_string("2 1", 2), cfg_scale=1.0)
    how = bundle.sampling.model_copy(update={"precision": "bf16"})
    made = replace(bundle, sampling=how)
    folder = formats.write(made, tmp_path / "made", "aoti")
    images = load_aoti(folder).sample([1, 2]).images
    assert 0 < gap(images, made.sample([1, 2]).images) < 0.02
    assert gap(images, bundle.sample([1, 2]).images) < 0.02
    assert verify(folder, speed=False)[-1].name == "images"


def test_a_bundle_of_compiled_blocks_runs_the_package(bundle, tmp_path, monkeypatch, only_traced):
    how = bundle.sampling.model_copy(update={"compile": True})
    folder = formats.write(replace(bundle, sampling=how), tmp_path / "made", "aoti")
    path = folder / "bundle.json"
    data = json.loads(path.read_text())
    assert data["sampling"]["compile"] is False
    data["sampling"]["compile"] = True  # as earlier releases wrote it
    path.write_text(json.dumps(data))
    calls = []
    call = aoti._Call.__call__
    monkeypatch.setattr(aoti._Call, "__call__", lambda *a: calls.append(1) or call(*a))
    loaded = load_aoti(folder, check_parity=False)
    made = loaded.sample([5, 2])
    assert 2 * len(calls) == made.block_calls  # guidance is one call of two halves
    assert gap(made.images, bundle.sample([5, 2]).images) < 1e-4
    assert only_traced() == 0 and "compiled blocks" not in verify(folder)[1].found


def test_verify_takes_it(folder):
    checks = verify(folder, speed=False)
    assert [c.name for c in checks if c.passed] == ["files", "network", "parity", "images"], checks[
        -1
    ]
    assert "its block compiled" in checks[1].found


def test_what_must_not_run_is_refused(folder, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(aoti, "built", lambda: {"torch": "1.0"})
    with pytest.raises(CheckpointError, match="compiled for this machine and torch"):
        load_aoti(copy)
    monkeypatch.undo()
    package = copy / aoti.PACKAGE
    package.write_bytes(package.read_bytes()[:-100])
    opened = pytest.fail
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *a: opened("it was opened"))
    with pytest.raises(CheckpointError, match=r"block.pt2 is damaged"):
        load_aoti(copy)
    monkeypatch.undo()
    path = copy / "bundle.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"files": file_entries(copy, aoti.FILES)}))
    with pytest.raises(CheckpointError, match="no compiled block that this torch can load"):
        load_aoti(copy)
