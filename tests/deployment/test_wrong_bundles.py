"""Bundles that were damaged, forged or made for something else: each is refused in one line that
says the true reason; nothing of them is executed and nothing half-loaded."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from asesearch.backbones import DiT
from asesearch.config import DiffusionConfig, SamplingConfig
from asesearch.deployment.bundle import Bundle
from asesearch.deployment.manifest import file_entries
from asesearch.deployment.reading import load_bundle
from asesearch.deployment.verify import verify
from asesearch.deployment.writing import write_bundle
from asesearch.errors import CheckpointError
from asesearch.schedule import ExitSchedule
from tests.conftest import TINY_DIT

MODEL = "model.safetensors"
PARITY = "parity.safetensors"
FILES = (MODEL, PARITY)


class Payload:
    """A pickle that leaves a file behind where it is opened."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


# -- ways to tamper: each takes the bundle's folder ------------------------------------------------


def text(change):
    """Change the manifest as text."""

    def tamper(folder):
        path = folder / "bundle.json"
        path.write_text(change(path.read_text()))

    return tamper


def raw(data):
    """Other bytes in place of the manifest."""
    return lambda folder: (folder / "bundle.json").write_bytes(data)


def said(*keys, value=None, drop=False):
    """Another value under these keys of the manifest."""

    def tamper(folder):
        path = folder / "bundle.json"
        data = json.loads(path.read_text())
        place = data
        for key in keys[:-1]:
            place = place[key]
        if drop:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value
        path.write_text(json.dumps(data))

    return tamper


def named(name):
    """A file of this name on record, which is there with the right hash."""

    def tamper(folder):
        entries = file_entries(folder, FILES)
        said("files", value={**entries, name: entries[MODEL]})(folder)
        (folder.parent / "outside").write_bytes((folder / MODEL).read_bytes())

    return tamper


def bytes_of(name, change):
    """Change a file's bytes."""

    def tamper(folder):
        path = folder / name
        path.write_bytes(change(bytearray(path.read_bytes())))

    return tamper


def flipped(data):
    data[-3] ^= 1
    return data


def in_place_of(name, make):
    """Something else in a file's place."""

    def tamper(folder):
        (folder / name).unlink()
        make(folder / name)

    return tamper


def linked(path):
    target = path.parent.parent / "outside"
    shutil.copy(path.parent / (PARITY if path.name == MODEL else MODEL), target)
    path.symlink_to(target)


def sealed(*steps):
    """Tamper, and put the hashes of what is there then on record."""

    def tamper(folder):
        for step in steps:
            step(folder)
        said("files", value=file_entries(folder, FILES))(folder)

    return tamper


def tensors(name, change, **metadata):
    """Change the tensors of a file, and the text that goes with them."""

    def tamper(folder):
        path = folder / name
        with safe_open(path, "pt") as file:
            about = {**(file.metadata() or {}), **metadata}
        found = {k: v.clone() for k, v in load_file(path).items()}
        save_file(change(found), path, {k: v for k, v in about.items() if v is not None})

    return tamper


def put(name, make):
    """A change of tensors: one of them made anew."""
    return lambda found: {**found, name: make(found.get(name))}


def without(name):
    return lambda found: {k: v for k, v in found.items() if k != name}


def pickled(how):
    """A pickle whose opening would leave a trace beside the bundle."""
    return lambda path: how(Payload(path.parent.parent / "ran"), path)


def bare_pickle(payload, path):
    path.write_bytes(pickle.dumps(payload, protocol=2))


def torch_zip(payload, path):
    torch.save({"x_embedder.proj.weight": payload}, path)


def config(**changes):
    """The same other sizes in manifest and weights."""
    made = {**DiT(**TINY_DIT).config, **changes}

    def tamper(folder):
        tensors(MODEL, dict, config=json.dumps(made))(folder)
        said("backbone", "config", value=made)(folder)

    return tamper


def schedule(text_, depth=4, steps=1000, **changes):
    data = ExitSchedule.from_string(text_, depth, steps).to_dict()
    return said("schedule", value={**data, **changes})


