"""Latents: encoding, its resumption, reading, decoding."""

import json
import os
import shutil
import subprocess
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from asesearch.config import DataConfig
from asesearch.data import ImageArray, ImageFolder, check_readable, latents, open_data
from asesearch.data.latents import LatentShards
from asesearch.encoding import (
    LatentDecoder,
    encode_folder,
    encode_latents,
    encode_prompts,
    networks,
    read_captions,
)
from asesearch.encoding.networks import TextEncoder, Vae
from asesearch.errors import CheckpointError, ConfigError, DataError

pytestmark = pytest.mark.usefixtures("own_cache")
CAPTIONS = ["a red shirt", "A  Blue Shirt ", "shirt", "a red red red red blue shirt", ""]
MAX_LENGTH = 6  # the fourth caption has seven words and the end


def make_vae(path, seed=0, **config):
    torch.manual_seed(seed)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        sample_size=16,
        latent_channels=4,
        **blocks,
        **config,
    )
    vae.save_pretrained(path)
    return path


def make_text_encoder(path, seed=0, width=16, max_length=16):
    words = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "blue", "shirt"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, **special
    )
    fast.save_pretrained(path / "tokenizer")
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(words),
        "d_model": width,
        "d_kv": 4,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 4,
    }
    T5EncoderModel(T5Config(**sizes, pad_token_id=0, eos_token_id=1)).save_pretrained(
        path / "text_encoder"
    )
    return path


@pytest.fixture(scope="module")
def vae_path(tmp_path_factory):
    return make_vae(
        tmp_path_factory.mktemp("networks") / "vae", scaling_factor=0.25, shift_factor=0.5
    )


@pytest.fixture(scope="module")
def vae(vae_path):
    return AutoencoderKL.from_pretrained(vae_path).eval()


