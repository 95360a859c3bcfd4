"""Searches in the shape of the real ones: 28 blocks, 1,000 classes, latents, 2,048 features; all
else is small.

`python -m tests.search.test_true_shape STUDY_JSON RUN_DIR` is one worker of such a search.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch_fidelity import FeatureExtractorBase

from asesearch.backbones import DiT, UViT
from asesearch.config import parse_study
from asesearch.evaluation.extractors import register_extractor
from asesearch.evaluation.fidelity import check_sample_counts, low_fidelity_metric, num_components
from asesearch.search import Workbench, costs, preflight, search
from asesearch.study import Study
from tests.test_cli import call
from tests.test_encoding import make_text_encoder, make_vae

README = Path(__file__).parent.parent.parent / "README.md"
PIXELS = 16  # two latents of the tiny VAE make eight


class Wide(FeatureExtractorBase):
    """As many features as the name says: random ones of 4 x 4 thumbnails."""

    def __init__(self, name, features_list=("all",), feature_extractor_weights_path=None, **_):
        super().__init__(name, list(features_list))
        generator = torch.Generator().manual_seed(0)
        dim = int(name.rpartition("-")[2])
        self.weight = torch.nn.Parameter(torch.randn(48, dim, generator=generator))
        self.phase = torch.nn.Parameter(6 * torch.rand(dim, generator=generator))

    def forward(self, images):
        small = torch.nn.functional.adaptive_avg_pool2d(images.float() / 127.5 - 1, 4).flatten(1)
        return (torch.cos(small @ self.weight + self.phase),)

    @staticmethod
    def get_provided_features_list():
        return ("all",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "all"

    @staticmethod
    def can_be_compiled():
        return True

    @staticmethod
    def get_dummy_input_for_compile():
        return torch.zeros(1, 3, PIXELS, PIXELS, dtype=torch.uint8)


INCEPTION_SIZE = 2048
NEEDED = 18 << 30  # bytes of memory for a training step of DiT-XL/2 in float32
register_extractor("wide-2048", Wide)
register_extractor("wide-512", Wide)


def readme_study():
    (block,) = re.findall(r"```toml\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    return tomllib.loads(block)


def test_the_readmes_study_has_a_score_in_every_protocol():
    config = parse_study(readme_study(), "README")
    check_sample_counts(config, INCEPTION_SIZE)
    images = config.promotion.num_samples
    assert low_fidelity_metric(config.promotion, config.evaluation, INCEPTION_SIZE) == "frechet-pca"
    assert images == 500 and num_components(images, INCEPTION_SIZE) == 125


def one_thousand_classes(place):
    """Pictures of three of 1,000 classes, their latents, the VAE, and a DiT of 28 blocks; many
    pictures more as reference."""
    rng = np.random.default_rng(0)
    for i in range(24):
        path = place / "train" / f"class-{i % 3}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (PIXELS, PIXELS, 3), np.uint8)).save(path)
    (place / "train" / "classes.json").write_text(
        json.dumps({"class-0": 5, "class-1": 207, "class-2": 999})
    )
    (place / "many").mkdir()
    for i in range(2100):
        pixels = np.clip(
            rng.normal(128 + 40 * rng.normal(), 60, (PIXELS, PIXELS, 3)), 0, 255
        ).astype(np.uint8)
        Image.fromarray(pixels).save(place / "many" / f"{i:04}.png")
    make_vae(place / "vae", scaling_factor=0.25)
    options = ("--vae", place / "vae", "--image-size", PIXELS, "--out", place / "latents")
    call("latents", place / "train", *options)
    net = DiT(
        input_size=8,
        patch_size=4,
        in_channels=4,
        hidden_size=16,
        depth=28,
        num_heads=2,
        num_classes=1000,
    )
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.05
    torch.save(net.state_dict(), place / "dit.pt")
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return one_thousand_classes(tmp_path_factory.mktemp("true-shape"))


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("ASESEARCH_CACHE", str(tmp_path / "cache"))


def located(data, place, extractor):
    """The study with this place's paths and an extractor."""
    data["backbone"] |= {"checkpoint": str(place / "dit.pt"), "args": {"num_heads": 2}}
    data["data"] |= {"path": str(place / "latents"), "vae": str(place / "vae")}
    reference = {"kind": "image-folder", "path": str(place / "many"), "image_size": PIXELS}
    data["evaluation"] |= {"extractor": extractor, "reference": reference}
    return data