NAN = torch.tensor(float("nan"))
CASES = {
    # the manifest as a file
    "manifest missing": (lambda f: (f / "bundle.json").unlink(), "can't read .*No such file"),
    "manifest a folder": (in_place_of("bundle.json", Path.mkdir), "can't read .*directory"),
    "manifest empty": (raw(b""), "can't read .*Expecting value"),
    "manifest truncated": (text(lambda t: t[:-20]), "can't read .*bundle.json: "),
    "manifest not text": (raw(b"\xff\xfe\x00"), "can't read .*utf-8"),
    "manifest too large": (raw(b" " * ((1 << 24) + 1)), "more than 16,777,216 bytes"),
    "manifest too deep": (raw(b"[" * 200_000), "nested too deep"),
    "manifest a list": (raw(b"[1]"), "not the manifest of an asesearch bundle"),
    "manifest null": (raw(b"null"), "not the manifest of an asesearch bundle"),
    "key twice": (text(lambda t: t.replace('"version"', '"format": "x", "version"', 1)), "twice"),
    "NaN": (text(lambda t: t.replace('"cfg_scale": 1.5', '"cfg_scale": NaN')), "NaN.*no JSON"),
    "integer of 5,000 digits": (
        text(lambda t: t.replace('"version": 1', f'"version": {"1" * 5000}', 1)),
        "an integer of 5,000 digits",
    ),
    # its head
    "no format": (said("format", drop=True), "not the manifest of an asesearch bundle"),
    "format a number": (said("format", value=1), "not the manifest of an asesearch bundle"),
    "format another": (said("format", value="asesearch.zip"), "got 'asesearch.zip'"),
    "version 2": (said("version", value=2), "bundle version 2; this release reads 1"),
    "version text": (said("version", value="1"), "bundle version '1'"),
    "version true": (said("version", value=True), "bundle version True"),
    "no version": (said("version", drop=True), "bundle version None"),
    "unknown key": (said("hook", value="os.system"), "unknown key 'hook'"),
    # the files on record
    "files a list": (said("files", value=list(FILES)), "not the manifest"),
    "files none": (said("files", value={}), "lacks the file 'model.safetensors'"),
    "files one": (said("files", PARITY, drop=True), "lacks the file 'parity.safetensors'"),
    "files one more": (named("code.py"), "unknown file 'code.py'"),
    "name up": (named("../outside"), "files inside the bundle; got '../outside'"),
    "name absolute": (named("/etc/hostname"), "files inside the bundle; got '/etc/hostname'"),
    "name in a folder": (named("../bundle/../outside"), "files inside the bundle"),
    "name of Windows": (named("c:\\outside"), "files inside the bundle"),
    "name empty": (named(""), "files inside the bundle"),
    "name of the manifest": (named("bundle.json"), "files inside the bundle"),
    "entry null": (said("files", MODEL, value=None), "must give sha256 and bytes"),
    "entry without hash": (said("files", MODEL, "sha256", drop=True), "must give sha256 and bytes"),
    "size text": (said("files", MODEL, "bytes", value="x"), "has .* bytes, and x are on record"),
    "hash null": (said("files", MODEL, "sha256", value=None), "its SHA-256 is not"),
    # the files
    "weights flipped": (bytes_of(MODEL, flipped), f"{MODEL} is damaged: its SHA-256"),
    "weights truncated": (bytes_of(MODEL, lambda b: b[:-9]), f"{MODEL} is damaged: it has"),
    "weights empty": (bytes_of(MODEL, lambda b: b""), "has 0 bytes"),
    "weights missing": (lambda f: (f / MODEL).unlink(), f"{MODEL} is missing"),
    "weights a folder": (in_place_of(MODEL, Path.mkdir), f"{MODEL} is missing"),
    "weights a link": (in_place_of(MODEL, linked), f"{MODEL} is a link"),
    "outputs flipped": (bytes_of(PARITY, flipped), f"{PARITY} is damaged: its SHA-256"),
    "outputs truncated": (bytes_of(PARITY, lambda b: b[:100]), f"{PARITY} is damaged: it has"),
    "outputs missing": (lambda f: (f / PARITY).unlink(), f"{PARITY} is missing"),
    "outputs a link": (in_place_of(PARITY, linked), f"{PARITY} is a link"),
    # pickles, with the right hash
    "weights a pickle": (sealed(in_place_of(MODEL, pickled(bare_pickle))), "is a pickle, which is"),
    "weights of torch": (sealed(in_place_of(MODEL, pickled(torch_zip))), "is a pickle, which is"),
    "outputs a pickle": (sealed(in_place_of(PARITY, pickled(bare_pickle))), "is a pickle, which"),
    "plain tensors of torch": (
        sealed(in_place_of(MODEL, lambda p: torch.save({"x": torch.ones(1)}, p))),
        "is a pickle, which is never opened",
    ),
    # safetensors that are none, with the right hash
    "weights cut": (sealed(bytes_of(MODEL, lambda b: b[:-9])), "no whole safetensors file"),
    "weights of no bytes": (sealed(bytes_of(MODEL, lambda b: b"")), "no whole safetensors file"),
    "header too long": (
        sealed(bytes_of(MODEL, lambda b: b"\xff" * 8 + b[8:])),
        "no whole safetensors file",
    ),
    "outputs cut": (sealed(bytes_of(PARITY, lambda b: b[:200])), "no whole safetensors file"),
    # weights of something else
    "foreign weights": (
        sealed(tensors(MODEL, dict, format=None)),
        "must be weights of asesearch.backbone, version 1; got None",
    ),
    "weights of version 2": (
        sealed(tensors(MODEL, dict, version="2")),
        "got asesearch.backbone, version 2",
    ),
    "weight missing": (sealed(tensors(MODEL, without("blocks.1.mlp.fc1.bias"))), "fc1.bias"),
    "weight surplus": (sealed(tensors(MODEL, put("blocks.9.x", lambda _: NAN))), "blocks.9.x"),
    "weight of another shape": (
        sealed(tensors(MODEL, put("blocks.0.attn.proj.bias", lambda v: v[:8].clone()))),
        r"attn.proj.bias \(8,\) instead of \(16,\)",
    ),
    "weight in half": (
        sealed(tensors(MODEL, put("blocks.0.attn.proj.bias", lambda v: v.half()))),
        "must hold float32 weights; got F16 in blocks.0.attn.proj.bias",
    ),
    "weight of integers": (
        sealed(tensors(MODEL, put("blocks.0.attn.proj.bias", lambda v: v.long()))),
        "must hold float32 weights; got I64",
    ),
    "weight NaN": (
        sealed(tensors(MODEL, put("blocks.0.attn.proj.bias", lambda v: v * NAN))),
        "NaN or infinity: 16 of 16 in blocks.0.attn.proj.bias",
    ),
    "other weights": (
        sealed(tensors(MODEL, put("blocks.0.attn.proj.weight", lambda v: v * 2))),
        "computes something else here",
    ),
    # a network that is not the weights'
    "kind another": (said("backbone", "kind", value="uvit"), "kind is dit, and not uvit"),
    "kind unknown": (said("backbone", "kind", value="zip"), "kind: Input should be 'dit'"),
    "kind a table": (said("backbone", "kind", value={}), "kind: Input should be 'dit'"),
    "network a list": (said("backbone", value=[]), "backbone must be a table"),
    "network without config": (said("backbone", "config", drop=True), "a kind and a config"),
    "config another": (said("backbone", "config", "depth", value=5), "depth is 4, and not 5"),
    "config of a billion blocks": (sealed(config(depth=10**9)), "tells of 1000000000 blocks"),
    "config of a huge image": (sealed(config(input_size=4 * 10**9)), "tokens of width 16"),
    "config unknown": (sealed(config(hook="os.system")), "DiT has no argument 'hook'"),
    "config of text": (sealed(config(depth="4")), "depth must be a positive integer"),
    # schedule, process, sampler
    "no schedule": (said("schedule", drop=True), "lacks 'schedule'"),
    "schedule text": (said("schedule", value="4 4 2 1"), "schedule must be a table"),
    "schedule of another depth": (schedule("5 5 2 1", 5), "of 5 blocks; got one of 4"),
    "schedule of other timesteps": (schedule("4 4 2 1", steps=500), "500 diffusion timesteps"),
    "schedule of version 9": (schedule("4 4 2 1", version=9), "version 9|got .*9"),
    "schedule of half blocks": (schedule("4 4 2 1", exit_depths=[4, 4, 2, 0.5]), "0.5"),
    "schedule below one block": (schedule("4 4 2 1", exit_depths=[4, 4, 2, 0]), "must lie in 1…4"),
    "timesteps huge": (
        said("diffusion", "num_train_timesteps", value=10**30),
        "less than or equal",
    ),
    "timesteps other": (said("diffusion", "num_train_timesteps", value=500), "got 500"),
    "process of another solver": (
        sealed(
            said("diffusion", value={"process": "vp-sde"}), said("sampling", "solver", value="ddpm")
        ),
        "ddpm is for",
    ),
    "solver a list": (said("sampling", "solver", value=["ddim"]), "sampling: solver: Input should"),
    "steps beyond timesteps": (said("sampling", "num_steps", value=2**40), "must lie in 1…1000"),
    "steps a float": (
        said("sampling", "num_steps", value=4.0),
        "num_steps: Input should be a valid",
    ),
    "guidance infinite": (
        text(lambda t: t.replace('"cfg_scale": 1.5', '"cfg_scale": 1e999')),
        "cfg_scale: Input should be a finite number",
    ),
    "sampling unknown key": (said("sampling", "hook", value=1), "unknown key hook"),
    "sampling null": (said("sampling", value=None), "sampling must be a table"),
    "evaluation a list": (said("evaluation", value=[]), "evaluation must be a table"),
    "provenance missing": (said("provenance", drop=True), "lacks 'provenance'"),
    "latents text": (said("latents", value="vae"), "latents must give shift and scale"),
    "latents of two channels": (
        said("latents", value={"shift": [0.0, 0.0], "scale": [1.0, 1.0], "digest": ""}),
        "one number for each of 1 channels; got 2",
    ),
    "latents infinite": (
        text(lambda t: t.replace('"latents": null', '"latents": {"shift": [0], "scale": [1e999]}')),
        "latents must give shift and scale",
    ),
    "latents of other channels in shift": (
        said("latents", value={"shift": [0.0, 0.0], "scale": [1.0]}),
        "latents must give shift and scale",
    ),
    # inputs and outputs on record
    "output missing": (sealed(tensors(PARITY, without("out.2"))), "missing or unknown: out.2"),
    "output surplus": (sealed(tensors(PARITY, put("out.x", lambda _: NAN))), "unknown: out.x"),
    "output of another shape": (
        sealed(tensors(PARITY, put("out.2", lambda v: v[:1].clone()))),
        r"out.2 in .*must be float32 \(2, 2, 8, 8\); got float32 \(1, 2, 8, 8\)",
    ),
    "output in double": (
        sealed(tensors(PARITY, put("out.2", lambda v: v.double()))),
        "out.2 in .*must be float32",
    ),
    "output off": (sealed(tensors(PARITY, put("out.2", lambda v: v * 1.01))), "exit depth 2"),
    "output NaN": (sealed(tensors(PARITY, put("out.2", lambda v: v * NAN))), "off by nan"),
    "timestep out of range": (
        sealed(tensors(PARITY, put("t", lambda v: v + 1000))),
        "t in .*must lie in 0…999",
    ),
    "label out of range": (
        sealed(tensors(PARITY, put("y", lambda v: v + 7))),
        "y in .*must lie in 0…2",
    ),
    "prompts of a network without": (
        sealed(tensors(PARITY, put("y.a", lambda _: torch.ones(2, 3)))),
        "unknown: y.a",
    ),
}
#: Of these the network is right, and its outputs have to be computed.
RUN = {"other weights", "output off", "output NaN"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A bundle of random weights."""
    net = DiT(**TINY_DIT).eval()
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.2
    how = SamplingConfig(solver="ddim", num_steps=4, cfg_scale=1.5)
    made = Bundle(
        net, ExitSchedule.from_string("4 4 2 1", 4), "dit", DiffusionConfig(), how, {}, {}
    )
    return write_bundle(made, tmp_path_factory.mktemp("whole") / "bundle")


def test_there_are_enough_cases():
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_bundle_is_refused_with_the_true_reason(name, whole, tmp_path, monkeypatch):
    tamper, rule = CASES[name]
    folder = tmp_path / "bundle"
    shutil.copytree(whole, folder)
    tamper(folder)
    if name not in RUN:
        for way in ("forward", "all_exits"):
            monkeypatch.setattr(DiT, way, lambda *a, **k: pytest.fail("the network was run"))
    for opener in ("load", "Unpickler", "loads"):
        monkeypatch.setattr(pickle, opener, lambda *a, **k: pytest.fail("something was unpickled"))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(CheckpointError, match=rule) as error:
        load_bundle(folder)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500 + 2 * len(str(folder)), message
    assert sorted(folder.parent.rglob("*")) == before  # no payload ran, and nothing was written
    checks = verify(folder, speed=False)
    assert [check.passed for check in checks] == [True] * (len(checks) - 1) + [False]


def test_the_whole_bundle_loads_and_the_payload_would_be_seen(whole, tmp_path):
    """Negative controls: of the cases' bundle, and of the trace that a pickle leaves."""
    assert load_bundle(whole).sample([0]).images.shape == (1, 1, 8, 8)
    bare_pickle(Payload(tmp_path / "ran"), tmp_path / "x")
    pickle.loads((tmp_path / "x").read_bytes())
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize(
    "make",
    [lambda p: None, lambda p: p.write_text("x"), lambda p: p.mkdir()],
    ids=["absent", "a file", "empty"],
)
def test_what_is_no_bundle_is_refused(make, tmp_path):
    make(tmp_path / "bundle")
    with pytest.raises(CheckpointError, match="is .*bundle a bundle written by"):
        load_bundle(tmp_path / "bundle")