@pytest.fixture(scope="module")
def text_path(tmp_path_factory):
    return make_text_encoder(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return ImageArray(
        rng.integers(0, 256, (5, 3, 16, 16), np.uint8), np.array([2, 0, 1, 1, 0]), "five"
    )


# shards of 3 and 2 images, batches of 2 and 1
SETTINGS = {"batch_size": 2, "shard_size": 3, "dtype": "float32"}


@pytest.fixture(scope="module")
def encoded(images, vae_path, tmp_path_factory):
    """Five images with labels and mirror images; tests that change files copy the folder."""
    out = tmp_path_factory.mktemp("encoded") / "latents"
    encode_latents(images, vae_path, out, **SETTINGS)
    return out


@pytest.fixture(scope="module")
def captioned(images, vae_path, text_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("captioned") / "latents"
    encode_latents(
        images,
        vae_path,
        out,
        captions=CAPTIONS,
        text_encoder_path=text_path,
        max_length=MAX_LENGTH,
        **SETTINGS,
    )
    return out


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def posterior(vae, x_start):
    return vae.encode(x_start).latent_dist


# -- reading what was encoded ----------------------------------------------------------------------


def test_the_mean_is_the_vaes_own_shifted_and_scaled_as_its_config_says(encoded, images, vae):
    shards = LatentShards(encoded)
    x_start, y = shards.batch(range(5))
    expected = (posterior(vae, images.batch(range(5))[0]).mean - 0.5) * 0.25
    assert x_start.shape == (5, *shards.shape) == (5, 4, 8, 8) and x_start.dtype == torch.float32
    torch.testing.assert_close(x_start, expected, atol=1e-6, rtol=1e-5)
    assert y.tolist() == [2, 0, 1, 1, 0] and shards.num_classes == 3 and len(shards) == 5
    assert shards.name == "five/latents" and shards.null_condition is None


def test_order_and_repeats_of_indices(encoded):
    shards = LatentShards(encoded)
    everything, labels = shards.batch(range(5))
    some, y = shards.batch([4, 0, 3, 3])
    assert torch.equal(some, everything[[4, 0, 3, 3]]) and torch.equal(y, labels[[4, 0, 3, 3]])


def test_with_a_generator_the_posterior_is_sampled(encoded, images, vae):
    shards = LatentShards(encoded)
    want = posterior(vae, images.batch(range(5))[0])
    x_start = shards.batch(range(5), generator(7))[0]
    noise = torch.randn(5, 4, 8, 8, generator=generator(7))
    torch.testing.assert_close(
        x_start, (want.mean + want.std * noise - 0.5) * 0.25, atol=1e-6, rtol=1e-5
    )
    assert torch.equal(x_start, shards.batch(range(5), generator(7))[0])
    assert not torch.equal(x_start, shards.batch(range(5), generator(8))[0])
    draws = torch.stack([shards.batch([0], generator(s))[0][0] for s in range(300)])
    torch.testing.assert_close(draws.std(0), want.std[0] * 0.25, rtol=0.25, atol=0)


def test_flips_are_the_mirror_images_latents(encoded, images, vae):
    plain = LatentShards(encoded)
    flipping = LatentShards(encoded, flip=True)
    # no generator, no flips
    assert torch.equal(plain.batch(range(5))[0], flipping.batch(range(5))[0])
    x_start = images.batch(range(5))[0]
    # (2, N, C, h, w)
    both = torch.stack([posterior(vae, x).mean for x in (x_start, x_start.flip(-1))])
    std = torch.stack([posterior(vae, x).std for x in (x_start, x_start.flip(-1))])
    draws = generator(4)
    side = (torch.rand(5, generator=draws) < 0.5).long()
    assert 0 < side.sum() < 5
    noise = torch.randn(5, 4, 8, 8, generator=draws)
    each = torch.arange(5)
    expected = (both[side, each] + std[side, each] * noise - 0.5) * 0.25
    torch.testing.assert_close(
        flipping.batch(range(5), generator(4))[0], expected, atol=1e-6, rtol=1e-5
    )
    mirrored_latents = both[0].flip(-1)
    assert not torch.allclose(
        mirrored_latents, both[1], atol=1e-3
    )  # why the mirror images are encoded, not the latents mirrored
    assert plain.digest != flipping.digest


def test_latents_are_mapped_not_loaded(encoded):
    shards = LatentShards(encoded)
    assert all(type(shards._map(shard, "latents")) is np.memmap for shard in range(2))


MANY = """
import resource, sys
from asesearch.data.latents import LatentShards

hard, folder = int(sys.argv[1]), sys.argv[2]
resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
shards = LatentShards(folder)
kept = shards._map.cache_info().maxsize
shards.check()
found = [shards.batch(range(60))[0].double().sum().item() for _ in range(2)]
assert found[0] == found[1]
print(kept, found[0], shards.digest)
"""


@pytest.mark.thorough
def test_more_shards_than_a_process_may_hold_open(vae_path, tmp_path):
    """As the latents of ImageNet are: 2,504 files, where 1,024 is the usual limit."""
    rng = np.random.default_rng(0)
    many = ImageArray(rng.integers(0, 256, (60, 3, 16, 16), np.uint8), np.arange(60) % 3, "many")
    out = tmp_path / "latents"
    encode_latents(many, vae_path, out, batch_size=30, shard_size=1, dtype="float32")
    want = LatentShards(out)
    total = want.batch(range(60))[0].double().sum().item()
    for hard, kept in ((40, 20), (4096, 60)):  # may not be raised; may be
        done = subprocess.run(
            [sys.executable, "-c", MANY, str(hard), out], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [str(kept), str(total), want.digest]


def test_float16_is_the_default_and_agrees_to_three_digits(encoded, images, vae_path, tmp_path):
    encode_latents(images, vae_path, tmp_path / "half", batch_size=2)
    half = LatentShards(tmp_path / "half", verify=True)
    assert half._map(0, "latents").dtype == np.float16 and half._map(0, "latents").shape == (
        5,
        2,
        2,
        4,
        8,
        8,
    )
    exact = LatentShards(encoded).batch(range(5))[0]
    torch.testing.assert_close(half.batch(range(5))[0], exact, atol=1e-3, rtol=1e-3)


def test_without_flips_or_labels(images, vae_path, tmp_path):
    bare = ImageArray(images.images.numpy(), None, "bare")
    encode_latents(bare, vae_path, tmp_path / "out", flips=False, **SETTINGS)
    shards = LatentShards(tmp_path / "out")
    x_start, y = shards.batch([1])
    assert y is None and shards.num_classes == 0 and x_start.shape == (1, 4, 8, 8)
    with pytest.raises(DataError, match="flip needs the mirror images' latents"):
        LatentShards(tmp_path / "out", flip=True)


def test_channel_statistics_of_a_config_take_the_place_of_the_shift(images, tmp_path):
    """Some autoencoders give a mean and a standard deviation for each channel."""
    stats = {
        "latents_mean": [0.1, 0.2, 0.3, 0.4],
        "latents_std": [1.0, 2.0, 4.0, 0.5],
        "scaling_factor": 0.5,
    }
    path = make_vae(tmp_path / "vae", **stats)
    encode_latents(images, path, tmp_path / "out", **SETTINGS)
    mean = posterior(AutoencoderKL.from_pretrained(path).eval(), images.batch([0])[0]).mean
    shift, std = (torch.tensor(stats[k]).view(-1, 1, 1) for k in ("latents_mean", "latents_std"))
    x_start = LatentShards(tmp_path / "out").batch([0])[0]
    torch.testing.assert_close(x_start, (mean - shift) / std * 0.5, atol=1e-6, rtol=1e-5)


# -- resuming --------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def killed_after(batches):
    def progress(done, total):
        nonlocal batches
        batches -= 1
        if batches < 0:
            raise Killed

    return progress


@pytest.mark.parametrize("batches", range(3))
def test_a_run_that_was_killed_ends_in_the_same_bytes(encoded, images, vae_path, tmp_path, batches):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        encode_latents(images, vae_path, out, **SETTINGS, progress=killed_after(batches))
    with pytest.raises(DataError, match="all images must be encoded; got [03] of 5"):
        LatentShards(out)
    # what a kill in the middle of a write leaves
    (out / "latents-00000.npy.part").write_bytes(b"cut short")
    calls = []
    encode_latents(
        images, vae_path, out, **SETTINGS, progress=lambda done, total: calls.append((done, total))
    )
    (out / "latents-00000.npy.part").unlink(missing_ok=True)
    assert content(out) == content(encoded)
    assert calls == ([(2, 5), (3, 5), (5, 5)] if batches < 2 else [(3, 5), (5, 5)])


def test_a_finished_encoding_is_left_alone(encoded, images, vae_path, tmp_path, monkeypatch):
    out = shutil.copytree(encoded, tmp_path / "out")
    before = content(out)
    monkeypatch.setattr(ImageArray, "batch", lambda *_: pytest.fail("read an image"))
    encode_latents(images, vae_path, out, **SETTINGS)
    assert content(out) == before


def test_one_encoding_at_a_time_writes_into_a_folder(images, vae_path, tmp_path):
    out = tmp_path / "out"

    def second(done, total):
        encode_latents(images, vae_path, out, **SETTINGS)

    with pytest.raises(DataError, match="one encoding at a time.*another is at .*out; wait"):
        encode_latents(images, vae_path, out, **SETTINGS, progress=second)
    encode_latents(images, vae_path, out, **SETTINGS)  # what it held is free again
    (out / "index.json").unlink()
    for path in out.glob("*.npy"):
        path.unlink()
    encode_latents(images, vae_path, out, **SETTINGS)  # and its file is nothing strange
    assert len(LatentShards(out)) == len(images)


def test_latents_are_read_through_once(encoded, tmp_path, own_cache, monkeypatch):
    out = shutil.copytree(encoded, tmp_path / "out")
    reads = []
    digest = latents.file_sha256
    monkeypatch.setattr(latents, "file_sha256", lambda p: reads.append(p.name) or digest(p))
    for _ in range(2):
        check_readable(LatentShards(out))
    assert sorted(reads) == sorted(p.name for p in out.glob("*.npy"))
    changed = bytearray((out / "latents-00001.npy").read_bytes())
    changed[-1] ^= 1
    (out / "latents-00001.npy").write_bytes(changed)
    with pytest.raises(DataError, match=r"latents-00001\.npy must have the SHA-256"):
        check_readable(LatentShards(out))
    assert reads[4:] == ["latents-00001.npy"]


def test_headers_are_parsed_one_at_a_time(encoded, monkeypatch):
    """Python before 3.11.8 fails now and then where threads parse together."""
    load, inside, most = np.load, [], []

    def watched(*args, **kwargs):
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return load(*args, **kwargs)

    shards = LatentShards(encoded)
    monkeypatch.setattr(latents.np, "load", watched)
    entry = shards._entries[0]
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: latents.open_array(encoded, entry, False), range(8)))
    assert len(opened) == len(most) == 8 and set(most) == {1}


def test_latents_that_are_not_finite_are_named(encoded, tmp_path):
    out = shutil.copytree(encoded, tmp_path / "out")
    index = json.loads((out / "index.json").read_text())
    array = np.load(out / "latents-00001.npy")
    array[-1, 0, 0, 0, 0, 0] = np.nan
    index["shards"][1]["latents"] = latents.write_array(out / "latents-00001.npy", array)
    (out / "index.json").write_text(json.dumps(index))
    shards = LatentShards(out)
    assert shards.batch([0, 3])[0].isfinite().all()
    for use in (lambda: check_readable(shards), lambda: shards.batch([0, 4])):
        with pytest.raises(DataError, match=r"latents-00001\.npy must hold finite numbers"):
            use()


@pytest.mark.parametrize("damage", ["missing", "truncated", "one bit"])
@pytest.mark.parametrize("name", ["latents-00000.npy", "labels-00001.npy"])
def test_damage_is_noticed_and_mended(encoded, images, vae_path, tmp_path, name, damage):
    out = shutil.copytree(encoded, tmp_path / "out")
    whole = (out / name).read_bytes()
    if damage == "missing":
        (out / name).unlink()
    else:
        changed = whole[:-1] if damage == "truncated" else whole[:-1] + bytes([whole[-1] ^ 1])
        (out / name).write_bytes(changed)
    with pytest.raises(DataError, match=f"{name}.*encode into this folder again"):
        LatentShards(out, verify=damage == "one bit")
    if damage == "one bit" and "labels" not in name:
        shards = LatentShards(out)  # which does not read everything
        with pytest.raises(DataError, match=f"{name} must have the SHA-256"):
            check_readable(shards)
    encode_latents(images, vae_path, out, **SETTINGS)
    assert content(out) == content(encoded)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", 0),
        ("count", "5"),
        ("shape", [4, 8]),
        ("num_classes", None),
        ("shift", [0.0]),
        ("scale", [0.0] * 4),
        ("scale", [float("nan")] * 4),
        ("identity", {}),
        ("null_prompt", 3),
        ("shards", [{}]),
        ("shards", [{"latents": {"file": "../x.npy"}}]),
    ],
)
def test_an_index_that_no_encoding_writes_is_refused(encoded, tmp_path, field, value):
    out = shutil.copytree(encoded, tmp_path / "out")
    index = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps(index | {field: value}))
    with pytest.raises(DataError, match=f"can't read the index .*its ({field}|shift or scale) is"):
        LatentShards(out)


