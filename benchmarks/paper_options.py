"""The command line of `paper.py`, and the study that it comes to."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from measuring import LEAST, add_full_depth, wake
from paper_rows import EXPERIMENTS, FIXED, OWN, PAY, PRETRAINED, Choice, offered, rows_of_steps

from asesearch.backbones import save_backbone
from asesearch.backbones.checkpoints import inspect_checkpoint, load_backbone
from asesearch.config import BackboneConfig, StudyConfig, parse_study, read_toml
from asesearch.errors import ConfigError
from asesearch.sampler import Sampler

ABOUT = "The paper's figures and tables, row by row, under one protocol, with the cost of training."
NETWORKS = {"dit": "shipped:fashion-mnist-dit-18", "uvit": "shipped:fashion-mnist-uvit"}
#: Own steps, as `recipes.py` has them; what the command line says comes on top.
TRAIN: dict[str, Any] = {
    "warmup_steps": 10,
    "ema_decay": 0.98,
    "min_snr_gamma": 5.0,
    "distill_frac": 1.0,
    "loss_weight": {"shape": "none"},
    "checkpoint_every": 100,
}
TINY = {
    "num_samples": 70,
    "repeats": 2,
    "pick_samples": 70,
    "own_steps": 1,
    "own_batch": 8,
    "time_images": 2,
    "time_repeats": 1,
    "elastic_steps": 9,
    "elastic_batch": 8,
    "split": "test",
}
TINY_SHAPES = {
    "dit": {"hidden_size": 8, "num_heads": 1, "patch_size": 14},
    "uvit": {"embed_dim": 8, "num_heads": 1, "patch_size": 14},
}


def depth_of(args: argparse.Namespace) -> int:
    """Blocks of the network that may be dropped."""
    return load_backbone(BackboneConfig(kind=args.kind, checkpoint=args.network)).depth


def samplers_of(args: argparse.Namespace, choice: Choice) -> list[str]:
    """All samplers of an experiment, by name.

    Raises:
        ConfigError: one that this release does not have.
    """
    for name in choice.samplers:
        if not offered(name):
            raise ConfigError(
                f'--samplers are written SOLVER-STEPS; got {name!r}; write for example "ddim-50"'
            )
    if args.experiment in FIXED:
        rows = FIXED[args.experiment](choice)
        return list(dict.fromkeys(name for row in rows for name in (row.against, row.sampler)))
    added = ("", *choice.caches)
    bases = choice.samplers or PAY
    names = [base + suffix for base in bases for suffix in added]
    few = [row.sampler for base in bases for row in rows_of_steps(base, choice, choice.fewer)]
    return list(dict.fromkeys(filter(offered, (*names, *few))))


def study_of(args: argparse.Namespace, samplers: list[str]) -> StudyConfig:
    """The study whose parts an experiment uses."""
    first = Sampler.from_string(samplers[0])
    images = args.elastic_steps * args.elastic_batch
    tuning = {
        **TRAIN,
        "batch_size": args.own_batch,
        "lr": args.own_lr,
        "mixed_precision": args.mixed_precision,
        "compile": args.compile,
    }
    warm_up = {
        "num_steps": max(1, round(images / args.own_batch)),  # the same images in own batches
        "full_frac": args.elastic_full_frac,
        "depth_distribution": "noise-easy",
    }
    return parse_study(
        {
            "name": "paper",
            "backbone": {"kind": args.kind, "checkpoint": args.network},
            "data": {"kind": "fashion-mnist", "split": args.split},
            "train": {**tuning, "num_steps": args.own_steps},
            "elastic": {**tuning, **warm_up},
            "sampling": {
                "solver": first.solver,
                "num_steps": first.num_steps,
                "batch_size": args.sample_batch,
                "precision": args.precision,
                "compile": args.compile_sampling,
            },
            "evaluation": {
                "extractor": "fashion-cnn",
                "num_samples": args.pick_samples,
                "reference": {"kind": "fashion-mnist", "split": "train"},
            },
            "confirm": {"num_samples": args.num_samples, "repeats": args.repeats},
            "search": {
                "samplers": samplers[1:],
                "cost": "flops",
                "min_exit_depth": args.elastic_min_exit_depth,
                "full_depth": args.full_depth,
            },
        },
        "paper",
    )


def options() -> argparse.ArgumentParser:
    """What the command line takes."""
    parser = argparse.ArgumentParser(description=ABOUT)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument(
        "--study",
        type=Path,
        help="TOML file of further options, for all experiments and in a table of its own for "
        "each; the command line overrides them",
    )
    parser.add_argument("--kind", choices=NETWORKS, default="dit", help="of network")
    parser.add_argument(
        "--network", help="pretrained weights (default: the shipped ones of 18 blocks)"
    )
    parser.add_argument(
        "--elastic", type=Path, help="weights of the warm-up, as recipes.py --keep writes them"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of rows and networks")
    parser.add_argument(
        "--num-samples", type=int, default=5000, help="images a seed set (default %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="seed sets (default %(default)s)")
    parser.add_argument(
        "--training-seeds", type=int, default=1, help="of own steps (default %(default)s)"
    )
    parser.add_argument("--pick-samples", type=int, default=1000, help="images that `pay` picks by")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="`pay`: how much worse a pick may score"
    )
    parser.add_argument(
        "--samplers", nargs="*", default=[], help="in place of the experiment's own"
    )
    parser.add_argument(
        "--methods",
        nargs="*",
        default=[],
        help="measure these alone: full, exits, steps, cache, … or a row by its label",
    )
    parser.add_argument(
        "--schedules", nargs="*", default=[], help="further exit schedules, each in quotes"
    )
    parser.add_argument(
        "--rivals-from",
        choices=[PRETRAINED, OWN],
        default=PRETRAINED,
        help="full network of "
        "methods without training: as it is, or after equal-compute fine-tuning",
    )
    parser.add_argument(
        "--no-equal-compute",
        action="store_true",
        help="leave the fine-tuned full network for later; the page says that it is not measured",
    )
    parser.add_argument(
        "--no-published",
        action="store_true",
        help="`pay` and `figure4`: take the schedules of --schedules alone",
    )
    parser.add_argument(
        "--caches",
        nargs="*",
        default=[],
        help="try these alone, for example block-0.05 block-adjusted-0.1",
    )
    parser.add_argument(
        "--fewer",
        nargs="*",
        type=int,
        default=[],
        help="`pay`: numbers of steps to measure the full network in, besides",
    )
    add_full_depth(parser)
    parser.add_argument(
        "--own-steps", type=int, default=200, help="of a schedule (default %(default)s)"
    )
    parser.add_argument(
        "--own-batch", type=int, default=128, help="images a step (default %(default)s)"
    )
    parser.add_argument(
        "--own-lr", type=float, default=6e-4, help="learning rate (default %(default)s)"
    )
    parser.add_argument(
        "--elastic-steps", type=int, help="of the warm-up, where its weights do not tell"
    )
    parser.add_argument("--elastic-batch", type=int, help="images a step of the warm-up, likewise")
    parser.add_argument("--elastic-full-frac", type=float, help="its share at full depth, likewise")
    parser.add_argument(
        "--elastic-min-exit-depth", type=int, help="fewest blocks that it draws, likewise"
    )
    parser.add_argument(
        "--elastic-seconds", type=float, help="what it took, likewise; unknown if not given"
    )
    parser.add_argument("--time-images", type=int, default=64, help="images of a timed sampling")
    parser.add_argument(
        "--time-repeats", type=int, default=5, help="timed pairs (default %(default)s)"
    )
    parser.add_argument(
        "--untimed",
        action="store_true",
        help="leave times for a later call without it, alone on the machine",
    )
    parser.add_argument(
        "--sample-batch", type=int, default=100, help="images at a time (default %(default)s)"
    )
    parser.add_argument("--precision", choices=["float32", "tf32", "bf16"], default="float32")
    parser.add_argument(
        "--mixed-precision", choices=["no", "bf16"], default="no", help="of own steps"
    )
    parser.add_argument("--compile", action="store_true", help="the blocks in own steps")
    parser.add_argument(
        "--compile-sampling", action="store_true", help="the blocks in sampling; no caches then"
    )
    parser.add_argument(
        "--split", choices=["train", "test"], default="train", help="images to fine-tune on"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny network, to see that the script runs"
    )
    return parser


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with what its study file says where it says nothing.

    Raises:
        ConfigError: a file that cannot be read, or has a key that is no option.
        SystemExit: an option or a value that there is not, as argparse says it.
    """
    parser = options()
    args = parser.parse_args(argv)
    if args.study is not None:
        told = study_options(args.study, args.experiment)
        words = [word for name, value in told.items() for word in words_of(name, value)]
        read = parser.parse_args([args.experiment, *words, "--out", str(args.out)])
        parser.set_defaults(**{name: getattr(read, name) for name in told})
        args = parser.parse_args(argv)
    return args


