import gc

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from asesearch.backbones.diffusers_adapter import DiffusersBackbone
from asesearch.deployment.diffusers_hook import apply_exit_schedule
from asesearch.errors import ConfigError, ScheduleError
from asesearch.schedule import ExitSchedule

DEPTH = 4
STEPS = 5
TOKENS = 3
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": DEPTH, "in_channels": 4}
SCHEDULE = ExitSchedule.from_string("4 3 3 2 1", DEPTH)
REVERSED = ExitSchedule.from_string("1 2 3 3 4", DEPTH)


def randomised(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.2
    return model.eval()


def tiny_vae():
    return AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8
    ).eval()


def dit_pipeline():
    # 1000 classes: the pipeline writes its null label
    model = DiTTransformer2DModel(**HEADS, sample_size=8, out_channels=8)
    return DiTPipeline(randomised(model), tiny_vae(), DDIMScheduler())


def pixart_pipeline():
    sizes = {"cross_attention_dim": 16, "caption_channels": 12, "sample_size": 8, "out_channels": 8}
    model = PixArtTransformer2DModel(**HEADS, **sizes)
    return PixArtAlphaPipeline(
        None, None, tiny_vae(), randomised(model), DPMSolverMultistepScheduler()
    )


def sd3_pipeline():
    sizes = {
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 6,
        "pos_embed_max_size": 8,
    }
    model = randomised(SD3Transformer2DModel(**HEADS, **sizes, sample_size=8, out_channels=4))
    none = dict.fromkeys(
        [
            "text_encoder",
            "text_encoder_2",
            "text_encoder_3",
            "tokenizer",
            "tokenizer_2",
            "tokenizer_3",
        ]
    )
    return StableDiffusion3Pipeline(model, FlowMatchEulerDiscreteScheduler(), tiny_vae(), **none)


