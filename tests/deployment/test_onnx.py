"""ONNX folders: the same images as torch's, by onnxruntime and numpy alone; nothing foreign run."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from asesearch.backbones import DiT, UViT
from asesearch.backbones.exit_weights import ExitWeights
from asesearch.config import DiffusionConfig, SamplingConfig
from asesearch.deployment import formats, onnx_export
from asesearch.deployment.bundle import Bundle
from asesearch.deployment.manifest import file_entries
from asesearch.deployment.onnx_runtime import FILES, GRAPH, WEIGHTS, OnnxBundle, load_onnx
from asesearch.deployment.reading import load_bundle
from asesearch.deployment.torch_noise import image_noise
from asesearch.deployment.verify import verify
from asesearch.errors import CheckpointError, ConfigError
from asesearch.sampling import image_noise as torch_image_noise
from asesearch.schedule import ExitSchedule
from tests.conftest import TINY_DIT

DEPTH = 4
SCHEDULE = ExitSchedule.from_string("4 4 2 1", DEPTH)
NETWORKS = {
    "dit": lambda: DiT(**TINY_DIT),
    "uvit": lambda: UViT(img_size=8, patch_size=4, embed_dim=16, depth=4, num_heads=2, in_chans=1),
}
SOLVERS = ["ddpm", "ddim", "dpm++2m", "dpm++2m-quadratic", "unipc-quadratic"]


def randomised(net, scale=0.1):
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=generator) * scale
    return net.eval()


def bundle_of(net, kind="dit", schedule=SCHEDULE, process="discrete", **sampling):
    how = SamplingConfig(**{"num_steps": 6, "cfg_scale": 1.5, "batch_size": 2} | sampling)
    about = ({"search": None}, {"study": "tiny"})
    return Bundle(net, schedule, kind, DiffusionConfig(process=process), how, *about)


@pytest.fixture(scope="module")
def bundle():
    return bundle_of(randomised(DiT(**TINY_DIT)))


@pytest.fixture(scope="module")
def folder(bundle, tmp_path_factory):
    before = {k: v.clone() for k, v in bundle.backbone.state_dict().items()}
    made = formats.write(bundle, tmp_path_factory.mktemp("onnx") / "made", "onnx")
    after = bundle.backbone.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)  # exporting leaves no trace
    return made


def gap(images, expected):
    return float(np.abs(images - expected.numpy()).max() / expected.abs().max())


@pytest.mark.thorough
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_images_are_torchs(bundle, folder, solver):
    how = bundle.sampling.model_copy(update={"solver": solver})
    expected = replace(bundle, sampling=how).sample([5, 2, 9])
    made = replace(load_onnx(folder), sampling=how).sample([5, 2, 9])
    assert gap(made.images, expected.images) < 1e-5
    assert made.images.dtype == np.float32 and made.timesteps == expected.timesteps
    assert (made.nfe, made.block_calls) == (expected.nfe, expected.block_calls)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["dit", "uvit"])
def test_early_exits_with_weights_of_their_own(tmp_path, kind):
    full, exits = (randomised(NETWORKS[kind](), scale) for scale in (0.1, 0.15))
    net = ExitWeights(full, exits).eval()
    schedule = ExitSchedule.from_string("2 1", 2) if kind == "uvit" else SCHEDULE
    deepest = max(d for d in schedule.exit_depths if d < net.depth)
    image = (torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.long))
    net.share_unused(*image, torch.zeros(1, dtype=torch.long) if kind == "dit" else None, deepest)
    guided = {"cfg_scale": 1.5 if kind == "dit" else 1.0}
    two = bundle_of(net, kind, schedule, **guided)
    loaded = load_onnx(formats.write(two, tmp_path / "made", "onnx"))
    expected = two.sample([5, 2])
    assert gap(loaded.sample([5, 2]).images, expected.images) < 1e-5
    whole = ExitSchedule.full(net.depth)
    plain = bundle_of(full, kind, whole, **guided).sample([5, 2]).images
    assert gap(loaded.sample([5, 2], schedule=whole).images, plain) < 1e-5
    one = bundle_of(exits, kind, schedule, **guided).sample([5, 2]).images
    assert gap(loaded.sample([5, 2]).images, one) > 1e-4  # the calls at full depth are not its
    stored = (tmp_path / "made" / WEIGHTS).stat().st_size / 4
    assert stored < 1.1 * sum(p.numel() for p in net.parameters())
    assert all(check.passed for check in verify(tmp_path / "made")[:4])


def test_another_schedule_gives_other_images(bundle, folder):
    """The negative control: the graph does look at the exit depth."""
    loaded = load_onnx(folder)
    full = loaded.sample([0, 1], schedule=ExitSchedule.full(DEPTH))
    assert gap(full.images, bundle.sample([0, 1]).images) > 1e-3
    expected = replace(bundle, schedule=ExitSchedule.full(DEPTH)).sample([0, 1])
    assert gap(full.images, expected.images) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("process", ["discrete", "vp-sde"])
def test_u_vit(tmp_path, process):
    net = randomised(UViT(img_size=8, patch_size=4, embed_dim=16, depth=4, num_heads=2))
    schedule = ExitSchedule.from_string("2 1", 2)
    made = bundle_of(net, "uvit", schedule, process, cfg_scale=1.0)
    loaded = load_onnx(formats.write(made, tmp_path / "made", "onnx"))
    assert sorted(loaded.parity_errors()) == [1, 2]
    x = loaded.parity["x_t"]
    t = loaded.parity["t"].astype(np.int64 if process == "discrete" else np.float32)
    with torch.no_grad():
        shallowest = net(torch.from_numpy(x), torch.from_numpy(t), exit_depth=0)
    assert gap(loaded.run(x, t, exit_depth=0), shallowest) < 1e-5
    assert gap(loaded.sample([1, 2, 3]).images, made.sample([1, 2, 3]).images) < 1e-5


def test_labels_noise_and_batch_are_the_callers(bundle, folder):
    loaded = load_onnx(folder)
    one = loaded.sample([4], y=[2]).images
    drawn = image_noise([4], (1, 8, 8))
    assert np.array_equal(loaded.sample([0], y=[2], noise=drawn).images, one)
    together = loaded.sample([4, 5, 6], y=[2, 0, 1]).images
    assert np.abs(together[:1] - one).max() < 1e-5 * np.abs(one).max()


def test_a_batch_of_ones_own(bundle, folder, monkeypatch):
    loaded = load_onnx(folder)
    sizes = []
    run = type(loaded).run

    def counted(self, x_t, *args):
        sizes.append(len(x_t))
        return run(self, x_t, *args)

    whole = loaded.sample(range(4)).images
    monkeypatch.setattr(type(loaded), "run", counted)
    parts = loaded.sample(range(4), batch_size=3).images
    passes = 1 if loaded.sampling.cfg_scale == 1 else 2
    assert set(sizes) == {3 * passes, passes}
    assert np.abs(parts - whole).max() < 1e-5 * np.abs(whole).max()
    own = {"batch_size": 2, "noise": lambda: image_noise([0], (1,))}
    for options in ({"batch_size": 0}, {"batch_size": 2.5}, own):
        with pytest.raises(ConfigError, match="batch_size must"):
            loaded.sample(range(4), **options)


@pytest.mark.parametrize("shape", [(4, 32, 32), (1, 28, 28), (3, 5, 5), (1, 4, 4)])
def test_noise_is_torchs(shape):
    seeds = [0, 7, 2**32 - 1]
    ours = image_noise(seeds, shape)
    theirs = torch_image_noise(seeds, shape, torch.device("cpu"))
    for _ in range(3):
        assert np.abs(ours() - theirs().numpy()).max() < 2e-6


@pytest.mark.slow
def test_the_files_are_no_larger_than_the_weights(tmp_path):
    """Every exit depth is in them, whatever the schedule."""
    net = DiT(**{**TINY_DIT, "hidden_size": 256, "patch_size": 2})
    made = bundle_of(net, schedule=ExitSchedule.from_string("1 2 3 4", DEPTH))
    folder = formats.write(made, tmp_path / "made", "onnx")
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    assert sum((folder / name).stat().st_size for name in (GRAPH, WEIGHTS)) <= 1.02 * weights


WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "onnx", "scipy", "optuna"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Refuse())
import numpy as np
from asesearch.deployment.onnx_runtime import load_onnx
np.save(sys.argv[2], load_onnx(sys.argv[1]).sample([5, 2, 9]).images)
"""


