"""Folders of diffusers: loaded by its own class, they sample as the bundle they were made of."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline

from asesearch.backbones import DiT
from asesearch.config import DiffusionConfig, SamplingConfig
from asesearch.deployment import formats
from asesearch.deployment.bundle import Bundle
from asesearch.deployment.diffusers_hook import apply_exit_schedule
from asesearch.deployment.diffusers_pipeline import ExportedDiTPipeline
from asesearch.deployment.manifest import file_entries
from asesearch.deployment.verify import verify
from asesearch.errors import CheckpointError, ConfigError, DataError
from asesearch.schedule import ExitSchedule
from tests.deployment.test_diffusers_hook import MAKERS, of_numpy_1

pytestmark = of_numpy_1
DEPTH = 4
SCHEDULE = ExitSchedule.from_string("4 4 2 1", DEPTH)
SEEDS = [5, 2, 9]
LATENTS = {"shift": [0.0] * 4, "scale": [0.5] * 4, "digest": "x"}


def made_bundle(solver="ddim", latents=None, channels=4, diffusion=None):
    sizes = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "num_heads": 4, "depth": DEPTH}
    net = DiT(**sizes, in_channels=channels, num_classes=10).eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in net.named_parameters():
        if name != "pos_embed":
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    how = SamplingConfig(solver=solver, num_steps=8, cfg_scale=1.5, batch_size=2)
    about = ({"search": None}, {"study": "tiny"}, None, latents)
    return Bundle(net, SCHEDULE, "dit", diffusion or DiffusionConfig(), how, *about)


def load(folder, **parts):
    pipeline = DiffusionPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, **options):
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    return pipeline([s % 10 for s in SEEDS], generator=generators, **options).images


def gap(images, expected):
    return float((images - expected).abs().max() / expected.abs().max())


@pytest.mark.thorough
@pytest.mark.parametrize(
    "solver",
    ["ddpm", "ddim", "dpm++2m", "dpm++2m-quadratic", "dpm++2m-order2", "unipc", "unipc-quadratic"]
    + ["ddim-power1.5"],
)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
def test_the_latents_are_the_bundles(tmp_path, solver, betas):
    """Guidance on three channels of four, ten classes, the official frequencies."""
    bundle = made_bundle(solver, diffusion=DiffusionConfig(beta_schedule=betas))
    folder = formats.write(bundle, tmp_path / "made", "diffusers")
    expected = bundle.sample(SEEDS)
    pipeline = load(folder, vae=None)
    with apply_exit_schedule(pipeline, folder) as handle:
        assert gap(sample(pipeline), expected.images) < 1e-4
        assert 2 * handle.block_calls == expected.block_calls  # guidance is one call of two halves
        full = replace(bundle, schedule=ExitSchedule.full(DEPTH)).sample(SEEDS)
        assert gap(sample(pipeline), full.images) > 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++2m", "dpm++2m-order2", "unipc"])
def test_so_are_they_in_one_step_and_in_two(tmp_path, solver):
    """diffusers' DDPMScheduler adds noise at the end of a single step, which begins above 0."""
    bundle = made_bundle(solver)
    folder = formats.write(bundle, tmp_path / "made", "diffusers")
    pipeline = load(folder, vae=None)
    with apply_exit_schedule(pipeline, folder):
        for steps in (1, 2):
            images = sample(pipeline, num_inference_steps=steps)
            assert gap(images, bundle.sample(SEEDS, num_steps=steps).images) < 1e-4


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_positions_rounded_by_weights_in_half_precision_stay_so(tmp_path, precision):
    bundle = made_bundle()
    net = bundle.backbone
    exact = net.pos_embed.data.clone()
    net.pos_embed.data = exact.to(getattr(torch, precision)).float()
    folder = formats.write(bundle, tmp_path / "made", "diffusers")
    pipeline = load(folder, vae=None)
    expected = bundle.sample(SEEDS).images
    with apply_exit_schedule(pipeline, folder):
        assert gap(sample(pipeline), expected) < 1e-5
    assert torch.equal(pipeline.transformer.pos_embed.pos_embed, exact)
    net.pos_embed.data = exact
    assert gap(bundle.sample(SEEDS).images, expected) > 1e-5  # they matter


