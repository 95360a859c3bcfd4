"""The sections of a study file, and what each key may be."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from asesearch.config.explaining import BUDGET, NAME, explain
from asesearch.config.names import SamplerName, SolverName
from asesearch.errors import ConfigError
from asesearch.sampler import Sampler

#: Integers that JSON carries exactly; larger ones are slips.
PositiveInt = Annotated[int, Field(gt=0, lt=2**53)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**53)]
#: Of a score, whose every record keeps the value and the first seed of each.
Repeats = Annotated[int, Field(gt=0, le=10_000)]


def _integer(value: object) -> object:
    """What `Literal` leaves out: true and 1.0 equal 1 and are no integers."""
    if type(value) is not int:
        raise ValueError("Input should be a valid integer")
    return value


def _path(text: str) -> str:
    """A path that the system can look at; an empty one would be the working directory."""
    if not text or "\0" in text:
        raise ValueError(
            "should be a path, not empty and without NUL characters: correct it, or leave it out"
        )
    return text


def _budget(text: str) -> str:
    """A time that is one."""
    if not 0 < _seconds(text) < math.inf:
        raise ValueError('should be a finite time above 0, as in "90m" or "1.5h"')
    return text


def _seconds(text: str) -> float:
    return float(text[:-1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[text[-1]]


#: Of a file or folder.
PathText = Annotated[str, AfterValidator(_path)]

#: An array of a study file as a tuple; its entries are as strictly typed as all else.
_Array = Field(strict=False)

#: Names that Windows keeps to itself, with any suffix.
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)

#: Longest study name: folders and files are called after it with something before or behind it,
#: and file systems take 255 bytes.
NAME_LENGTH = 200


def _file_name(name: str) -> str:
    """A study's name, if folders can be called after it everywhere."""
    if len(name) > NAME_LENGTH:
        raise ValueError(
            f"folders are called after it, so it has at most {NAME_LENGTH} characters; this one "
            f"has {len(name)}: shorten it"
        )
    if RESERVED.fullmatch(name) or name.endswith("."):
        raise ValueError(
            "folders are called after it, and Windows takes neither this name nor a point at the "
            "end: choose another"
        )
    return name