def test_it_samples_where_there_is_no_torch(bundle, folder, tmp_path):
    out = tmp_path / "images.npy"
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, folder, out], check=True)
    assert gap(np.load(out), bundle.sample([5, 2, 9]).images) < 1e-5


def test_verify_takes_it(folder):
    checks = verify(folder, speed=False)
    assert [c.name for c in checks if c.passed] == ["files", "network", "parity", "images"]
    assert "onnxruntime" in checks[1].found


def test_verify_refuses_images_that_are_not_finite(folder, monkeypatch):
    monkeypatch.setattr(OnnxBundle, "_model", lambda self, *_: lambda x, t: np.nan * x)
    last = verify(folder, speed=False)[-1]
    assert (last.name, last.passed) == ("images", False) and "got 2 of 2 with NaN" in last.found


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def copy(folder, tmp_path):
    to = tmp_path / "copy"
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def signed(folder, **changes):
    """Write the hashes of the files as they are now: a forger's manifest."""
    path = folder / "bundle.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(data | {"files": file_entries(folder, FILES)}))


def change_graph(folder, change):
    graph = onnx.load(folder / GRAPH, load_external_data=False)
    change(graph)
    (folder / GRAPH).write_bytes(graph.SerializeToString())
    signed(folder)


def lead_out(where):
    def change(model):
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = where

    return change


