"""The trainer: resumable, independent of what should not matter, and as cheap as its
schedule."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.optimization import get_scheduler
from PIL import Image
from safetensors.torch import load_file

from asesearch.backbones import DiT, UViT, load_backbone
from asesearch.backbones.exit_weights import EXITS
from asesearch.config import DiffusionConfig, LossWeight, TrainConfig, parse_study
from asesearch.data import ImageArray, ImageFolder, check_not_read
from asesearch.diffusion import Diffusion
from asesearch.errors import (
    AseSearchError,
    CheckpointError,
    ConfigError,
    DataError,
    ScheduleError,
    TrainingDiverged,
    WriteError,
)
from asesearch.finetuning import (
    CHECKPOINT,
    Batch,
    PlateauWeight,
    Trainer,
    batches,
    check_fit,
    draw_batch,
    finetune,
    lr_factor,
    make_accelerator,
    seeded_generator,
)
from asesearch.finetuning.checkpoint import check_checkpoint_room, write_checkpoint
from asesearch.finetuning.from_file import StudyTraining
from asesearch.locks import try_lock
from asesearch.schedule import ElasticDepths, ExitSchedule
from tests.shapes import SHAPE

SCHEDULE = ExitSchedule.from_string("4 3 2 1", 4)
CONFIG = TrainConfig(
    num_steps=12, batch_size=8, lr=1e-3, warmup_steps=2, checkpoint_every=5, seed=3
)


def weights(net):
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def same(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


def with_(config, **changes):
    return config.model_copy(update=changes)


class Killed(BaseException):
    pass


def kill_at(step):
    def on_step(done, loss):
        if done >= step:
            raise Killed

    return on_step


def in_two_steps(net, images, config=CONFIG, **options):
    config = with_(config, num_steps=2, distill_frac=0.5)
    return finetune(net, images, Diffusion(), SCHEDULE, config, **options)


@pytest.mark.parametrize(
    "inside",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.no_grad,
        torch.inference_mode,
        lambda: default_device("meta"),
        lambda: default_dtype(torch.float64),
        lambda: default_dtype(torch.bfloat16),
    ],
)
def test_what_the_caller_is_in_changes_no_training(tiny_dit, tiny_images, inside):
    wanted = in_two_steps(tiny_dit, tiny_images)
    with inside():
        made = in_two_steps(tiny_dit, tiny_images)
    assert made.losses == wanted.losses
    assert same(weights(made.backbone), weights(wanted.backbone))
    in_two_steps(made.backbone, tiny_images)  # it can be trained further


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def test_a_network_without_anything_to_train_is_refused(tiny_dit, tiny_images):
    tiny_dit.requires_grad_(False)
    with pytest.raises(
        ConfigError, match=r"all of them frozen; thaw it with .requires_grad_\(True"
    ):
        in_two_steps(tiny_dit, tiny_images)
    tiny_dit.time_embedder().requires_grad_(True)
    with pytest.raises(ConfigError, match="all of them frozen but the time embedder's, which"):
        in_two_steps(tiny_dit, tiny_images, with_(CONFIG, freeze_time_embedder=True))


def test_a_checkpoints_folder_may_be_text(tiny_dit, tiny_images, tmp_path):
    in_two_steps(tiny_dit, tiny_images, run_dir=str(tmp_path / "run"))
    assert (tmp_path / "run" / CHECKPOINT).is_file()


def test_what_is_nearly_right_is_refused_with_the_fix(tiny_dit, tiny_images):
    right = [tiny_dit, tiny_images, Diffusion(), SCHEDULE, CONFIG]
    wrong = [
        (0, tiny_dit.half(), "must be float32; got torch.float16 in .*mixed_precision = 'bf16'"),
        (1, torch.zeros(1, 1, 8, 8), "must be a data source; got Tensor"),
        (2, DiffusionConfig(), "got DiffusionConfig; make one by make_diffusion"),
        (3, "4 3 2 1", "got '4 3 2 1'; make one of text by ExitSchedule.from_string"),
        (4, {"num_steps": 2}, "must be a TrainConfig; got dict"),
    ]
    for place, value, words in wrong:
        with pytest.raises(AseSearchError, match=words):
            finetune(*right[:place], value, *right[place + 1 :])
        tiny_dit.float()
    with pytest.raises(ConfigError, match="must be float32; got torch.float64"):
        finetune(*right, teacher=copy.deepcopy(tiny_dit).double())
    with pytest.raises(ConfigError, match="must be float32; got torch.bfloat16"):
        in_two_steps(tiny_dit, tiny_images, teacher=copy.deepcopy(tiny_dit).bfloat16())


def test_a_teacher_may_be_in_half_precision_where_it_is_not_used(tiny_dit, tiny_images):
    teacher = copy.deepcopy(tiny_dit).bfloat16()
    config = with_(CONFIG, num_steps=2, distill_frac=0)
    assert len(
        finetune(tiny_dit, tiny_images, Diffusion(), SCHEDULE, config, teacher=teacher).losses
    )


def test_a_setting_of_the_wrong_type_is_an_error_of_its_own():
    with pytest.raises(ConfigError, match="^TrainConfig: num_steps: .*valid integer"):
        TrainConfig(num_steps=np.int64(3))
    with pytest.raises(ConfigError, match="^TrainConfig: unknown key learning_rate$"):
        TrainConfig(learning_rate=0.1)


def test_its_seconds_are_those_of_training_steps(tiny_dit, tiny_images, tmp_path, monkeypatch):
    """Neither what a checkpoint takes nor what is done at a look at the losses."""
    import asesearch.finetuning.trainer as module

    clock = [0.0]

    def take(seconds):
        clock[0] += seconds

    step, save = Trainer.train_step, Trainer._save
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(Trainer, "train_step", lambda *a: take(1.0) or step(*a))
    monkeypatch.setattr(Trainer, "_save", lambda *a: take(1000.0) or save(*a))
    run = (tiny_dit, tiny_images, Diffusion(), SCHEDULE, CONFIG, tmp_path)
    with pytest.raises(Killed):
        finetune(*run, on_step=kill_at(12))  # its checkpoint is of step 10
    assert finetune(*run, on_step=lambda *_: take(50.0)).seconds == CONFIG.num_steps
    assert clock[0] == 14 + 3 * 1000 + 50


@pytest.mark.parametrize(
    "changes", [{}, {"distill_frac": 0.5}, {"freeze_time_embedder": True, "min_snr_gamma": 5.0}]
)
def test_killed_and_resumed_gives_the_same_result(tiny_dit, tiny_images, tmp_path, changes):
    config = with_(CONFIG, **changes)
    straight = finetune(tiny_dit, tiny_images, Diffusion(), SCHEDULE, config)
    with pytest.raises(Killed):
        finetune(tiny_dit, tiny_images, Diffusion(), SCHEDULE, config, tmp_path, on_step=kill_at(6))
    trainer = Trainer(tiny_dit, tiny_images, Diffusion(), SCHEDULE, config, tmp_path)
    assert trainer.resumed_at == 5  # the last checkpoint before the kill
    resumed = trainer.run()
    assert same(weights(straight.backbone), weights(resumed.backbone))
    assert straight.losses == resumed.losses and len(resumed.losses) == 12


def test_there_is_room_for_a_checkpoint_before_anything_is_trained(
    tiny_dit, tiny_images, tmp_path, monkeypatch
):
    run_dir = tmp_path / "run"
    before = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: before._replace(free=100_000))
    with pytest.raises(WriteError, match=r"takes .* MB; got 0\.1 MB of free space for .*run; make"):
        finetune(tiny_dit, tiny_images, Diffusion(), SCHEDULE, CONFIG, run_dir)
    assert not run_dir.exists()
    size = sum(p.numel() for p in tiny_dit.parameters()) * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: before._replace(free=size))
    with pytest.raises(WriteError, match="the checkpoint of a training"):
        finetune(tiny_dit, tiny_images, Diffusion(), SCHEDULE, CONFIG, run_dir)
    at_the_end = with_(CONFIG, checkpoint_every=CONFIG.num_steps)
    finetune(tiny_dit, tiny_images, Diffusion(), SCHEDULE, at_the_end, run_dir)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: before._replace(free=0))
    finetune(tiny_dit, tiny_images, Diffusion(), SCHEDULE, at_the_end, run_dir)  # is only read


@pytest.mark.parametrize(
    ("steps", "every", "done", "copies"),
    [
        (12, 12, 0, 1),  # one in the end, of the weights alone
        (12, 6, 0, 5),  # which is written beside the one before it
        (12, 5, 0, 8),
        (12, 5, 5, 4),
        (12, 5, 10, 1),
    ],
)
def test_a_checkpoint_is_whole_before_the_one_before_it_goes(
    tiny_dit, tmp_path, monkeypatch, steps, every, done, copies
):
    each = sum(4 * p.numel() for p in tiny_dit.parameters())
    if done:
        write_checkpoint(tmp_path / CHECKPOINT, {"w": torch.zeros(each)}, {}, {"step": done})
    config = with_(CONFIG, num_steps=steps, checkpoint_every=every)
    before = shutil.disk_usage(tmp_path)

    def room(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: before._replace(free=size))

    room(copies * each)
    check_checkpoint_room(tmp_path, tiny_dit, config)
    room(copies * each - 1)
    with pytest.raises(WriteError, match="the checkpoint of a training takes"):
        check_checkpoint_room(tmp_path, tiny_dit, config)


def test_there_is_room_for_the_trained_weights_before_anything_is_trained(tmp_path, monkeypatch):
    text = {
        "name": "room",
        "backbone": {"kind": "dit", "args": SHAPE},
        "data": {"kind": "fashion-mnist", "split": "test"},
        "train": {"num_steps": 2, "batch_size": 4},
    }
    make = partial(StudyTraining, parse_study(text, "t"), "full", tmp_path / "w.safetensors")
    size = sum(p.numel() * 4 for p in make(tmp_path / "run").backbone.parameters())
    before = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: before._replace(free=1.5 * size))
    with pytest.raises(WriteError, match="checkpoint of a training, with its result, takes"):
        make(tmp_path / "run")
    monkeypatch.setattr("asesearch.finetuning.from_file.share_room", lambda *_: False)
    make(tmp_path / "run")
    config = parse_study({**text, "train": {"num_steps": 0, "batch_size": 4}}, "t")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: before._replace(free=0.5 * size))
    with pytest.raises(WriteError, match=f"the trained network takes .* for {tmp_path}; make"):
        StudyTraining(config, "full", tmp_path / "w.safetensors", tmp_path / "run")


def test_a_finished_run_is_not_repeated(tiny_dit, tiny_images, tmp_path):
    first = finetune(tiny_dit, tiny_images, Diffusion(), SCHEDULE, CONFIG, tmp_path)
    kept = load_file(tmp_path / "training.safetensors")  # nothing that only training needs
    assert kept and same(kept, {f"ema.{n}": p for n, p in weights(first.backbone).items()})
    calls = []
    again = finetune(
        tiny_dit,
        tiny_images,
        Diffusion(),
        SCHEDULE,
        CONFIG,
        tmp_path,
        on_step=lambda *a: calls.append(a),
    )
    assert (
        calls == []
        and same(weights(first.backbone), weights(again.backbone))
        and first.losses == again.losses
    )


def test_the_network_passed_in_is_not_changed(tiny_dit, tiny_images):
    before = weights(tiny_dit)
    result = finetune(tiny_dit, tiny_images, Diffusion(), SCHEDULE, CONFIG)
    assert same(before, weights(tiny_dit)) and not same(before, weights(result.backbone))
    assert not result.backbone.training


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 2e-3), ("seed", 4), ("distill_frac", 0.5), ("ema_decay", 0.5), ("num_steps", 13)],
)
def test_a_checkpoint_of_another_run_is_refused_by_field(
    tiny_dit, tiny_images, tmp_path, name, value
):
    finetune(tiny_dit, tiny_images, Diffusion(), SCHEDULE, with_(CONFIG, num_steps=2), tmp_path)
    with pytest.raises(CheckpointError, match=name):
        Trainer(
            tiny_dit,
            tiny_images,
            Diffusion(),
            SCHEDULE,
            with_(CONFIG, **{"num_steps": 2, name: value}),
            tmp_path,
        )


def test_a_checkpoint_of_another_schedule_or_network_is_refused(tiny_dit, tiny_images, tmp_path):
    config = with_(CONFIG, num_steps=2)
    finetune(tiny_dit, tiny_images, Diffusion(), SCHEDULE, config, tmp_path)
    with pytest.raises(CheckpointError, match="differs in its schedule; train in another folder"):
        Trainer(tiny_dit, tiny_images, Diffusion(), ExitSchedule.full(4), config, tmp_path)
    with torch.no_grad():
        tiny_dit.final_layer.linear.bias.add_(1)
    with pytest.raises(CheckpointError, match="initial weights; .*: their content is not what"):
        Trainer(tiny_dit, tiny_images, Diffusion(), SCHEDULE, config, tmp_path)


def test_a_damaged_checkpoint_is_refused(tiny_dit, tiny_images, tmp_path):
    finetune(tiny_dit, tiny_images, Diffusion(), SCHEDULE, with_(CONFIG, num_steps=2), tmp_path)
    raw = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CheckpointError, match="can't resume"):
        Trainer(tiny_dit, tiny_images, Diffusion(), SCHEDULE, with_(CONFIG, num_steps=2), tmp_path)
    assert not list(tmp_path.glob("*.part"))


def test_batches_depend_on_seed_and_step_and_not_on_the_number_of_processes(tiny_dit, tiny_images):
    def whole(step, seed=3):
        return draw_batch(
            tiny_images, tiny_dit, with_(CONFIG, seed=seed), Diffusion(), step, (0, 1)
        )

    halves = [draw_batch(tiny_images, tiny_dit, CONFIG, Diffusion(), 7, (r, 2)) for r in (0, 1)]
    batch = whole(7)
    for name in ("x_start", "y", "t", "noise"):
        assert torch.equal(getattr(batch, name), torch.cat([getattr(h, name) for h in halves]))
    assert not torch.equal(batch.noise, whole(8).noise) and not torch.equal(
        batch.noise, whole(7, seed=4).noise
    )


def test_an_epoch_sees_every_image_once(tiny_dit, tiny_images):
    seen = torch.cat(
        [
            draw_batch(tiny_images, tiny_dit, CONFIG, Diffusion(), s, (0, 1)).x_start
            for s in range(12)
        ]
    )
    assert len(seen) == 96
    every, _ = tiny_images.batch(range(96))
    assert torch.equal(seen.flatten(1).sum(1).sort().values, every.flatten(1).sum(1).sort().values)


def test_timesteps_are_stratified_and_labels_dropped(tiny_dit, tiny_images):
    config = with_(CONFIG, batch_size=50, class_dropout_prob=0.3)
    draws = [draw_batch(tiny_images, tiny_dit, config, Diffusion(), s, (0, 1)) for s in range(40)]
    for batch in draws:
        assert sorted((batch.t // 20).tolist()) == list(range(50))
    dropped = torch.cat([b.y for b in draws]).eq(3).float().mean().item()
    assert abs(dropped - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 2000)


def test_batches_for_early_exits_alone_survive_rounding(tiny_dit, tiny_images):
    """In float32 the last of 1,024 equal parts of [0, 1) rounds up to 1 at this step."""
    config = with_(CONFIG, batch_size=1024, seed=0)
    strata = torch.arange(580, 1000)
    batch = draw_batch(tiny_images, tiny_dit, config, Diffusion(), 92, (0, 1), strata)
    assert batch.t.min() == 580 and batch.t.max() == 999
    assert torch.bincount(batch.t - 580).max() <= 4 and batch.u.max() < 1


def test_an_early_exit_step_runs_only_the_blocks_it_needs(tiny_dit, tiny_images):
    rows = [0] * 4
    trainer = Trainer(tiny_dit, tiny_images, Diffusion(), SCHEDULE, with_(CONFIG, batch_size=40))
    for i in range(4):
        trainer.backbone.blocks[i].register_forward_pre_hook(
            lambda _m, args, i=i: rows.__setitem__(i, rows[i] + args[0].shape[0])
        )
    trainer.train_step(draw_batch(tiny_images, tiny_dit, trainer.config, Diffusion(), 0, (0, 1)))
    assert rows == [40, 30, 20, 10]  # stratified timesteps: a quarter leaves after each block


def test_gradients_equal_those_of_masked_whole_forwards(tiny_dit, tiny_images):
    """The grouped forward against the released code's way: run everything, pick each sample's exit
    afterwards."""
    trainer = Trainer(
        tiny_dit,
        tiny_images,
        Diffusion(),
        SCHEDULE,
        with_(CONFIG, loss_weight=LossWeight(shape="none")),
    )
    batch = draw_batch(tiny_images, tiny_dit, CONFIG, Diffusion(), 0, (0, 1))
    loss, _ = trainer._loss(batch)
    loss.backward()
    reference = DiT(**tiny_dit.config)
    reference.load_state_dict(tiny_dit.state_dict())
    diffusion = Diffusion()
    x_t = diffusion.q_sample(batch.x_start, batch.t, batch.noise)
    depths = torch.from_numpy(SCHEDULE.exit_depth_at(batch.t.numpy()))
    outputs = torch.stack([reference(x_t, batch.t, batch.y, exit_depth=d) for d in (1, 2, 3, 4)])
    chosen = outputs[depths - 1, torch.arange(len(depths))]
    mse, vb = diffusion.hybrid_loss(chosen, batch.x_start, x_t, batch.t, batch.noise)
    (mse + vb).mean().backward()
    assert torch.allclose(loss, (mse + vb).mean(), rtol=1e-5)
    expected = dict(reference.named_parameters())
    for name, p in trainer.backbone.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p.grad, expected[name].grad, atol=1e-6, rtol=1e-4), name


def test_time_embedder_is_frozen_on_request(tiny_dit, tiny_images):
    config = with_(CONFIG, freeze_time_embedder=True)
    before = weights(tiny_dit)
    after = weights(finetune(tiny_dit, tiny_images, Diffusion(), SCHEDULE, config).backbone)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved and not any(n.startswith("t_embedder") for n in moved)


def test_pure_distillation_of_the_full_network_into_itself_has_no_error_to_learn(
    tiny_dit, tiny_images
):
    config = with_(CONFIG, distill_frac=1.0, num_steps=1, warmup_steps=0)
    trainer = Trainer(tiny_dit, tiny_images, Diffusion(), ExitSchedule.full(4), config)
    batch = draw_batch(tiny_images, tiny_dit, config, Diffusion(), 0, (0, 1))
    x_t = trainer.diffusion.q_sample(batch.x_start, batch.t, batch.noise)
    output = tiny_dit(x_t, batch.t, batch.y)
    _, vb = trainer.diffusion.hybrid_loss(output, batch.x_start, x_t, batch.t, batch.noise)
    assert torch.allclose(trainer._loss(batch)[0], vb.mean(), atol=1e-6)


def test_training_lowers_the_loss(tiny_images):
    torch.manual_seed(0)
    net = DiT(
        input_size=8,
        patch_size=4,
        in_channels=1,
        hidden_size=16,
        depth=2,
        num_heads=2,
        num_classes=3,
    )
    config = TrainConfig(num_steps=80, batch_size=16, lr=5e-3, lr_schedule="cosine", seed=0)
    losses = finetune(net, tiny_images, Diffusion(), ExitSchedule.full(2), config).losses
    assert np.mean(losses[-20:]) < 0.75 * np.mean(losses[:20])


@pytest.mark.parametrize("poison", ["x_start", "noise"])
def test_not_a_number_is_caught_and_not_saved(tiny_dit, tiny_images, tmp_path, monkeypatch, poison):
    import asesearch.finetuning.trainer as module

    def poisoned(*args):
        for step, batch in zip(args[5], batches(*args), strict=True):
            if step == 7:
                values = {**vars(batch)}
                values[poison] = values[poison] * math.nan
                batch = Batch(**values)
            yield batch

    monkeypatch.setattr(module, "batches", poisoned)
    with pytest.raises(TrainingDiverged, match="step 7 of 12.*lower the learning rate"):
        finetune(tiny_dit, tiny_images, Diffusion(), SCHEDULE, CONFIG, tmp_path)
    monkeypatch.undo()
    assert Trainer(tiny_dit, tiny_images, Diffusion(), SCHEDULE, CONFIG, tmp_path).resumed_at == 5


def test_ema_follows_its_definition(tiny_dit, tiny_images):
    config = with_(CONFIG, num_steps=3, ema_decay=0.9)
    trainer = Trainer(tiny_dit, tiny_images, Diffusion(), SCHEDULE, config)
    name = "final_layer.linear.weight"
    expected = weights(tiny_dit)[name]
    for step in range(3):
        trainer.train_step(draw_batch(tiny_images, tiny_dit, config, Diffusion(), step, (0, 1)))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = (
            decay * expected
            + (1 - decay) * dict(trainer.backbone.named_parameters())[name].detach()
        )
    assert torch.allclose(dict(trainer.ema.named_parameters())[name], expected, atol=1e-6)


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig(num_steps=10, warmup_steps=4, lr_schedule="cosine")
    factors = [lr_factor(s, config) for s in range(10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0] and factors[4] == 1.0
    assert (
        all(a > b for a, b in zip(factors[4:], factors[5:], strict=False)) and 0 < factors[-1] < 0.1
    )
    assert lr_factor(9, with_(config, lr_schedule="constant")) == 1.0


@pytest.mark.parametrize("name", ["constant", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 4, 20, 25])
def test_the_learning_rate_is_that_of_diffusers_whose_warm_up_is_one_step_behind(name, warmup):
    config = TrainConfig(num_steps=20, warmup_steps=warmup, lr_schedule=name)
    reference = get_scheduler(
        "cosine" if name == "cosine" else "constant_with_warmup",
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        num_warmup_steps=warmup,
        num_training_steps=20,
    ).lr_lambdas[0]
    for step in range(20):
        expected = reference(step + 1 if step < warmup else step)
        assert lr_factor(step, config) == pytest.approx(expected, abs=1e-12)


def test_loss_weight_is_raised_on_shortened_intervals_only():
    schedule = ExitSchedule.from_string("4 4 2 1", 4)
    dropped = torch.tensor([0.0, 0.5, 0.75])
    weight = PlateauWeight.make(LossWeight(shape="dropped", peak=3.0), schedule)
    assert weight.at(dropped, 0).tolist() == pytest.approx([1.0, 1 + 2 * (2 / 3), 3.0])
    step = PlateauWeight.make(LossWeight(shape="step", peak=3.0), schedule)
    assert step.at(dropped, 0).tolist() == [1.0, 3.0, 3.0]
    for config, flat in (
        (LossWeight(shape="none"), schedule),
        (LossWeight(peak=3.0), ExitSchedule.full(4)),
    ):
        assert PlateauWeight.make(config, flat).at(dropped, 0).tolist() == [1.0] * 3


def test_loss_weight_returns_to_one_at_the_plateau_and_stays():
    weight = PlateauWeight.make(LossWeight(peak=2.0, window=5, tolerance=0.05), SCHEDULE)
    most = torch.tensor([0.75])
    falling = [1 / (1 + 0.5 * i) for i in range(20)]
    for i, loss in enumerate(falling):
        weight.update(loss, i)
    assert weight.ended_at is None and weight.at(most, 20).item() == 2.0
    for i in range(20, 40):
        weight.update(0.09, i)
    # no better from steps 20 … 24 to 25 … 29, which counts from step 30
    assert (
        weight.ended_at == 30
        and weight.at(most, 29).item() == 2.0
        and weight.at(most, 30).item() == 1.0
    )
    weight.update(0.001, 41)
    assert weight.ended_at == 30 and weight.at(most, 42).item() == 1.0


def test_seeded_generators_do_not_collide():
    draws = {
        torch.randint(2**62, (1,), generator=seeded_generator(a, b)).item()
        for a in range(20)
        for b in range(20)
    }
    assert len(draws) == 400


def class_folders(root, names):
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(root / name / "a.png")
    return root


@pytest.mark.parametrize("count", [1, 2, 4])
def test_class_folders_that_are_not_the_networks_classes_need_a_mapping(tiny_dit, tmp_path, count):
    """Fewer or more folders than classes: which is which would be a guess."""
    root = class_folders(tmp_path / "pets", "abcd"[:count])
    full = ExitSchedule.full(4)
    with pytest.raises(
        DataError,
        match=f"has 3 classes; got {count} class folders from pets.*classes.json.*the data section",
    ):
        check_fit(tiny_dit, ImageFolder(root, 8, 1), Diffusion(), full)
    first = max(0, 3 - count)
    shifted = {name: i + first for i, name in enumerate("abcd"[:count])}
    mapped = ImageFolder(root, 8, 1, classes=shifted)
    if count < 4:
        check_fit(tiny_dit, mapped, Diffusion(), full)
    else:
        with pytest.raises(DataError, match="0…2; got labels up to 3 from pets"):
            check_fit(tiny_dit, mapped, Diffusion(), full)


def test_as_many_class_folders_as_classes_are_taken_in_order_and_no_labels_never(
    tiny_dit, tmp_path
):
    full = ExitSchedule.full(4)
    check_fit(
        tiny_dit, ImageFolder(class_folders(tmp_path / "three", "cab"), 8, 1), Diffusion(), full
    )
    flat = class_folders(tmp_path / "deep", "a") / "a"
    with pytest.raises(
        DataError, match="has 3 classes; got images without labels from a; use class folders"
    ):
        check_fit(tiny_dit, ImageFolder(flat, 8, 1), Diffusion(), full)


def test_one_label_more_than_classes_may_mean_that_there_is_no_null_label(tiny_dit, tmp_path):
    full = ExitSchedule.full(4)
    hint = (
        r"; or, if the network was trained on 4 classes without label dropout, set "
        r"args\.num_classes = 4"
    )
    data = ImageFolder(class_folders(tmp_path / "pets", "abcd"), 8, 1)
    with pytest.raises(DataError, match=hint):
        check_fit(tiny_dit, data, Diffusion(), full)
    with pytest.raises(DataError) as caught:
        check_fit(
            tiny_dit,
            ImageFolder(class_folders(tmp_path / "more", "abcde"), 8, 1),
            Diffusion(),
            full,
        )
    assert "label dropout" not in str(caught.value)
    check_fit(
        DiT(**{**tiny_dit.config, "num_classes": 4, "class_dropout_prob": 0.0}),
        data,
        Diffusion(),
        full,
    )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("names", ["", "a", "abc"])
def test_a_network_of_one_class_takes_every_image_as_of_that_class(
    tiny_dit, tmp_path, dropout, names
):
    """The official DiT is trained unconditionally so; no label is dropped where there is no null
    label."""
    net = DiT(**{**tiny_dit.config, "num_classes": 1, "class_dropout_prob": dropout})
    root = class_folders(tmp_path / "pets", names or "a")
    data = ImageFolder(root if names else root / "a", 8, 1)
    check_fit(net, data, Diffusion(), ExitSchedule.full(4))
    config = TrainConfig(batch_size=64, class_dropout_prob=0.5)
    y = draw_batch(data, net, config, Diffusion(), 0, (0, 1)).y
    assert y.dtype == torch.int64 and y.shape == (64,)
    dropped = int((y == 1).sum())
    assert set(y.tolist()) <= {0, 1} and (10 < dropped < 54 if dropout else dropped == 0)
    done = finetune(net, data, Diffusion(), SCHEDULE, TrainConfig(num_steps=1, batch_size=2))
    assert len(done.losses) == 1


def test_no_label_is_dropped_without_a_null_label(tiny_dit, tmp_path):
    data = ImageFolder(class_folders(tmp_path, "abc"), 8, 1)
    net = DiT(**{**tiny_dit.config, "class_dropout_prob": 0.0})
    config = TrainConfig(batch_size=30, class_dropout_prob=1.0)
    assert sorted(draw_batch(data, net, config, Diffusion(), 0, (0, 1)).y.tolist()) == sorted(
        [0, 1, 2] * 10
    )
    assert set(draw_batch(data, tiny_dit, config, Diffusion(), 0, (0, 1)).y.tolist()) == {3}


def test_an_unconditional_network_needs_no_mapping(tmp_path):
    shape = {
        "img_size": 8,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 16,
        "depth": 4,
        "num_heads": 2,
        "num_classes": -1,
    }
    root = class_folders(tmp_path, "ab")
    data = ImageFolder(root, 8, 1)
    net = UViT(**shape)
    assert check_fit(net, data, Diffusion(), ExitSchedule.full(net.depth)) is None
    flat = ImageFolder(root / "a", 8, 1)
    assert check_fit(net, flat, Diffusion(), ExitSchedule.full(net.depth)) is None
    labelled = UViT(**{**shape, "num_classes": 3})
    with pytest.raises(DataError, match="got images without labels"):
        check_fit(labelled, flat, Diffusion(), ExitSchedule.full(net.depth))


def test_parts_that_do_not_fit_are_refused(tiny_dit, tiny_images):
    rng = np.random.default_rng(0)
    large = ImageArray(
        rng.integers(0, 255, (4, 1, 12, 12), dtype=np.uint8), np.arange(4) % 3, "large"
    )
    many = ImageArray(rng.integers(0, 255, (4, 1, 8, 8), dtype=np.uint8), np.arange(4), "many")
    with pytest.raises(
        DataError, match=r"takes images of shape \(1, 8, 8\); got \(1, 12, 12\) from large"
    ):
        finetune(tiny_dit, large, Diffusion(), SCHEDULE, CONFIG)
    with pytest.raises(DataError, match="has 3 classes, 0…2; got labels up to 3 from many"):
        finetune(tiny_dit, many, Diffusion(), SCHEDULE, CONFIG)
    with pytest.raises(ScheduleError, match="network of 5 blocks; got one of 4"):
        finetune(tiny_dit, tiny_images, Diffusion(), ExitSchedule.full(5), CONFIG)
    with pytest.raises(ScheduleError, match="for 500 diffusion"):
        finetune(tiny_dit, tiny_images, Diffusion(), ExitSchedule.full(4, 500), CONFIG)
    with pytest.raises(ConfigError, match="needs a GPU"):
        finetune(
            tiny_dit, tiny_images, Diffusion(), SCHEDULE, with_(CONFIG, mixed_precision="bf16")
        )


@pytest.mark.slow
@pytest.mark.parametrize("full_depth", ["tuned", "pretrained"])
def test_two_processes_give_the_result_of_one(full_depth, tmp_path):
    """Real processes and real gradient reduction: only the order of summation differs."""
    study = tmp_path / "study.toml"
    study.write_text(
        'name = "two"\n[backbone]\nkind = "dit"\ncheckpoint = "shipped:fashion-mnist-dit"\n'
        '[data]\nkind = "fashion-mnist"\nsplit = "test"\n[train]\nnum_steps = 6\nbatch_size = '
        f"16\ncheckpoint_every = 3\n[search]\nfull_depth = '{full_depth}'\n"
    )
    states = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.safetensors"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(processes),
            "-m",
            "asesearch",
        ]
        command += [
            "finetune",
            str(study),
            "--schedule",
            "D3-DiT",
            "-o",
            str(out),
            "--run-dir",
            str(tmp_path / f"run{processes}"),
        ]
        subprocess.run(
            command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        states.append(load_file(out))
    largest = max(float((states[0][k] - states[1][k]).abs().max()) for k in states[0])
    assert 0 < largest < 1e-4  # 0 would mean that no gradient was reduced
    assert any(k.startswith(EXITS) for k in states[0]) == (full_depth == "pretrained")


@pytest.mark.thorough
def test_a_study_files_full_depth_is_kept_to(tmp_path, monkeypatch):
    """With the pretrained weights at full depth only early exits' own are trained, from a network
    or from such weights; under all blocks the network is."""
    text = {
        "name": "own",
        "backbone": {"kind": "dit", "checkpoint": "shipped:fashion-mnist-dit"},
        "data": {"kind": "fashion-mnist", "split": "test"},
        "train": {"num_steps": 2, "batch_size": 4, "distill_frac": 1.0},
        "search": {"full_depth": "pretrained"},
    }
    config = parse_study(text, "own.toml")
    pretrained = load_backbone(config.backbone)
    out = tmp_path / "own.safetensors"
    asked = {}
    with monkeypatch.context() as patch:
        patch.setattr("asesearch.finetuning.from_file.share_room", lambda *_: False)
        room = "asesearch.finetuning.from_file.check_room"
        patch.setattr(room, lambda _, size, what: asked.update({what: size}))
        training = StudyTraining(config, "12 12 3", out, tmp_path / "1")
    training.write(training.run())
    found = load_file(out)
    written = sum(t.numel() * t.element_size() for t in found.values())
    assert 0.95 * written < asked["the trained network"] <= written
    assert any(k.startswith(f"{EXITS}blocks.2.") for k in found)
    assert not any(k.startswith(f"{EXITS}blocks.3.") for k in found)  # nothing reads it
    assert all(torch.equal(found[k], v) for k, v in pretrained.state_dict().items())

    text["backbone"]["checkpoint"] = str(out)
    again = parse_study(text, "own.toml")
    with pytest.raises(ScheduleError, match="trained under early exits; got a schedule that runs"):
        StudyTraining(again, "full", tmp_path / "no.safetensors", tmp_path / "2")
    training = StudyTraining(again, "12 12 3", tmp_path / "further.safetensors", tmp_path / "3")
    with (
        try_lock(tmp_path / "3" / "training.lock"),  # as another process that trains there
        pytest.raises(ConfigError, match="one training at a time .*give another --run-dir"),
    ):
        training.run()
    training.write(training.run())
    further = load_file(training.out)
    name = f"{EXITS}blocks.0.mlp.fc1.weight"
    assert not torch.equal(further[name], found[name])
    assert all(torch.equal(further[k], v) for k, v in pretrained.state_dict().items())

    del text["backbone"]["checkpoint"]
    plain = {**text, "backbone": {"kind": "dit", "args": SHAPE}}
    training = StudyTraining(parse_study(plain, "t"), "full", out, tmp_path / "4")
    training.write(training.run())
    assert not any(k.startswith(EXITS) for k in load_file(out))


@pytest.mark.parametrize("section", ["backbone.checkpoint", "confirm.also.mine"])
def test_weights_that_the_study_reads_are_not_written_over(tmp_path, section):
    """Neither the file itself, by whatever name, nor one in a folder of weights."""
    folder = tmp_path / "net"
    folder.mkdir()
    (tmp_path / "same").symlink_to(folder)
    (folder / "w.safetensors").write_bytes(b"weights")

    def study(read):
        text = {
            "name": "own",
            "backbone": {"kind": "dit", "checkpoint": "shipped:fashion-mnist-dit"},
            "data": {"kind": "fashion-mnist", "split": "test"},
            "confirm": {"also": {"mine": str(tmp_path / "other.safetensors")}},
        }
        if section == "backbone.checkpoint":
            text["backbone"]["checkpoint"] = str(read)
        else:
            text["confirm"]["also"]["mine"] = str(read)
        return parse_study(text, "own.toml")

    for read in (folder / "w.safetensors", folder):
        with pytest.raises(ConfigError, match=f"not over them; got .*, where {section} = .*--out"):
            StudyTraining(study(read), "full", tmp_path / "same/w.safetensors", tmp_path / "run")
    assert (folder / "w.safetensors").read_bytes() == b"weights"
    check_not_read(study(folder / "w.safetensors"), folder / "new.safetensors", "--out")


def test_progress_is_plain_json(tiny_dit, tiny_images, tmp_path):
    """The checkpoint holds tensors and JSON: nothing in it can run code."""
    from safetensors import safe_open

    finetune(tiny_dit, tiny_images, Diffusion(), SCHEDULE, with_(CONFIG, num_steps=2), tmp_path)
    with safe_open(tmp_path / CHECKPOINT, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
    assert progress["step"] == 2 and len(progress["losses"]) == 2


def test_elastic_warm_up_draws_a_depth_a_sample_and_resumes(tiny_dit, tiny_images, tmp_path):
    law = ElasticDepths(4, 1000, 1, "noise-easy", 0.2)
    config = with_(CONFIG, distill_frac=1.0)
    trainer = Trainer(tiny_dit, tiny_images, Diffusion(), law, config)
    drawn = []
    for step in range(40):
        batch = draw_batch(tiny_images, tiny_dit, config, Diffusion(), step, (0, 1))
        assert batch.u.shape == (8,) and ((batch.u >= 0) & (batch.u < 1)).all()
        drawn.append(trainer._exit_depth(batch))
    assert set(np.concatenate(drawn)) == {1, 2, 3, 4} and len({tuple(sorted(d)) for d in drawn}) > 1
    straight = finetune(tiny_dit, tiny_images, Diffusion(), law, config)
    with pytest.raises(Killed):
        finetune(tiny_dit, tiny_images, Diffusion(), law, config, tmp_path, on_step=kill_at(10))
    resumed = finetune(tiny_dit, tiny_images, Diffusion(), law, config, tmp_path)
    assert (
        same(weights(straight.backbone), weights(resumed.backbone))
        and straight.losses == resumed.losses
    )
    with pytest.raises(CheckpointError, match="differs in its schedule; train in another folder"):
        finetune(tiny_dit, tiny_images, Diffusion(), ElasticDepths(4, 1000, 2), config, tmp_path)


@pytest.mark.thorough
def test_one_elastic_network_serves_every_depth_better_than_the_pretrained(tiny_dit, tiny_images):
    torch.manual_seed(0)
    shape = tiny_dit.config
    config = TrainConfig(num_steps=60, batch_size=32, lr=3e-3, ema_decay=0.9)
    full = finetune(DiT(**shape), tiny_images, Diffusion(), ExitSchedule.full(4), config).backbone
    config = with_(config, num_steps=40, distill_frac=1.0)
    elastic = finetune(full, tiny_images, Diffusion(), ElasticDepths(4, 1000, 1), config).backbone
    batch = draw_batch(
        tiny_images, full, with_(config, batch_size=96, seed=9), Diffusion(), 0, (0, 1)
    )
    x_t = Diffusion().q_sample(batch.x_start, batch.t, batch.noise)

    def error(net, depth):
        with torch.no_grad():
            truth = full(x_t, batch.t, batch.y)
            found = net(x_t, batch.t, batch.y, exit_depth=depth)
        return float((truth - found)[:, :1].pow(2).mean())

    assert all(error(elastic, depth) < 0.7 * error(full, depth) for depth in (1, 2, 3))


ALONE = """
import os
from asesearch.errors import ConfigError
from asesearch.finetuning import make_accelerator, train_alone
try:
    train_alone()
