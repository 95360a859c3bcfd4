"""`verify`: what is right passes, and each kind of wrong fails its own check."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import asesearch
from asesearch.backbones import UViT
from asesearch.backbones.exit_weights import ExitWeights
from asesearch.backbones.merging import Merging
from asesearch.cli import app
from asesearch.config import DiffusionConfig, SamplingConfig
from asesearch.deployment import formats
from asesearch.deployment import verify as module
from asesearch.deployment.bundle import Bundle
from asesearch.deployment.manifest import file_entries
from asesearch.deployment.verify import Opened, verify
from asesearch.deployment.writing import write_bundle
from asesearch.errors import ConfigError
from asesearch.schedule import ExitSchedule

SCHEDULE = ExitSchedule.from_string("4 4 2 1", 4)


@pytest.fixture
def folder(tiny_dit, tmp_path):
    how = SamplingConfig(solver="ddim", num_steps=4, batch_size=5)
    made = Bundle(tiny_dit, SCHEDULE, "dit", DiffusionConfig(), how, {}, {})
    return write_bundle(made, tmp_path / "bundle")


def resealed(folder):
    """The hashes on record made those of the files as they are."""
    path = folder / "bundle.json"
    data = json.loads(path.read_text())
    data["files"] = file_entries(folder, data["files"])
    path.write_text(json.dumps(data))


def test_a_whole_bundle_passes(folder, monkeypatch):
    monkeypatch.setattr(module, "SPEED_S", 0.5)
    checks = asesearch.verify(str(folder))
    assert [c.name for c in checks] == ["files", "network", "parity", "images", "speed"]
    assert all(c.passed for c in checks[:4])
    assert "DiT of 4 blocks" in checks[1].found and str(SCHEDULE) in checks[1].found
    assert set(checks[2].numbers["errors"]) == {"1", "2", "4"}
    assert max(checks[2].numbers["errors"].values()) < 1e-5
    assert 0 < checks[4].numbers["block_frac"] < 1 and checks[4].numbers["images"] <= 5
    assert checks[3].found == "2 images in 2 of 4 steps, finite"


def test_what_fits_the_memory_is_timed(folder, monkeypatch):
    sample = Bundle.sample
    sizes = []

    def on_a_small_machine(self, seeds, *args, **options):
        sizes.append(len(seeds))
        if len(seeds) > 2:
            torch.empty(1 << 50)
        return sample(self, seeds, *args, **options)

    monkeypatch.setattr(Bundle, "sample", on_a_small_machine)
    checks = verify(folder)
    assert max(sizes) == 4 and checks[4].name == "speed" and checks[4].numbers["images"] == 1


def test_damage_fails_files_and_ends_there(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (only,) = verify(folder)
    assert (only.name, only.passed) == ("files", False) and "is damaged" in only.found
    assert verify(folder / "nothing")[0].found.startswith("can't read")


def test_another_network_fails_network_or_parity(folder):
    path = folder / "parity.safetensors"
    whole = load_file(path)
    save_file({**whole, "out.2": whole["out.2"] * 1.01}, path)
    resealed(folder)
    checks = verify(folder)
    assert [(c.name, c.passed) for c in checks][1:] == [("network", True), ("parity", False)]
    assert "(depth 2; tolerance 0.002)" in checks[-1].found
    save_file({**whole, "out.2": torch.full_like(whole["out.2"], torch.nan)}, path)
    resealed(folder)
    assert not verify(folder)[-1].passed
    save_file({k: v for k, v in whole.items() if k != "out.2"}, path)
    resealed(folder)
    assert [(c.name, c.passed) for c in verify(folder)][1:] == [("network", False)]


@pytest.mark.parametrize("speed", [False, True])
def test_images_that_are_not_finite_fail(folder, monkeypatch, speed):
    """Outputs on record are float32's, and a network may compute otherwise in its sampling."""
    nothing = SimpleNamespace(images=torch.full((2, 1, 8, 8), torch.nan))
    monkeypatch.setattr(Bundle, "sample", lambda *_: nothing)
    last = verify(folder, speed=speed)[-1]
    assert (last.name, last.passed) == ("images", False)
    assert "must be finite; got 2 of 2 with NaN" in last.found


def test_a_bundle_of_compiled_blocks_is_verified_as_such(tiny_dit, tmp_path, only_traced):
    how = SamplingConfig(solver="ddim", num_steps=4, compile=True)
    made = Bundle(tiny_dit, SCHEDULE, "dit", DiffusionConfig(), how, {}, {})
    checks = verify(write_bundle(made, tmp_path / "bundle"), speed=False)
    assert all(c.passed for c in checks) and checks[1].found.endswith("ddim-4, compiled blocks")
    assert only_traced() == 1