def sample(pipeline):
    """Images of two labels or prompts, under guidance, always from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(1)
    shared = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(2)}
    if isinstance(pipeline, DiTPipeline):
        return pipeline([1, 7], output_type="pt", **shared).images
    names = ("prompt_embeds", "negative_prompt_embeds")
    prompts = {name: torch.randn(2, TOKENS, 12, generator=draw) for name in names}
    if isinstance(pipeline, PixArtAlphaPipeline):
        masks = {
            "prompt_attention_mask": torch.ones(2, TOKENS),
            "negative_prompt_attention_mask": torch.tensor([[1, 0, 0]] * 2),
        }
        options = {"prompt": None, "negative_prompt": None, "use_resolution_binning": False}
        return pipeline(**prompts, **masks, **options, output_type="latent", **shared).images
    pooled = {
        name.replace("prompt", "pooled_prompt"): torch.randn(2, 6, generator=draw) for name in names
    }
    return pipeline(**prompts, **pooled, output_type="latent", **shared).images


MAKERS = {"dit": dit_pipeline, "pixart": pixart_pipeline, "sd3": sd3_pipeline}


@pytest.fixture(params=MAKERS)
def pipeline(request):
    return MAKERS[request.param]()


def record(transformer):
    """Timesteps the transformer is called at, and block calls made, as seen by hooks of our own."""
    timesteps = []
    calls = []
    transformer.register_forward_pre_hook(
        lambda m, a, k: timesteps.append(float(k["timestep"][0])), with_kwargs=True
    )
    for i, block in enumerate(transformer.transformer_blocks):
        block.register_forward_pre_hook(lambda m, a, i=i: calls.append(i))
    return timesteps, calls


# the multistep scheduler hands tensors to numpy in the way of numpy 1
of_numpy_1 = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@of_numpy_1
def test_a_pipeline_runs_the_scheduled_blocks_only(pipeline):
    expected = sample(pipeline)
    with apply_exit_schedule(pipeline, ExitSchedule.full(DEPTH)) as handle:
        assert torch.equal(sample(pipeline), expected)
        assert (handle.nfe, handle.block_calls) == (STEPS, STEPS * DEPTH)
    with apply_exit_schedule(pipeline, SCHEDULE) as handle:
        timesteps, calls = record(pipeline.transformer)
        images = sample(pipeline)
        in_chain = [min(t, 999.0) for t in timesteps]  # rectified flow begins at 1000
        assert calls == [i for t in in_chain for i in range(SCHEDULE.exit_depth_at(t))]
        assert handle.nfe == len(timesteps) == STEPS
        assert handle.block_calls == len(calls) == SCHEDULE.block_calls(in_chain) < STEPS * DEPTH
    with apply_exit_schedule(pipeline, REVERSED):
        other = sample(pipeline)
    assert images.shape == expected.shape and bool(torch.isfinite(images).all())
    assert not torch.allclose(images, expected, atol=1e-3)
    assert not torch.allclose(images, other, atol=1e-3)
    assert torch.equal(sample(pipeline), expected)  # removed


@of_numpy_1
def test_a_pipeline_under_a_schedule_samples_as_with_the_blocks_cut_off(pipeline):
    with apply_exit_schedule(pipeline, ExitSchedule.uniform_intervals((2,), DEPTH)):
        images = sample(pipeline)
    blocks = pipeline.transformer.transformer_blocks
    pipeline.transformer.transformer_blocks = blocks[:2]
    assert torch.equal(images, sample(pipeline))
    pipeline.transformer.transformer_blocks = blocks[:3]
    assert not torch.allclose(images, sample(pipeline), atol=1e-3)


def test_the_backbone_and_the_hook_agree():
    transformer = dit_pipeline().transformer
    x_t = torch.randn(3, 4, 8, 8)
    t = torch.tensor([10, 500, 990])
    y = torch.tensor([1, 2, 1000])
    with apply_exit_schedule(transformer, SCHEDULE) as handle:
        # one depth per sample, arguments by position
        out = transformer(x_t, t, y, return_dict=False)[0]
        assert (handle.nfe, handle.block_calls) == (1, 4)
    exit_depth = torch.from_numpy(SCHEDULE.exit_depth_at(t))
    assert torch.equal(DiffusersBackbone(transformer)(x_t, t, y, exit_depth=exit_depth), out)


def test_removing_restores_everything(pipeline):
    transformer = pipeline.transformer
    blocks = list(transformer.transformer_blocks)
    classes = [type(b) for b in blocks]
    names = list(transformer.state_dict())
    handle = apply_exit_schedule(pipeline, SCHEDULE)
    assert list(transformer.state_dict()) == names
    handle.remove()
    handle.remove()
    assert [type(b) for b in blocks] == classes and list(transformer.transformer_blocks) == blocks
    assert not transformer._forward_pre_hooks and not transformer._forward_hooks
    with pytest.raises(KeyError), apply_exit_schedule(pipeline, SCHEDULE):
        raise KeyError
    assert [type(b) for b in blocks] == classes


def test_one_schedule_at_a_time():
    pipeline = dit_pipeline()
    handle = apply_exit_schedule(pipeline, SCHEDULE)
    with pytest.raises(ConfigError, match="one early exit at a time.*remove"):
        apply_exit_schedule(pipeline.transformer, SCHEDULE)
    handle.remove()
    net = DiffusersBackbone(pipeline.transformer)
    with pytest.raises(ConfigError, match="one early exit at a time.*remove"):
        apply_exit_schedule(pipeline, SCHEDULE)
    assert apply_exit_schedule(net.detach(), SCHEDULE).nfe == 0


def test_a_schedule_that_does_not_fit_is_refused_and_leaves_no_trace():
    pipeline = dit_pipeline()
    with pytest.raises(ScheduleError, match=r"4 blocks; got one for 28; use rescaled\(4\)"):
        apply_exit_schedule(pipeline, ExitSchedule.from_string("D3-DiT"))
    with pytest.raises(ScheduleError, match="for 500 timesteps; got a scheduler of 1000"):
        apply_exit_schedule(pipeline, ExitSchedule.full(DEPTH, 500))
    apply_exit_schedule(pipeline, SCHEDULE)


def test_a_scheduler_of_other_timesteps_put_in_afterwards_is_refused():
    pipeline = dit_pipeline()
    with apply_exit_schedule(pipeline, SCHEDULE):
        expected = sample(pipeline)
        pipeline.scheduler = DDIMScheduler(num_train_timesteps=500)
        with pytest.raises(ScheduleError, match="for 1000 timesteps; got a scheduler of 500"):
            sample(pipeline)
        pipeline.scheduler = DDIMScheduler()
        assert torch.equal(sample(pipeline), expected)
        transformer = pipeline.transformer
        del pipeline  # the schedule doesn't keep it
        gc.collect()
        inputs = (torch.zeros(1, 4, 8, 8), torch.tensor([900]), torch.tensor([1]))
        assert torch.isfinite(transformer(*inputs).sample).all()


@pytest.mark.parametrize(
    "thing", ["pipeline", 3, torch.nn.Linear(2, 2)], ids=["text", "number", "other module"]
)
def test_what_has_no_transformer_is_refused(thing):
    with pytest.raises(
        ConfigError, match="applies to a transformer|supported are DiTTransformer2DModel"
    ):
        apply_exit_schedule(thing, SCHEDULE)


def test_calls_that_the_schedule_can_not_serve_are_refused():
    transformer = sd3_pipeline().transformer
    x_t = torch.randn(3, 4, 8, 8)
    y = {
        "encoder_hidden_states": torch.randn(3, TOKENS, 12),
        "pooled_projections": torch.randn(3, 6),
    }
    with apply_exit_schedule(transformer, SCHEDULE) as handle:
        with pytest.raises(ConfigError, match="needs the timestep; got none"):
            transformer(x_t, **y)
        with pytest.raises(
            ConfigError, match="skip_layers, which act between the blocks; got skip_layers"
        ):
            transformer(x_t, **y, timestep=torch.tensor([10.0] * 3), skip_layers=[1])
        with pytest.raises(ConfigError, match=r"one per sample \(3\); got 2"):
            transformer(x_t, **y, timestep=torch.tensor([10.0, 900.0]))
        for wrong in (-1.0, 1000.5, float("nan")):
            with pytest.raises(ScheduleError, match=r"timesteps must lie in \[0, 1000\)"):
                transformer(x_t, **y, timestep=torch.full((3,), wrong))
        assert (handle.nfe, handle.block_calls) == (0, 0)
        transformer(x_t, **y, timestep=torch.full((3,), 1000.0))
        assert (handle.nfe, handle.block_calls) == (1, 1)


def test_a_failed_call_leaves_no_plan_behind():
    transformer = dit_pipeline().transformer
    x_t = torch.randn(2, 4, 8, 8)
    t = torch.tensor([900, 900])
    y = torch.tensor([1, 2])
    expected = transformer(x_t, timestep=t, class_labels=y).sample
    handle = apply_exit_schedule(transformer, SCHEDULE)
    with pytest.raises(RuntimeError):
        transformer(x_t[:, :3], timestep=t, class_labels=y)
    tokens = torch.randn(2, 16, 16)
    last = transformer.transformer_blocks[-1]
    # called alone, it is no part of the failed call
    assert not torch.equal(last(tokens, timestep=t, class_labels=y), tokens)
    handle.remove()
    assert torch.equal(transformer(x_t, timestep=t, class_labels=y).sample, expected)
