"""Every study file loads, and those for large networks run to the end on tiny networks and data of
the same kind.

Only sizes, paths and numbers are made small; all else is as in the file.
"""

import copy
import hashlib
import html
import json
import re
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import FeatureExtractorBase

from asesearch.backbones import DiT, UViT
from asesearch.backbones.diffusers_adapter import DiffusersBackbone
from asesearch.config import DataConfig, load_study, parse_study, read_toml
from asesearch.data.latents import LatentShards
from asesearch.deployment.export import export
from asesearch.deployment.images import decoder_of, prompts_for
from asesearch.deployment.reading import load_bundle
from asesearch.diffusion import Diffusion
from asesearch.encoding.networks import Vae, read_own_config
from asesearch.errors import AseSearchError, ConfigError, DataError
from asesearch.evaluation.extractors import register_extractor
from asesearch.finetuning import check_fit
from asesearch.point import Point
from asesearch.report import write_report
from asesearch.schedule import ExitSchedule
from asesearch.search import Workbench, opening, parts, search
from asesearch.search.costs import Costs, elastic_depths
from asesearch.search.plan import make_plan
from asesearch.study import Study
from tests.test_cli import call
from tests.test_encoding import make_text_encoder, make_vae

FOLDER = Path(__file__).parent.parent / "studies"
STUDIES = sorted(FOLDER.glob("*.toml"))
SHORT = {"num_steps": 2, "batch_size": 4, "mixed_precision": "no", "warmup_steps": 1}
SMALL = {
    "elastic": SHORT,
    "map": {"num_bins": 2, "num_images": 3},
    "train": SHORT,
    "promotion": {"num_samples": 14},
    "sampling": {"num_steps": 3, "batch_size": 8},
    "evaluation": {"extractor": "thumbnail", "num_samples": 14},
    "search": {"num_trials": 3},
    "confirm": {"num_samples": 14, "max_points": 1, "time_images": 2, "time_repeats": 1},
}
PIXELS = 16  # two latents of the tiny VAE make eight