def test_labels_that_are_no_classes_are_refused(encoded, tmp_path):
    out = shutil.copytree(encoded, tmp_path / "out")
    labels = np.load(out / "labels-00000.npy")
    for wrong in (-1, 99):
        np.save(out / "labels-00000.npy", np.full_like(labels, wrong))
        with pytest.raises(DataError, match=f"labels-00000.npy must hold labels in .*{wrong}"):
            LatentShards(out)


@pytest.mark.parametrize(
    "changes",
    [
        {"scaling_factor": "x"},
        {"scaling_factor": None},
        {"latents_std": [0.0] * 4, "latents_mean": [0.0] * 4},
        {"shift_factor": "x"},
        {"block_out_channels": []},
        {"block_out_channels": [8]},
    ],
)
def test_a_vae_with_a_damaged_config_is_refused(vae_path, tmp_path, changes):
    folder = shutil.copytree(vae_path, tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=r"must scale each latent channel|readable Autoenc"):
        LatentDecoder(folder)


def test_an_array_of_another_shape_or_type_is_refused(encoded, tmp_path):
    out = shutil.copytree(encoded, tmp_path / "out")
    for array in (
        np.zeros((2, 2, 2, 4, 8, 8), np.float32),
        np.zeros((3, 2, 2, 4, 8, 8), np.float16),
    ):
        np.save(out / "latents-00000.npy", array)
        with pytest.raises(DataError, match="must hold float32"):
            LatentShards(out)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{", "can't read"),
        ("[]", "can't read"),
        ("{}", "can't read"),
        ('{"version": 2}', "version 2"),
        ('{"version": 1}', "can't read"),
        ("[" * 100_000, "can't read .*nested too deep.* encode again into another folder"),
        ("", r"index\.json is empty, as a power cut may leave it; remove .* --out"),
        ("\0" * 40, r"index\.json is empty, as a power cut may leave it; remove .* --out"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, text, rule):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(DataError, match=rule):
        LatentShards(tmp_path)


def test_going_on_with_something_else_is_refused_by_name(encoded, images, vae_path, tmp_path):
    out = shutil.copytree(encoded, tmp_path / "out")
    before = content(out)
    other_vae = make_vae(tmp_path / "vae", seed=1, scaling_factor=0.25, shift_factor=0.5)
    other_images = ImageArray(images.images.numpy()[:4], None, "four")
    rescaled = make_vae(tmp_path / "rescaled", scaling_factor=0.5, shift_factor=0.5)
    for source, network, changes, name in [
        (images, other_vae, {}, "vae"),
        (images, rescaled, {}, "vae"),
        (other_images, vae_path, {}, "source"),
        (images, vae_path, {"flips": False}, "flips: True -> False"),
        (images, vae_path, {"dtype": "float16"}, "dtype: float32 -> float16"),
        (images, vae_path, {"shard_size": 4}, "shard_size: 3 -> 4"),
    ]:
        with pytest.raises(DataError, match=f"another encoding; changed: {name}[^;]*; undo that"):
            encode_latents(source, network, out, **{**SETTINGS, **changes})
    assert content(out) == before


def test_a_folder_with_other_things_in_it_is_refused(images, vae_path, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="empty folder; got .*thesis.txt"):
        encode_latents(images, vae_path, tmp_path)


def test_the_vaes_digest_is_of_its_content_not_its_files(images, encoded, vae_path, tmp_path):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(vae_path, pipeline / "vae")
    config = json.loads((pipeline / "vae" / "config.json").read_text())
    (pipeline / "vae" / "config.json").write_text(
        json.dumps({**config, "_diffusers_version": "0.31.0"})
    )
    out = shutil.copytree(encoded, tmp_path / "out")
    encode_latents(images, pipeline, out, **SETTINGS)
    assert LatentDecoder(pipeline).digest == LatentDecoder(vae_path).digest


# -- wrong input, before anything is written -------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "rule"),
    [
        ({"batch_size": 0}, ConfigError, "at least 1; got 0 and 3"),
        ({"shard_size": 0}, ConfigError, "at least 1; got 2 and 0"),
        ({"dtype": "bfloat16"}, ConfigError, "dtype must be float16 or float32"),
        ({"captions": CAPTIONS}, ConfigError, "needed together"),
        ({"text_encoder_path": "t5"}, ConfigError, "needed together"),
        ({"captions": CAPTIONS[1:], "text_encoder_path": "t5"}, DataError, "got 4 for 5 images"),
        (
            {"captions": CAPTIONS, "text_encoder_path": "nowhere"},
            CheckpointError,
            "nowhere must hold config.json",
        ),
    ],
)
def test_wrong_arguments(images, vae_path, tmp_path, changes, error, rule):
    with pytest.raises(error, match=rule):
        encode_latents(images, vae_path, tmp_path / "out", **{**SETTINGS, **changes})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 15, 16), (2, 3, 16, 17)])
