"""The ASE loop: one trainer for pretraining, brief and full fine-tuning.

Every random draw of step k follows from (seed, k) alone, so a run that is killed and resumed gives
the same result as one that was not, and a run on several processes sees the same batches as a run
on one.

Source: Moon et al. 2024, section 3.3 and Algorithm 1. Differences from the released code: a step
runs only the blocks its samples need (the code runs all and picks exits afterwards); the EMA rate
is ramped up, min(ema_decay, (1+k)/(10+k)), so that a run of a few hundred steps is not dominated by
its initial weights; timesteps are stratified over the batch.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, KwargsHandler, send_to_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from asesearch.backbones.base import Backbone, Conditioning, check_schedule, own_labels
from asesearch.config import LossWeight, TrainConfig
from asesearch.data import DataSource
from asesearch.diffusion import Process
from asesearch.errors import CheckpointError, ConfigError, DataError, TrainingDiverged
from asesearch.files import replacing
from asesearch.schedule import ElasticDepths, ExitSchedule

# blocks to run: one schedule, or a law that every sample draws from
Depths = ExitSchedule | ElasticDepths
SYNC_EVERY = 10  # steps between looks at the loss: each is a device synchronisation
CHECKPOINT = "training.safetensors"
#: Steps in a row that fp16's loss scaler may skip: each halves its scale, which begins at 2^16, so
#: that it is 1/16 after them.
MAX_SKIPPED = 20


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream depends on all of `key`, and on nothing else."""
    words = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


@dataclass
class Batch:
    """What one process needs for one step, on the CPU. `u` (N,) in [0, 1) draws the depth where a
    law does."""

    x_start: Tensor
    y: Conditioning | None
    t: Tensor
    noise: Tensor
    u: Tensor


