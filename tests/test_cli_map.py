"""`asesearch map`, as a user runs it."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from asesearch.backbones import DiT
from asesearch.backbones.saving import save_backbone
from asesearch.cli import app
from asesearch.data.latents import INDEX
from asesearch.data.outputs import KNOWN
from asesearch.deployment.manifest import MANIFEST
from asesearch.errors import CheckpointError, ConfigError, DataError, WriteError
from asesearch.study.difficulty import DifficultyMap
from asesearch.study.directory import STUDY as STUDY_FILE
from tests.shapes import SHAPE

STUDY = """
name = "tiny"
[backbone]
kind = "dit"
{backbone}
[data]
kind = "fashion-mnist"
split = "test"
[map]
num_bins = {bins}
num_images = 6
"""
ARGS = f"args = {{ {', '.join(f'{k} = {v}' for k, v in SHAPE.items())} }}"


def call(*args, code=0):
    result = CliRunner().invoke(app, ["map", *map(str, args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result.stdout, result.stderr


def network(path, seed):
    generator = torch.Generator().manual_seed(seed)
    net = DiT(**SHAPE)
    for p in net.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=generator) * 0.2
    save_backbone(net, path)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with study files for a trained and an untrained network, and other
    weights."""
    monkeypatch.chdir(tmp_path)
    network("net.safetensors", 0)
    network("tuned.safetensors", 1)
    for name, backbone, bins in (
        ("trained", 'checkpoint = "net.safetensors"', 4),
        ("scratch", ARGS, 4),
        ("bins", ARGS, 1001),
        ("missing", 'checkpoint = "nowhere.safetensors"', 4),
    ):
        (tmp_path / f"{name}.toml").write_text(STUDY.format(backbone=backbone, bins=bins))
    return tmp_path


def read(folder):
    return DifficultyMap.from_dict(json.loads((folder / "map.json").read_text()))


def test_a_map_of_the_studys_own_network(place):
    out, err = call("trained.toml")
    said = json.loads(out)
    found = read(place / "reports/tiny-map")
    assert said["files"] == [
        f"reports/tiny-map/map.{kind}" for kind in ("csv", "png", "svg", "json")
    ]
    assert all((place / name).stat().st_size > 100 for name in said["files"])
    assert (said["data"], said["num_images"], said["reference"]) == (
        "fashion-mnist/test",
        6,
        "itself",
    )
    assert said["error_by_exit_depth"].keys() == {"data", "middle", "noise"}
    assert np.allclose(
        list(said["error_by_exit_depth"].values()), np.array(found.error_full)[[0, 2, 3]], rtol=1e-3
    )
    assert (
        found.weights == found.reference_weights
        and found.error_full[0][-1] == 0
        and found.error_full[0][0] > 0
    )
    assert (
        len(pd.read_csv(place / "reports/tiny-map/map.csv")) == 4 * 3
        and "map" in err
        and "{" not in err
    )


@pytest.mark.thorough
def test_other_weights_are_judged_against_the_studys_network(place):
    call("trained.toml", "--out", "own")
    out, _ = call("trained.toml", "--weights", "tuned.safetensors", "--out", "tuned")
    own = read(place / "own")
    tuned = read(place / "tuned")
    assert (
        json.loads(out)["reference"] == "net.safetensors"
        and json.loads(out)["weights"] == "tuned.safetensors"
    )
    assert (
        tuned.reference_weights == own.weights != tuned.weights
        and min(row[-1] for row in tuned.error_full) > 0
    )
    call("trained.toml", "--weights", "net.safetensors", "--out", "again")
    assert np.allclose(read(place / "again").error_full, own.error_full, rtol=1e-4, atol=1e-12)


@pytest.mark.thorough
def test_an_untrained_network(place):
    """Nothing sets its exits apart, and none predicts any noise: both show."""
    out, _ = call("scratch.toml", "--out", "scratch")
    found = read(place / "scratch")
    assert json.loads(out)["weights"] == "random, seed 0"
    assert not np.any(found.error_full) and np.allclose(found.error_noise, 1, atol=0.1)
    out, _ = call("scratch.toml", "--weights", "tuned.safetensors", "--out", "tuned")
    found = read(place / "tuned")
    assert (
        json.loads(out)["reference"] == "itself"
        and found.reference_weights == found.weights
        and np.any(found.error_full)
    )