def test_images_the_vae_does_not_take(vae_path, tmp_path, shape):
    with pytest.raises(DataError, match="3 channels whose sides are multiples of 2"):
        encode_latents(
            ImageArray(np.zeros(shape, np.uint8), None, "odd"), vae_path, tmp_path / "out"
        )


def test_numbers_that_float16_cannot_hold_are_refused(images, vae_path, tmp_path):
    path = shutil.copytree(vae_path, tmp_path / "loud")
    state = load_file(path / "diffusion_pytorch_model.safetensors")
    state["quant_conv.bias"] += 1e5
    save_file(state, path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(
        DataError, match=r"finite in torch.float16; got others in images 0…1 of five; use float32"
    ):
        encode_latents(images, path, tmp_path / "out", batch_size=2)
    encode_latents(images, path, tmp_path / "single", **SETTINGS)


def without_weights(path):
    (path / "diffusion_pytorch_model.safetensors").unlink()


def cut_weights(path):
    file = path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def lose_one_weight(path):
    state = load_file(path / "diffusion_pytorch_model.safetensors")
    state.pop("decoder.conv_in.weight")
    save_file(state, path / "diffusion_pytorch_model.safetensors")


def spoil_decoder(path):
    state = load_file(path / "diffusion_pytorch_model.safetensors")
    state["decoder.conv_in.weight"].view(-1)[0] = float("nan")
    save_file(state, path / "diffusion_pytorch_model.safetensors")


def web_page(path):
    page = "<!doctype html><title>Sign in</title>"
    (path / "diffusion_pytorch_model.safetensors").write_text(page)


def empty_weights(path):
    (path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    (path / "._diffusion_pytorch_model.safetensors").write_text("<html></html>")  # as of a Mac


def not_fetched(path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 2700\n"
    (path / "diffusion_pytorch_model.safetensors").write_text(pointer)


def damage_config(path):
    (path / "config.json").write_text("{")


def another_class(path):
    (path / "config.json").write_text(
        json.dumps({**json.loads((path / "config.json").read_text()), "_class_name": "VQModel"})
    )


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (without_weights, "must hold a readable AutoencoderKL with its weights in safetensors"),
        (cut_weights, "must hold a readable AutoencoderKL with its weights in safetensors"),
        (lose_one_weight, "decoder.conv_in.weight"),
        (
            spoil_decoder,
            r"/vae .*finite numbers; got NaN or .*: 1 of \d+ in decoder.conv_in.weight",
        ),
        (web_page, r"model\.safetensors is a web page \('Sign in'\); download the file itself"),
        (empty_weights, r"/diffusion_pytorch_model\.safetensors is empty; download it again"),
        (not_fetched, r"model\.safetensors is a Git LFS pointer .*; run `git lfs pull`"),
        (damage_config, "config.json is not readable JSON"),
        (another_class, "must be an AutoencoderKL; got VQModel"),
    ],
)
def test_a_damaged_vae_is_refused(vae_path, tmp_path, damage, rule):
    damage(shutil.copytree(vae_path, tmp_path / "vae"))
    with pytest.raises(CheckpointError, match=rule):
        LatentDecoder(tmp_path / "vae")


def test_a_vae_at_a_path_that_is_not_utf_8_is_refused(vae_path, tmp_path):
    bad = shutil.copytree(vae_path, tmp_path / "v\udce9")
    with pytest.raises(CheckpointError, match="path of weights must be UTF-8; .* rename it"):
        LatentDecoder(bad)


# -- decoding --------------------------------------------------------------------------------------


@torch.no_grad()
def test_decoding_is_the_vaes_own_and_the_inverse_of_the_scaling(encoded, images, vae, vae_path):
    x_start = LatentShards(encoded).batch(range(5))[0]
    pixels = LatentDecoder(vae_path).decode(x_start, batch_size=2)
    own = vae.decode(posterior(vae, images.batch(range(5))[0]).mean).sample
    assert pixels.shape == (5, 3, 16, 16) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, own.clamp(-1, 1), atol=1e-5, rtol=1e-4)