@pytest.mark.slow
def test_every_trial_of_a_large_network_gets_a_score(place, tmp_path):
    data = {
        "name": "xl",
        "backbone": {"kind": "dit"},
        "data": {"kind": "latents"},
        "elastic": {"num_steps": 3, "batch_size": 4, "distill_frac": 1.0},
        "map": {"num_bins": 4, "num_images": 4},
        "train": {"num_steps": 2, "batch_size": 4},
        "sampling": {"num_steps": 2, "batch_size": 200, "cfg_scale": 1.5},
        "evaluation": {"num_samples": 2049},
        "search": {"proposer": "difficulty", "num_trials": 6, "warm_start": ["full", "D3-DiT"]},
        "promotion": {},
        "confirm": {
            "max_points": 2,
            "num_samples": 2049,
            "repeats": 1,
            "time_images": 2,
            "time_repeats": 1,
        },
    }
    (tmp_path / "study.json").write_text(json.dumps(located(data, place, "wide-2048")))
    command = [
        sys.executable,
        "-m",
        "tests.search.test_true_shape",
        tmp_path / "study.json",
        tmp_path / "run",
    ]
    workers = [
        subprocess.Popen(command, cwd=README.parent, stderr=subprocess.PIPE, text=True)
        for _ in range(WORKERS)
    ]
    errors = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * WORKERS, errors
    results = Study.open(tmp_path / "run").results()
    assert len(results.records) >= 6 and [r.failure for r in results.records] == [None] * len(
        results.records
    )
    scores = [r.low_fidelity.quality for r in results.records]
    assert {q.protocol.metric for q in scores} == {"frechet-pca-50"} and {
        len(q.values) for q in scores
    } == {2}
    assert {q.protocol.metric_name for q in scores} == {
        "Fréchet distance in 50 principal components (wide-2048)"
    }
    assert len(results.complete) >= 2 and all(r.quality.value > 0 for r in results.complete)
    assert results.full is not None and results.confirmations[0].number == results.full.number


def test_the_readmes_study_passes_the_preflight(place):
    """As it is, but for paths and extractor."""
    bench = Workbench(parse_study(located(readme_study(), place, "wide-2048"), "README"))
    checked = "\n".join(preflight(bench).checked)
    assert (
        "low-fidelity protocol: Fréchet distance in 125 principal components (wide-2048), 2 x 500 "
        "images" in checked
    )
    assert "search protocol: Fréchet distance (wide-2048), 3 x 5000 images" in checked
    assert (
        "warm starts: full, D2-DiT, D3-DiT, D7-DiT, full unipc-quadratic-7, "
        "full ddim-50+cache-block-0.1" in checked
    )


@pytest.mark.slow
def test_the_readmes_study_runs_in_miniature(place, tmp_path):
    """Fewer steps, images and trials; more features than low-fidelity images, as there."""
    data = located(readme_study(), place, "wide-512")
    data["elastic"]["num_steps"] = 3
    data["train"] |= {"num_steps": 2, "batch_size": 4}
    data["elastic"]["batch_size"] = 4
    data["map"] = {"num_bins": 4, "num_images": 4}
    data["sampling"]["num_steps"] = 3
    data["evaluation"] |= {"num_samples": 513, "repeats": 2}
    data["search"] |= {"num_trials": 8, "samplers": ["unipc-quadratic-2", "ddim-2"]}
    data["confirm"] = {
        "max_points": 2,
        "num_samples": 513,
        "repeats": 2,
        "time_images": 2,
        "time_repeats": 1,
    }
    results = search(parse_study(data, "README"), tmp_path / "run")
    assert len(results.records) == 8 and [r.failure for r in results.records] == [None] * 8
    assert {r.low_fidelity.quality.protocol.metric for r in results.records} == {"frechet-pca-125"}
    assert {"full", "D2-DiT", "D3-DiT", "D7-DiT"} <= {r.origin for r in results.complete}
    assert len(results.confirmations) >= 2


# -- the studies of large networks -----------------------------------------------------------------

LATENT = 32  # of 256 x 256 images; the tiny VAE makes it of 64


def randomised(net):
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.02
    return net