class _Section(BaseModel):
    """Strictly typed: true is no number, "10" no integer, 1.0 no integer; an integer is a float.

    Raises:
        ConfigError: an unknown key or a value out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self).__name__)) from error

    # a table within another is made without it, so that the errors of a file are told at once
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


Section = TypeVar("Section", bound=BaseModel)


class LossWeight(_Section):
    """λ(t): raised on the shortened intervals until their loss levels off, then 1.

    The paper says that λ(t) is larger on the noise side and returns to 1 once progress levels off,
    and gives no values (the released code uses 1 throughout). Ours: with d(t) the fraction of
    blocks dropped at t, `dropped`: λ = 1 + (peak - 1) · d(t) / max d; `step`: λ = peak wherever a
    block is dropped; `none`: λ = 1. λ returns to 1 for good when the loss on the shortened
    intervals, averaged over `window` steps, has improved by less than the fraction `tolerance` on
    the `window` before, or after `max_steps`.
    """

    shape: Literal["dropped", "step", "none"] = "dropped"
    peak: float = Field(default=2.0, ge=1.0)
    window: PositiveInt = 50
    tolerance: NonNegativeFloat = 0.01
    max_steps: PositiveInt | None = None


class TrainConfig(_Section):
    """One training run: from scratch, a brief fine-tuning, or a full one.

    `min_snr_gamma` weights the loss of the predicted noise by min(SNR, γ) / SNR, so that timesteps
    near data, which are many times as easy, don't outweigh the others (Hang et al. 2023).
    `truncated_snr` weights it by max(1, 1 / SNR), so that near noise it is the error of the clean
    image that counts (Salimans & Ho 2022). There the prediction is divided by a small alpha, and
    the solver's first steps take over errors that the loss of the noise does not show.
    """

    num_steps: NonNegativeInt = 200
    batch_size: PositiveInt = 64
    lr: PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    grad_clip: PositiveFloat | None = 1.0
    ema_decay: float = Field(default=0.999, ge=0.0, lt=1.0)
    freeze_time_embedder: bool = False
    class_dropout_prob: float = Field(default=0.1, ge=0.0, le=1.0)
    min_snr_gamma: PositiveFloat | None = None
    truncated_snr: bool = False
    loss_weight: LossWeight = LossWeight()
    distill_frac: float = Field(default=0.0, ge=0.0, le=1.0)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool = False
    checkpoint_every: PositiveInt = 500
    seed: NonNegativeInt = 0

    @property
    def result_fields(self) -> dict[str, Any]:
        """What the weights that it gives depend on, as plain data; without what releases before
        `truncated_snr` did not know, where it is off."""
        data = self.model_dump(mode="json", exclude={"checkpoint_every", "compile"})
        return {k: v for k, v in data.items() if k != "truncated_snr" or v}


class ElasticConfig(TrainConfig):
    """The elastic warm-up: one fine-tuning in which every sample draws its own exit depth, so that
    one network serves every schedule. Done once per study; all trials start from its weights.

    `depth_distribution`: `uniform` draws depths evenly at every noise level; `noise-easy` deeper
    near data and shallower near noise, as the schedules it will serve: with u uniform and τ = t /
    T, min + (depth - min + 1) u^(1/2 + 3τ/2), rounded down. `full_frac` of the samples run all
    blocks whatever the distribution, so that the full network is not forgotten. Where
    `search.full_depth` is `pretrained` nothing can be forgotten, and they keep the weights of deep
    exits near the pretrained ones.
    """

    num_steps: PositiveInt = 500
    depth_distribution: Literal["uniform", "noise-easy"] = "uniform"
    full_frac: float = Field(default=0.5, ge=0.0, le=1.0)

    @model_validator(mode="before")
    @classmethod
    def _earlier_names(cls, data: Any) -> Any:
        """Read `depth_law`, the name of `depth_distribution` in earlier releases."""
        if isinstance(data, dict) and "depth_law" in data and "depth_distribution" not in data:
            return {"depth_distribution" if k == "depth_law" else k: v for k, v in data.items()}
        return data


class MapConfig(_Section):
    """The difficulty map: the error of every exit depth in `num_bins` equal noise levels, on
    `num_images` images each.

    `data` holds the images; give some that the network is not fine-tuned on. By default the study's
    own.
    """

    num_bins: PositiveInt = 20
    num_images: int = Field(default=128, ge=2, lt=2**53)
    seed: NonNegativeInt = 0
    data: DataConfig | None = None


class PromotionConfig(_Section):
    """Cheap evaluation first: which schedules are worth their brief fine-tuning.

    A schedule is sampled with the elastic weights, `repeats` times `num_samples` images, and is
    fine-tuned if it belongs to the front with a probability of at least `threshold`, judged by all
    scores so far and their spread.

    `metric`: `auto` is the evaluation's own where it exists: the Fréchet distance needs more images
    than the extractor has features, and for fewer it is taken in principal components of the
    reference (`frechet-pca`), a quarter as many as images.

    The `difficulty` proposer begins with an exploration phase: its first `explore` proposals (never
    more than half of `num_trials`) follow the front of low-fidelity scores and are not fine-tuned
    yet; the best of them may come again. Of those that follow, the first `always` are fine-tuned
    whatever their low-fidelity score, so that there is something to judge by.
    """

    metric: Literal["auto", "frechet", "kid", "frechet-pca"] = "auto"
    num_samples: int = Field(default=200, ge=2, lt=2**53)
    repeats: Repeats = 2
    threshold: float = Field(default=0.3, ge=0.0, le=1.0)
    always: NonNegativeInt = 1
    explore: NonNegativeInt = 8


class BackboneConfig(_Section):
    """The network: `kind` and either a preset, constructor `args`, or both; weights from
    `checkpoint`.

    `checkpoint` is a path, or `shipped:NAME` for a network that travels in the package. Without one
    the network starts from random weights, which only `asesearch train` and `asesearch map` allow.
    """

    kind: Literal["dit", "uvit", "diffusers"] = "dit"
    preset: str | None = None
    args: dict[str, Any] = {}
    checkpoint: PathText | None = None


class DiffusionConfig(_Section):
    """The forward process the network was trained with."""

    process: Literal["discrete", "vp-sde"] = "discrete"
    beta_schedule: Literal["linear", "scaled_linear"] = "linear"
    num_train_timesteps: int = Field(default=1000, ge=1, le=1_000_000)


class DataConfig(_Section):
    """A data set. `path` is relative to the working directory.

    `image_size` and `channels` say how an image folder's files are read: centre-cropped to a square
    of image_size pixels, as grey (1) or colour (3). `classes` says which of the network's classes
    each class folder is: folder names in order of class index, or a table of name = index; it takes
    the place of `classes.json` in the folder. `skip_damaged` checks all images and leaves out those
    that are damaged. `num_workers` processes read the images ahead; with 0 a thread does. `vae` is
    for latents: the folder of the AutoencoderKL that turns generated latents into images, which
    evaluation needs.
    """

    kind: Literal["fashion-mnist", "image-folder", "latents"]
    path: PathText | None = None
    vae: PathText | None = None
    split: Literal["train", "test"] = "train"
    image_size: PositiveInt | None = None
    channels: Annotated[Literal[1, 3], BeforeValidator(_integer)] = 3
    flip: bool = False
    classes: Annotated[tuple[str, ...], _Array] | dict[str, int] | None = None
    skip_damaged: bool = False
    num_workers: NonNegativeInt = 0
    download: bool = False


#: The kinds of data that a setting is for; those not named are for all.
KINDS = {
    "vae": ("latents",),
    "split": ("fashion-mnist",),
    "download": ("fashion-mnist",),
    "image_size": ("image-folder",),
    "channels": ("image-folder",),
    "flip": ("image-folder", "latents"),
    "classes": ("image-folder",),
    "skip_damaged": ("image-folder",),
    "num_workers": ("image-folder",),
}


class SamplingConfig(_Section):
    """How images are made: solver, steps, guidance (1 = none), images per batch, and arithmetic.

    `solver` may name the spacing of its timesteps: `ddim-power1.5` has t grow with the 1.5th power
    of the step's number, `-quadratic` with its square.

    `precision`: the network's matrix products and convolutions in float32, in a GPU's TF32, several
    times faster (elsewhere float32), as the official DiT code samples, or in bfloat16. `compile`
    runs the network's blocks as compiled code: latency and measured time are those of compiled
    blocks.
    """

    solver: SolverName = "ddim"
    num_steps: PositiveInt = 50
    cfg_scale: NonNegativeFloat = 1.0
    batch_size: PositiveInt = 100
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    compile: bool = False

    @property
    def sampler(self) -> Sampler:
        """Solver and number of steps."""
        return Sampler(self.solver, self.num_steps)

    def under(self, sampler: Sampler) -> SamplingConfig:
        """The same with another solver and number of steps."""
        return self.model_copy(update={"solver": sampler.solver, "num_steps": sampler.num_steps})


class EvaluationConfig(_Section):
    """The quality protocol: scores are compared only where all of it is equal.

    Each of `repeats` sets of `num_samples` images has its own seeds, so the spread over repeats is
    the metric's noise. The reference is `reference` (by default the training data).
    """

    metric: Literal["frechet", "kid"] = "frechet"
    extractor: str = "inception-v3-compat"
    extractor_weights: PathText | None = None
    num_samples: int = Field(default=5000, ge=2, lt=2**53)
    repeats: Repeats = 1
    seed: NonNegativeInt = 0
    reference: DataConfig | None = None


class ConfirmConfig(_Section):
    """The front again, on seeds no trial has seen, with the real whole-sampling time against the
    full network.

    At most `max_points` points, spread evenly over the front. `time_images` images are sampled by
    the point and the full network in turn, `time_repeats` times each.

    Each point and the full network are fine-tuned under `training_seeds` seeds in all, the search's
    among them, and each network is scored on the same images: how far a score moves when it is
    trained again, beside how far it moves when it is sampled again. `also` names further feature
    extractors that score the same images, or is a table of name = file with its weights.
    """

    max_points: PositiveInt = 8
    num_samples: int = Field(default=5000, ge=2, lt=2**53)
    repeats: Repeats = 3
    training_seeds: PositiveInt = 1
    also: Annotated[tuple[str, ...], _Array] | dict[str, PathText] = ()
    time_images: PositiveInt = 64
    time_repeats: PositiveInt = 5


class SearchConfig(_Section):
    """Where schedules come from, and how many.

    `cost` is the second objective, as a fraction of the full network's: `time` (latency measured
    once per study), or `flops` (the same on every run, so that a study repeats trial by trial).
    `interval_power` makes a schedule's intervals unequal: interval i ends at
    num_train_timesteps·(i/num_intervals)^interval_power, so that 2 gives each call of a quadratic
    grid an interval of its own. `samplers` are other ways to sample that compete with the schedules
    on one front, as "SOLVER-STEPS" ("ddim-10") or "SOLVER-STEPS+ACCELERATION": each trial has one
    of them or the study's own. Time is counted over the full network's under the study's own.
    `budget` ("90m", "2h", "1d") ends the search when the
    wall time in which any worker was at work, and what is still to be confirmed, reach it.
    `full_depth`: whose weights make a schedule's calls at full depth: the `tuned` ones, as all
    others, or the `pretrained` ones. Then fine-tuning goes to the early exits alone and takes
    nothing from the other calls, for the memory of the weights that early exits use; the full
    network, which all is compared with, is the pretrained one as it is.
    `proposer`: `difficulty` (ours) needs the difficulty map, which is measured once per study; the
    others are Optuna's.
    """

    proposer: Literal["difficulty", "tpe", "nsga2", "gp", "random"] = "tpe"
    num_trials: PositiveInt = 20
    budget: Annotated[str, Field(pattern=BUDGET), AfterValidator(_budget)] | None = None
    num_intervals: int = Field(default=10, ge=1, lt=2**53)
    interval_power: float = Field(default=1.0, ge=0.1, le=4.0)
    noise_easy: bool = True
    min_exit_depth: PositiveInt | None = None
    full_depth: Literal["tuned", "pretrained"] = "tuned"
    warm_start: Annotated[tuple[str, ...], _Array] = ("full",)
    samplers: Annotated[tuple[SamplerName, ...], _Array] = ()
    cost: Literal["time", "flops"] = "time"
    seed: NonNegativeInt = 0
    storage: str | None = None
    keep_weights: Literal["all", "front"] = "front"

    @property
    def own_exits(self) -> bool:
        """Whether early exits have weights of their own beside the pretrained ones."""
        return self.full_depth == "pretrained"

    @property
    def budget_s(self) -> float | None:
        """`budget` in seconds."""
        return None if self.budget is None else _seconds(self.budget)


class StudyConfig(_Section):
    """A whole experiment: `studies/NAME.toml`. Sections that a command does not use may be left
    out."""

    name: Annotated[str, Field(pattern=NAME), AfterValidator(_file_name)]
    backbone: BackboneConfig
    data: DataConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    train: TrainConfig = TrainConfig()
    elastic: ElasticConfig | None = None
    map: MapConfig = MapConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    search: SearchConfig = SearchConfig()
    promotion: PromotionConfig | None = None
    confirm: ConfirmConfig = ConfirmConfig()

    def with_options(self, section: str, **options: Any) -> StudyConfig:
        """The study with a section's fields replaced by those options of a command line that are
        not None.

        Raises:
            ConfigError: a value out of range.
        """
        given = {k: v for k, v in options.items() if v is not None}
        own = getattr(self, section)
        try:
            return self.model_copy(
                update={section: type(own).model_validate({**own.model_dump(), **given})}
            )
        except ValidationError as error:
            raise ConfigError(explain(error, f"options for {section}")) from error

    @property
    def samplers(self) -> tuple[Sampler, ...]:
        """The study's own sampler, and then the others that compete on its front."""
        others = map(Sampler.from_string, self.search.samplers)
        return tuple(dict.fromkeys((self.sampling.sampler, *others)))

    def shareable(self) -> dict[str, Any]:
        """Plain data for what leaves this machine: without the storage, whose URL may hold a
        password."""
        return self.model_dump(mode="json", exclude={"search": {"storage"}})