def test_decoded_images_stay_in_range_and_do_not_depend_on_the_batch(vae_path):
    latents = torch.randn(5, 4, 8, 8, generator=generator()) * 100
    decoder = LatentDecoder(vae_path)
    pixels = decoder.decode(latents)
    assert pixels.min() == -1 and pixels.max() == 1
    torch.testing.assert_close(pixels, decoder.decode(latents, batch_size=1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decoder.decode(latents.double()), pixels)


@pytest.mark.parametrize("part", ["decoder", "half", "encoder", "quant_conv", "unknown"])
def test_latents_are_decoded_by_a_vae_with_their_own_encoder(
    vae_path, encoded, tmp_path, caplog, part
):
    other = AutoencoderKL.from_pretrained(vae_path)
    if part == "half":
        other.half().float()
    else:
        changed = other.encoder if part == "unknown" else getattr(other, part)
        for p in changed.parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=generator())
    other.save_pretrained(tmp_path)
    latents = LatentShards(encoded)
    own = LatentDecoder(vae_path)
    own.check_encoder(latents.vae, latents.encoder)
    decoder = LatentDecoder(tmp_path)
    assert decoder.digest != own.digest
    if part in ("encoder", "quant_conv"):
        told = rf"got {tmp_path} \(SHA-256 {decoder.digest[:12]}…\).* {own.digest[:12]}….*again"
        with pytest.raises(DataError, match=told):
            decoder.check_encoder(latents.vae, latents.encoder)
    else:
        decoder.check_encoder(latents.vae, None if part == "unknown" else latents.encoder)
    assert ("is not the one that encoded the latents" in caplog.text) is (part == "unknown")


def test_latents_of_earlier_releases_get_to_know_their_encoder(images, vae_path, tmp_path):
    encode_latents(images, vae_path, tmp_path, **SETTINGS)
    index = json.loads((tmp_path / "index.json").read_text())
    known = index.pop("encoder")
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert LatentShards(tmp_path).encoder is None
    encode_latents(images, vae_path, tmp_path, **SETTINGS)
    assert LatentShards(tmp_path).encoder == known


def test_a_vae_computes_in_float32_both_ways(vae_path):
    """A GPU would convolve in TF32, which is torch's default and changes the third digit."""
    vae = Vae(vae_path, "cpu")
    decoder = LatentDecoder(vae_path)
    allowed = []
    for net in (vae.net.encoder, decoder._vae.net.decoder):
        net.register_forward_hook(lambda *a: allowed.append(torch.backends.cudnn.allow_tf32))
    vae.moments(torch.zeros(1, 3, 16, 16))
    decoder.decode(torch.zeros(1, 4, 8, 8))
    assert allowed == [False, False] and torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (4, 8, 8)])
def test_latents_of_another_vae_are_refused(vae_path, shape):
    with pytest.raises(DataError, match=r"latents of shape \(N, 4, h, w\)"):
        LatentDecoder(vae_path).decode(torch.zeros(shape))


# -- captions --------------------------------------------------------------------------------------