except ConfigError as error:
    print(error)
else:
    print(make_accelerator("no").num_processes, os.environ.get("PMI_SIZE"))
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("started", "said"),
    [
        ({"PMI_SIZE": "2", "PMI_RANK": "0", "LOCAL_RANK": "0"}, "1 2\n"),
        ({}, "1 None\n"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "only `train` and `finetune` share their work"),
    ],
)
def test_a_worker_of_a_search_trains_alone_whatever_started_it(started, said):
    launcher = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "PMI_SIZE")
    environment = {k: v for k, v in os.environ.items() if k not in launcher}
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        env={**environment, **started},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(said)


# -- fp16 ------------------------------------------------------------------------------------------


@pytest.fixture
def half_precision():
    """Makes accelerators that train in fp16 with a loss scaler of that first scale, on the CPU."""

    def make(init_scale):
        AcceleratorState._reset_state()
        accelerator = Accelerator(mixed_precision="fp16", cpu=True)
        # accelerate itself leaves loss scaling to devices that are not the CPU
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        return accelerator

    yield make
    AcceleratorState._reset_state()


def in_halves(net, images, accelerator, run_dir=None, **changes):
    return Trainer(
        net,
        images,
        Diffusion(),
        SCHEDULE,
        with_(CONFIG, **changes),
        run_dir,
        accelerator=accelerator,
    )