def pictures(folder, count, size):
    """PNGs of one colour each, with captions."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    lines = []
    for i in range(count):
        colour = tuple(rng.integers(0, 256, 3).tolist())
        Image.new("RGB", (size, size), colour).save(folder / f"{i:04}.png")
        lines.append({"file_name": f"{i:04}.png", "text": f"a {['red', 'blue'][i % 2]} shirt"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def make_latents(place, count, *options, classes=()):
    """Latents of a few pictures by a tiny VAE, in turn of each class: the sections of the study
    that name them."""
    images = pictures(place / "train", count, 2 * LATENT)
    if classes:
        (images / "metadata.jsonl").unlink()
        (images / "classes.json").write_text(json.dumps({f"n{c}": c for c in classes}))
        for i, path in enumerate(sorted(images.glob("*.png"))):
            (images / f"n{classes[i % len(classes)]}").mkdir(exist_ok=True)
            path.rename(images / f"n{classes[i % len(classes)]}" / path.name)
    make_vae(place / "vae", scaling_factor=0.25)
    fixed = ("--vae", place / "vae", "--image-size", 2 * LATENT, "--out", place / "latents")
    call("latents", images, *fixed, *options)
    reference = pictures(place / "many", 2100, PIXELS)
    return {
        "data": {"path": str(place / "latents"), "vae": str(place / "vae")},
        "evaluation": {
            "reference": {"kind": "image-folder", "path": str(reference), "image_size": 2 * LATENT}
        },
    }


def imagenet(place, width):
    """DiT-XL/2, 28 blocks, 16 heads, patches of 2, 1,000 classes, of this width."""
    sections = make_latents(place, 6, classes=(5, 207, 999))
    size = {**DiT.preset_args("DiT-XL/2"), "hidden_size": width}
    net = DiT(**size, input_size=LATENT, in_channels=4, num_classes=1000)
    torch.save(randomised(net).state_dict(), place / "net.pt")
    backbone = {"checkpoint": str(place / "net.pt"), "args": {"num_heads": size["num_heads"]}}
    return {**sections, "backbone": backbone}


def celeba(place, width):
    """U-ViT-S/4 for CelebA, as released."""
    assert width == UViT.preset_args("U-ViT-S/4-CelebA64")["embed_dim"]
    torch.save(randomised(UViT.from_preset("U-ViT-S/4-CelebA64")).state_dict(), place / "net.pth")
    # the reference are the data themselves: more than the extractor has features
    images = pictures(place / "faces", 2100, 128)
    return {"backbone": {"checkpoint": str(place / "net.pth")}, "data": {"path": str(images)}}


def pixart(place, width):
    """PixArt-alpha, 28 blocks, 16 heads, patches of 2, of this width; at its own, 1152, also its
    prompts: 120 tokens of 4096 numbers."""
    from diffusers import PixArtTransformer2DModel

    tokens, embedding = (120, 4096) if width == 1152 else (16, 16)
    text = make_text_encoder(place / "text", width=embedding, max_length=tokens)
    captions = ("--captions", place / "train" / "metadata.jsonl", "--text-encoder", text)
    sections = make_latents(place, 6, "--no-flips", *captions, "--max-length", tokens)
    net = PixArtTransformer2DModel(
        num_layers=28,
        num_attention_heads=16,
        attention_head_dim=width // 16,
        sample_size=LATENT,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=width,
        caption_channels=embedding,
    )
    randomised(net).save_pretrained(place / "net")
    return {**sections, "backbone": {"checkpoint": str(place / "net")}}


IMAGENET = ("imagenet256-dit-xl2", imagenet)
CELEBA = ("celeba64-uvit-s4", celeba)
PIXART = ("pixart-alpha-256", pixart)
SAMPLERS = {
    "imagenet256-dit-xl2": "ddim-50, dpm++2m-25, unipc-quadratic-10",
    "celeba64-uvit-s4": "dpm++2m-50, dpm++2m-25, dpm++2m-10",
    "pixart-alpha-256": "dpm++2m-20, unipc-quadratic-10, unipc-quadratic-7",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("study", "width", "millions", "depth", "warm_starts"),
    [
        (IMAGENET, 128, 8, 28, 5),
        (IMAGENET, 1152, 675, 28, 5),
        (CELEBA, 512, 44, 6, 5),
        (PIXART, 128, 7, 28, 3),
        (PIXART, 1152, 610, 28, 3),
    ],
    ids=["DiT-XL/2, narrow", "DiT-XL/2", "U-ViT-S/4", "PixArt-alpha, narrow", "PixArt-alpha"],
)
def test_the_studies_of_large_networks_pass_the_preflight(
    tmp_path, study, width, millions, depth, warm_starts
):
    """As they are, but for paths, extractor, the size of the pictures, and a CPU's precision."""
    name, make = study
    if millions > 500 and psutil.virtual_memory().available < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of free memory for weights, EMA and moments")
    data = tomllib.loads((README.parent / "studies" / f"{name}.toml").read_text(encoding="utf-8"))
    for section, values in make(tmp_path, width).items():
        data[section] |= values
    data["evaluation"]["extractor"] = "wide-2048"
    for section in ("elastic", "train"):
        assert data[section].pop("mixed_precision") == "bf16"
    bench = Workbench(parse_study(data, name))
    assert bench.backbone.depth == depth and bench.extractor.dim == INCEPTION_SIZE
    assert sum(p.numel() for p in bench.backbone.parameters()) // 10**6 == millions
    checked = preflight(bench).checked
    text = "\n".join(checked)
    assert checked[0] == f"one image through {SAMPLERS[name]}, and wide-2048"
    assert "principal components (wide-2048), 1 x 500 images" in text
    assert "search protocol: Fréchet distance (wide-2048), 1 x 5000 images" in text
    (starts,) = [line for line in checked if line.startswith("warm starts: full, D")]
    assert len(starts.split(", ")) == warm_starts + 2  # and the full network, other samplers
    assert "map: 20 bins of 128 images" in text
    assert "one step of [elastic]" in text and "one step of [train]" in text


WORKERS = 1

if __name__ == "__main__":
    study, folder = sys.argv[1:]
    costs.LATENCY_REPEATS = 1
    search(parse_study(json.loads(Path(study).read_text()), study), Path(folder))