@torch.no_grad()
def test_captions_are_the_text_encoders_own(captioned, text_path):
    tokenizer = AutoTokenizer.from_pretrained(text_path / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(text_path / "text_encoder").eval()

    def direct(captions):
        tokens = tokenizer(
            captions,
            padding="max_length",
            max_length=MAX_LENGTH,
            truncation=True,
            return_tensors="pt",
        )
        return encoder(**tokens).last_hidden_state, tokens.attention_mask

    shards = LatentShards(captioned, verify=True)
    x_start, y = shards.batch([4, 1, 0, 3, 2], generator())
    hidden, mask = direct(
        ["", "a blue shirt", "a red shirt", "a red red red red blue shirt", "shirt"]
    )
    assert x_start.shape == (5, 4, 8, 8) and shards.num_classes == 0
    assert (
        y["encoder_hidden_states"].shape == (5, MAX_LENGTH, 16)
        and y["encoder_hidden_states"].dtype == torch.float32
    )
    assert torch.equal(y["encoder_attention_mask"], mask) and mask.sum(1).tolist() == [
        1,
        4,
        4,
        6,
        2,
    ]
    torch.testing.assert_close(
        y["encoder_hidden_states"], hidden * mask[..., None], atol=1e-5, rtol=1e-4
    )
    hidden, mask = direct([""])
    null = shards.null_condition
    assert torch.equal(null["encoder_attention_mask"], mask)
    torch.testing.assert_close(
        null["encoder_hidden_states"], hidden * mask[..., None], atol=1e-5, rtol=1e-4
    )


def test_captions_survive_a_kill_too(captioned, images, vae_path, text_path, tmp_path):
    how = {
        **SETTINGS,
        "captions": CAPTIONS,
        "text_encoder_path": text_path,
        "max_length": MAX_LENGTH,
    }
    with pytest.raises(Killed):
        encode_latents(images, vae_path, tmp_path / "out", **how, progress=killed_after(2))
    encode_latents(images, vae_path, tmp_path / "out", **how)
    assert content(tmp_path / "out") == content(captioned)


def test_other_captions_or_another_text_encoder_are_refused_by_name(
    captioned, images, vae_path, text_path, tmp_path
):
    how = {
        **SETTINGS,
        "captions": CAPTIONS,
        "text_encoder_path": text_path,
        "max_length": MAX_LENGTH,
    }
    other = make_text_encoder(tmp_path / "other", seed=1)
    for changes, name in [
        ({"captions": ["another", *CAPTIONS[1:]]}, "captions"),
        ({"text_encoder_path": other}, "text_encoder"),
        ({"max_length": 5}, "max_length: 6 -> 5"),
    ]:
        with pytest.raises(DataError, match=f"changed: {name}[^;]*; undo that"):
            encode_latents(images, vae_path, captioned, **{**how, **changes})


def test_text_encoders_that_cannot_be_used(images, vae_path, text_path, tmp_path):
    how = {**SETTINGS, "captions": CAPTIONS}
    with pytest.raises(ConfigError, match="max_length must lie in 1…16 .*got 17"):
        encode_latents(
            images, vae_path, tmp_path / "out", **how, text_encoder_path=text_path, max_length=17
        )
    shutil.copytree(text_path / "text_encoder", tmp_path / "bare")
    with pytest.raises(CheckpointError, match="tokenizer_config.json is needed"):
        encode_latents(
            images,
            vae_path,
            tmp_path / "out",
            **how,
            text_encoder_path=tmp_path / "bare",
            max_length=6,
        )
    together = shutil.copytree(text_path / "tokenizer", tmp_path / "bare", dirs_exist_ok=True)
    encode_latents(
        images, vae_path, tmp_path / "out", **how, text_encoder_path=together, max_length=6
    )
    (together / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="can't load the tokenizer"):
        encode_latents(
            images, vae_path, tmp_path / "out", **how, text_encoder_path=together, max_length=6
        )


def test_a_text_encoder_with_nan_is_refused(text_path, tmp_path):
    folder = shutil.copytree(text_path, tmp_path / "nan") / "text_encoder"
    TextEncoder(folder, "cpu", 6)
    state = load_file(folder / "model.safetensors")
    state["shared.weight"][3] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match="text_encoder .*NaN or infinity: 16 of 112 in shared"
    ):
        TextEncoder(folder, "cpu", 6)


def test_prompts_are_encoded_without_hashing_the_network(text_path, monkeypatch):
    """Which takes longer than the prompts, of a T5."""
    monkeypatch.setattr(networks, "weights_digest", None)
    assert encode_prompts(["a red shirt"], text_path, 6)["encoder_hidden_states"].shape[-1] == 16
    with pytest.raises(TypeError):
        _ = TextEncoder(text_path, "cpu", 6).digest


def test_a_tokenizer_of_another_model_is_refused(text_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(text_path / "tokenizer")
    assert tokenizer.vocab_size == TextEncoder(text_path, "cpu", 6).net.config.vocab_size
    tokenizer.add_tokens(["hat"])
    pipeline = shutil.copytree(text_path, tmp_path / "other")
    tokenizer.save_pretrained(pipeline / "tokenizer")
    with pytest.raises(CheckpointError, match=r"got 7 embeddings and token 7 \('hat'\); put both"):
        TextEncoder(pipeline, "cpu", 6)


# -- folders ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three images in two class folders."""
    rng = np.random.default_rng(0)
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    return tmp_path / "pictures"


def write_captions(path, rows):
    path.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8"
    )
    return path


ROWS = [
    {"file_name": "dog/1.png", "text": "shirt\u2028été", "mood": "any"},
    {"file_name": "./cat/2.png", "text": "blue"},
    {"file_name": "cat/1.png", "text": "red"},
]


def test_captions_are_paired_by_file_name(folder, tmp_path):
    path = write_captions(tmp_path / "metadata.jsonl", ROWS)
    assert read_captions(path, ImageFolder(folder, 16)) == ["red", "blue", "shirt\u2028été"]


