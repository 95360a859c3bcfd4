"""Bundles: the same images anywhere, and no damaged or foreign file accepted."""

import base64
import copy
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from asesearch.backbones import DiT, UViT
from asesearch.backbones.caching import Caching
from asesearch.backbones.exit_weights import ExitWeights
from asesearch.backbones.guidance import GuidanceInterval
from asesearch.calibration import calibrated
from asesearch.config import DiffusionConfig, SamplingConfig
from asesearch.deployment import formats
from asesearch.deployment import verify as verify_module
from asesearch.deployment.bundle import Bundle
from asesearch.deployment.diffusers_hook import apply_exit_schedule
from asesearch.deployment.export import check_checkpoint
from asesearch.deployment.images import BundleImages
from asesearch.deployment.manifest import OLD, PART
from asesearch.deployment.reading import load_bundle
from asesearch.deployment.verify import verify
from asesearch.deployment.writing import check_bundle_dir, write_bundle
from asesearch.diffusion import Diffusion
from asesearch.errors import CheckpointError, ConfigError, ScheduleError, WriteError
from asesearch.sampling import sample
from asesearch.schedule import ExitSchedule

SCHEDULE = ExitSchedule.from_string("4 4 2 1", 4)
TIMESTEPS = Diffusion().timesteps(4)


@pytest.fixture
def bundle(tiny_dit):
    how = SamplingConfig(solver="ddim", num_steps=4, cfg_scale=1.5, batch_size=5)
    return Bundle(
        tiny_dit,
        SCHEDULE,
        "dit",
        DiffusionConfig(),
        how,
        {"search": None},
        {"study": "tiny", "trial": 3},
    )


@pytest.fixture
def folder(bundle, tmp_path):
    return write_bundle(bundle, tmp_path / "bundle")


