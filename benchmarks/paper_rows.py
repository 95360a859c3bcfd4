"""What each of the paper's figures and tables consists of, as rows to be measured by `paper.py`.

A row is a schedule under a sampler with the recipe of its weights. Which rows an experiment has
follows from the depth of the network alone, so that a page can show what is not measured yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import ValidationError

from asesearch.config.sections import SearchConfig
from asesearch.errors import ConfigError
from asesearch.sampler import Sampler
from asesearch.schedule import ExitSchedule

#: Published schedules by kind of network, and the two that stand for them.
PUBLISHED = {
    "dit": ("D2-DiT", "D3-DiT", "D4-DiT", "D7-DiT"),
    "uvit": ("D1-U-ViT", "D2-U-ViT", "D3-U-ViT", "D6-U-ViT"),
}
TYPICAL = {"dit": ("D3-DiT", "D7-DiT"), "uvit": ("D1-U-ViT", "D3-U-ViT")}
DDIM = "ddim-50"
DPM = "dpm++2m-50"
#: The columns of `pay`.
PAY = (
    "ddpm-250",
    "ddim-50",
    "ddim-25",
    "dpm++2m-20",
    "dpm++2m-10",
    "unipc-quadratic-10",
    "unipc-quadratic-6",
)
#: Those of `figure4`.
CURVES = tuple(
    f"{solver}-{count}"
    for solver in ("ddim", "ddpm", "dpm++2m")
    for count in (10, 15, 20, 25, 50, 100, 200)
)
#: The paper's equal-budget shapes of a network of six decoder blocks, data side first.
SHAPES = ("6655442211", "6655441122", "6655112244", "6611224455")
#: Tenths of t that are light, one at a time, and the share of the blocks that run there.
MIXED = (1, 3, 5, 7, 9)
LIGHT = 1 / 3
THRESHOLDS = ("0.05", "0.1", "0.2", "0.3")
#: Behind a sampler's name: methods that need no schedule. What a sampler refuses is left out.
ADDED = {
    "cache": (
        *(f"+cache-{part}-{x}" for part in ("attn", "mlp", "block") for x in THRESHOLDS),
        *(f"+cache-{part}-adjusted-{x}" for part in ("attn", "block") for x in THRESHOLDS[1:3]),
    ),
    "merge": ("+merge-0.1", "+merge-0.2", "+merge-0.4"),
    "deediff": tuple(f"+deediff-{x}" for x in ("0.02", "0.05", "0.1", "0.15")),
}
PRETRAINED = "pretrained"  # recipe: the network as it is
OWN = "own"  # recipe: `Trials.tuning`, which for the full network is equal-compute fine-tuning
#: Recipe: `OWN`, and the pretrained network in all calls at full depth: two sets of weights.
JOINED = "pretrained at full depth"
EXPERTS = "experts"  # recipe: a network of its own for each tenth of t, in equal compute

#: Changes of `OWN`, each alone. `times` is of the number of steps; `start` of the weights.
RECIPES: dict[str, dict[str, Any]] = {
    OWN: {},
    "EMA 0.9": {"ema_decay": 0.9},  # the ramp of a brief fine-tuning makes all above 0.96 one
    "λ by blocks dropped, peak 2": {"loss_weight": {"shape": "dropped", "peak": 2.0}},
    "λ by blocks dropped, peak 5": {"loss_weight": {"shape": "dropped", "peak": 5.0}},
    "λ in a step, peak 2": {"loss_weight": {"shape": "step", "peak": 2.0}},
    "half distilled": {"distill_frac": 0.5},
    "noise targets": {"distill_frac": 0.0},
    "no own steps": {"times": 0.0},
    "a quarter of the steps": {"times": 0.25},
    "four times the steps": {"times": 4.0},
    "time embedder frozen": {"freeze_time_embedder": True},
    "no warm-up, equal compute": {"start": PRETRAINED},
}


@dataclass(frozen=True)
class Row:
    """What is measured.

    Attributes:
        method: "full", "exits", "joined", "static", "data-easy", "steps", "cache", …
        label: what a page calls it.
        schedule: as `str` of an `ExitSchedule` writes it.
        sampler: as `str` of a `Sampler` writes it.
        against: sampler of the full network over whose costs its own are counted.
        recipe: how its weights are made: `PRETRAINED`, `JOINED`, `EXPERTS` or a key of
            `RECIPES`.
        stage: "pick" for candidates on few images, "confirm" for all else.
    """

    method: str
    label: str
    schedule: str
    sampler: str
    against: str
    recipe: str = OWN
    stage: str = "confirm"

    @property
    def trained(self) -> bool:
        """Whether training it again gives other weights."""
        return self.recipe != PRETRAINED

    def to_dict(self) -> dict[str, str]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Choice:
    """What a call chooses of an experiment.

    Attributes:
        depth: blocks of the network that may be dropped.
        samplers: in place of the experiment's own; empty keeps those.
        schedules: further exit schedules, searched ones for example.
        rivals_from: recipe of the full network that training-free methods run on.
        equal_compute: whether the full network is also fine-tuned for as much as the others.
        published: whether `pay` and `figure4` take other schedules than the further ones.
        caches: what `pay` tries of `ADDED["cache"]`.
        fewer: numbers of steps that `pay` measures the full network in, besides.
        kind: of the network, "dit" or "uvit".
        joined: whether `JOINED` makes other weights than `OWN`, as it does where a schedule's own
            make all its calls.
    """

    depth: int = 18
    samplers: tuple[str, ...] = ()
    schedules: tuple[str, ...] = ()
    rivals_from: str = PRETRAINED
    equal_compute: bool = True
    published: bool = True
    caches: tuple[str, ...] = ADDED["cache"]
    fewer: tuple[int, ...] = ()
    kind: str = "dit"
    joined: bool = True

    @property
    def fixed_blocks(self) -> int:
        """Blocks that always run: of a U-ViT as many as may be dropped, and the one between."""
        return self.depth + 1 if self.kind == "uvit" else 0

    @property
    def names(self) -> tuple[str, ...]:
        """The published schedules of the kind of network."""
        return PUBLISHED[self.kind]

    @property
    def typical(self) -> tuple[str, ...]:
        """A moderate one of them, and a deep one."""
        return TYPICAL[self.kind]

    def read(self, text: str) -> ExitSchedule:
        """A schedule by name or depths."""
        return ExitSchedule.from_string(text, self.depth)


def offered(name: str) -> bool:
    """Whether this release has a sampler of that name."""
    try:
        return str(Sampler.from_string(name)) in SearchConfig(samplers=(name,)).samplers
    except (ConfigError, ValidationError):
        return False


def full_rows(sampler: str, choice: Choice) -> Iterator[Row]:
    """The full network as it is, and after equal-compute fine-tuning."""
    full = str(choice.read("full"))
    yield Row("full", "full, as it is", full, sampler, sampler, PRETRAINED)
    if choice.equal_compute:
        yield Row("full", "full, equal compute", full, sampler, sampler, OWN)


def static_depth(schedule: ExitSchedule) -> ExitSchedule:
    """One depth everywhere, of as many blocks as the schedule runs, to the nearest."""
    count = max(1, round(schedule.depth * schedule.block_frac()))
    return ExitSchedule.uniform_intervals([count], schedule.depth)


def data_easy(schedule: ExitSchedule) -> ExitSchedule:
    """The schedule with data and noise exchanged."""
    return ExitSchedule.uniform_intervals(schedule.exit_depths[::-1], schedule.depth)


def exit_rows(sampler: str, choice: Choice, method: str = "exits") -> Iterator[Row]:
    """The published schedules and the further ones, as `OWN` or as `JOINED` makes their weights."""
    for name in (*choice.names, *choice.schedules):
        schedule = str(choice.read(name))
        if method == "joined":
            yield Row(method, f"{name}, joined", schedule, sampler, sampler, JOINED)
        else:
            yield Row(method, name, schedule, sampler, sampler)


def added_rows(method: str, sampler: str, choice: Choice, schedule: str = "full") -> Iterator[Row]:
    """Methods that are part of a sampler's name, on the full network or under a schedule."""
    exits = schedule != "full"
    for suffix in choice.caches if method == "cache" else ADDED[method]:
        if offered(sampler + suffix):
            label = suffix.removeprefix("+")
            yield Row(
                f"exits+{method}" if exits else method,
                f"{schedule}, {label}" if exits else label,
                str(choice.read(schedule)),
                sampler + suffix,
                sampler,
                OWN if exits else choice.rivals_from,
            )