def test_a_loss_scale_that_overflows_is_no_divergence(tiny_dit, tiny_images, half_precision):
    trainer = in_halves(tiny_dit, tiny_images, half_precision(2.0**24), num_steps=30)
    moved = []
    for step in range(20):
        before = weights(trainer.backbone)
        ema = weights(trainer.ema)
        trainer._absorb(
            [
                trainer.train_step(
                    draw_batch(tiny_images, tiny_dit, trainer.config, Diffusion(), step, (0, 1))
                )
            ]
        )
        moved.append(
            (not same(before, weights(trainer.backbone)), not same(ema, weights(trainer.ema)))
        )
    assert all(net == ema for net, ema in moved)  # a skipped step leaves both alone
    skipped = [step for step, (net, _) in enumerate(moved) if not net]
    assert 2 <= len(skipped) <= 14 and skipped[0] == 0 and moved[-1] == (True, True)
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (24 - len(skipped))
    assert len(trainer.losses) == 20 and np.isfinite(trainer.losses).all() and trainer.skipped == 0
    # the learning rate goes by step, whatever was skipped
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(
        1e-3 * 0.5 * (1 + math.cos(math.pi * 17 / 28))
    )


def test_a_scale_that_never_fits_is_divergence_and_says_so(tiny_dit, tiny_images, half_precision):
    trainer = in_halves(tiny_dit, tiny_images, half_precision(2.0**70), num_steps=60)
    with pytest.raises(
        TrainingDiverged, match="overflow in fp16.*20 steps in a row.*step 19 of 60.*bf16"
    ):
        trainer.run()