def tiny_vae(folder, scale=0.5):
    vae = AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=8,
        scaling_factor=scale,
    )
    vae.save_pretrained(folder)
    return folder


def test_with_a_vae_it_loads_as_it_is_and_gives_the_same_images(tmp_path):
    bundle = made_bundle("dpm++2m", LATENTS)
    vae = tiny_vae(tmp_path / "vae")
    folder = formats.write(bundle, tmp_path / "made", "diffusers", vae=vae)
    pipeline = load(folder)
    assert type(pipeline) is DiTPipeline
    shift = pipeline.transformer.transformer_blocks[0].norm1.emb.time_proj.downscale_freq_shift
    handle = apply_exit_schedule(pipeline, folder)
    images = sample(pipeline, output_type="pt")
    with torch.no_grad():
        decoded = pipeline.vae.decode(bundle.sample(SEEDS).images / 0.5).sample
    assert gap(images, (decoded / 2 + 0.5).clamp(0, 1)) < 1e-4
    assert sample(pipeline)[0].size == (8, 8)
    handle.remove()
    blocks = pipeline.transformer.transformer_blocks
    assert {b.norm1.emb.time_proj.downscale_freq_shift for b in blocks} == {shift}
    assert type(pipeline) is DiTPipeline and not hasattr(pipeline, "exported")


def test_saved_under_its_schedule_it_is_a_pipeline_of_diffusers(tmp_path):
    """The schedule stays in the exported folder, which the saved one takes it from again."""
    vae = tiny_vae(tmp_path / "vae")
    folder = formats.write(made_bundle(latents=LATENTS), tmp_path / "made", "diffusers", vae=vae)
    pipeline = load(folder)
    with apply_exit_schedule(pipeline, folder):
        images = sample(pipeline, output_type="latent")
        pipeline.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline"
    again = load(tmp_path / "saved")
    assert type(again) is DiTPipeline
    with apply_exit_schedule(again, folder):
        assert torch.equal(sample(again, output_type="latent"), images)


def test_steps_guidance_and_scheduler_can_be_changed(tmp_path):
    bundle = made_bundle()
    folder = formats.write(bundle, tmp_path / "made", "diffusers")
    pipeline = load(folder, vae=None)
    with apply_exit_schedule(pipeline, folder) as handle:
        plain = replace(bundle, sampling=bundle.sampling.model_copy(update={"cfg_scale": 1.0}))
        images = sample(pipeline, guidance_scale=1, num_inference_steps=5)
        assert gap(images, plain.sample(SEEDS, num_steps=5).images) < 1e-4 and handle.nfe == 5
        with pytest.raises(ConfigError, match=r"num_steps must lie in 1…1000.*got 0"):
            sample(pipeline, num_inference_steps=0)
        pipeline.scheduler = DDIMScheduler(clip_sample=False)
        assert torch.isfinite(sample(pipeline)).all()
        assert list(pipeline.scheduler.timesteps) == list(range(875, -1, -125))  # its own grid


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++2m-quadratic", "unipc-quadratic"])
def test_a_scheduler_of_the_same_class_keeps_its_own_timesteps(tmp_path, solver):
    """The exported one is told by its config, also loaded anew; any other is the user's."""
    folder = formats.write(made_bundle(solver), tmp_path / "made", "diffusers")
    pipeline = load(folder, vae=None)
    cls = type(pipeline.scheduler)
    with apply_exit_schedule(pipeline, folder):
        images = sample(pipeline)
        exported = list(pipeline.scheduler.timesteps)
        pipeline.scheduler = cls.from_pretrained(folder, subfolder="scheduler")
        assert torch.equal(sample(pipeline), images)
        config = pipeline.scheduler.config
        own = cls.from_config(config, timestep_spacing="trailing")
        own.set_timesteps(8)
        pipeline.scheduler = cls.from_config(config, timestep_spacing="trailing")
        assert torch.isfinite(sample(pipeline)).all()
        assert list(pipeline.scheduler.timesteps) == list(own.timesteps) != exported
        if solver.startswith("dpm"):  # whose timesteps are refused beside
            pipeline.scheduler = cls.from_config(config, use_karras_sigmas=True)
            assert torch.isfinite(sample(pipeline)).all()


