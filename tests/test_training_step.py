"""What one training step does, against numbers that do not come from the trainer's own formulas."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from asesearch.backbones import DiT
from asesearch.config import LossWeight, TrainConfig
from asesearch.diffusion import Diffusion
from asesearch.finetuning import Batch, PlateauWeight, Trainer, draw_batch, seconds_per_step
from asesearch.schedule import ElasticDepths, ExitSchedule

SCHEDULE = ExitSchedule.from_string("4 1", 4)  # all blocks below t = 500, one above
PLAIN = LossWeight(shape="none")
CONFIG = TrainConfig(
    num_steps=10, batch_size=8, lr=1e-3, lr_schedule="constant", loss_weight=PLAIN, seed=3
)


def trainer_of(net, images, schedule=SCHEDULE, **changes):
    return Trainer(net, images, Diffusion(), schedule, CONFIG.model_copy(update=changes))


def batch_at(net, images, t):
    """A batch whose every image has this timestep."""
    batch = draw_batch(images, net, CONFIG, Diffusion(), 0, (0, 1))
    return Batch(batch.x_start, batch.y, torch.full_like(batch.t, t), batch.noise, batch.u)


def copied(net):
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def largest_move(before, after):
    return max(float((after[n] - before[n]).abs().max()) for n in before)


# -- λ(t) ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "times"), [(900, 3.0), (100, 1.0)])
def test_the_loss_of_shortened_intervals_counts_more(tiny_dit, tiny_images, t, times):
    batch = batch_at(tiny_dit, tiny_images, t)
    plain, _ = trainer_of(tiny_dit, tiny_images)._loss(batch)
    raised, stats = trainer_of(
        tiny_dit, tiny_images, loss_weight=LossWeight(shape="step", peak=3.0)
    )._loss(batch)
    assert raised.item() == pytest.approx(times * plain.item(), rel=1e-5)
    # what is reported is not weighted
    assert stats[0].item() == pytest.approx(8 * plain.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("rule", "end"),
    [
        ({"window": 2, "tolerance": 1.0}, 10),
        ({"max_steps": 4}, 4),
        ({"window": 6, "max_steps": 13}, 13),
    ],
)
def test_the_weight_ends_at_the_step_it_says(tiny_dit, tiny_images, rule, end):
    """λ at every step of a run, from the loss that the gradient came from and the one that is
    reported."""
    weight = LossWeight(shape="step", peak=4.0, **rule)
    trainer = trainer_of(tiny_dit, tiny_images, loss_weight=weight, num_steps=24)
    seen = []

    def noted(batch, loss=trainer._loss):
        weighted, stats = loss(
            Batch(batch.x_start, batch.y, torch.full_like(batch.t, 900), batch.noise, batch.u)
        )
        seen.append(weighted.item() * 8 / stats[0].item())
        return weighted, stats

    trainer._loss = noted
    assert trainer.run().weight_ended_at == end
    assert seen == pytest.approx([4.0] * end + [1.0] * (24 - end), rel=1e-4)


def test_a_weight_that_never_ends_says_so(tiny_dit, tiny_images):
    weight = LossWeight(shape="step", peak=4.0, window=3, tolerance=1.0)
    assert (
        trainer_of(tiny_dit, tiny_images, loss_weight=weight, num_steps=10).run().weight_ended_at
        is None
    )


def test_the_weight_ends_after_so_many_steps():
    weight = PlateauWeight.make(
        LossWeight(shape="step", peak=3.0, window=50, max_steps=3), SCHEDULE
    )
    dropped = torch.tensor([0.75])
    seen = []
    for step, loss in enumerate([9.0, 6.0, 3.0, 1.0]):  # falling: no plateau
        seen.append(weight.at(dropped, step).item())
        weight.update(loss, step)
    assert seen == [3.0, 3.0, 3.0, 1.0] and weight.ended_at == 3


@pytest.mark.parametrize(
    "checkpoint_every", [7, 9], ids=["killed before it is found", "killed before it counts"]
)
def test_the_plateau_is_resumed(tiny_dit, tiny_images, tmp_path, checkpoint_every):
    """With tolerance 1 λ ends as soon as there are two windows of losses: found at step 8, it
    counts from step 10."""
    weight = LossWeight(shape="step", peak=4.0, window=4, tolerance=1.0)
    config = CONFIG.model_copy(
        update={"num_steps": 14, "checkpoint_every": checkpoint_every, "loss_weight": weight}
    )

    def train(run_dir=None, on_step=None):
        return Trainer(tiny_dit, tiny_images, Diffusion(), SCHEDULE, config, run_dir).run(on_step)

    def die(done, loss):
        if done >= checkpoint_every + 1:
            raise KeyboardInterrupt

    straight = train()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, die)
    resumed = train(tmp_path)
    assert straight.weight_ended_at == resumed.weight_ended_at == 10
    expected = copied(straight.backbone)
    assert all(torch.equal(p, expected[n]) for n, p in resumed.backbone.named_parameters())


# -- optimiser -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "step", "fraction"),
    [
        ({}, 0, 1.0),
        ({"warmup_steps": 4}, 0, 0.25),
        ({"warmup_steps": 4}, 2, 0.75),
        ({"lr_schedule": "cosine"}, 5, 0.5),  # half way down
        # three quarters: (1 - 1/√2) / 2
        ({"lr_schedule": "cosine", "warmup_steps": 2}, 8, 0.1464466),
    ],
)
def test_a_first_step_moves_weights_by_the_scheduled_learning_rate(
    tiny_dit, tiny_images, changes, step, fraction
):
    """Adam's first step is the learning rate for every gradient that is not tiny, whatever its
    size."""
    trainer = trainer_of(tiny_dit, tiny_images, **changes)
    trainer.step = step
    trainer.train_step(draw_batch(tiny_images, tiny_dit, CONFIG, Diffusion(), step, (0, 1)))
    moved = largest_move(copied(tiny_dit), copied(trainer.backbone))
    assert moved == pytest.approx(1e-3 * fraction, rel=1e-3)


def test_weight_decay_shrinks_what_has_no_gradient(tiny_dit, tiny_images):
    """At t = 900 one block runs: the others only decay, by learning rate times weight decay."""
    trainer = trainer_of(tiny_dit, tiny_images, weight_decay=0.1)
    before = copied(tiny_dit)["blocks.3.mlp.fc1.weight"]
    for name, p in trainer.backbone.named_parameters():
        if name.startswith("blocks.3"):
            p.grad = torch.zeros_like(p)  # AdamW passes over parameters without any
    trainer.train_step(batch_at(tiny_dit, tiny_images, 900))
    after = copied(trainer.backbone)["blocks.3.mlp.fc1.weight"]
    assert torch.allclose(after, before * (1 - 1e-4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("clip", [1e-3, None])
def test_gradients_are_clipped_to_their_norm(tiny_dit, tiny_images, clip):
    trainer = trainer_of(tiny_dit, tiny_images, grad_clip=clip)
    norms = []

    def note(*_):
        norms.append(
            math.sqrt(sum(float(p.grad.double().square().sum()) for p in trainer.named.values()))
        )

    trainer.optimizer.optimizer.register_step_pre_hook(note)
    stats = trainer.train_step(draw_batch(tiny_images, tiny_dit, CONFIG, Diffusion(), 0, (0, 1)))
    whole = float(stats[3])  # before clipping
    assert whole > 0.01 and norms == [pytest.approx(whole if clip is None else clip, rel=1e-4)]


@pytest.mark.parametrize(
    # of the old average at each of four steps: ramped up from 0.1, at most ema_decay
    ("ema_decay", "kept"),
    [
        (0.0, [0, 0, 0, 0]),
        (0.15, [0.1, 0.15, 0.15, 0.15]),
        (0.999, [1 / 10, 2 / 11, 3 / 12, 4 / 13]),
    ],
)
def test_the_average_of_weights_keeps_no_more_than_its_decay(
    tiny_dit, tiny_images, ema_decay, kept
):
    trainer = trainer_of(tiny_dit, tiny_images, ema_decay=ema_decay)
    name = "final_layer.linear.weight"
    average = copied(tiny_dit)[name].double().numpy()
    for step, share in enumerate(kept):
        trainer.train_step(draw_batch(tiny_images, tiny_dit, CONFIG, Diffusion(), step, (0, 1)))
        average = share * average + (1 - share) * copied(trainer.backbone)[name].double().numpy()
        assert np.allclose(copied(trainer.ema)[name].numpy(), average, atol=1e-6)


# -- min-SNR ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [10, 50, 100, 400, 900])
def test_min_snr_acts_near_data_and_truncated_snr_near_noise_and_nowhere_else(tiny_images, t):
    torch.manual_seed(0)
    net = DiT(
        8, 4, in_channels=1, hidden_size=16, depth=4, num_heads=2, num_classes=3, learn_sigma=False
    )
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.1)
    batch = batch_at(net, tiny_images, t)
    plain = trainer_of(net, tiny_images)._loss(batch)[0].item()
    weighted = trainer_of(net, tiny_images, min_snr_gamma=5.0)._loss(batch)[0].item()
    # the linear schedule of Ho et al. 2020
    signal = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: t + 1])
    snr = signal / (1 - signal)
    assert (snr > 5) == (t <= 100)
    assert weighted / plain == pytest.approx(5 / snr if snr > 5 else 1.0, rel=1e-4)
    weighted = trainer_of(net, tiny_images, truncated_snr=True)._loss(batch)[0].item()
    assert (snr < 1) == (t >= 400)
    assert weighted / plain == pytest.approx(1 / snr if snr < 1 else 1.0, rel=1e-4)


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
def test_processes_draw_their_own_shares_of_one_batch(tiny_dit, tiny_images, world):
    whole = draw_batch(tiny_images, tiny_dit, CONFIG, Diffusion(), 7, (0, 1))
    parts = [
        draw_batch(tiny_images, tiny_dit, CONFIG, Diffusion(), 7, (rank, world))
        for rank in range(world)
    ]
    for name in ("x_start", "y", "t", "noise", "u"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts])), name
        assert len({getattr(p, name).numpy().tobytes() for p in parts}) == world or name == "y", (
            name
        )
    law = ElasticDepths(4, 1000, 1)
    depths = [
        trainer_of(tiny_dit, tiny_images, law)._exit_depth(batch).tolist()
        for batch in (whole, *parts)
    ]
    assert depths[0] == sum(depths[1:], []) and set(depths[0]) == {1, 2, 3, 4}


def test_depth_draws_are_stratified_and_new_each_step(tiny_dit, tiny_images):
    draws = [
        draw_batch(tiny_images, tiny_dit, CONFIG, Diffusion(), step, (0, 1)) for step in range(5)
    ]
    for batch in draws:
        assert sorted((batch.u * 8).long().tolist()) == list(range(8))
        # not tied to the noise level
        assert (batch.u * 8).long().tolist() != (batch.t * 8 // 1000).tolist()
    assert len({tuple(batch.u.tolist()) for batch in draws}) == 5


# -- targets and books -----------------------------------------------------------------------------


def test_the_target_is_part_noise_and_part_the_whole_teacher(tiny_images):
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = DiT(
            8,
            4,
            in_channels=1,
            hidden_size=16,
            depth=4,
            num_heads=2,
            num_classes=3,
            learn_sigma=False,
        )
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
        nets.append(net.eval())
    student, teacher = nets
    config = CONFIG.model_copy(update={"distill_frac": 0.25})
    trainer = Trainer(student, tiny_images, Diffusion(), SCHEDULE, config, teacher=teacher)
    batch = batch_at(student, tiny_images, 900)
    x_t = Diffusion().q_sample(batch.x_start, batch.t, batch.noise)
    with torch.no_grad():
        whole = teacher(x_t, batch.t, batch.y)
        exited = student(x_t, batch.t, batch.y, exit_depth=1)
    expected = (0.75 * batch.noise + 0.25 * whole - exited).square().mean()
    assert trainer._loss(batch)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_on_record_is_the_mean_over_the_batch(tiny_dit, tiny_images):
    """With the learning rate at nothing, every step's loss is that of the network passed in."""
    result = trainer_of(tiny_dit, tiny_images, lr=1e-12, num_steps=12).run()
    expected = []
    for step in range(12):
        batch = draw_batch(tiny_images, tiny_dit, CONFIG, Diffusion(), step, (0, 1))
        x_t = Diffusion().q_sample(batch.x_start, batch.t, batch.noise)
        exit_depth = torch.where(batch.t < 500, 4, 1)
        with torch.no_grad():
            output = tiny_dit(x_t, batch.t, batch.y, exit_depth=exit_depth)
        mse, vb = Diffusion().hybrid_loss(output, batch.x_start, x_t, batch.t, batch.noise)
        expected.append((mse + vb).mean().item())
    assert result.losses == pytest.approx(expected, rel=1e-4)