def figure1(choice: Choice) -> Iterator[Row]:
    """Noise-easy against data-easy at equal blocks."""
    for sampler in choice.samplers or (DDIM,):
        yield from full_rows(sampler, choice)
        for name in choice.typical:
            yield from shaped_rows(name, sampler, choice)


def shaped_rows(name: str, sampler: str, choice: Choice) -> Iterator[Row]:
    """A schedule, its reverse, and one depth everywhere."""
    schedule = choice.read(name)
    turned = str(data_easy(schedule))
    flat = static_depth(schedule)
    yield Row("exits", name, str(schedule), sampler, sampler)
    yield Row("data-easy", f"{name} reversed", turned, sampler, sampler)
    yield Row("static", f"{flat} of {choice.depth} blocks", str(flat), sampler, sampler)


def figure3(choice: Choice) -> Iterator[Row]:
    """Score against time saved, all methods."""
    for sampler in choice.samplers or (DDIM, DPM):
        yield from full_rows(sampler, choice)
        yield from exit_rows(sampler, choice)
        yield from exit_rows(sampler, choice, "joined") if choice.joined else ()
        yield from step_rows(sampler, choice)
        for method in ADDED:
            yield from added_rows(method, sampler, choice)
        for name in choice.names:
            yield from list(shaped_rows(name, sampler, choice))[1:]


