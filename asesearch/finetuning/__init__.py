"""The ASE loop: one trainer for pretraining, brief and full fine-tuning.

Every random draw of step k follows from (seed, k) alone, so a run that is killed and resumed gives
the same result as one that was not, and a run on several processes sees the same images, timesteps,
noise and exit depths as a run on one. Only what a data source draws for itself (which images are
mirrored, the noise of a latent's posterior) each process draws by a generator of its own.
"""

from asesearch.finetuning.annealing import Depths, PlateauWeight, ema_decay_at, lr_factor
from asesearch.finetuning.batches import Batch, batches, draw_batch, seeded_generator
from asesearch.finetuning.checkpoint import CHECKPOINT
from asesearch.finetuning.fit import check_fit
from asesearch.finetuning.step import make_accelerator, train_alone
from asesearch.finetuning.trainer import Trainer, TrainResult, finetune, seconds_per_step

__all__ = [
    "CHECKPOINT",
    "Batch",
    "Depths",
    "PlateauWeight",
    "TrainResult",
    "Trainer",
    "batches",
    "check_fit",
    "draw_batch",
    "ema_decay_at",
    "finetune",
    "lr_factor",
    "make_accelerator",
    "seconds_per_step",
    "seeded_generator",
    "train_alone",
]