def test_compiled_blocks_are_a_choice_of_a_plain_bundle(folder, tiny_dit, tmp_path, only_traced):
    checks = verify(folder, speed=False, compile=True)
    assert all(c.passed for c in checks) and checks[1].found.endswith("ddim-4, compiled blocks")
    assert only_traced() == 1
    how = SamplingConfig(solver="ddim", num_steps=4, compile=True)
    made = Bundle(tiny_dit, SCHEDULE, "dit", DiffusionConfig(), how, {}, {})
    eager = verify(write_bundle(made, tmp_path / "eager"), speed=False, compile=False)
    assert eager[1].found.endswith("ddim-4") and only_traced() == 1
    merging = replace(
        made, sampling=how.model_copy(update={"compile": False}), acceleration=Merging(0.5)
    )
    merging = replace(merging, acceleration_name="merge-0.5")
    merged = write_bundle(merging, tmp_path / "merged")
    assert verify(merged, speed=False, compile=False)[-1].passed
    last = verify(merged, speed=False, compile=True)[-1]
    assert not last.passed and "leave compile or the acceleration out" in last.found
    manifest = json.loads((folder / "bundle.json").read_text())
    with pytest.raises(ConfigError, match="for the format asesearch.bundle; got asesearch.onnx"):
        module._open(folder, {**manifest, "format": "asesearch.onnx"}, True)


def test_a_slow_network_is_timed_in_few_calls(monkeypatch):
    """Six seconds a call: not five pairs of samplings."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def run(schedule, steps, images):
        now[0] += 6.0 * steps * images
        return (900, 100)

    check = module._speed(Opened("a network", SCHEDULE, 50, 1, dict, 1.0, run), run)
    assert (check.numbers["steps"], check.numbers["images"]) == (2, 1) and now[0] <= 6 + 24


@pytest.mark.parametrize(("frac", "passed"), [(0.6, True), (0.8, True), (0.95, False)])
def test_speed_is_judged_by_the_promised_saving(frac, passed, monkeypatch):
    """A schedule that runs 5/8 of the blocks must save at least half of 3/8."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def run(schedule, steps, images):
        now[0] += steps * images * (1.0 if schedule is not None else frac)
        return SCHEDULE.boundaries[:-1][:steps] if steps > 1 else (0,)

    opened = Opened("a network", SCHEDULE, 4, 1, dict, 1.0, run)
    monkeypatch.setattr(module, "SPEED_S", 60.0)
    check = module._speed(opened, run)
    assert check.numbers["time_frac"] == pytest.approx(frac)
    assert (check.numbers["steps"], check.numbers["block_frac"]) == (4, 11 / 16)
    assert check.passed is passed


@pytest.mark.thorough
@pytest.mark.parametrize("form", ["bundle", "onnx"])
def test_a_u_vit_is_promised_no_saving_of_blocks_that_always_run(form, tmp_path, monkeypatch):
    """Three of its five blocks; one of the other two runs."""
    net = UViT(img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=4, num_heads=2)
    assert net.fixed_blocks == ExitWeights(net, net).fixed_blocks == 3
    assert ExitSchedule.full(2).block_frac([0, 999], 3) == 1
    schedule = ExitSchedule.from_string("1 1", 2)
    how = SamplingConfig(solver="ddim", num_steps=2, batch_size=2)
    made = Bundle(net.eval(), schedule, "uvit", DiffusionConfig(), how, {}, {})
    folder = formats.write(made, tmp_path / "made", form)
    monkeypatch.setattr(module, "SPEED_S", 0.5)
    assert verify(folder)[4].numbers["block_frac"] == pytest.approx(4 / 5)


@pytest.mark.parametrize(("jitter", "passed"), [(0.0, False), (0.3, True)])
def test_a_busy_machine_is_no_slow_bundle(jitter, passed, monkeypatch):
    """0.95 of the time fails where the pairs agree, and not where they are spread by 0.3."""
    now = [0.0]
    calls = [0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def run(schedule, steps, images):
        calls[0] += 1
        early = schedule is None
        now[0] += steps * images * (0.95 + jitter * (calls[0] % 3 - 1) if early else 1.0)
        return SCHEDULE.boundaries[:-1][:steps] if steps > 1 else (0,)

    monkeypatch.setattr(module, "SPEED_S", 60.0)
    assert module._speed(Opened("a network", SCHEDULE, 4, 1, dict, 1.0, run), run).passed is passed


def test_the_full_network_promises_no_saving():
    full = ExitSchedule.full(4)
    run = lambda schedule, steps, images: (900, 100)[:steps]  # noqa: E731
    check = module._speed(Opened("a network", full, 4, 1, dict, 1.0, run), run)
    assert check.passed and "no saving is promised" in check.found


def test_another_format_is_named(folder):
    path = folder / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "asesearch.zip"}))
    checks = verify(folder, speed=False)
    assert [c.passed for c in checks] == [True, False] and "got 'asesearch.zip'" in checks[1].found


def test_the_command_prints_a_table_or_json_and_exits(folder):
    run = CliRunner().invoke
    table = run(app, ["verify", str(folder), "--no-speed"])
    assert table.exit_code == 0
    assert [line.split()[:2] for line in table.stdout.splitlines()] == [
        ["files", "ok"],
        ["network", "ok"],
        ["parity", "ok"],
        ["images", "ok"],
    ]
    (folder / "parity.safetensors").unlink()
    failed = run(app, ["verify", str(folder), "--json"])
    assert failed.exit_code == 1
    assert [(c["name"], c["passed"]) for c in json.loads(failed.stdout)] == [("files", False)]