def step_rows(sampler: str, choice: Choice) -> Iterator[Row]:
    """The full network in fewer steps: as many calls as a published schedule's blocks pay for,
    and half."""
    steps = Sampler.from_string(sampler).num_steps
    shares = [choice.read(name).block_frac(None, choice.fixed_blocks) for name in choice.names]
    counts = dict.fromkeys(max(1, round(steps * share)) for share in (*shares, 0.5))
    yield from rows_of_steps(sampler, choice, counts)


def rows_of_steps(sampler: str, choice: Choice, counts: Iterable[int]) -> Iterator[Row]:
    """The full network in so many steps."""
    own = Sampler.from_string(sampler)
    for count in counts:
        few = str(Sampler(own.solver, count))
        full = str(choice.read("full"))
        yield Row("steps", f"{count} steps", full, few, sampler, choice.rivals_from)


def figure4(choice: Choice) -> Iterator[Row]:
    """One schedule at many numbers of steps."""
    for sampler in choice.samplers or CURVES:
        yield from full_rows(sampler, choice)
        for name in (*(choice.typical[:1] if choice.published else ()), *choice.schedules):
            yield Row("exits", name, str(choice.read(name)), sampler, sampler)


def table3(choice: Choice) -> Iterator[Row]:
    """Equal-budget shapes."""
    for sampler in choice.samplers or ("dpm++2m-25", DPM):
        yield from full_rows(sampler, choice)
        for shape in SHAPES:
            own = ExitSchedule.uniform_intervals([int(d) for d in shape], 6)
            yield Row("shape", shape, str(own.rescaled(choice.depth)), sampler, sampler)


def table4(choice: Choice) -> Iterator[Row]:
    """One light interval only, one expert per interval, and further training."""
    light = max(1, round(choice.depth * LIGHT))
    for sampler in choice.samplers or ("dpm++2m-25", DPM):
        yield from full_rows(sampler, choice)
        for k in MIXED:
            depths = [choice.depth] * 10
            depths[k] = light
            schedule = ExitSchedule.uniform_intervals(depths, choice.depth)
            yield Row("mixed", f"Mixed-{k}", str(schedule), sampler, sampler)
        full = str(choice.read("full"))
        yield Row("experts", "one expert per tenth", full, sampler, sampler, EXPERTS)


