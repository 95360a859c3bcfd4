"""Weights of their own for early exits, in diffusers pipelines: what runs with which."""

import copy
import logging
import threading
from dataclasses import replace

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from safetensors.torch import load_file

from asesearch.backbones.diffusers_adapter import DiffusersBackbone
from asesearch.backbones.exit_weights import ExitWeights
from asesearch.config import DiffusionConfig, SamplingConfig
from asesearch.deployment import formats
from asesearch.deployment.bundle import Bundle
from asesearch.deployment.diffusers_exits import EXITS_FILE, exits_of
from asesearch.deployment.diffusers_hook import apply_exit_schedule
from asesearch.deployment.verify import verify
from asesearch.errors import CheckpointError, ConfigError
from asesearch.schedule import ExitSchedule
from tests.deployment.test_diffusers_export import SEEDS, gap, load, made_bundle
from tests.deployment.test_diffusers_export import sample as sample_folder
from tests.deployment.test_diffusers_hook import (
    DEPTH,
    MAKERS,
    SCHEDULE,
    TOKENS,
    of_numpy_1,
    randomised,
    sample,
    tiny_vae,
)

pytestmark = of_numpy_1
SHALLOW = ExitSchedule.from_string("4 4 2 2 1", DEPTH)
CONSTANT = [ExitSchedule.uniform_intervals((d,), DEPTH) for d in range(1, DEPTH + 1)]


@pytest.fixture(params=["dit", "pixart"])
def name(request):
    return request.param


def bundle_of(name):
    """A network of diffusers, and another's weights for its early exits."""
    full, exits = (MAKERS[name]().transformer for _ in range(2))
    randomised(exits, seed=1)
    nets = [DiffusersBackbone(net).eval() for net in (full, exits)]
    prompts = None if name == "dit" else {"encoder_hidden_states": torch.randn(2, TOKENS, 12)}
    how = SamplingConfig(solver="ddim", num_steps=4, batch_size=2)
    about = (DiffusionConfig(), how, {}, {}, prompts)
    return Bundle(ExitWeights(*nets), SHALLOW, "diffusers", *about)


def second(name):
    """A pipeline of the weights that `bundle_of` gives early exits."""
    pipeline = MAKERS[name]()
    randomised(pipeline.transformer, seed=1)
    return pipeline


def weights(pipeline):
    return {k: v.clone() for k, v in pipeline.transformer.state_dict().items()}


def test_each_call_runs_with_the_weights_of_its_depth(name):
    pipeline = MAKERS[name]()
    before = weights(pipeline)
    bundle = bundle_of(name)
    for schedule in CONSTANT:
        with apply_exit_schedule(pipeline, replace(bundle, schedule=SHALLOW)) as handle:
            handle.schedule = schedule
            images = sample(pipeline)
        of = MAKERS[name]() if schedule.is_full else second(name)
        of.vae = pipeline.vae
        if schedule.exit_depths[0] in (1, 2, DEPTH):  # 3 is deeper than what the schedule asks for
            with apply_exit_schedule(of, schedule):
                assert torch.equal(images, sample(of)), schedule
    after = weights(pipeline)
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_a_schedule_of_both(name):
    """Calls near data as by the first weights, calls near noise as by the second."""
    pipeline = MAKERS[name]()
    with apply_exit_schedule(pipeline, bundle_of(name)) as handle:
        images = sample(pipeline)
        assert torch.equal(sample(pipeline), images)  # and nothing is left behind in between
        assert handle.block_calls < DEPTH * handle.nfe
    for other in (MAKERS[name](), second(name)):
        other.vae = pipeline.vae
        with apply_exit_schedule(other, SHALLOW):
            assert not torch.allclose(sample(other), images, atol=1e-3)


def test_what_early_exits_never_read_is_not_kept(name):
    bundle = bundle_of(name)
    own = exits_of(bundle.backbone, SHALLOW)
    assert any("transformer_blocks.1." in k for k in own)
    assert not [k for k in own if k.startswith(("transformer_blocks.2", "transformer_blocks.3"))]
    assert exits_of(bundle.backbone.full, SHALLOW) == {}
    assert exits_of(ExitWeights(bundle.backbone.full, bundle.backbone.full), SHALLOW) == {}


def test_a_bundles_folder_too(tmp_path, name):
    bundle = bundle_of(name)
    folder = formats.write(bundle, tmp_path / "bundle")
    pipeline = MAKERS[name]()
    with apply_exit_schedule(pipeline, bundle):
        expected = sample(pipeline)
    with apply_exit_schedule(pipeline, folder):
        assert torch.equal(sample(pipeline), expected)
    weights_file = folder / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-8] + b"12345678")
    with pytest.raises(CheckpointError, match="SHA-256 is not the recorded one"):
        apply_exit_schedule(pipeline, folder)
    apply_exit_schedule(pipeline, SCHEDULE).remove()  # nothing was left behind


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_set_before_or_after(dtype):
    made = []
    vae = MAKERS["dit"]().vae
    for early in (True, False):
        pipeline = MAKERS["dit"]()
        pipeline.vae = copy.deepcopy(vae)
        if early:
            pipeline.to(dtype)
        with apply_exit_schedule(pipeline, bundle_of("dit")):
            if not early:
                sample(pipeline)
                pipeline.to(dtype)
            made.append(sample(pipeline))
        assert {p.dtype for p in pipeline.transformer.parameters()} == {dtype}
    assert made[0].dtype == dtype and torch.equal(*made)