def test_the_time_before_a_kill_is_counted(tiny_dit, tiny_images, tmp_path, monkeypatch):
    """On a clock that ticks a second each time it is read: two ticks a look, the resumed run's on
    top."""
    now = iter(range(1000))
    monkeypatch.setattr(
        "asesearch.finetuning.trainer.time", SimpleNamespace(perf_counter=lambda: next(now))
    )
    config = CONFIG.model_copy(update={"num_steps": 6, "checkpoint_every": 2})

    def die(done, loss):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(tiny_dit, tiny_images, Diffusion(), SCHEDULE, config, tmp_path).run(die)
    resumed = Trainer(tiny_dit, tiny_images, Diffusion(), SCHEDULE, config, tmp_path)
    assert resumed.resumed_at == 2 and resumed.seconds == 1
    assert resumed.run().seconds == 1 + 2


def test_the_time_of_a_step_leaves_the_first_out(tiny_dit, tiny_images, monkeypatch):
    times = iter([0, 100, 200, 201, 300, 305, 400, 402])  # steps of 100 s, 1 s, 5 s and 2 s
    monkeypatch.setattr(
        "asesearch.finetuning.trainer.time", SimpleNamespace(perf_counter=lambda: next(times))
    )
    assert seconds_per_step(trainer_of(tiny_dit, tiny_images)) == 2
