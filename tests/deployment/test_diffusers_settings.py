"""Schedules beside what diffusers users set: Flux, precision, offloading, compiled blocks,
caches."""

import logging

import accelerate
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PyramidAttentionBroadcastConfig,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)

from asesearch.deployment.diffusers_hook import apply_exit_schedule
from asesearch.errors import ConfigError
from asesearch.schedule import ExitSchedule
from tests.deployment.test_diffusers_hook import (
    DEPTH,
    MAKERS,
    SCHEDULE,
    STEPS,
    of_numpy_1,
    randomised,
    sample,
    tiny_vae,
)

pytestmark = of_numpy_1


def flux_pipeline():
    """Two double blocks, then two single ones."""
    sizes = {"num_layers": 2, "num_single_layers": 2, "in_channels": 16, "patch_size": 1}
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
    model = FluxTransformer2DModel(
        **sizes, **heads, joint_attention_dim=12, pooled_projection_dim=6
    )
    none = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), tiny_vae(), transformer=randomised(model), **none
    )


def sample_flux(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=torch.ones(2, 3, 12),
        pooled_prompt_embeds=torch.ones(2, 6),
        height=8,
        width=8,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(2),
        output_type="latent",
    ).images


def under(pipeline, schedule=SCHEDULE, draw=sample):
    with apply_exit_schedule(pipeline, schedule) as handle:
        images = draw(pipeline)
    return images, handle.block_calls


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_flux_exits_from_either_list_of_blocks(depth):
    pipeline = flux_pipeline()
    expected = sample_flux(pipeline)
    full, calls = under(pipeline, ExitSchedule.full(DEPTH), sample_flux)
    assert torch.equal(full, expected) and calls == STEPS * DEPTH
    images, calls = under(pipeline, ExitSchedule.uniform_intervals((depth,), DEPTH), sample_flux)
    assert calls == STEPS * depth
    net = pipeline.transformer
    net.transformer_blocks = net.transformer_blocks[:depth]
    net.single_transformer_blocks = net.single_transformer_blocks[: max(0, depth - 2)]
    assert torch.equal(images, sample_flux(pipeline))  # as with the blocks cut off


def test_flux_timesteps_are_read_on_the_schedulers_scale():
    pipeline = flux_pipeline()
    _, calls = under(pipeline, SCHEDULE, sample_flux)
    timesteps = [min(float(t), 999.0) for t in pipeline.scheduler.timesteps]
    assert calls == SCHEDULE.block_calls(timesteps) < STEPS * DEPTH


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strength", [None, 0.5])
def test_flux_timesteps_are_the_schedulers_in_any_precision(dtype, strength):
    """bfloat16 has fewer numbers than there are timesteps."""
    pipeline = flux_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    given = {"num_inference_steps": 50, "height": 8, "width": 8, "output_type": "latent"}
    if strength is not None:
        pipeline = FluxImg2ImgPipeline(**pipeline.components)
        pipeline.image_processor.config.do_resize = False
        given |= {"image": torch.zeros(1, 4, 1, 1, dtype=dtype), "strength": strength}
    pipeline.to(dtype).set_progress_bar_config(disable=True)
    given |= {"prompt_embeds": torch.ones(1, 3, 12, dtype=dtype)}
    given |= {"pooled_prompt_embeds": torch.ones(1, 6, dtype=dtype)}
    schedule = ExitSchedule.from_string("4 3 4 3 4 3 4 3 4 1", DEPTH)
    for _ in range(2):  # the second begins where the first left the scheduler
        with apply_exit_schedule(pipeline, schedule) as handle:
            pipeline(**given)
        timesteps = [min(float(t), 999.0) for t in pipeline.scheduler.timesteps]
        run = timesteps[len(timesteps) - handle.nfe :]
        assert handle.nfe == (50 if strength is None else 25)
        assert handle.block_calls == schedule.block_calls(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_flux_timesteps_on_a_boundary_are_in_the_interval_that_begins_there(dtype):
    """Flux divides by 1000, and 0.9 · 1000 is less than 900."""
    transformer = flux_pipeline().transformer.to(dtype)
    schedule = ExitSchedule.from_string("1 2 3 4 1 2 3 4 1 2", DEPTH)
    inputs = {
        "hidden_states": torch.zeros(1, 4, 16),
        "encoder_hidden_states": torch.zeros(1, 3, 12),
    }
    inputs |= {"pooled_projections": torch.zeros(1, 6)}
    ids = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
    inputs = {name: value.to(dtype) for name, value in (inputs | ids).items()}
    for t in (*range(100, 1000, 100), 950, 985):
        with apply_exit_schedule(transformer, schedule) as handle, torch.no_grad():
            transformer(**inputs, timestep=torch.tensor([t]).to(dtype) / 1000)
        assert handle.block_calls == schedule.exit_depth_at(t), t


def sana_pipeline(cls, scheduler, **options):
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": DEPTH}
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8}
    sizes = {"in_channels": 4, "out_channels": 4, "patch_size": 1, "sample_size": 8}
    widths = {"cross_attention_dim": 16, "caption_channels": 12}
    model = SanaTransformer2DModel(**heads, **cross, **sizes, **widths, **options)
    vae = {"in_channels": 3, "latent_channels": 4, "attention_head_dim": 2}
    for side in ("encoder", "decoder"):
        vae[f"{side}_block_types"] = ("ResBlock",)
        vae[f"{side}_block_out_channels"] = (8,)
        vae[f"{side}_layers_per_block"] = (1,)
        vae[f"{side}_qkv_multiscales"] = ((),)
    return cls(None, None, AutoencoderDC(**vae), randomised(model), scheduler)