def test_a_loss_that_is_not_finite_is_divergence_in_fp16_too(tiny_dit, tiny_images, half_precision):
    trainer = in_halves(tiny_dit, tiny_images, half_precision(1024.0))
    batch = draw_batch(tiny_images, tiny_dit, CONFIG, Diffusion(), 0, (0, 1))
    batch.x_start[0] = math.nan
    with pytest.raises(TrainingDiverged, match="not finite at step 0"):
        trainer._absorb([trainer.train_step(batch)])


def test_the_loss_scale_is_resumed(tiny_dit, tiny_images, half_precision, tmp_path):
    straight = in_halves(tiny_dit, tiny_images, half_precision(2.0**24)).run()
    with pytest.raises(Killed):
        in_halves(tiny_dit, tiny_images, half_precision(2.0**24), tmp_path).run(kill_at(6))
    resumed = in_halves(tiny_dit, tiny_images, half_precision(2.0**24), tmp_path)
    assert resumed.resumed_at == 5 and resumed.accelerator.scaler.get_scale() < 2.0**24
    assert (
        same(weights(straight.backbone), weights(resumed.run().backbone))
        and straight.losses == resumed.losses
    )


# -- precisions of one process -------------------------------------------------------------------


def test_a_warm_up_and_a_fine_tuning_may_differ_in_precision(tiny_dit, tiny_images):
    """One process, float32 and bfloat16 in turn: each is what it says, and float32 gives the same
    as before."""

    def losses(precision):
        accelerator = make_accelerator(precision)
        assert accelerator.mixed_precision == precision
        trainer = Trainer(
            tiny_dit, tiny_images, Diffusion(), SCHEDULE, CONFIG, accelerator=accelerator
        )
        return trainer.run().losses

    try:
        first = losses("no")
        half = losses("bf16")
        again = losses("no")
    finally:
        AcceleratorState._reset_state()
    assert again == first
    assert half != first and half == pytest.approx(first, rel=0.05)