def test_a_bundle_and_its_folder_have_schedules_too(tmp_path):
    bundle = made_bundle()
    plain = formats.write(bundle, tmp_path / "plain")
    folder = formats.write(bundle, tmp_path / "made", "diffusers")
    pipeline = load(folder, vae=None)
    for source in (bundle, plain, str(plain)):
        with apply_exit_schedule(pipeline, source) as handle:
            assert handle.schedule == SCHEDULE and type(pipeline) is DiTPipeline
    with pytest.raises(CheckpointError, match=r"is .* a bundle written by `asesearch export`\?"):
        apply_exit_schedule(pipeline, tmp_path)


@pytest.mark.parametrize("own", [{}, {"frequency_shift": 1, "norm_eps": 0.1}])
def test_a_diffusers_dit_computes_as_the_bundles_network(tmp_path, own):
    """diffusers fixes the frequencies, and a folder's norm_eps may be another's."""
    bundle = made_bundle()
    net = DiT(**bundle.backbone.config | own).eval()
    net.load_state_dict(bundle.backbone.state_dict())
    bundle = replace(bundle, backbone=net)
    transformer = load(formats.write(bundle, tmp_path / "made", "diffusers"), vae=None).transformer
    for block in transformer.transformer_blocks:
        block.norm3.eps = 0.5  # as of another config
    x_t, t, y = torch.randn(2, 4, 8, 8), torch.tensor([900, 900]), torch.tensor([3, 1])
    with torch.no_grad():
        before = transformer(x_t, t, y).sample
        expected = net(x_t, t, y, exit_depth=int(SCHEDULE.exit_depth_at(900)))
        for source in (bundle, formats.write(bundle, tmp_path / "plain")):
            with apply_exit_schedule(transformer, source):
                assert gap(transformer(x_t, t, y).sample, expected) < 1e-4
            assert torch.equal(transformer(x_t, t, y).sample, before)
        with apply_exit_schedule(transformer, SCHEDULE):  # that tells of no network
            assert gap(transformer(x_t, t, y).sample, expected) > 1e-3


def test_another_pipeline_is_refused_and_left_as_it_was(tmp_path):
    folder = formats.write(made_bundle(), tmp_path / "made", "diffusers")
    pipeline = MAKERS["pixart"]()
    blocks = [type(block) for block in pipeline.transformer.transformer_blocks]
    with pytest.raises(ConfigError, match="of a DiTPipeline; got a PixArtAlphaPipeline"):
        apply_exit_schedule(pipeline, folder)
    assert [type(block) for block in pipeline.transformer.transformer_blocks] == blocks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frequency_shift": "1"}, "got wrong frequency_shift"),
        (
            {"diffusion": DiffusionConfig(num_train_timesteps=7).model_dump()},
            "got wrong diffusion.num_train_timesteps",
        ),
        ({"diffusion": {"num_train_timesteps": 0}}, "got wrong diffusion: num_train_timesteps"),
        ({"positions": "int8"}, "got wrong positions"),
        ({"guided_channels": 5}, "got wrong guided_channels"),
        ({"latents": {"shift": [0.0], "scale": [1.0]}}, "got wrong latents"),
        ({"latents": {"shift": [0.0] * 4, "scale": [True] * 4}}, "got wrong latents"),
        ({"latents": {"shift": "0000", "scale": [1.0] * 4}}, "got wrong latents"),
        ({"sampling": {"solver": "magic"}}, "got wrong sampling: solver"),
        ({"schedule": {}}, "must hold an exit schedule"),
        ({"version": 2}, "has bundle version 2; this release reads 1"),
        ({"format": "asesearch.tape"}, "got 'asesearch.tape'"),
    ],
)
def test_a_forged_manifest_is_refused(tmp_path, changes, message):
    folder = formats.write(made_bundle(), tmp_path / "made", "diffusers")
    pipeline = load(folder, vae=None)
    path = folder / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        apply_exit_schedule(pipeline, folder)
    assert type(pipeline) is DiTPipeline
    apply_exit_schedule(pipeline, SCHEDULE).remove()  # nothing was left behind