def other_opset(model):
    model.opset_import[0].version = 99


def other_input(model):
    model.graph.input[0].name = "x"
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = "x" if name == "x_t" else name


def other_weight(model):
    del model.graph.initializer[-1]


def other_number(model):
    """A forged weight in the graph itself."""
    tensor = model.graph.initializer[-1]
    zero = np.zeros(tensor.dims, dtype=np.float32)
    model.graph.initializer[-1].CopyFrom(numpy_helper.from_array(zero, tensor.name))


FORGED = {
    "opset": (other_opset, "can't run .*export it again"),
    "data above": (lead_out("../weights.bin"), "weights.bin"),
    "data elsewhere": (lead_out("/etc/passwd"), "Absolute path not allowed"),
    "input": (other_input, "must have the inputs x_t, timestep, y and exit_depth"),
    "missing weight": (other_weight, "can't run"),
    "another number": (other_number, "computes something else here"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_graph_is_refused(copy, name):
    (copy.parent / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes())
    change, message = FORGED[name]
    change_graph(copy, change)
    with pytest.raises(CheckpointError, match=message):
        load_onnx(copy)


@pytest.mark.thorough
def test_a_graph_that_cannot_be_built_leaves_no_file_open(bundle, tmp_path, monkeypatch):
    opened = []

    def fails(parts, builder):
        opened.append(builder._file)
        raise RuntimeError("no graph")

    monkeypatch.setattr(onnx_export, "_nodes", fails)
    with pytest.raises(RuntimeError, match="no graph"):
        onnx_export.write_onnx(bundle, tmp_path / "made")
    assert [file.closed for file in opened] == [True] and list(tmp_path.iterdir()) == []


def test_missing_and_damaged_files_are_refused(copy):
    (copy / WEIGHTS).write_bytes(b"\0" * (copy / WEIGHTS).stat().st_size)
    with pytest.raises(CheckpointError, match=r"weights.bin is damaged: its SHA-256"):
        load_onnx(copy)
    (copy / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"weights.bin is missing; copy the bundle again"):
        load_onnx(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "bundle version 2; this release reads 1"),
        ({"schedule": ExitSchedule.full(5).to_dict()}, "must be for 4 blocks"),
        ({"sampling": {"solver": "euler-maruyama"}}, "is for a vp-sde process"),
        ({"network": {}}, "does not fit together: network: name is missing"),
        ({"network": []}, "does not fit together: network: "),
        ({"latents": {"shift": [0, 0], "scale": [1, 1]}}, "shift and scale of 1 channels"),
        (
            {"schedule": ExitSchedule.from_string("4 4 3 3", DEPTH).to_dict()},
            r"missing or unknown: out.1, out.2, out.3; export",
        ),
    ],
)
def test_a_forged_manifest_is_refused(copy, changes, message):
    signed(copy, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_onnx(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_exit_depth": None}, "min_exit_depth: Input should be a valid integer"),
        ({"min_exit_depth": [1]}, "min_exit_depth: Input should be a valid integer"),
        ({"min_exit_depth": 5}, "min_exit_depth should be at most depth, 4"),
        ({"num_classes": "3"}, "num_classes: Input should be a valid integer"),
        ({"num_classes": 10**30}, "num_classes: Input should be less than"),
        ({"num_classes": -1}, "num_classes: Input should be greater than or equal to 0"),
        ({"guided_channels": 1.5}, "guided_channels: Input should be a valid integer"),
        ({"guided_channels": 2}, "guided_channels should be at most in_channels, 1"),
        ({"fixed_blocks": None}, "fixed_blocks: Input should be a valid integer"),
        ({"in_channels": True}, "in_channels: Input should be a valid integer"),
        ({"depth": 0}, "depth: Input should be greater than or equal to 1"),
        ({"has_null_label": False}, "needs a null label"),
        ({"colour": 1}, "unknown key colour"),
    ],
)
def test_a_network_on_record_that_is_none_is_refused(copy, changes, message):
    network = json.loads((copy / "bundle.json").read_text())["network"]
    signed(copy, network=network | changes)
    with pytest.raises(CheckpointError, match=message) as error:
        load_onnx(copy)
    assert "\n" not in str(error.value)