def draw_batch(
    data: DataSource,
    backbone: Backbone,
    config: TrainConfig,
    diffusion: Process,
    step: int,
    part: tuple[int, int],
) -> Batch:
    """The batch of step `step`, or the share of process `part` = (rank, number of processes) of it.

    Images are drawn without replacement within an epoch; timesteps are stratified (one in each of
    batch_size equal strata of the chain, shuffled); labels are dropped with `class_dropout_prob`
    where the network has a null label.
    """
    rank, world = part
    size = config.batch_size
    gen = seeded_generator(config.seed, step, 1)
    indices = _epoch_indices(len(data), size, step, config.seed)
    t = diffusion.draw_t(
        (torch.randperm(size, generator=gen) + torch.rand(size, generator=gen)) / size
    )
    noise = torch.randn(size, *data.shape, generator=gen)
    dropped = torch.rand(size, generator=gen) < config.class_dropout_prob
    mine = slice(rank * size // world, (rank + 1) * size // world)
    x_start, y = data.batch(indices[mine], seeded_generator(config.seed, step, 2, rank))
    y = own_labels(backbone, y, len(x_start))
    if y is not None and backbone.has_null_label:
        y = _with_drops(y, backbone.null_labels(y), dropped[mine])
    depth_gen = seeded_generator(config.seed, step, 4)
    u = (torch.randperm(size, generator=depth_gen) + torch.rand(size, generator=depth_gen)) / size
    return Batch(x_start, y, t[mine], noise[mine], u[mine])


def _with_drops(y: Conditioning, null: Conditioning, dropped: Tensor) -> Conditioning:
    """`null` where `dropped` (N,), else `y`."""
    if isinstance(y, Tensor):
        assert isinstance(null, Tensor)
        return torch.where(dropped.view(-1, *(1,) * (y.ndim - 1)), null, y)
    assert isinstance(null, dict)
    return {
        k: torch.where(dropped.view(-1, *(1,) * (v.ndim - 1)), null[k], v) for k, v in y.items()
    }


def _epoch_indices(total: int, size: int, step: int, seed: int) -> list[int]:
    first = step * size
    indices: list[int] = []
    while len(indices) < size:
        epoch, offset = divmod(first + len(indices), total)
        order = np.random.default_rng([seed, epoch, 3]).permutation(total)
        indices += order[offset : offset + size - len(indices)].tolist()
    return indices


@dataclass
class PlateauWeight:
    """λ(t) over the course of a run; see `config.LossWeight` for shape and stop rule."""

    config: LossWeight
    most_dropped: float  # largest fraction of blocks that the schedule drops
    losses: list[float] = field(default_factory=list)
    ended_at: int | None = None

    @classmethod
    def make(cls, config: LossWeight, schedule: Depths) -> PlateauWeight:
        """For a schedule; nothing is raised if it drops nothing."""
        flat = config.shape == "none" or config.peak == 1.0 or schedule.is_full
        return cls(
            config, 1 - min(schedule.exit_depths) / schedule.depth, ended_at=0 if flat else None
        )

    def update(self, loss: float, step: int) -> None:
        """Take the mean loss on the shortened intervals at a step (NaN if none was drawn); apply
        the stop rule.

        What the losses say counts from the next look at them (see `SYNC_EVERY`), so that no result
        depends on when checkpoints are written.
        """
        if self.ended_at is not None:
            return
        if math.isfinite(loss):
            self.losses.append(loss)
        window = self.config.window
        limit = self.config.max_steps
        if len(self.losses) >= 2 * window and len(self.losses) % window == 0:
            before = sum(self.losses[-2 * window : -window]) / window
            now = sum(self.losses[-window:]) / window
            if now > before * (1 - self.config.tolerance):
                self.ended_at = -(-(step + 1) // SYNC_EVERY) * SYNC_EVERY
        if limit is not None and max(step + 1, self.ended_at or 0) >= limit:
            self.ended_at = limit

    def at(self, dropped: Tensor, step: int) -> Tensor:
        """λ at a step of samples for which these fractions of the blocks are dropped: (N,) ->
        (N,)."""
        ends = [end for end in (self.ended_at, self.config.max_steps) if end is not None]
        if step >= min(ends, default=math.inf):
            return torch.ones_like(dropped)
        lift = (
            dropped / self.most_dropped
            if self.config.shape == "dropped"
            else (dropped > 0).to(dropped)
        )
        return 1 + (self.config.peak - 1) * lift


@dataclass
class TrainResult:
    """What a run gives.

    Attributes:
        backbone: the EMA network, in eval mode, on the device it was trained on.
        losses: mean unweighted hybrid loss of each step.
        weight_ended_at: step from which λ was 1, None if it never got there.
        seconds: time spent in training steps, over all resumptions.
    """

    backbone: Backbone
    losses: list[float]
    weight_ended_at: int | None
    seconds: float


def lr_factor(step: int, config: TrainConfig) -> float:
    """Learning rate at a step as a fraction of `lr`: linear warm-up, then constant or a cosine to
    0.

    The same values as diffusers' `get_scheduler`, but for its warm-up, which begins at 0, so that
    a first step would learn nothing, and is up to 1 / warmup_steps lower. No scheduler object: it
    counts its own calls, and step k's rate is to follow from k alone.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return 1.0
    return 0.5 * (
        1
        + math.cos(
            math.pi * (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
        )
    )


def ema_decay_at(step: int, config: TrainConfig) -> float:
    """The share of the old average that a step keeps: `ema_decay`, ramped up to.

    The average itself is PyTorch's. diffusers' `EMAModel` could give the same decays (with
    use_ema_warmup, inv_gamma = 9, power = 1, update_after_step = -1), but its import takes 6 s of
    processor time, as it loads pipelines and transformers.
    """
    return min(config.ema_decay, (1 + step) / (10 + step))


def make_accelerator(mixed_precision: str, *handlers: KwargsHandler) -> Accelerator:
    """An accelerator of this precision, whatever the precision of those that this process made
    before.

    accelerate keeps one precision per process and refuses another; the warm-up and a trial's
    fine-tuning may each have their own. Accelerators of another precision are not to be used on.
    """
    now = AcceleratorState._shared_state
    if now and now.get("_mixed_precision") != mixed_precision:
        AcceleratorState._reset_state()  # the process group, kept elsewhere, stays
    return Accelerator(
        mixed_precision=mixed_precision,
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=list(handlers),
    )


class Trainer:
    """State of one run. Use `finetune` unless you need the steps one by one.

    Args:
        backbone: the network to start from; it is copied, not changed.
        data: training images.
        diffusion: forward process; its chain must be the schedule's.
        schedule: blocks to run at each noise level, or the law of an elastic warm-up.
        config: see `TrainConfig`.
        run_dir: folder for the checkpoint that makes the run resumable; None = not resumable.
        teacher: full-depth network for distillation; by default a frozen copy of `backbone`, if
            `distill_frac` > 0.
        accelerator: for several processes or devices; by default one is made.

    Raises:
        ConfigError, DataError, ScheduleError: parts that do not fit each other.
        CheckpointError: `run_dir` holds the checkpoint of another run.
    """

    def __init__(
        self,
        backbone: Backbone,
        data: DataSource,
        diffusion: Process,
        schedule: Depths,
        config: TrainConfig,
        run_dir: Path | None = None,
        teacher: Backbone | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        check_fit(backbone, data, diffusion, schedule)
        self.data = data
        self.diffusion = diffusion
        self.schedule = schedule
        self.config = config
        self.run_dir = None if run_dir is None else Path(run_dir)
        if config.mixed_precision != "no" and accelerator is None and not torch.cuda.is_available():
            raise ConfigError(
                f"mixed_precision = {config.mixed_precision!r} needs a GPU; use 'no' on a CPU"
            )
        unused = DistributedDataParallelKwargs(find_unused_parameters=not schedule.is_full)
        self.accelerator = accelerator or make_accelerator(config.mixed_precision, unused)
        device = self.accelerator.device
        self.part = (self.accelerator.process_index, self.accelerator.num_processes)
        if config.batch_size % self.part[1]:
            raise ConfigError(
                f"batch_size must be a multiple of the {self.part[1]} processes; got "
                f"{config.batch_size}"
            )
        self.fingerprint = weights_fingerprint(backbone)
        self.backbone = copy.deepcopy(backbone).to(device).train()
        self.ema = copy.deepcopy(backbone).to(device).eval().requires_grad_(False)
        self.teacher = None
        if config.distill_frac > 0:
            self.teacher = (
                copy.deepcopy(teacher or backbone).to(device).eval().requires_grad_(False)
            )
        self._learnt = [n for n, p in self.backbone.named_parameters() if p.requires_grad]
        frozen = self.backbone.time_embedder() if config.freeze_time_embedder else None
        if frozen is not None:
            frozen.requires_grad_(False)
        self.named = {n: p for n, p in self.backbone.named_parameters() if p.requires_grad}
        self.ema_of = dict(self.ema.named_parameters())
        if config.compile:
            for i in range(self.backbone.depth):
                # in place: every depth shares the compiled blocks
                self.backbone.block_at(i).compile()
        optimizer = torch.optim.AdamW(
            self.named.values(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.model: nn.Module
        self.model, self.optimizer = self.accelerator.prepare(self.backbone, optimizer)
        self.weight = PlateauWeight.make(config.loss_weight, schedule)
        self.step = 0
        self.seconds = 0.0
        self.skipped = 0
        self.losses: list[float] = []
        self.resumed_at = self._load() if self.run_dir is not None else 0

    # -- one step --------------------------------------------------------------------------------

    def _exit_depth(self, batch: Batch) -> npt.NDArray[np.int64]:
        if isinstance(self.schedule, ElasticDepths):
            return self.schedule.draw(batch.t.numpy(), batch.u.numpy())
        return self.schedule.exit_depth_at(batch.t.numpy())

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Weighted mean loss for the gradient, and (sum of loss, sum and count of it on shortened
        intervals)."""
        device = self.accelerator.device
        t = batch.t
        exit_depth = torch.from_numpy(self._exit_depth(batch))
        dropped = 1 - exit_depth.float() / self.schedule.depth
        x_start = batch.x_start.to(device, non_blocking=True)
        noise = batch.noise.to(device, non_blocking=True)
        y = send_to_device(batch.y, device, non_blocking=True)
        td = t.to(device, non_blocking=True)
        x_t = self.diffusion.q_sample(x_start, td, noise)
        target = noise
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                eps = self.teacher(x_t, td, y)[:, : noise.shape[1]].float()
            target = torch.lerp(noise, eps, self.config.distill_frac)
        with self.accelerator.autocast():
            output = self.model(x_t, td, y, exit_depth=exit_depth)
        mse, vb = self.diffusion.hybrid_loss(output, x_start, x_t, td, noise, target)
        # Hang et al. 2023, for a network that predicts eps
        if self.config.min_snr_gamma is not None:
            snr = self.diffusion.snr(t)
            mse = mse * (snr.clamp(max=self.config.min_snr_gamma) / snr).to(mse)
        loss = mse + vb  # (N,)
        short = (dropped > 0).to(device)
        stats = torch.stack(
            [loss.detach().sum(), (loss.detach() * short).sum(), short.sum().to(loss)]
        )
        return (loss * self.weight.at(dropped, self.step).to(device)).mean(), stats

    def train_step(self, batch: Batch) -> Tensor:
        """One optimiser step and one EMA step; the statistics of `_loss`, the gradient norm and 1
        if skipped, on the device.

        Where gradients overflow in fp16, the loss scaler skips the step and lowers its scale:
        network and EMA stay as they are, and the learning rate goes on by step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * lr_factor(self.step, self.config)
        loss, stats = self._loss(batch)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(
            list(self.named.values()), self.config.grad_clip or math.inf
        )
        skipped = self._optimizer_step()
        self.optimizer.zero_grad()
        if not skipped:
            decay = ema_decay_at(self.step, self.config)
            average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            average([self.ema_of[n] for n in self.named], list(self.named.values()), self.step)
        self.step += 1
        norm = torch.zeros(()) if norm is None or skipped else torch.as_tensor(norm)
        return torch.cat([stats, norm.to(stats).view(1), stats.new_full((1,), float(skipped))])

    def _optimizer_step(self) -> bool:
        """Whether the loss scaler skipped it. (accelerate's `optimizer_step_was_skipped` misses it:
        fused AdamW is called in any case and skips by itself.)
        """
        scaler = self.accelerator.scaler
        if scaler is None:
            self.optimizer.step()
            return False
        scale = scaler.get_scale()
        self.optimizer.step()
        return bool(scaler.get_scale() < scale)

    def _absorb(self, stats: list[Tensor]) -> None:
        """Bring the statistics of the last steps to the host, over all processes; guard against
        NaN.

        Raises:
            TrainingDiverged: a loss or a gradient is not finite, or the loss scaler skips one step
                after the other.
        """
        if not stats:
            return
        table = self.accelerator.reduce(torch.stack(stats), "sum").cpu().double()  # (steps, 5)
        first = self.step - len(stats)
        for i, (total, short, count, norm, skipped) in enumerate(table.tolist()):
            if not (math.isfinite(total) and math.isfinite(norm)):
                other = ", or train in bf16" if self.config.mixed_precision == "fp16" else ""
                raise TrainingDiverged(
                    f"loss or gradient is not finite at step {first + i} of "
                    f"{self.config.num_steps}; lower the learning rate ({self.config.lr:g}) or "
                    f"give a longer warm-up{other}"
                )
            self.skipped = self.skipped + 1 if skipped else 0
            if self.skipped >= MAX_SKIPPED:
                raise TrainingDiverged(
                    f"the gradients overflow in fp16 whatever the loss scale: {self.skipped} steps "
                    f"in a row were skipped up to step {first + i} of {self.config.num_steps}; "
                    f"train in bf16, or lower the learning rate ({self.config.lr:g})"
                )
            self.losses.append(total / self.config.batch_size)
            self.weight.update(short / count if count else math.nan, first + i)

    def run(self, on_step: Callable[[int, float], None] | None = None) -> TrainResult:
        """Train to `num_steps`.

        Args:
            on_step: called as (steps done, mean loss of the last steps) every few steps, on the
                main process.

        Raises:
            TrainingDiverged: the loss or a gradient is not finite; nothing of the last steps is
                saved.
        """
        total = self.config.num_steps

        def fetch(step: int) -> Batch:
            return draw_batch(
                self.data, self.backbone, self.config, self.diffusion, step, self.part
            )

        stats: list[Tensor] = []
        start = time.perf_counter()
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(fetch, self.step)
            while self.step < total:
                batch = ahead.result()
                ahead = pool.submit(fetch, self.step + 1)
                stats.append(self.train_step(batch))
                due = self.run_dir is not None and self.step % self.config.checkpoint_every == 0
                if self.step % SYNC_EVERY == 0 or due or self.step == total:
                    self._absorb(stats)
                    self.seconds += time.perf_counter() - start
                    start = time.perf_counter()
                    stats = []
                    if on_step is not None and self.accelerator.is_main_process:
                        on_step(
                            self.step,
                            sum(self.losses[-SYNC_EVERY:]) / len(self.losses[-SYNC_EVERY:]),
                        )
                    if due or (self.step == total and self.run_dir is not None):
                        self._save()
            ahead.cancel()
        for name in self._learnt:
            self.ema_of[name].requires_grad_(True)  # so that it can be trained further
        ended = self.weight.ended_at
        return TrainResult(
            self.ema, self.losses, None if ended is None or ended >= total else ended, self.seconds
        )

    # -- save and resume -------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be continued."""
        return {
            "config": self.config.model_dump(exclude={"checkpoint_every", "compile"}),
            "schedule": self.schedule.to_dict(),
            "backbone": [type(self.backbone).__name__, self.backbone.config],
            "initial weights": self.fingerprint,
            "data": self.data.digest,
            "betas": [self.diffusion.beta_schedule, self.diffusion.num_train_timesteps],
        }

    def _save(self) -> None:
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process or self.run_dir is None:
            return
        tensors = {f"model.{n}": p.detach() for n, p in self.named.items()}
        tensors |= {f"ema.{n}": self.ema_of[n] for n in self.named}
        for name, p in self.named.items():
            for key, value in self.optimizer.state[p].items():
                tensors[f"adam.{key}.{name}"] = value.reshape(1) if value.ndim == 0 else value
        tensors = {k: v.cpu().contiguous() for k, v in tensors.items()}
        progress = {
            "step": self.step,
            "losses": self.losses,
            "weight_losses": self.weight.losses,
            "weight_ended_at": self.weight.ended_at,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "loss_scaler": None
            if self.accelerator.scaler is None
            else self.accelerator.scaler.state_dict(),
        }
        metadata = {
            "identity": json.dumps(self._identity(), sort_keys=True),
            "progress": json.dumps(progress),
        }
        with replacing(self.run_dir / CHECKPOINT) as part:
            save_file(tensors, part, metadata)

    def _load(self) -> int:
        assert self.run_dir is not None
        path = self.run_dir / CHECKPOINT
        if not path.is_file():
            return 0
        try:
            with safe_open(path, "pt", device=str(self.accelerator.device)) as file:
                metadata = file.metadata() or {}
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
            identity = json.loads(metadata["identity"])
            progress = json.loads(metadata["progress"])
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise CheckpointError(
                f"can't resume from {path}: {error}; delete it to begin anew"
            ) from error
        ours = json.loads(json.dumps(self._identity()))
        for name in ours:
            if identity.get(name) != ours[name]:
                raise CheckpointError(
                    f"{path} belongs to a run with another {name}; delete it to begin anew, or "
                    f"undo the change: {_difference(identity.get(name), ours[name])}"
                )
        for name, p in self.named.items():
            p.data.copy_(tensors[f"model.{name}"])
            self.ema_of[name].copy_(tensors[f"ema.{name}"])
            state = {
                k: tensors[f"adam.{k}.{name}"]
                for k in ("step", "exp_avg", "exp_avg_sq")
                if f"adam.{k}.{name}" in tensors
            }
            if state:
                self.optimizer.state[p] = {**state, "step": state["step"].reshape(())}
        self.step = progress["step"]
        self.losses = progress["losses"]
        self.seconds = progress["seconds"]
        self.weight.losses = progress["weight_losses"]
        self.weight.ended_at = progress["weight_ended_at"]
        self.skipped = progress.get("skipped", 0)
        if self.accelerator.scaler is not None and progress.get("loss_scaler"):
            self.accelerator.scaler.load_state_dict(progress["loss_scaler"])
        return self.step


def weights_fingerprint(backbone: nn.Module) -> str:
    """SHA-256 over the first 1,024 numbers of every parameter: tells two sets of weights apart, at
    no cost for large ones."""
    sha = hashlib.sha256()
    for name, p in sorted(backbone.named_parameters()):
        sha.update(f"{name} {tuple(p.shape)}".encode())
        sha.update(p.detach().flatten()[:1024].float().cpu().numpy().tobytes())
    return sha.hexdigest()


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        return ", ".join(
            f"{k}: {old.get(k)!r} then, {new.get(k)!r} now" for k in new if old.get(k) != new.get(k)
        )
    return f"{old!r} then, {new!r} now"


def check_fit(backbone: Backbone, data: DataSource, diffusion: Process, schedule: Depths) -> None:
    """Refuse parts that do not belong together.

    Raises:
        DataError: images of another shape, labels out of the network's range, or not the prompts it
            takes.
        ScheduleError: a schedule of another depth or chain, or shallower than the network allows.
    """
    if backbone.prediction_type != "epsilon":
        raise ConfigError(
            "fine-tuning is for networks that predict noise; got one that predicts "
            f"{backbone.prediction_type!r} (rectified flow); its schedules can be attached to a "
            "pipeline, not trained"
        )
    expected = (backbone.in_channels, backbone.input_size, backbone.input_size)
    if data.shape != expected:
        raise DataError(
            f"the network takes images of shape {expected}; got {data.shape} from {data.name}; "
            "resize them"
        )
    if backbone.num_classes:
        _check_classes(backbone, data)
    if backbone.takes_prompt:
        try:
            backbone.check_conditioning(data.batch([0])[1], 1)
        except ConfigError as error:
            raise DataError(
                f"{data.name} must give the prompts that the network takes: {error}"
            ) from error
    check_schedule(backbone, diffusion.num_train_timesteps, schedule)


def _check_classes(backbone: Backbone, data: DataSource) -> None:
    """Refuse labels that are not, or may not be, those of a network with several classes."""
    wanted = backbone.num_classes
    got = data.num_classes
    if wanted == 1:
        return  # see `own_labels`
    hint = ""
    if got == wanted + 1 and backbone.has_null_label:
        hint = (
            f"; or, if the network was trained on {got} classes without label dropout, set "
            f"args.num_classes = {got} in [backbone] (for a U-ViT args.has_null_label = false)"
        )
    if got == 0:
        raise DataError(
            f"the network has {wanted} classes; got images without labels from {data.name}; use "
            "class folders"
        )
    if getattr(data, "labels_by_order", False) and got != wanted:
        raise DataError(
            f"the network has {wanted} classes; got {got} class folders from {data.name}, and "
            "nothing says which classes they "
            'are; name them in a classes.json beside the class folders, such as {"cat": 281, '
            '"dog": 207}, or under classes in '
            f"the data section (latents: encode them again with that){hint}"
        )
    if got > wanted:
        raise DataError(
            f"the network has {wanted} classes, 0…{wanted - 1}; got labels up to {got - 1} from "
            f"{data.name}; correct the labels, or the class indices of its folders{hint}"
        )


def finetune(
    backbone: Backbone,
    data: DataSource,
    diffusion: Process,
    schedule: Depths,
    config: TrainConfig,
    run_dir: Path | None = None,
    teacher: Backbone | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Fine-tune `backbone` (or train it from scratch, with `ExitSchedule.full`) under an exit
    schedule.

    See `Trainer` for arguments and errors, `Trainer.run` for `on_step`. With `run_dir`, a killed
    run goes on where its last checkpoint was, and gives the same result as one that was not killed.
    """
    return Trainer(backbone, data, diffusion, schedule, config, run_dir, teacher).run(on_step)


def seconds_per_step(trainer: Trainer, steps: int = 3) -> float:
    """Median time of a few training steps of a trainer that is thrown away afterwards, after one to
    warm up."""
    times = []
    for step in range(steps + 1):
        start = time.perf_counter()
        batch = draw_batch(
            trainer.data, trainer.backbone, trainer.config, trainer.diffusion, step, trainer.part
        )
        trainer.train_step(batch).cpu()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