def test_a_failed_call_leaves_the_first_weights():
    transformer = MAKERS["dit"]().transformer
    before = {k: v.clone() for k, v in transformer.state_dict().items()}
    t, y = torch.tensor([900, 900]), torch.tensor([1, 2])
    with apply_exit_schedule(transformer, bundle_of("dit")):
        with pytest.raises(RuntimeError):
            transformer(torch.randn(2, 3, 8, 8), timestep=t, class_labels=y)
        assert all(torch.equal(transformer.state_dict()[k], v) for k, v in before.items())
        with pytest.raises(ConfigError, match="at full depth or leaves blocks out for all"):
            transformer(torch.randn(2, 4, 8, 8), timestep=torch.tensor([0, 900]), class_labels=y)
        transformer(torch.randn(2, 4, 8, 8), timestep=t, class_labels=y)


def call(transformer, t):
    y = torch.tensor([1, 2])
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return transformer(x_t, timestep=torch.tensor([t, t]), class_labels=y).sample


def in_threads(transformer, count, times):
    """What threads get that call the transformer at these timesteps in turn; one that is stuck
    fails."""
    made = {}

    def work(i):
        with torch.no_grad():
            made[i] = [call(transformer, times[(i + n) % len(times)]) for n in range(40)]

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(made) == count
    return made


def test_threads_that_share_a_transformer():
    transformer = MAKERS["dit"]().transformer
    times = (900, 100)  # an early exit, and all blocks
    with apply_exit_schedule(transformer, bundle_of("dit")), torch.no_grad():
        expected = [call(transformer, t) for t in times]
        for i, outputs in in_threads(transformer, 4, times).items():
            assert all(torch.equal(o, expected[(i + n) % 2]) for n, o in enumerate(outputs))


@pytest.mark.parametrize("error", [RuntimeError, ConfigError, KeyboardInterrupt])
def test_a_failed_call_keeps_no_thread_waiting(error):
    """An interrupt, which torch's hooks don't see, is put right by the next call."""
    transformer = MAKERS["dit"]().transformer
    with apply_exit_schedule(transformer, bundle_of("dit")) as handle, torch.no_grad():
        expected = call(transformer, 900)

        def fail(*_):
            raise error("here")

        for module in (transformer, transformer.transformer_blocks[0]):
            hook = module.register_forward_pre_hook(fail)
            with pytest.raises(error):
                call(transformer, 900)
            hook.remove()
        assert torch.equal(call(transformer, 900), expected)
        assert torch.equal(in_threads(transformer, 1, (900,))[0][0], expected)
        second = copy.deepcopy(transformer)  # with a lock of its own
        assert torch.equal(call(second, 900), expected)
        assert handle.schedule is SHALLOW


@pytest.mark.parametrize("first", ["offload", "schedule"])
def test_offloading_in_parts_is_refused(first):
    """Weights that come in with each block would come in place of those of the early exits."""
    for how in (sequential, groups, leaves):
        pipeline = MAKERS["dit"]()
        if first == "offload":
            how(pipeline.transformer)
        with apply_exit_schedule(pipeline, bundle_of("dit")):
            if first == "schedule":
                how(pipeline.transformer)
            with pytest.raises(ConfigError, match=r"offloading in parts.*enable_model_cpu_offload"):
                sample(pipeline)


def sequential(transformer):
    accelerate.cpu_offload(transformer, execution_device="cpu")


def groups(transformer):
    apply_group_offloading(transformer, onload_device=torch.device("cpu"), num_blocks_per_group=3)


def leaves(transformer):
    device = torch.device("cpu")
    apply_group_offloading(transformer, onload_device=device, offload_type="leaf_level")


def test_another_transformer_is_refused_or_named(caplog):
    bundle = bundle_of("dit")
    wide = MAKERS["pixart"]()
    with pytest.raises(ConfigError, match=r"lacks or has in another shape, .* for example"):
        apply_exit_schedule(wide, bundle)
    apply_exit_schedule(wide, SCHEDULE).remove()  # nothing was left behind
    with caplog.at_level(logging.WARNING):
        apply_exit_schedule(MAKERS["dit"](), bundle).remove()
        apply_exit_schedule(MAKERS["dit"]().to(torch.float16), bundle).remove()
    assert "other weights" not in caplog.text
    apply_exit_schedule(second("dit"), bundle).remove()
    assert "has other weights than the bundle's network" in caplog.text