def sample_sana(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    shared = {"prompt_embeds": torch.ones(1, 3, 12), "prompt_attention_mask": torch.ones(1, 3)}
    if isinstance(pipeline, SanaPipeline):
        shared |= {f"negative_{name}": value for name, value in shared.items()}
        shared |= {"negative_prompt": None, "num_inference_steps": 10}
    return pipeline(
        **shared,
        height=32,
        width=32,
        use_resolution_binning=False,
        generator=torch.Generator().manual_seed(2),
        output_type="latent",
    ).images


@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_sana_timesteps_are_read_on_the_schedulers_scale(scale):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = sana_pipeline(SanaPipeline, scheduler, timestep_scale=scale)
    images, calls = under(pipeline, SCHEDULE, sample_sana)
    timesteps = [min(float(t), 999.0) for t in scheduler.timesteps]
    assert calls == SCHEDULE.block_calls(timesteps) < 10 * DEPTH
    assert torch.isfinite(images).all()


def test_sana_sprint_counts_in_rectified_flows_time():
    options = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    pipeline = sana_pipeline(SanaSprintPipeline, SCMScheduler(), **options)
    noisy = ExitSchedule.from_string("1 1 1 1 1 1 1 1 1 2", DEPTH)
    _, calls = under(pipeline, noisy, sample_sana)
    assert calls == 2 + 1  # at pi/2, all noise, and at 1.3: 783


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    pipeline = MAKERS["dit"]()
    expected, calls = under(pipeline)
    images, same = under(pipeline.to(dtype))
    assert same == calls and images.dtype == dtype
    assert 0 < float((images.float() - expected).abs().mean()) < 0.05


@pytest.mark.parametrize("first", ["offload", "schedule"])
def test_offloaded_blocks(first):
    """Weights come in with each block that runs, as sequential offloading does on a GPU."""
    pipeline = MAKERS["dit"]()
    expected, calls = under(pipeline)
    if first == "offload":
        accelerate.cpu_offload(pipeline.transformer, execution_device="cpu")
    with apply_exit_schedule(pipeline, SCHEDULE) as handle:
        if first == "schedule":
            accelerate.cpu_offload(pipeline.transformer, execution_device="cpu")
        assert torch.equal(sample(pipeline), expected) and handle.block_calls == calls
    assert next(pipeline.transformer.transformer_blocks[0].parameters()).device.type == "meta"


@pytest.mark.slow
@pytest.mark.parametrize("first", ["compile", "schedule"])
def test_compiled_blocks(first):
    pipeline = MAKERS["dit"]()
    blocks = pipeline.transformer.transformer_blocks
    expected, calls = under(pipeline)
    if first == "compile":
        for block in blocks:
            block.compile()
    with apply_exit_schedule(pipeline, SCHEDULE) as handle:
        if first == "schedule":
            for block in blocks:
                block.compile()
        torch.testing.assert_close(sample(pipeline), expected, rtol=1e-3, atol=1e-4)
        assert handle.block_calls == calls


@pytest.mark.thorough
def test_a_transformer_compiled_as_a_whole_is_refused():
    pipeline = MAKERS["dit"]()
    pipeline.transformer = torch.compile(pipeline.transformer)
    with pytest.raises(ConfigError, match=r"compiled as a whole.*block.compile\(\)"):
        apply_exit_schedule(pipeline, SCHEDULE)


def attention_cache(skip):
    names = ("transformer_blocks", "single_transformer_blocks")
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=skip,
        spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=names,
        current_timestep_callback=lambda: 500,
    )


def test_a_cache_inside_the_blocks_acts_on_those_that_run():
    pipeline = flux_pipeline()
    expected, calls = under(pipeline, draw=sample_flux)
    pipeline.transformer.enable_cache(attention_cache(1))  # no step is skipped
    images, same = under(pipeline, draw=sample_flux)
    assert torch.equal(images, expected) and same == calls
    pipeline.transformer.disable_cache()
    pipeline.transformer.enable_cache(attention_cache(2))  # every other one is
    assert not torch.equal(under(pipeline, draw=sample_flux)[0], expected)


def test_a_cache_that_needs_the_last_block_is_refused():
    pipeline = flux_pipeline()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with (
        apply_exit_schedule(pipeline, SCHEDULE),
        pytest.raises(ConfigError, match="last block.*got fbc_leader_block_hook; call"),
    ):
        sample_flux(pipeline)
    pipeline.transformer.disable_cache()
    assert torch.isfinite(under(pipeline, draw=sample_flux)[0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.filterwarnings("ignore")
def test_cache_dit_with_no_step_skipped_changes_nothing(name):
    cache_dit = pytest.importorskip("cache_dit")
    logging.disable(logging.INFO)
    pipeline = MAKERS[name]()
    expected, calls = under(pipeline)
    all_steps = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1000, residual_diff_threshold=0.0
    )
    cache_dit.enable_cache(pipeline, cache_config=all_steps)
    images, same = under(pipeline)
    assert torch.equal(images, expected) and same == calls
    cache_dit.disable_cache(pipeline)
    with apply_exit_schedule(pipeline, SCHEDULE):
        cache_dit.enable_cache(pipeline, cache_config=all_steps)
        assert torch.equal(sample(pipeline), expected)
    logging.disable(logging.NOTSET)