def test_a_dry_run_estimates_and_leaves_nothing(place):
    before = sorted(place.iterdir())
    plan = json.loads(call("trained.toml", "--weights", "tuned.safetensors", "--dry-run")[0])
    assert (
        plan["estimate"]["total_s"] > 0
        and plan["num_bins"] == 4
        and plan["out"] == "reports/tiny-map"
    )
    assert plan["reference"] == "net.safetensors" and sorted(place.iterdir()) == before


WRONG = [
    (["nowhere.toml"], ConfigError, "can't read nowhere.toml"),
    (["bins.toml"], ConfigError, "num_bins must be at most"),
    (["missing.toml"], CheckpointError, "nowhere.safetensors"),
    (["trained.toml", "--weights", "none.safetensors"], CheckpointError, "none.safetensors"),
    (["trained.toml", "--out", "net.safetensors"], WriteError, "can't write to net.safetensors"),
]


@pytest.mark.parametrize(("args", "error", "message"), WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_wrong_input_is_one_line(place, args, error, message):
    with pytest.raises(error, match=message) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


def test_images_that_do_not_fit_are_refused(place):
    text = (place / "scratch.toml").read_text().replace("input_size = 28", "input_size = 14")
    (place / "small.toml").write_text(text)
    with pytest.raises(DataError, match="takes images of shape"):
        call("small.toml")


def test_it_explains_itself():
    out, _ = call("--help")
    assert all(
        word in out for word in ("--weights", "--out", "--dry-run", "trained or", "full network")
    )
    call(code=2)


@pytest.mark.parametrize("classes", [1, 10])
def test_official_weights_without_label_dropout(tmp_path, monkeypatch, classes):
    """A network of one class is measured on images of any; ten labels are ten classes if the study
    file says so."""
    monkeypatch.chdir(tmp_path)
    net = DiT(**{**SHAPE, "num_classes": classes}, class_dropout_prob=0.0)
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.05)
    torch.save(net.state_dict(), "net.pt")
    (tmp_path / "one.toml").write_text(
        STUDY.format(backbone='checkpoint = "net.pt"\nargs = { num_heads = 2 }', bins=2)
    )
    told = f'checkpoint = "net.pt"\nargs = {{ num_heads = 2, num_classes = {classes} }}'
    (tmp_path / "told.toml").write_text(STUDY.format(backbone=told, bins=2))
    out, _ = call("told.toml", "--out", "told")
    assert json.loads(out)["num_bins"] == 2 and DifficultyMap.from_dict(
        json.loads((tmp_path / "told/map.json").read_text())
    )
    if classes == 1:
        call("one.toml", "--out", "one")
        assert (tmp_path / "one/map.json").read_text() == (tmp_path / "told/map.json").read_text()
    else:
        with pytest.raises(
            DataError, match=r"has 9 classes.* without label dropout, set args\.num_classes = 10"
        ):
            call("one.toml", "--out", "one")


def test_weights_that_are_not_finite_are_refused_before_anything_is_measured(place):
    net = DiT(**SHAPE)
    net.final_layer.linear.bias.data[:] = torch.nan
    torch.save(net.state_dict(), "broken.pt")
    text = STUDY.format(
        backbone='checkpoint = "broken.pt"\nargs = { num_heads = 2, num_classes = 10 }', bins=2
    )
    (place / "broken.toml").write_text(text)
    for args in (
        ["broken.toml"],
        ["broken.toml", "--dry-run"],
        ["scratch.toml", "--weights", "broken.pt"],
    ):
        with pytest.raises(CheckpointError, match=r"392 of 392 in final_layer\.linear\.bias"):
            call(*args, "--out", "out")
    assert not (place / "out").exists()


def test_a_map_into_a_folder_that_is_something_else_is_refused(place):
    """Nothing of it is overwritten, nor taken for an image."""
    assert set(KNOWN) >= {STUDY_FILE, MANIFEST, INDEX}
    for name, what in KNOWN.items():
        (place / what).mkdir()
        (place / what / name).write_text("{}")
        with pytest.raises(ConfigError, match=f"got {what}, which is {what} .*; change --out"):
            call("trained.toml", "--out", what)
        assert [path.name for path in (place / what).iterdir()] == [name]
    text = (place / "trained.toml").read_text()
    data = '[map.data]\nkind = "latents"\npath = "encoded"\n'
    (place / "latents.toml").write_text(text + data)
    with pytest.raises(ConfigError, match="beside the latents of a study.*got encoded/map in"):
        call("latents.toml", "--out", "encoded/map")
    train = ["train", "scratch.toml", "--out", "w.safetensors", "--run-dir", "a study directory"]
    with pytest.raises(ConfigError, match="which is a study directory.*change --run-dir"):
        raise CliRunner().invoke(app, train).exception
