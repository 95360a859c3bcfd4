"""What a search will cost, measured on this machine before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from asesearch.finetuning import Trainer, seconds_per_step
from asesearch.search.workbench import Workbench


@dataclass(frozen=True)
class Plan:
    """Upper bounds, in seconds: every schedule is counted at the cost of the full network.

    Attributes:
        train_step_s: one fine-tuning step at full depth.
        image_s: sampling one image at full depth.
        decode_s: turning one latent into an image; 0 where the network makes images.
        trial_s: one trial.
        search_s: all of `num_trials`.
        confirm_s: confirmation of the front, its timing included.
        calls_an_image: network calls.
    """

    train_step_s: float
    image_s: float
    decode_s: float
    trial_s: float
    search_s: float
    confirm_s: float
    calls_an_image: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, seconds rounded to milliseconds."""
        return {k: round(v, 3) for k, v in vars(self).items()}


def _decode_s(bench: Workbench) -> float:
    """Seconds to decode one latent, in a batch of the study's after one to warm up."""
    if bench.decoder is None:
        return 0.0
    latents = torch.zeros(bench.batch_size, *bench.data.shape)
    bench.decoder.decode(latents)
    start = time.perf_counter()
    bench.decoder.decode(latents)
    return (time.perf_counter() - start) / bench.batch_size


def make_plan(bench: Workbench) -> Plan:
    """Time a few steps and calls, and multiply."""
    config = bench.config
    steps = bench.diffusion.timesteps(config.sampling.num_steps)
    calls = len(steps) * (2 if config.sampling.cfg_scale != 1 else 1)
    table = bench.latency
    image_s = len(steps) * table.median_ms[-1] / 1000 / bench.batch_size
    decode_s = _decode_s(bench)
    step_s = seconds_per_step(Trainer(bench.backbone, bench.data, bench.diffusion, bench.full, config.train))
    shown_s = image_s + decode_s
    per_trial = config.train.num_steps * step_s + config.evaluation.num_samples * config.evaluation.repeats * shown_s
    confirm = config.confirm
    points = min(confirm.max_points, config.search.num_trials - 1)
    quality = (points + 1) * confirm.num_samples * confirm.repeats * shown_s
    timing = points * 2 * (confirm.time_repeats + 1) * confirm.time_images * image_s
    return Plan(step_s, image_s, decode_s, per_trial, per_trial * config.search.num_trials, quality + timing, calls)