def study_options(path: Path, experiment: str) -> dict[str, Any]:
    """Options of an experiment in a study file: those of all, and over them those of its table."""
    known = {action.dest for action in options()._actions if action.option_strings}
    known -= {"help", "out", "study"}
    found = read_toml(path)
    tables = {name: found.pop(name) for name in EXPERIMENTS if isinstance(found.get(name), dict)}
    for where, table in {"": found, **tables}.items():
        for key in table.keys() - known:
            place = f"[{where}] {key}" if where else key
            raise ConfigError(
                f"{path}: {place} is no option of paper.py; write those that --help lists, with _ "
                f"for -, above all tables or in [{'], ['.join(EXPERIMENTS)}]"
            )
    return found | tables.get(experiment, {})


def words_of(name: str, value: Any) -> list[str]:
    """An option as the command line has it."""
    if value is False:
        return []
    values = value if isinstance(value, list) else [] if value is True else [value]
    return [f"--{name.replace('_', '-')}", *map(str, values)]


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """With what --tiny and the weights of the warm-up say.

    Raises:
        ConfigError: a warm-up whose cost is not known, or experts that are to be compiled.
    """
    args.network = args.network or NETWORKS[args.kind]
    if args.compile_sampling and args.experiment == "table4":
        raise ConfigError(
            "the experts of table4 are several networks, whose blocks are not compiled; leave "
            "--compile-sampling out"
        )
    if args.tiny:
        vars(args).update(TINY)
        args.network = str(tiny_network(args.out / "tiny.safetensors", 0, args.kind))
        args.elastic = tiny_network(args.out / "tiny-elastic.safetensors", 1, args.kind)
    if args.elastic is None:
        raise ConfigError(
            "schedules are fine-tuned from elastic weights; got none; make some with `python "
            "benchmarks/recipes.py … --keep W.safetensors` and give --elastic W.safetensors"
        )
    metadata = inspect_checkpoint(
        args.elastic
    ).metadata  # recipes.py writes the one, a study the other
    told = json.loads(metadata.get("elastic_depths", "{}"))
    told |= json.loads(metadata.get("warm_up", "{}"))
    fields = {"steps": "num_steps", "batch": "batch_size"}
    for option in (*fields, "full_frac", "min_exit_depth", "seconds"):
        name = f"elastic_{option}"
        if getattr(args, name) is None:
            setattr(args, name, told.get(fields.get(option, option)))
    if args.elastic_full_frac is None:
        args.elastic_full_frac = 0.5
    if args.elastic_min_exit_depth is None:
        args.elastic_min_exit_depth = LEAST
    if args.elastic_steps is None or args.elastic_batch is None:
        raise ConfigError(
            "the warm-up's compute is counted, and the full network is fine-tuned for as much; "
            f"{args.elastic} does not tell its steps; give --elastic-steps and --elastic-batch"
        )
    return args


def tiny_network(path: Path, seed: int, kind: str = "dit") -> Path:
    """A tiny network of as many blocks for the same images."""
    if not path.is_file():
        like = load_backbone(BackboneConfig(kind=kind, checkpoint=NETWORKS[kind]))
        net = type(like)(**{**like.config, **TINY_SHAPES[kind]})
        wake(net, seed)
        save_backbone(net, path, {})
    return path


def command_of(args: argparse.Namespace) -> str:
    """The command, with the names of files alone."""
    words = ["python benchmarks/paper.py", args.experiment]
    for action in options()._actions:
        given = getattr(args, action.dest, None)
        usual = (None, False, [], action.default, NETWORKS[args.kind])
        if not action.option_strings or action.dest == "study" or given in usual:
            continue
        option, *values = words_of(action.dest, given)
        words.append(option)
        names = (Path(value).name for value in values)
        words += [f"'{name}'" if " " in name else name for name in names]
    return " ".join(words)