def test_wrong_labels_are_refused(tmp_path):
    folder = formats.write(made_bundle(), tmp_path / "made", "diffusers")
    pipeline = load(folder, vae=None)
    with apply_exit_schedule(pipeline, folder):
        for wrong in ([10], [-1], [0.5], ["cat"], "cat", 3, None, [], [None], [True], [10**30]):
            with pytest.raises(ConfigError, match="must be integers in 0…9, one per image; got"):
                pipeline(wrong)
        for steps in (2.5, "2", True):
            with pytest.raises(ConfigError, match="num_steps must lie in 1…1000, an integer .*got"):
                pipeline([1], num_inference_steps=steps)


def test_verify_takes_it(tmp_path):
    folder = formats.write(made_bundle(), tmp_path / "made", "diffusers")
    checks = verify(folder, speed=False)
    assert [c.name for c in checks if c.passed] == ["files", "network", "parity", "images"], checks[
        -1
    ]
    assert "diffusers pipeline" in checks[1].found


def test_verify_misses_outputs_that_are_not_on_record(tmp_path):
    folder = formats.write(made_bundle(), tmp_path / "made", "diffusers")
    path = folder / "bundle.json"
    data = json.loads(path.read_text())
    other = ExitSchedule.from_string("4 3 3 3", DEPTH).to_dict()
    path.write_text(json.dumps(data | {"schedule": other}))
    last = verify(folder, speed=False)[-1]
    assert (last.name, last.passed) == ("parity", False)
    assert "missing or unknown: out.1, out.2, out.3; export it again" in last.found


def test_verify_refuses_images_that_are_not_finite(tmp_path, monkeypatch):
    folder = formats.write(made_bundle(), tmp_path / "made", "diffusers")
    monkeypatch.setattr(ExportedDiTPipeline, "_output", lambda self, x, _: x / 0 * 0)
    last = verify(folder, speed=False)[-1]
    assert (last.name, last.passed) == ("images", False) and "got 2 of 2 with NaN" in last.found


def test_what_is_no_pipeline_of_ours_is_refused(tmp_path):
    folder = formats.write(made_bundle(), tmp_path / "made", "diffusers")
    path = folder / "bundle.json"
    (folder / "pipeline.py").write_text("raise SystemExit")
    names = [*json.loads(path.read_text())["files"], "pipeline.py"]
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"files": file_entries(folder, names)})
    )
    assert "names the file 'pipeline.py'" in verify(folder)[-1].found
    (folder / "scheduler/scheduler_config.json").write_text("{")
    assert "scheduler_config.json is damaged" in verify(folder)[-1].found


@pytest.mark.parametrize(
    ("bundle", "vae", "error", "message"),
    [
        (made_bundle(), 0.5, ConfigError, "a VAE is for bundles that make latents"),
        (made_bundle(latents=LATENTS), 0.9, DataError, "must scale latents as the one that"),
        (replace(made_bundle(), kind="uvit"), None, ConfigError, "of the kind dit; got uvit"),
        (
            made_bundle(diffusion=DiffusionConfig(process="vp-sde")),
            None,
            ConfigError,
            "for a DiT in discrete time; got a DiT, vp-sde",
        ),
    ],
    ids=["vae for images", "other vae", "u-vit", "vp-sde"],
)
def test_what_diffusers_does_not_have_is_refused(tmp_path, bundle, vae, error, message):
    path = None if vae is None else tiny_vae(tmp_path / "vae", vae)
    with pytest.raises(error, match=message):
        formats.write(bundle, tmp_path / "made", "diffusers", vae=path)
    assert not (tmp_path / "made").exists()
    with pytest.raises(ConfigError, match="a VAE goes into the format diffusers only"):
        formats.write(bundle, tmp_path / "made", vae=tmp_path)