def test_weights_stored_in_eight_bits(name, caplog):
    """`enable_layerwise_casting`: each layer is cast as it is called, whichever weights it has."""
    made = []
    vae = tiny_vae()
    for first in (True, False):
        pipeline = MAKERS[name]()
        pipeline.vae = vae
        if first:
            in_eight_bits(pipeline.transformer)
        with apply_exit_schedule(pipeline, bundle_of(name)):
            if not first:
                expected = sample(pipeline)
                in_eight_bits(pipeline.transformer)
            made.append(sample(pipeline))
    assert "other weights" not in caplog.text
    assert torch.equal(*made) and not torch.equal(made[0], expected)
    assert (made[0] - expected).abs().mean() < 0.2 * expected.abs().mean()


def in_eight_bits(transformer):
    transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def test_offloading_of_the_whole_model():
    pipeline = MAKERS["pixart"]()
    with apply_exit_schedule(pipeline, bundle_of("pixart")):
        expected = sample(pipeline)
        accelerate.cpu_offload_with_hook(pipeline.transformer, execution_device="cpu")
        assert torch.equal(sample(pipeline), expected)


class Wrapped(torch.nn.Module):
    """A layer as an adapter wraps it; here one that adds nothing."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *args, **kwargs):
        return self.base_layer(*args, **kwargs)


def test_layers_wrapped_afterwards():
    pipeline = MAKERS["pixart"]()
    bundle = bundle_of("pixart")
    with apply_exit_schedule(pipeline, bundle):
        expected = sample(pipeline)
        attention = pipeline.transformer.transformer_blocks[0].attn1
        attention.to_q = Wrapped(attention.to_q)
        assert torch.equal(sample(pipeline), expected)
    with pytest.raises(ConfigError, match=r"lacks .*to_q.weight.* before adapters"):
        apply_exit_schedule(pipeline, bundle)


def test_what_was_fused_from_the_other_weights_is_refused(name):
    """Fused projections would run in place of the exits' own, a merged adapter in one set alone."""
    pipeline = MAKERS[name]()
    transformer = pipeline.transformer
    with apply_exit_schedule(pipeline, bundle_of(name)):
        expected = sample(pipeline)
        attention = transformer.transformer_blocks[1].attn1
        attention.fuse_projections()
        processor = attention.processor
        attention.set_processor(FusedAttnProcessor2_0())
        with pytest.raises(ConfigError, match=r"were fused .*unfuse_qkv_projections\(\)"):
            sample(pipeline)
        attention.set_processor(processor)
        if name == "pixart":  # which has it as a method
            transformer.fuse_qkv_projections()
            with pytest.raises(ConfigError, match="were fused"):
                sample(pipeline)
            transformer.unfuse_qkv_projections()
        layer = attention.to_v
        attention.to_v = Wrapped(layer)
        assert torch.equal(sample(pipeline), expected)
        attention.to_v.merged_adapters = ["style"]
        with pytest.raises(
            ConfigError, match=r"got style in transformer_blocks.1.attn1.to_v; call .*unfuse_lora"
        ):
            sample(pipeline)
        attention.to_v.merged_adapters = []
        assert torch.equal(sample(pipeline), expected)


@pytest.mark.slow
def test_compiled_blocks():
    pipeline = MAKERS["dit"]()
    bundle = bundle_of("dit")
    with apply_exit_schedule(pipeline, bundle):
        expected = sample(pipeline)
        for block in pipeline.transformer.transformer_blocks:
            block.compile()
        torch.testing.assert_close(sample(pipeline), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(sample(pipeline), expected, rtol=1e-3, atol=1e-4)


# -- a folder for diffusers ------------------------------------------------------------------------


def own_bundle(solver="ddim"):
    """A DiT of ours, and another's weights for its early exits."""
    first = made_bundle(solver)
    exits = made_bundle(solver).backbone
    generator = torch.Generator().manual_seed(1)
    for key, p in exits.named_parameters():
        if key != "pos_embed":
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return replace(first, backbone=ExitWeights(first.backbone, exits).eval())


@pytest.mark.parametrize("solver", ["ddpm", "dpm++2m"])
def test_an_exported_pipeline_samples_as_its_bundle(tmp_path, solver):
    bundle = own_bundle(solver)
    folder = formats.write(bundle, tmp_path / "made", "diffusers")
    pipeline = load(folder, vae=None)
    expected = bundle.sample(SEEDS).images
    with apply_exit_schedule(pipeline, folder):
        assert gap(sample_folder(pipeline), expected) < 1e-4
    one_set = replace(bundle, backbone=bundle.backbone.full).sample(SEEDS).images
    assert gap(one_set, expected) > 1e-2


@pytest.mark.thorough
def test_an_exported_pipeline_is_verified_with_both(tmp_path):
    folder = formats.write(own_bundle(), tmp_path / "made", "diffusers")
    checks = verify(folder)
    assert [c.name for c in checks] == ["files", "network", "parity", "images", "speed"], checks[-1]
    assert checks[2].passed and set(checks[2].numbers["errors"]) == {"1", "2", "4"}
    own = load_file(folder / EXITS_FILE)
    assert "transformer_blocks.0.attn1.to_q.weight" in own
    (folder / EXITS_FILE).unlink()
    assert "exits.safetensors is missing" in verify(folder)[-1].found
    with pytest.raises(CheckpointError, match="exits.safetensors is missing"):
        apply_exit_schedule(load(folder, vae=None), folder)