@pytest.mark.parametrize(
    ("rows", "rule"),
    [
        (ROWS[1:], r"1 images without caption \['dog/1.png'\] and 0 captions"),
        (
            [*ROWS, {"file_name": "x.png", "text": ""}],
            r"0 images .* 1 captions without image \['x.png'\]",
        ),
        ([*ROWS, ROWS[0]], ":4 must give each image one text"),
        ([{"file_name": "cat/1.png", "text": None}], ":1 must give each image one text; got None"),
        ([*ROWS[:2], {"file_name": "cat/1.png"}], ":3 must read"),
        ([{"text": "red"}], ":1 must read"),
        ([{"file_name": 3, "text": "red"}], ":1 must read"),
        ([["cat/1.png", "red"]], ":1 must read"),
    ],
)
def test_wrong_captions_are_refused_by_line(folder, tmp_path, rows, rule):
    with pytest.raises(DataError, match=rule):
        read_captions(write_captions(tmp_path / "metadata.jsonl", rows), ImageFolder(folder, 16))


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (b'{"file_name": "cat/1.png", "text": "x \\ud83d"}', r"whole .*'x \\ud83d', where .*both"),
        (b'{"file_name": "cat/1.png", "text": "x \\udce9"}', "whole .*half of one; write both"),
        (b'{"file_name": "cat/1.png", "text": "x \xe9"}', "in UTF-8; got .*; save the file as"),
    ],
)
def test_a_caption_that_is_no_text_is_refused_for_what_it_is(folder, tmp_path, line, rule):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(line)
    with pytest.raises(DataError, match=f":1 must hold a caption (of )?{rule}") as caught:
        read_captions(path, ImageFolder(folder, 16))
    str(caught.value).encode("utf-8")
    rows = [*ROWS[:2], {"file_name": "cat/1.png", "text": "\U0001f600"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="ascii")  # both halves, escaped
    assert read_captions(path, ImageFolder(folder, 16))[0] == "\U0001f600"


def test_a_mac_and_a_keyboard_write_one_file_name(folder, tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))
    path = tmp_path / "metadata.jsonl"
    for on_disk, listed in ((decomposed, composed), (composed, decomposed)):
        shutil.copy(folder / "cat/1.png", folder / "cat" / on_disk)
        write_captions(path, [*ROWS, {"file_name": f"cat/{listed}", "text": "coffee"}])
        assert read_captions(path, ImageFolder(folder, 16))[2] == "coffee"
        (folder / "cat" / on_disk).unlink()
    both = [{"file_name": f"cat/{n}", "text": n} for n in (composed, decomposed)]
    for name in (composed, decomposed):  # two files are two images
        shutil.copy(folder / "cat/1.png", folder / "cat" / name)
    write_captions(path, [*ROWS, *both])
    assert set(read_captions(path, ImageFolder(folder, 16))) >= {composed, decomposed}
    write_captions(path, [*ROWS, both[0]])
    with pytest.raises(DataError, match="1 images without caption"):
        read_captions(path, ImageFolder(folder, 16))


def test_unreadable_captions(folder, tmp_path):
    images = ImageFolder(folder, 16)
    with pytest.raises(DataError, match="can't read .*none.jsonl.*check the path"):
        read_captions(tmp_path / "none.jsonl", images)
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    with pytest.raises(DataError, match="latin.jsonl:1 must read"):
        read_captions(tmp_path / "latin.jsonl", images)
    path = write_captions(tmp_path / "wide.jsonl", ROWS)
    right = read_captions(path, images)
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-16")  # which is as good
    assert read_captions(path, images) == right
    (tmp_path / "twice.jsonl").write_text('{"file_name": "cat/1.png", "text": "x", "text": "q"}')
    with pytest.raises(DataError, match=r":1 must read .*each key once; got .*\"q\"}'; fix it"):
        read_captions(tmp_path / "twice.jsonl", images)
    (tmp_path / "cut.jsonl").write_text('{"file_name": "cat/1.png", "te')
    with pytest.raises(DataError, match=":1 must read"):
        read_captions(tmp_path / "cut.jsonl", images)


def test_a_folder_goes_in_and_a_data_source_comes_out(folder, vae, vae_path, tmp_path):
    config = DataConfig(kind="image-folder", path=str(folder), image_size=16)
    encode_folder(config, vae_path, tmp_path / "out", **SETTINGS)
    shards = open_data(DataConfig(kind="latents", path=str(tmp_path / "out"), flip=True))
    x_start, y = shards.batch([2, 0])
    expected = (posterior(vae, ImageFolder(folder, 16).batch([2, 0])[0]).mean - 0.5) * 0.25
    torch.testing.assert_close(x_start, expected, atol=1e-6, rtol=1e-5)
    assert y.tolist() == [1, 0] and shards.flip and shards.name == "pictures/latents"


def test_a_folder_with_captions(folder, vae_path, text_path, tmp_path):
    config = DataConfig(kind="image-folder", path=str(folder), image_size=16)
    captions = write_captions(tmp_path / "metadata.jsonl", ROWS)
    encode_folder(
        config, vae_path, tmp_path / "out", captions=captions, text_encoder=text_path, max_length=6
    )
    y = LatentShards(tmp_path / "out").batch([0, 2])[1]
    # "red", end; "shirt", unknown, end
    assert y["encoder_attention_mask"].sum(1).tolist() == [2, 3]


@pytest.mark.parametrize(
    "changes", [{"kind": "fashion-mnist"}, {"path": None}, {"image_size": None}]
)
def test_only_image_folders_are_encoded(folder, vae_path, tmp_path, changes):
    config = DataConfig(
        **{"kind": "image-folder", "path": str(folder), "image_size": 16, **changes}
    )
    with pytest.raises(
        ConfigError, match="encoding takes data of kind 'image-folder' with path and image_size"
    ):
        encode_folder(config, vae_path, tmp_path / "out")