class Thumbnail(FeatureExtractorBase):
    """Features of colour images that cost nothing: their 2 x 2 thumbnails."""

    def __init__(
        self, name="thumbnail", features_list=("12",), feature_extractor_weights_path=None, **_
    ):
        super().__init__(name, list(features_list))

    def forward(self, images):
        return (torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1),)

    @staticmethod
    def get_provided_features_list():
        return ("12",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "12"

    @staticmethod
    def can_be_compiled():
        return True

    @staticmethod
    def get_dummy_input_for_compile():
        return torch.zeros(1, 3, PIXELS, PIXELS, dtype=torch.uint8)


register_extractor("thumbnail", Thumbnail)


def randomised(net):
    """Every parameter random and small: as initialised, these networks answer 0."""
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.05
    return net


def make_images(folder, classes=(".",), count=24):
    """PNGs of 20 x 18 pixels, in turn in each class folder."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / classes[i % len(classes)] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (18, 20, 3), np.uint8)).save(path)
    return folder


def small(name, **changes):
    """The study file with `SMALL` and `changes`, section by section."""
    data = copy.deepcopy(read_toml(FOLDER / f"{name}.toml"))
    for section, values in [*SMALL.items(), *changes.items()]:
        data[section] = {**data[section], **values}
    return parse_study(data, name)


def report(results, folder, figures=False):
    """Write the report; drawing its figures takes seconds, which a slow test spends."""
    with pytest.MonkeyPatch.context() as patch:
        if not figures:
            patch.setattr("asesearch.report.page.drawings", lambda results: [])
        page = write_report(results, folder)
    assert results.name in page.read_text(encoding="utf-8")
    assert bool(list((folder / "figures").glob("*.svg"))) == figures


def run(config, folder):
    """Search, confirm, report and export; the bundle's folder."""
    results = search(config, folder / "run")
    assert [r.origin for r in results.complete] == list(config.search.warm_start[:3]), [
        r.failure for r in results.records
    ]
    report(results, folder / "report")
    return exported(results, folder)


def exported(results, folder):
    """The bundle of the last point that is confirmed."""
    assert results.confirmations[0].number == 0 and results.samples[0].shape == (
        14,
        3,
        PIXELS,
        PIXELS,
    )
    study = Study.open(folder / "run")
    return export(study, study.record(results.confirmations[-1].number), folder / "bundle")


def climb(config, folder, figures=False, warm_starts=1):
    """The same study as far as the proposals, with so many warm starts and one further sampler."""
    data = config.model_dump()
    first = list(config.search.warm_start[:warm_starts])
    data["search"] |= {
        "warm_start": first,
        "samplers": ["ddim-2"],
        "num_trials": warm_starts + 3,
    }
    results = search(parse_study(data, "climb"), folder / "run")
    assert results.difficulty_map is not None and results.difficulty_map.num_bins == 2
    assert [r.origin for r in results.records] == [
        *first,
        "full ddim-2",
        "difficulty",
        "difficulty",
    ]
    assert {*first, "full ddim-2"} <= {r.origin for r in results.complete}
    assert (
        all(r.low_fidelity is not None for r in results.records)
        and results.warm_up["gflops"]["elastic"] > 0
    )
    assert results.confirmations
    report(results, folder / "report", figures)
    return results


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("ASESEARCH_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_study_file_loads_and_is_called_what_it_is(path):
    assert load_study(path).name == path.stem
    text = path.read_text()
    assert text.startswith("# Question:") and "asesearch" in text


# -- CelebA, U-ViT ---------------------------------------------------------------------------------


def celeba_study(place):
    """The study, a tiny U-ViT and images for it."""
    net = UViT(
        img_size=PIXELS,
        patch_size=8,
        in_chans=3,
        embed_dim=16,
        depth=12,
        num_heads=2,
        num_classes=-1,
    )
    torch.save(randomised(net).state_dict(), place / "uvit.pth")
    return small(
        "celeba64-uvit-s4",
        backbone={"checkpoint": str(place / "uvit.pth"), "args": {"num_heads": 2}},
        data={"path": str(make_images(place / "faces")), "image_size": PIXELS},
    )


@pytest.mark.thorough
def test_celeba(tmp_path):
    bundle = exported(climb(celeba_study(tmp_path), tmp_path, warm_starts=3), tmp_path)
    assert load_bundle(bundle).sample([0, 1]).images.shape == (2, 3, PIXELS, PIXELS)
    call("sample", bundle, "--num", 3, "-o", tmp_path / "x.png")
    assert (tmp_path / "x.png").is_file()


@pytest.mark.slow
def test_celeba_with_figures(tmp_path):
    climb(celeba_study(tmp_path), tmp_path / "ladder", figures=True)


# -- ImageNet, DiT on latents ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Images of three classes, their latents, the VAE, and a DiT for them: all that the study
    names."""
    place = tmp_path_factory.mktemp("imagenet")
    make_images(place / "train", ("n01", "n02", "n03"))
    make_vae(place / "vae", scaling_factor=0.25)
    options = (
        "--vae",
        place / "vae",
        "--image-size",
        PIXELS,
        "--out",
        place / "latents",
        "--batch-size",
        16,
    )
    plan = json.loads(call("latents", place / "train", *options, "--dry-run")[0])
    assert (
        plan["images"] == 24
        and plan["shape"] == [4, 8, 8]
        and plan["total_s"] > 0
        and not (place / "latents").exists()
    )
    made = json.loads(call("latents", place / "train", *options, "--verify")[0])
    assert made["images"] == 24 and made["classes"] == 3 and made["verified"]
    on_disk = sum(p.stat().st_size for p in (place / "latents").glob("l*.npy"))
    assert plan["total_bytes"] <= on_disk < 1.1 * plan["total_bytes"]
    net = DiT(
        input_size=8,
        patch_size=4,
        in_channels=4,
        hidden_size=16,
        depth=4,
        num_heads=2,
        num_classes=3,
    )
    torch.save(randomised(net).state_dict(), place / "dit.pt")
    return place


def imagenet_study(place, **data):
    return small(
        "imagenet256-dit-xl2",
        backbone={"checkpoint": str(place / "dit.pt"), "args": {"num_heads": 2}},
        data={"path": str(place / "latents"), "vae": str(place / "vae"), **data},
        evaluation={**SMALL["evaluation"], "reference": reference(place)},
        search={"num_trials": 3, "min_exit_depth": 1},
    )


def reference(place, image_size=PIXELS):
    return {"kind": "image-folder", "path": str(place / "train"), "image_size": image_size}


@pytest.mark.thorough
def test_imagenet(imagenet, tmp_path, caplog):
    config = imagenet_study(imagenet)
    bundle = run(config, tmp_path)
    record = Study.open(tmp_path / "run").record(1)
    spent = {"low_fidelity", "finetune", "sample", "decode", "evaluate", "other"}
    assert spent == record.seconds.keys()
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert (
        manifest["latents"]["scale"] == [0.25] * 4
        and manifest["provenance"]["config"]["data"]["kind"] == "latents"
    )
    call("sample", bundle, "--num", 3, "-o", tmp_path / "x.npz")
    loaded = load_bundle(bundle)
    latents = np.load(tmp_path / "x.npz")["latents"]
    assert latents.dtype == np.float32 and np.array_equal(
        latents, loaded.sample(range(3)).images.numpy()
    )
    call("sample", bundle, "--num", 3, "--vae", imagenet / "vae", "-o", tmp_path / "y.npz")
    decoded = decoder_of(loaded, imagenet / "vae").decode(torch.from_numpy(latents))
    assert np.array_equal(np.load(tmp_path / "y.npz")["images"], parts.to_uint8(decoded).numpy())
    assert "is not the one that decoded" not in caplog.text
    make_other_decoder(imagenet / "vae", tmp_path / "other")
    decoder_of(loaded, tmp_path / "other")
    assert f"the VAE {tmp_path}/other (SHA-256" in caplog.text
    assert "is not the one that decoded the study's images" in caplog.text
    with pytest.raises(ConfigError, match="picture needs --vae"):
        call("sample", bundle, "-o", tmp_path / "z.png")


def test_a_study_of_latents_that_can_t_be_evaluated_is_refused_before_the_network_is_read(
    imagenet, tmp_path
):
    good = imagenet_study(imagenet)

    def changed(**sections):
        data = good.model_dump()
        for section, values in sections.items():
            data[section] |= values
        return parse_study(data, "changed")

    make_vae(tmp_path / "other", scaling_factor=0.5)
    latents = {"kind": "latents", "path": str(imagenet / "latents")}
    wrong = [
        (
            changed(data={"vae": None}, backbone={"checkpoint": "nowhere"}),
            ConfigError,
            "got no data.vae",
        ),
        (
            changed(evaluation={"reference": None}, backbone={"checkpoint": "nowhere"}),
            ConfigError,
            "set evaluation.reference",
        ),
        (changed(evaluation={"reference": latents}), ConfigError, "set evaluation.reference"),
        (
            changed(evaluation={"reference": reference(imagenet, 8)}),
            ConfigError,
            "3 and 16; got 3 and 8",
        ),
        (
            changed(data={"vae": str(tmp_path / "other")}),
            DataError,
            r"by \[0.25.*after a shift.*got \[0.5",
        ),
        (changed(data={"vae": str(imagenet / "latents")}), AseSearchError, "config.json"),
        (changed(sampling={"solver": "euler-maruyama"}), ConfigError, "vp-sde process"),
    ]
    for config, error, message in wrong:
        with pytest.raises(error, match=message):
            Workbench(config)
    with pytest.raises(ConfigError, match=r"data\.vae is for data of kind 'latents'"):
        opening.open_data(DataConfig(kind="image-folder", path="x", image_size=8, vae="y"))


def test_prompts_and_labels_are_no_substitute_for_each_other(imagenet):
    from diffusers import PixArtTransformer2DModel

    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 4, "sample_size": 8}
    net = DiffusersBackbone(
        PixArtTransformer2DModel(**heads, cross_attention_dim=16, caption_channels=16)
    )
    with pytest.raises(DataError, match="must give the prompts that the network takes.*got Tensor"):
        check_fit(net, LatentShards(imagenet / "latents"), Diffusion(), ExitSchedule.full(4))
    with pytest.raises(DataError, match="prompts need captions"):
        LatentShards(imagenet / "latents").conditions([0])


@pytest.mark.thorough
def test_a_plan_counts_the_decoding(imagenet):
    plan = make_plan(Workbench(imagenet_study(imagenet)))
    assert plan.decode_s > 0 and plan.trial_s > 2 * plan.train_step_s + 14 * plan.decode_s


def make_other_decoder(vae, folder):
    """A VAE of the same encoder, as sd-vae-ft-ema and -mse are."""
    net = Vae(vae, "cpu").net
    net.decoder.conv_in.weight.data.mul_(1.5)
    net.save_pretrained(folder)


def test_another_decoder_is_another_study(imagenet, tmp_path):
    """The path of the VAE may change, what lies there may not."""
    first = Workbench(imagenet_study(imagenet)).identity
    shutil.copytree(imagenet / "vae", tmp_path / "moved")
    make_other_decoder(imagenet / "vae", tmp_path / "other")
    assert Workbench(imagenet_study(imagenet, vae=str(tmp_path / "moved"))).identity == first
    assert (
        Workbench(imagenet_study(imagenet, vae=str(tmp_path / "other"))).identity["decoder"]
        != first["decoder"]
    )


def first_digest(net, config):
    """As releases took it first, of VAEs and text encoders."""
    sha = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(net.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def test_a_decoder_on_record_by_its_first_digest_is_the_same_decoder(imagenet, tmp_path):
    vae = Vae(imagenet / "vae", "cpu")
    first = first_digest(vae.net, read_own_config(imagenet / "vae"))
    assert first != vae.digest
    recorded = Workbench(imagenet_study(imagenet)).identity
    recorded["decoder"]["digest"] = first
    (tmp_path / "inputs.json").write_text(json.dumps(recorded))
    assert Workbench(imagenet_study(imagenet), tmp_path).identity == recorded
    make_other_decoder(imagenet / "vae", tmp_path / "other")
    other = Workbench(imagenet_study(imagenet, vae=str(tmp_path / "other")), tmp_path).identity
    assert other["decoder"]["digest"] not in (first, vae.digest)


def test_latents_on_record_by_first_digests_are_gone_on_with(imagenet, tmp_path):
    shutil.copytree(imagenet / "latents", tmp_path / "latents")
    index = json.loads((tmp_path / "latents" / "index.json").read_text())
    vae = Vae(imagenet / "vae", "cpu")
    index["identity"]["vae"] = first_digest(vae.net, read_own_config(imagenet / "vae"))
    (tmp_path / "latents" / "index.json").write_text(json.dumps(index))
    (tmp_path / "latents" / "latents-00000.npy").unlink()
    options = ("--image-size", PIXELS, "--out", tmp_path / "latents", "--batch-size", 16)
    call("latents", imagenet / "train", "--vae", imagenet / "vae", *options)
    again = (tmp_path / "latents" / "latents-00000.npy").read_bytes()
    assert again == (imagenet / "latents" / "latents-00000.npy").read_bytes()
    make_vae(tmp_path / "other", seed=1, scaling_factor=0.25)
    with pytest.raises(DataError, match="holds another encoding; changed: vae"):
        call("latents", imagenet / "train", "--vae", tmp_path / "other", *options)


# -- PixArt, text to image -------------------------------------------------------------------------


def pixart_study(tmp_path):
    """The study, a tiny PixArt, its text encoder, and latents of captioned images."""
    from diffusers import PixArtTransformer2DModel

    images = make_images(tmp_path / "train")
    lines = [
        {"file_name": p.name, "text": f"a {['red', 'blue'][i % 2]} shirt"}
        for i, p in enumerate(sorted(images.iterdir()))
    ]
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    make_vae(tmp_path / "vae")
    text = make_text_encoder(tmp_path / "text")
    call(
        "latents",
        images,
        "--vae",
        tmp_path / "vae",
        "--image-size",
        PIXELS,
        "--no-flips",
        "--out",
        tmp_path / "latents",
        "--captions",
        images / "metadata.jsonl",
        "--text-encoder",
        text,
        "--max-length",
        8,
    )
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 4, "sample_size": 8}
    net = PixArtTransformer2DModel(
        **heads, in_channels=4, out_channels=8, cross_attention_dim=16, caption_channels=16
    )
    randomised(net).save_pretrained(tmp_path / "pixart" / "transformer")
    return small(
        "pixart-alpha-256",
        backbone={"checkpoint": str(tmp_path / "pixart")},
        data={"path": str(tmp_path / "latents"), "vae": str(tmp_path / "vae")},
        evaluation={**SMALL["evaluation"], "reference": reference(tmp_path)},
        search={"num_trials": 3, "min_exit_depth": 1},
    )


@pytest.mark.thorough
def test_pixart(tmp_path):
    config = pixart_study(tmp_path)
    text = tmp_path / "text"
    bundle = run(config, tmp_path)
    loaded = load_bundle(bundle)
    bench = Workbench(config)
    seeds = range(5)
    point = Point(loaded.schedule, loaded.sampling.sampler)
    expected = bench.sample(loaded.backbone, point, seeds).images[:4]
    # its own prompts are the data's first four
    assert torch.equal(loaded.sample(seeds).images[:4], expected)
    y = prompts_for(loaded, ["a  red shirt", "a blue shirt"], text)
    own = {name: value[:2] for name, value in loaded.prompts.items()}
    torch.testing.assert_close(
        y["encoder_hidden_states"], own["encoder_hidden_states"], atol=2e-3, rtol=0
    )
    assert torch.equal(y["encoder_attention_mask"], own["encoder_attention_mask"])
    assert not torch.equal(loaded.sample([0, 0], y).images[0], loaded.sample([0, 0], y).images[1])
    call(
        "sample",
        bundle,
        "--num",
        2,
        "--prompt",
        "a blue shirt",
        "--text-encoder",
        text,
        "--vae",
        tmp_path / "vae",
        "-o",
        tmp_path / "x.png",
    )
    assert (tmp_path / "x.png").is_file()
    with pytest.raises(ConfigError, match="--prompt goes with --text-encoder"):
        call("sample", bundle, "--prompt", "a shirt", "-o", tmp_path / "y.npz")
    with pytest.raises(
        ConfigError, match="takes prompts, not labels; got the label 3; leave it out"
    ):
        call("sample", bundle, "--label", 3, "-o", tmp_path / "y.npz")


@pytest.mark.slow
def test_pixart_on_the_ladder(tmp_path):
    climb(pixart_study(tmp_path), tmp_path / "ladder")


REPORTED = sorted(
    path.parent.name
    for path in (FOLDER.parent / "reports").glob("*/index.html")
    if (FOLDER / f"{path.parent.name}.toml").exists()
)


@pytest.mark.parametrize("name", REPORTED)
def test_a_committed_report_is_of_the_committed_study_file(name):
    """What is said of a report takes numbers of images and seeds from the study file."""
    page = (FOLDER.parent / "reports" / name / "index.html").read_text(encoding="utf-8")
    shown = [html.unescape(t) for t in re.findall(r"<pre><code>(.*?)</code></pre>", page, re.S)]
    [reported] = [tomllib.loads(text) for text in shown if "num_trials" in text]
    now = load_study(FOLDER / f"{name}.toml").model_dump(mode="json")
    for section in ("backbone", "sampling", "evaluation", "train", "confirm", "promotion"):
        shown = {k: v for k, v in now[section].items() if not isinstance(v, dict)}
        told = {k: v for k, v in reported[section].items() if not isinstance(v, dict)}
        assert {k: shown[k] for k in told} == told, section
    assert {"fashion-mnist", "fashion-mnist-quick"} <= set(REPORTED)


@pytest.mark.parametrize("name", ["imagenet256-dit-xl2", "pixart-alpha-256"])
def test_the_costs_in_a_files_head_follow_from_its_settings(name):
    """Of networks of 28 blocks that take nearly all of the arithmetic."""
    file = FOLDER / f"{name}.toml"
    config = load_study(file)
    share = float(re.search(r"([\d.]+) of the blocks' 3 x", file.read_text())[1])
    steps = int(re.search(r"about ([\d,]+) steps", file.read_text())[1].replace(",", ""))
    full = ExitSchedule.full(28, config.diffusion.num_train_timesteps)
    own = {"backbone": SimpleNamespace(depth=28), "min_exit_depth": config.search.min_exit_depth}
    costs = Costs(SimpleNamespace(config=config, full=full, **own))
    costs.__dict__["flops"] = tuple(range(1, 29))
    once = config.elastic.model_copy(update={"num_steps": 1, "distill_frac": 0.0})
    depths = elastic_depths(costs.parts)
    exact = costs.training_gflops(depths, once) / costs.training_gflops(full, once)
    assert share == pytest.approx(exact, abs=0.006)
    assert steps == pytest.approx(costs.equal_compute_steps(), rel=0.005)


@pytest.mark.parametrize(("distill_frac", "calls"), [(0.0, 3), (1.0, 4)])
def test_without_a_warm_up_equal_compute_is_the_fine_tunings_own(distill_frac, calls):
    """To the step, though the quotient of the FLOPs is rounded: a step on noise is three calls, one
    with a teacher four."""
    config = load_study(FOLDER / "imagenet256-dit-xl2.toml")
    full = ExitSchedule.full(3)
    for num_steps in range(0, 700, 10):
        train = config.train.model_copy(
            update={"num_steps": num_steps, "batch_size": 32, "distill_frac": distill_frac}
        )
        made = config.model_copy(update={"train": train, "elastic": None})
        costs = Costs(SimpleNamespace(config=made, full=full))
        costs.__dict__["flops"] = (1_000_003, 2_000_007, 3_100_000)
        assert costs.equal_compute_steps() == -(-num_steps * calls // 3)
