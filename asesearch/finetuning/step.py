"""One training step: networks, optimiser, loss and the average of the weights.

Source: Moon et al. 2024, section 3.3 and Algorithm 1. Differences from the released code: a step
runs only the blocks its samples need (the code runs all and picks exits afterwards); the EMA rate
is ramped up, min(ema_decay, (1+k)/(10+k)), so that a run of a few hundred steps is not dominated by
its initial weights.
"""

from __future__ import annotations

import copy
import gc
import importlib
import math
import os
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, KwargsHandler, send_to_device
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from asesearch.backbones.base import Backbone
from asesearch.backbones.compiled import compiled
from asesearch.backbones.device import collect_cycles, plain_torch
from asesearch.config import TrainConfig
from asesearch.diffusion import Process
from asesearch.errors import ConfigError
from asesearch.finetuning.annealing import Depths, PlateauWeight, ema_decay_at, lr_factor
from asesearch.finetuning.batches import Batch
from asesearch.schedule import ElasticDepths

#: What launchers of several processes set, and accelerate takes for an invitation.
_INVITATIONS = ("LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


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


def train_alone() -> None:
    """Have this process train by itself, whatever started it: the workers of a study, which `srun`
    or `mpirun` may start beside each other, share no gradients.

    Raises:
        ConfigError: it is one of several processes of one training.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not several and not PartialState._shared_state:
        kept = {name: os.environ.pop(name) for name in _INVITATIONS if name in os.environ}
        try:
            PartialState(cpu=not torch.cuda.is_available())
        finally:
            os.environ.update(kept)
    if several or PartialState().num_processes > 1:
        raise ConfigError(
            "only `train` and `finetune` share their work among the processes of `accelerate "
            "launch` or `torchrun`; start each worker of a search by a command of its own"
        )


@cache
def _import_dynamo() -> None:
    """What PyTorch imports when a process makes its first optimiser.

    The import keeps the frames that called it until garbage is collected: a first trainer's
    networks and Adam's moments lay beside the second's, 13 GB for DiT-XL/2.
    """
    importlib.import_module("torch._dynamo")
    gc.collect()


def _as_teacher(net: Backbone, device: torch.device) -> Backbone:
    """The network itself where it is ready for use, else a copy: weights of a large one take
    gigabytes, and nothing here changes a teacher's."""
    here = torch.empty(0, device=device).device  # "cuda" is some "cuda:0"
    if not net.training and all(p.device == here for p in net.parameters()):
        return net
    return copy.deepcopy(net).to(device).eval().requires_grad_(False)


class TrainingStep:
    """The networks of one run, and the step that trains them.

    Args:
        backbone: the network to start from; it is copied, not changed.
        diffusion: forward process; its timesteps must be the schedule's.
        schedule: blocks to run at each noise level, or the distribution of an elastic warm-up.
        config: see `TrainConfig`.
        teacher: full-depth network for distillation; by default `backbone`, if `distill_frac` > 0.
            In eval mode on the device it is used as it is, so don't change it during the run; else
            it is copied.
        accelerator: for several processes or devices; by default one is made.

    Raises:
        ConfigError: a precision that needs a GPU, a batch that does not divide by the processes, or
            no parameter that may be trained.
    """

    @plain_torch()
    def __init__(
        self,
        backbone: Backbone,
        diffusion: Process,
        schedule: Depths,
        config: TrainConfig,
        teacher: Backbone | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        _import_dynamo()
        self.diffusion = diffusion
        self.schedule = schedule
        self.config = config
        if config.mixed_precision != "no" and accelerator is None and not torch.cuda.is_available():
            raise ConfigError(
                f"mixed_precision = {config.mixed_precision!r} needs a GPU; use 'no' on a CPU"
            )
        unused = DistributedDataParallelKwargs(find_unused_parameters=not schedule.is_full)
        self.accelerator = accelerator or make_accelerator(config.mixed_precision, unused)
        device = self.accelerator.device
        if device.type == "cuda" or config.compile:
            collect_cycles()
        self.part = (self.accelerator.process_index, self.accelerator.num_processes)
        if config.batch_size % self.part[1]:
            raise ConfigError(
                f"batch_size must be a multiple of the {self.part[1]} processes; got "
                f"{config.batch_size}"
            )
        self.backbone = copy.deepcopy(backbone).to(device).train()
        self.ema = copy.deepcopy(backbone).to(device).eval().requires_grad_(False)
        self.teacher = None
        if config.distill_frac > 0:
            self.teacher = _as_teacher(teacher or backbone, device)
        self._learnt = [n for n, p in self.backbone.named_parameters() if p.requires_grad]
        frozen = self.backbone.time_embedder() if config.freeze_time_embedder else None
        if frozen is not None:
            frozen.requires_grad_(False)
        self.named = {n: p for n, p in self.backbone.named_parameters() if p.requires_grad}
        if not self.named:
            rest = " but the time embedder's, which config freezes" if self._learnt else ""
            raise ConfigError(
                "training needs parameters that may change; got a network that has all of them "
                f"frozen{rest}; thaw it with .requires_grad_(True)"
            )
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
            teaching = compiled(self.teacher, self.config.compile)
            with torch.no_grad(), self.accelerator.autocast(), teaching:
                eps = self.teacher(x_t, td, y)[:, : noise.shape[1]].float()
            target = torch.lerp(noise, eps, self.config.distill_frac)
        with self.accelerator.autocast():
            output = self.model(x_t, td, y, exit_depth=exit_depth)
        mse, vb = self.diffusion.hybrid_loss(output, x_start, x_t, td, noise, target)
        snr = self.diffusion.snr(t)
        # Hang et al. 2023, for a network that predicts eps
        if self.config.min_snr_gamma is not None:
            mse = mse * (snr.clamp(max=self.config.min_snr_gamma) / snr).to(mse, non_blocking=True)
        # Salimans & Ho 2022, section 4, for the same
        if self.config.truncated_snr:
            mse = mse * (1 / snr).clamp(min=1.0).to(mse, non_blocking=True)
        loss = mse + vb  # (N,)
        short = (dropped > 0).to(device, non_blocking=True)
        stats = torch.stack(
            [loss.detach().sum(), (loss.detach() * short).sum(), short.sum().to(loss)]
        )
        weight = self.weight.at(dropped, self.step).to(device, non_blocking=True)
        return (loss * weight).mean(), stats

    @plain_torch()
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

    def tensors(self) -> dict[str, Tensor]:
        """Weights, their averages and the optimiser's moments, by name: what a checkpoint keeps.

        After the last step the averages alone, which are the result: a quarter of it all.
        """
        tensors: dict[str, Tensor] = {f"ema.{n}": self.ema_of[n] for n in self.named}
        if self.step >= self.config.num_steps:
            return tensors
        tensors |= {f"model.{n}": p.detach() for n, p in self.named.items()}
        for name, p in self.named.items():
            for key, value in self.optimizer.state[p].items():
                tensors[f"adam.{key}.{name}"] = value.reshape(1) if value.ndim == 0 else value
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave."""
        ended = not any(name.startswith("model.") for name in tensors)
        for name, p in self.named.items():
            self.ema_of[name].copy_(tensors[f"ema.{name}"])
            if ended:
                continue
            p.data.copy_(tensors[f"model.{name}"])
            state = {
                k: tensors[f"adam.{k}.{name}"]
                for k in ("step", "exp_avg", "exp_avg_sq")
                if f"adam.{k}.{name}" in tensors
            }
            if state:
                self.optimizer.state[p] = {**state, "step": state["step"].reshape(())}