FREED = """
import gc, weakref
import numpy as np
from asesearch.backbones import DiT
from asesearch.config import TrainConfig
from asesearch.data import ImageArray
from asesearch.diffusion import Diffusion
from asesearch.finetuning import Trainer
from asesearch.schedule import ExitSchedule
from tests.conftest import TINY_DIT

gc.collect()
gc.disable()
data = ImageArray(np.zeros((9, 1, 8, 8), np.uint8), np.arange(9) % 3, "nine")
config = TrainConfig(num_steps=2, batch_size=2)
trainer = Trainer(DiT(**TINY_DIT), data, Diffusion(), ExitSchedule.full(4), config)
seen = weakref.ref(trainer.backbone)
assert seen() is not None
del trainer
assert seen() is None, "still there"

# a compiled block refers to itself
compiled = config.model_copy(update={"compile": True})
trainer = Trainer(DiT(**TINY_DIT), data, Diffusion(), ExitSchedule.full(4), compiled)
seen = weakref.ref(trainer.backbone.blocks[0])
del trainer
assert seen() is not None, "no cycle, and nothing to test"
Trainer(DiT(**TINY_DIT), data, Diffusion(), ExitSchedule.full(4), compiled)
assert seen() is None, "still there while the next is trained"
"""


@pytest.mark.slow
def test_a_processs_first_trainer_is_freed_with_its_last_reference():
    """Making the first optimiser, PyTorch imports what keeps the frames that asked for it."""
    subprocess.run([sys.executable, "-c", FREED], check=True, cwd=Path(__file__).parent.parent)