@pytest.mark.parametrize("dry_run", [True, False])
def test_damaged_images_stop_the_encoding_before_it_begins_all_by_name(
    folder, vae_path, tmp_path, monkeypatch, dry_run
):
    for name in ("cat/2.png", "dog/1.png"):
        (folder / name).write_bytes(b"damaged")
    monkeypatch.setattr(ImageFolder, "batch", None)
    config = DataConfig(kind="image-folder", path=str(folder), image_size=16)
    with pytest.raises(DataError, match=r"2 of 3 images.*cat/2\.png.*dog/1\.png"):
        encode_folder(config, vae_path, tmp_path / "out", dry_run=dry_run)


def test_damaged_images_are_skipped_with_their_captions(folder, vae_path, text_path, tmp_path):
    (folder / "cat" / "2.png").write_bytes(b"damaged")
    config = DataConfig(kind="image-folder", path=str(folder), image_size=16, skip_damaged=True)
    captions = write_captions(tmp_path / "metadata.jsonl", ROWS)
    encode_folder(
        config, vae_path, tmp_path / "out", captions=captions, text_encoder=text_path, max_length=6
    )
    y = LatentShards(tmp_path / "out").batch([0, 1])[1]
    # "red", end; "shirt", unknown, end
    assert y["encoder_attention_mask"].sum(1).tolist() == [2, 3]


def test_latents_carry_the_mapping_of_their_folders(folder, vae_path, tmp_path):
    config = DataConfig(
        kind="image-folder", path=str(folder), image_size=16, classes={"cat": 281, "dog": 207}
    )
    encode_folder(config, vae_path, tmp_path / "mapped", **SETTINGS)
    mapped = LatentShards(tmp_path / "mapped")
    assert mapped.batch(range(3))[1].tolist() == [281, 281, 207] and mapped.num_classes == 282
    assert mapped.classes == {"cat": 281, "dog": 207} and not mapped.labels_by_order
    plain = config.model_copy(update={"classes": None})
    with pytest.raises(DataError, match="holds another encoding; changed: source"):
        encode_folder(plain, vae_path, tmp_path / "mapped", **SETTINGS)
    encode_folder(plain, vae_path, tmp_path / "plain", **SETTINGS)
    assert LatentShards(tmp_path / "plain").labels_by_order
    # which says of the same labels that they are meant
    (folder / "classes.json").write_text('["cat", "dog"]')
    encode_folder(plain, vae_path, tmp_path / "plain", **SETTINGS)
    again = LatentShards(tmp_path / "plain")
    assert not again.labels_by_order and again.batch(range(3))[1].tolist() == [0, 0, 1]


def test_latents_of_the_last_release_are_read(encoded, tmp_path):
    """Which kept no class names; their labels counted the folders."""
    old = shutil.copytree(encoded, tmp_path / "old")
    index = json.loads((old / "index.json").read_text())
    assert index.pop("classes") == {} and index.pop("labels_by_order") is False
    (old / "index.json").write_text(json.dumps(index))
    shards = LatentShards(old)
    new = LatentShards(encoded)
    assert shards.labels_by_order and not new.labels_by_order and shards.digest == new.digest
    assert torch.equal(shards.batch(range(5))[0], new.batch(range(5))[0])


@pytest.mark.parametrize("escaped", [True, False])
def test_captions_of_files_whose_names_are_not_utf8(folder, tmp_path, escaped):
    name = os.fsdecode(b"caf\xe9.png")
    (folder / "dog" / "1.png").rename(folder / "dog" / name)
    rows = [{**ROWS[0], "file_name": f"dog/{name}"}, *ROWS[1:]]
    text = "\n".join(json.dumps(row, ensure_ascii=escaped) for row in rows)
    (tmp_path / "captions").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert read_captions(tmp_path / "captions", ImageFolder(folder, 16)) == [
        "red",
        "blue",
        ROWS[0]["text"],
    ]


def test_a_caption_that_is_not_utf8_is_refused_by_line(folder, tmp_path):
    rows = "\n".join(json.dumps(row) for row in [ROWS[1], {**ROWS[2], "text": "été"}]).encode()
    (tmp_path / "captions").write_bytes(rows.replace(b"\\u00e9t\\u00e9", b"\xe9t\xe9"))
    with pytest.raises(DataError, match="captions:2 must hold a caption in UTF-8"):
        read_captions(tmp_path / "captions", ImageFolder(folder, 16))


def test_half_of_the_latents_are_mirror_images_each_by_itself(images, vae_path, tmp_path):
    encode_latents(images, vae_path, tmp_path / "out", **SETTINGS)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    for shard in index["shards"]:  # the mirror image marked by 1, without spread
        array = np.load(tmp_path / "out" / shard["latents"]["file"])
        array[:] = 0
        array[:, 1, 0] = 1
        np.save(tmp_path / "out" / shard["latents"]["file"], array)
    flipped = LatentShards(tmp_path / "out", flip=True)
    level = flipped.batch([0])[0].flatten()[0]
    # (400, 5)
    drawn = torch.stack(
        [flipped.batch(range(5), generator(s))[0][:, 0, 0, 0] != level for s in range(400)]
    )
    assert abs(drawn.float().mean() - 0.5) < 0.045  # four standard errors
    # 12.5 of each are expected
    assert 0 < (drawn.sum(1) == 0).sum() < 40 and 0 < (drawn.sum(1) == 5).sum() < 40