def ablations(choice: Choice) -> Iterator[Row]:
    """A published schedule with one part of its recipe changed."""
    for sampler in choice.samplers or (DDIM,):
        yield from full_rows(sampler, choice)
        name = choice.typical[0]
        schedule = str(choice.read(name))
        for recipe in (*RECIPES, *([JOINED] if choice.joined else [])):
            method = {OWN: "exits", JOINED: "joined"}.get(recipe, "ablation")
            label = name if recipe == OWN else recipe
            yield Row(method, label, schedule, sampler, sampler, recipe)


#: Experiments whose rows are known beforehand; `pay` picks its own, see `paper.py`.
FIXED: dict[str, Callable[[Choice], Iterator[Row]]] = {
    "figure1": figure1,
    "figure3": figure3,
    "figure4": figure4,
    "table3": table3,
    "table4": table4,
    "ablations": ablations,
}
EXPERIMENTS = (*FIXED, "pay")


# -- pay -----------------------------------------------------------------------------------------

Found = Callable[[Row], tuple[float, float]]  # score and relative FLOPs of a row that is measured


def candidate(row: Row) -> Row:
    """The row on the few images that candidates are picked by."""
    return replace(row, stage="pick")


def confirmed(row: Row) -> Row:
    """The row on fresh seeds, as all else is measured."""
    return replace(row, stage="confirm")


def best(rows: Iterable[Row], found: Found, limit: float) -> Row | None:
    """The cheapest row whose score is within the limit; if there is none, the one with the lowest
    score."""
    rows = list(rows)
    if len(rows) == 1:  # nothing to pick
        return rows[0]
    good = [row for row in rows if found(row)[0] <= limit]
    if good:
        return min(good, key=lambda row: found(row)[::-1])
    return min(rows, key=found, default=None)


def pay(choice: Choice, found: Found, tolerance: float) -> Iterator[Row]:
    """Do exits still pay? For each sampler the full network, the best exits, the best cache, exits
    with a cache, and fewer steps.

    Candidates are measured first, where there are several; a row that has been given is measured
    before the next is asked for. The best are measured again on fresh seeds.

    Args:
        choice: see `Choice`; a cache runs on the full network that scores better.
        found: what a candidate was measured to be.
        tolerance: how far above the full network's score a candidate may be, as a fraction.
    """
    for sampler in choice.samplers or PAY:
        full = list(map(candidate, full_rows(sampler, choice)))
        exits = list(map(candidate, pay_exits(sampler, choice)))
        yield from full
        yield from exits if len(exits) > 1 else ()
        reference = min(full, key=found)
        limit = (1 + tolerance) * found(reference)[0]
        better = replace(choice, rivals_from=reference.recipe)
        caches = list(map(candidate, added_rows("cache", sampler, better)))
        yield from caches if len(caches) > 1 else ()
        chosen = best(exits, found, limit)
        assert chosen is not None
        both = list(map(candidate, added_rows("cache", sampler, choice, chosen.label)))
        yield from both if len(both) > 1 else ()
        picked = (chosen, best(caches, found, limit), best(both, found, limit))
        yield from map(confirmed, (*full, *(row for row in picked if row is not None)))
        yield from rows_of_steps(sampler, better, choice.fewer)


def pay_exits(sampler: str, choice: Choice) -> Iterator[Row]:
    """Candidates: the published and further schedules, and one depth everywhere, which drops least
    where all calls are near data; or the further schedules alone."""
    if not choice.published:
        for text in choice.schedules:
            yield Row("exits", text, str(choice.read(text)), sampler, sampler)
        return
    yield from exit_rows(sampler, choice)
    for count in (choice.depth - 2, choice.depth - 4, choice.depth - 6):
        flat = str(ExitSchedule.uniform_intervals([max(1, count)], choice.depth))
        yield Row("exits", flat, flat, sampler, sampler)