def test_the_callers_autocast_changes_no_outputs_on_record(bundle, folder, tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        again = write_bundle(bundle, tmp_path / "again")
        load_bundle(folder)
        assert all(check.passed for check in verify(folder) if check.name != "speed")
    ours, theirs = (load_file(path / "parity.safetensors") for path in (folder, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_round_trip_gives_identical_images(bundle, folder):
    loaded = load_bundle(folder)
    assert (loaded.schedule, loaded.sampling, loaded.diffusion) == (
        SCHEDULE,
        bundle.sampling,
        bundle.diffusion,
    )
    assert loaded.provenance == {"study": "tiny", "trial": 3} and loaded.kind == "dit"
    seeds = [3, 4, 11]
    y = torch.tensor([s % 3 for s in seeds])
    expected = sample(
        bundle.backbone,
        "ddim",
        SCHEDULE,
        diffusion=Diffusion(),
        num_steps=4,
        seeds=seeds,
        y=y,
        cfg_scale=1.5,
        batch_size=5,
    )
    again = loaded.sample(seeds)
    assert torch.equal(again.images, expected.images) and again.block_calls == expected.block_calls


def test_early_exits_with_weights_of_their_own(bundle, tmp_path, monkeypatch):
    gen = torch.Generator().manual_seed(1)
    exits = copy.deepcopy(bundle.backbone)
    for p in exits.parameters():
        p.data += torch.randn(p.shape, generator=gen) * 0.02
    made = replace(bundle, backbone=ExitWeights(bundle.backbone, exits).eval())
    folder = write_bundle(made, tmp_path / "two")
    loaded = load_bundle(folder)
    assert isinstance(loaded.backbone, ExitWeights)
    images = loaded.sample([3, 4]).images
    assert torch.equal(images, made.sample([3, 4]).images)
    assert not torch.equal(images, bundle.sample([3, 4]).images)
    whole = replace(loaded, schedule=ExitSchedule.full(4)).sample([3, 4]).images
    assert torch.equal(whole, replace(bundle, schedule=ExitSchedule.full(4)).sample([3, 4]).images)
    monkeypatch.setattr(verify_module, "SPEED_S", 0.5)
    checks = verify(folder)
    assert all(check.passed for check in checks[:3])
    assert "weights of their own" in checks[1].found


@pytest.mark.thorough
def test_a_bundle_of_a_compiled_study_samples_compiled(bundle, tmp_path, only_traced):
    how = bundle.sampling.model_copy(update={"compile": True})
    loaded = load_bundle(write_bundle(replace(bundle, sampling=how), tmp_path / "bundle"))
    eager = loaded.sample([0, 1], compile=False).images
    assert only_traced() == 0
    torch.testing.assert_close(loaded.sample([0, 1]).images, eager, rtol=0, atol=1e-5)
    bundle.sample([0, 1], compile=True)
    assert only_traced() == 1


def test_seeds_and_labels_of_a_bundle_as_lists(bundle):
    wanted = bundle.sample([3, 4], torch.tensor([1, 2])).images
    assert torch.equal(bundle.sample((s for s in (3, 4)), [1, 2]).images, wanted)
    for seeds, y in (([0], ["1"]), (["1"], None), (3, None), ([None], None), ([0], 1)):
        for use in (bundle.sample, bundle.plan):
            with pytest.raises(ConfigError, match="^(y|seeds) must be"):
                use(seeds, y)
    with pytest.raises(ConfigError, match="labels must be classes of the bundle's network"):
        bundle.sample([0], [bundle.backbone.num_classes])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint32", "uint64"])
def test_seeds_of_any_integer_type(bundle, dtype):
    wanted = bundle.sample([3, 4], num_steps=1).images
    seeds = np.array([3, 4], dtype)
    for given in (seeds, list(seeds), torch.from_numpy(seeds)):
        assert torch.equal(bundle.sample(given, num_steps=1).images, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_bundle_under_another_default_type_makes_the_same_images(bundle, folder, dtype):
    wanted = bundle.sample([3, 4])
    torch.set_default_dtype(dtype)
    try:
        made = load_bundle(folder).sample([3, 4])
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.images.dtype == torch.float32 and torch.equal(made.images, wanted.images)
    assert made != wanted and made == made  # they hold tensors, which are not compared


def test_a_bundle_of_half_precision_says_what_to_do(bundle):
    half = replace(bundle, backbone=copy.deepcopy(bundle.backbone).half())
    with pytest.raises(
        ConfigError, match=r"must be float32; got torch.float16 in .*precision = 'b"
    ):
        half.sample([3])


def test_a_device_that_is_none_is_refused(folder):
    with pytest.raises(ConfigError, match="must be one of torch's; got 'gpu'"):
        load_bundle(folder, "gpu")


def test_a_batch_of_ones_own(folder, tmp_path):
    images = BundleImages(folder, tmp_path / "x.npz", num=5, batch_size=2)
    assert images.plan["sampling"]["batch_size"] == 2 and images.bundle.sampling.batch_size == 5
    sizes = set()
    images.bundle.backbone.register_forward_hook(lambda net, args, out: sizes.add(len(args[0])))
    made = images.sample().images
    assert sizes == {4, 2}  # under guidance each image is there twice
    torch.testing.assert_close(made, images.bundle.sample(range(5)).images, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="batch_size must be an integer of at least 1; got 0"):
        images.bundle.sample([0], batch_size=0)


def test_steps_and_labels_can_be_chosen(folder):
    loaded = load_bundle(folder)
    assert loaded.sample([0, 1], num_steps=2).nfe == 4  # two steps, each with and without the label
    for call in (loaded.sample, loaded.plan):
        with pytest.raises(ConfigError, match=r"num_steps must lie in 1…1000.*got 0"):
            call([0], num_steps=0)
    one, other = (loaded.sample([5], torch.tensor([y])).images for y in (0, 2))
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("classes", "dropout", "label", "rule"),
    [
        (
            3,
            0.1,
            3,
            "the bundle's network, 0…2; got 3, the null label, which stands for no class; choose "
            "from 0…2",
        ),
        (3, 0.1, 4, "the bundle's network, 0…2; got 4; choose from 0…2"),
        (3, 0.0, 3, "the bundle's network, 0…2; got 3; choose from 0…2"),
        (3, 0.1, -1, "the bundle's network, 0…2; got -1; choose from 0…2"),
        (1, 0.0, 1, "the bundle's network, 0…0; got 1; choose 0, its only class"),
        (1, 0.1, 1, "got 1, the null label, which stands for no class; choose 0, its only class"),
    ],
)
def test_labels_that_are_no_classes_are_refused(bundle, classes, dropout, label, rule):
    net = DiT(**{**bundle.backbone.config, "num_classes": classes, "class_dropout_prob": dropout})
    made = replace(
        bundle,
        backbone=net,
        sampling=bundle.sampling.model_copy(update={"cfg_scale": 1.5 if dropout else 1.0}),
    )
    net.register_forward_hook(lambda *a: pytest.fail("the network was called"))
    for refused in (
        lambda: made.labels(label, 2),
        lambda: made.sample([0, 1], torch.tensor([0, label])),
    ):
        with pytest.raises(ConfigError, match=rule):
            refused()
    assert made.labels(classes - 1, 2).tolist() == [classes - 1] * 2


def test_a_label_for_a_network_without_labels_is_refused(bundle):
    small = {
        "img_size": 8,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 16,
        "depth": 4,
        "num_heads": 2,
    }
    net = UViT(**small)
    made = replace(
        bundle, backbone=net, sampling=bundle.sampling.model_copy(update={"cfg_scale": 1.0})
    )
    for refused in (lambda: made.labels(0, 2), lambda: made.sample([0, 1], torch.tensor([0, 0]))):
        with pytest.raises(
            ConfigError, match="is unconditional and takes no labels; got the label 0; leave it out"
        ):
            refused()


@pytest.mark.parametrize("name", ["model.safetensors", "parity.safetensors"])
def test_a_flipped_byte_is_found_before_anything_is_read(folder, name):
    path = folder / name
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"{name} is damaged: its SHA-256"):
        load_bundle(folder)


def test_missing_files_and_foreign_manifests_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="is .* a bundle"):
        load_bundle(tmp_path / "nothing")
    manifest = folder / "bundle.json"
    data = json.loads(manifest.read_text())
    for change, rule in (
        ({"version": 9}, "bundle version 9"),
        ({"format": "zip"}, "not the manifest"),
        ({"sampling": {"solver": "magic"}}, "sampling: solver: .*got 'magic'"),
        ({"schedule": ExitSchedule.full(5).to_dict()}, "network of 5 blocks"),
    ):
        manifest.write_text(json.dumps({**data, **change}))
        with pytest.raises((CheckpointError, ScheduleError), match=rule):
            load_bundle(folder)
    (folder / "model.safetensors").unlink()
    manifest.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        load_bundle(folder)


def test_a_manifest_saved_by_an_editor_with_a_byte_order_mark_is_read(folder):
    manifest = folder / "bundle.json"
    manifest.write_text(manifest.read_text(), encoding="utf-8-sig")
    assert load_bundle(folder).schedule == SCHEDULE


def test_a_network_that_computes_something_else_is_refused(folder):
    """Negative control of the parity check: an expected output that is off by 1 %."""
    path = folder / "parity.safetensors"
    tensors = load_file(path)
    save_file({k: v * 1.01 if k == "out.2" else v for k, v in tensors.items()}, path)
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["files"]["parity.safetensors"]["sha256"] = hashlib.sha256(
        path.read_bytes()
    ).hexdigest()
    (folder / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="at exit depth 2 it is off by"):
        load_bundle(folder)
    assert load_bundle(folder, check_parity=False).schedule == SCHEDULE


def test_nothing_is_overwritten_unasked(bundle, folder, tmp_path):
    with pytest.raises(CheckpointError, match="exists already"):
        write_bundle(bundle, folder)
    write_bundle(bundle, folder, overwrite=True)
    load_bundle(folder)
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.tex").write_text("words")
    with pytest.raises(CheckpointError, match="is not a bundle"):
        write_bundle(bundle, other, overwrite=True)
    assert (other / "thesis.tex").read_text() == "words"


def test_who_may_not_write_to_the_study_is_told_to_copy_it(tmp_path):
    """Export has no option for the folder of the checkpoint."""
    (tmp_path / "3").write_text("no folder")
    with pytest.raises(WriteError) as caught:
        check_checkpoint(tmp_path / "3" / "finetune-9")
    assert str(caught.value) == (
        f"can't write to {tmp_path}/3: Not a directory; a full fine-tuning keeps its checkpoint in "
        "the study's directory: copy that to a folder that you may write to, with room in it"
    )


def test_a_failed_export_leaves_nothing(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(WriteError, match="disk full"):
        write_bundle(bundle, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_parity_is_of_float32(bundle, tmp_path):
    """A GPU would convolve in TF32, and another machine not."""
    allowed = []
    net = bundle.backbone
    net.final_layer.register_forward_hook(
        lambda *args: allowed.append(torch.backends.cudnn.allow_tf32)
    )
    write_bundle(bundle, tmp_path / "bundle")
    assert allowed and not any(allowed) and torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("step", [0, 1])
def test_an_overwriting_that_fails_leaves_the_bundle_as_it_was(bundle, folder, monkeypatch, step):
    before = (folder / "bundle.json").read_bytes()
    really = os.replace
    moves = []

    def fails(source, target):
        moves.append(source)
        if len(moves) == step + 1:
            raise OSError("disk full")
        really(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(WriteError, match="disk full"):
        write_bundle(replace(bundle, provenance={"new": 1}), folder, overwrite=True)
    assert list(folder.parent.iterdir()) == [folder]
    assert (folder / "bundle.json").read_bytes() == before
    load_bundle(folder)


DIES = """
import os, sys
from pathlib import Path
from asesearch.deployment import writing
really = os.replace
def replace(source, target):
    really(source, target)
    os._exit(9)
os.replace = replace
with writing.whole_folder(Path(sys.argv[1]), overwrite=True) as part:
    (part / "new").write_text("half")
"""


@pytest.mark.thorough
def test_a_process_that_dies_while_it_overwrites_loses_no_bundle(bundle, folder):
    before = (folder / "bundle.json").read_bytes()
    assert subprocess.run([sys.executable, "-c", DIES, folder]).returncode == 9
    assert not folder.exists()
    aside = r"the bundle is .*/bundle\.\d+\.old\.part, .* was killed; rename that to bundle$"
    with pytest.raises(CheckpointError, match=aside):
        load_bundle(folder)
    with pytest.raises(CheckpointError, match="exists already"):  # it is back before any work
        check_bundle_dir(folder)
    assert (folder / "bundle.json").read_bytes() == before
    again = replace(bundle, provenance={"new": 1})
    assert load_bundle(write_bundle(again, folder, overwrite=True)).provenance == {"new": 1}
    left = [path for path in folder.parent.iterdir() if path != folder]
    assert [path.name.endswith(PART) for path in left] == [True]  # removed after a day


def test_what_was_left_of_another_name_is_left_alone(bundle, tmp_path):
    """v1.2.12345.old.part is v1.2's, and not v1's."""
    write_bundle(bundle, tmp_path / "v1.2")
    others = [tmp_path / f"v1.2.12345{kind}" for kind in (OLD, PART)]
    own = [tmp_path / f"v1.{pid}{kind}" for pid in (7, 123) for kind in (OLD, PART)]
    (tmp_path / "v1.2").rename(others[0])
    others[1].mkdir()
    write_bundle(bundle, tmp_path / "v1")
    for path in own:
        path.mkdir()
    for path in (*others, *own):
        os.utime(path, (0, 0))
    write_bundle(bundle, tmp_path / "v1", overwrite=True)
    assert all(path.is_dir() for path in others) and not any(path.exists() for path in own)
    with pytest.raises(CheckpointError, match="exists already"):
        check_bundle_dir(tmp_path / "v1.2")
    assert load_bundle(tmp_path / "v1.2").schedule == bundle.schedule and not others[0].exists()


def test_a_bundle_is_on_disk_before_it_has_its_name(bundle, folder, monkeypatch):
    calls = []
    sync = os.fsync
    replace = os.replace

    def synced(handle):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        sync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    write_bundle(bundle, folder, overwrite=True)
    files = sorted(path.name for path in folder.iterdir())
    part = f"{folder.name}.{os.getpid()}{PART}"
    wanted = [*files, part, *["replace"] * 3, folder.parent.name]
    assert calls[-len(wanted) :] == wanted


def test_a_path_that_is_not_utf_8_is_refused_before_any_work(bundle, folder):
    bad = folder.with_name("B\udce9")
    folder.rename(bad)
    for use in (load_bundle, check_bundle_dir, lambda path: write_bundle(bundle, path)):
        with pytest.raises(CheckpointError, match="path of a bundle must be UTF-8; .* rename it"):
            use(bad)
    (only,) = verify(bad, speed=False)
    assert not only.passed and "must be UTF-8" in only.found


def test_a_schedule_for_another_network_is_refused(bundle, tmp_path):
    wrong = Bundle(
        bundle.backbone, ExitSchedule.full(5), "dit", bundle.diffusion, bundle.sampling, {}, {}
    )
    with pytest.raises(ScheduleError, match="network of 5 blocks"):
        write_bundle(wrong, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["expected", "weights"])
def test_numbers_that_are_not_finite_fail_the_parity_check(bundle, tmp_path, poison, where):
    """A comparison with NaN is false whichever way it is asked: such a network must not pass for
    equal."""
    if where == "weights":
        with torch.no_grad():
            bundle.backbone.final_layer.linear.bias[0] = poison
    folder = write_bundle(bundle, tmp_path / "bundle")
    if where == "expected":
        path = folder / "parity.safetensors"
        tensors = load_file(path)
        tensors["out.2"][0, 0, 0, 0] = poison
        save_file(tensors, path)
        manifest = json.loads((folder / "bundle.json").read_text())
        manifest["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / "bundle.json").write_text(json.dumps(manifest))
    rule = (
        "is off by (nan|inf)"
        if where == "expected"
        else r"NaN or infinity: 1 of \d+ in final_layer\.linear\.bias"
    )
    with pytest.raises(CheckpointError, match=rule):
        load_bundle(folder)


# -- acceleration ----------------------------------------------------------------------------------


@pytest.fixture
def cached(bundle):
    reuse = np.zeros((4, 4), dtype=bool)
    reuse[1::2] = True
    acceleration = Caching("block", reuse)
    return replace(bundle, acceleration=acceleration, acceleration_name="cache-block-0.5")


def test_a_bundle_keeps_its_cache(bundle, cached, tmp_path):
    folder = write_bundle(cached, tmp_path / "cached")
    loaded = load_bundle(folder)
    assert str(loaded.sampler) == "ddim-4+cache-block-0.5"
    made = loaded.sample(range(3)).images
    assert torch.equal(made, cached.sample(range(3)).images)
    assert not torch.equal(made, bundle.sample(range(3)).images)
    with pytest.raises(ConfigError, match=r"for 4 network calls; .* of 3; keep .*or make one"):
        loaded.plan(range(3), num_steps=3)
    with pytest.raises(ConfigError, match="compiled blocks"):
        loaded.sample(range(3), compile=True)
    plain = write_bundle(bundle, tmp_path / "plain") / "bundle.json"
    assert "acceleration" not in json.loads(plain.read_text())  # as earlier releases read it


@pytest.mark.parametrize("acceleration", [None, "cache-block-0.5"])
def test_block_calls_of_a_sample_are_all_that_ran(tmp_path, acceleration):
    """Of a U-ViT with three blocks that always run, and two of which one runs."""
    net = UViT(img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=4, num_heads=2).eval()
    how = SamplingConfig(solver="ddim", num_steps=4, batch_size=2)
    schedule = ExitSchedule.from_string("1 1", 2)
    made = Bundle(net, schedule, "uvit", DiffusionConfig(), how, {}, {})
    if acceleration:
        reuse = np.zeros((4, 5), dtype=bool)
        reuse[1::2] = True
        made = replace(
            made, acceleration=Caching("block", reuse), acceleration_name="cache-block-0.5"
        )
    images = BundleImages(write_bundle(made, tmp_path / "b"), tmp_path / "x.npz", num=2)
    ran = []
    for block in images.bundle.backbone.transformer_blocks():
        block.attn.register_forward_hook(lambda *args: ran.append(len(args[-1])))
    result = images.sample()
    assert result.block_calls == sum(ran) / 2 == (8 if acceleration else 16)
    told = images.told(result)
    assert (told["blocks_run"], told["blocks_run_frac"]) == (sum(ran) / 2, sum(ran) / 2 / 20)
    assert images.plan["blocks_run_frac"] == (None if acceleration else 16 / 20)
    # the study's, which counts what an acceleration saves of a block, and over its own sampler's
    assert not {"block_frac", "block_calls"} & told.keys()


@pytest.mark.parametrize(
    "name", ["cache-attn-adjusted-2", "merge-0.5", "deediff-0.1", "guide-300-700"]
)
def test_a_bundle_keeps_any_acceleration(bundle, tmp_path, name):
    full = replace(bundle, schedule=ExitSchedule.full(4))

    def look(looking):
        return replace(full, acceleration=looking).sample(range(3))

    made = replace(full, acceleration=calibrated(name, TIMESTEPS, look), acceleration_name=name)
    loaded = load_bundle(write_bundle(made, tmp_path / "bundle"))
    images = loaded.sample(range(3)).images
    assert torch.equal(images, made.sample(range(3)).images)
    assert not torch.equal(images, full.sample(range(3)).images)


def test_an_interval_of_a_bundle_without_guidance_is_refused(bundle, tmp_path):
    inside = GuidanceInterval(np.ones(4, dtype=bool))
    guide = replace(bundle, acceleration=inside, acceleration_name="guide-0-1000")
    path = write_bundle(guide, tmp_path / "guide") / "bundle.json"
    data = json.loads(path.read_text())
    data["sampling"]["cfg_scale"] = 1.0
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="got cfg_scale 1"):
        load_bundle(path.parent)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "cache-block-0.50"}, "shortest form"),
        ({"name": "magic"}, "acceleration is cache-PART"),
        ({"more": 1}, "must have a name and a calibration"),
        ({"calibration": {"kind": "cache", "part": "block", "reuse": ["0000"]}}, "network calls"),
        ({"calibration": {"kind": "cache", "part": "block", "reuse": ["000"] * 4}}, "3 blocks"),
        ({"calibration": {"kind": "cache", "part": "block", "reuse": ["00x0"] * 4}}, "rows of 0"),
        ({"calibration": {"kind": ["cache"]}}, "is of kind cache, merge"),
        ({"calibration": {"kind": "merge", "ratio": 0.5}}, "of the acceleration's name"),
        ({"name": "cache-attn-0.5"}, "cache-attn-0.5; got one of cache block False"),
        ({"name": "cache-block-adjusted-0.5"}, "got one of cache block False"),
        (
            {
                "name": "merge-0.3",
                "calibration": {"kind": "merge", "ratio": 0.5},
            },
            "merge-0.3; got one of merge 0.5",
        ),
        (
            {
                "name": "cache-block-adjusted-0.5",
                "calibration": {
                    "kind": "cache",
                    "part": "block",
                    "reuse": ["0000", "0001", "0000", "0000"],
                    "adjustment": base64.b64encode(bytes(2 * 2 * 3)).decode(),
                },
            },
            "calibrated for 3 channels; got a network of 16",
        ),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(cached, tmp_path, change, words):
    folder = write_bundle(cached, tmp_path / "cached")
    path = folder / "bundle.json"
    data = json.loads(path.read_text())
    data["acceleration"] |= change
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=words):
        load_bundle(folder)


def test_other_formats_refuse_an_acceleration(cached, tmp_path):
    for name in ("onnx", "aoti", "diffusers"):
        with pytest.raises(ConfigError, match="format bundle only"):
            formats.write(cached, tmp_path / name, name)
    assert not list(tmp_path.iterdir())
    folder = write_bundle(cached, tmp_path / "cached")
    for given in (folder, cached):  # a pipeline would leave it out
        with pytest.raises(ConfigError, match="a schedule, not the acceleration"):
            apply_exit_schedule(torch.nn.Linear(1, 1), given)


def test_a_cached_bundle_is_verified_in_all_its_steps(cached, tmp_path, monkeypatch):
    monkeypatch.setattr("asesearch.deployment.verify.SPEED_S", 0.01)
    checks = verify(write_bundle(cached, tmp_path / "cached"))
    assert [c.name for c in checks] == ["files", "network", "parity", "images", "speed"]
    assert "ddim-4+cache-block-0.5" in checks[1].found and checks[-1].numbers["steps"] == 4