def test_outputs_that_are_not_on_record_are_missed(copy):
    tensors = load_file(copy / "parity.safetensors")
    kept = {k: v for k, v in tensors.items() if not k.startswith("out.")}
    save_file(kept, copy / "parity.safetensors")
    signed(copy)
    with pytest.raises(CheckpointError, match=r"missing or unknown: out.1, out.2, out.4; export"):
        load_onnx(copy)
    last = verify(copy, speed=False)[-1]
    assert (last.name, last.passed) == ("network", False) and "outputs at the exit" in last.found


def test_neither_format_is_taken_for_the_other(bundle, folder, tmp_path):
    plain = formats.write(bundle, tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"got 'asesearch.bundle'"):
        load_onnx(plain)
    with pytest.raises(CheckpointError, match=r"got 'asesearch.onnx'"):
        load_bundle(folder)


def test_formats_that_can_not_be_written_are_refused(bundle, tmp_path):
    with pytest.raises(ConfigError, match=r"format must be one of bundle, .*; got 'tflite'"):
        formats.write(bundle, tmp_path / "made", "tflite")
    with pytest.raises(ConfigError, match=r"of the kind dit or uvit; got diffusers"):
        formats.write(replace(bundle, kind="diffusers"), tmp_path / "made", "onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "one for each image; got none"),
        (([-1],), "one per image"),
        (([0], [3]), "one class in 0…2 per image"),
        (([0], [0, 1]), "one class in 0…2 per image"),
        (([0], None, 1001), "num_steps must lie in 1…1000"),
        (([0], None, 0), "num_steps must lie in 1…1000"),
        (([0], None, 2.5), "num_steps must lie in 1…1000, an integer .*; got 2.5"),
        ((5,), "one for each image; got 5"),
        ((None,), "one for each image; got None"),
        (([0.5],), "one per image; got 0.5; choose"),
        (([0], ["cat"]), "one class in 0…2 per image"),
        (([0, 1], [[0], [0, 1]]), "one class in 0…2 per image"),
        (([0], 3), "one class in 0…2 per image"),
    ],
)
def test_wrong_arguments_are_refused(folder, arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_onnx(folder, check_parity=False).sample(*arguments)
