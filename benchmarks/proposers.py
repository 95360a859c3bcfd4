"""Is a proposer of our own worth its code? It, Optuna's samplers and BoTorch on one landscape.

Synthetic landscapes whose truth is known (those of tests/proposer): log score = weights times true
map errors plus a smooth residual, observed with 2 % noise; 12 blocks, ten intervals, 15 calls. Ours
sees a difficulty map with errors of its own: good (5 %), rough (50 %) or shuffled, which misleads.
The others see the ten parameters of the search space and no map, which is what such a library can
be given without writing the model that ours consists of.

    python benchmarks/proposers.py --repeats 6 --out proposers.json
    pip install optuna-integration botorch     # for BoTorch's row; left out where it is missing
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna

sys.path.insert(0, str(Path(__file__).parent.parent))

from asesearch.files import write_json
from asesearch.study.environment import environment
from tests.proposer import test_proposer as landscapes

AT = (5, 10, 20)  # trials after which the dominated area is told
Make = Callable[[int], optuna.samplers.BaseSampler]


class Timed:
    """Counts the CPU seconds of what is asked of a sampler."""

    def __init__(self, sampler: optuna.samplers.BaseSampler) -> None:
        self.sampler = sampler
        self.spent_s = 0.0
        self.count = 0
        ask = sampler.sample_relative

        def timed(*args: Any) -> Any:
            begun = time.process_time()
            out = ask(*args)
            self.spent_s += time.process_time() - begun
            self.count += bool(out)
            return out

        sampler.sample_relative = timed  # type: ignore[method-assign]


def ours(kind: str) -> Make:
    """Our proposer under one kind of map."""
    how = landscapes.MAPS[kind]
    return lambda seed: landscapes.make_sampler(
        landscapes.make_problem(landscapes.FakeMap(seed, **how)), seed
    )


def methods() -> dict[str, Make]:
    """All that is here."""
    found: dict[str, Make] = {
        "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
        "TPE": lambda seed: optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=8, multivariate=True
        ),
        "NSGA-II": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=10),
        "Optuna GP": lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=8),
    }
    try:
        from optuna_integration import BoTorchSampler
    except ImportError as error:
        print(f"BoTorch is left out: {error}", file=sys.stderr)
    else:
        found["BoTorch"] = lambda seed: BoTorchSampler(seed=seed, n_startup_trials=8)
    return found | {f"ours, {kind} map": ours(kind) for kind in ("good", "rough", "shuffled")}


def run(make: Make, seed: int, count: int) -> tuple[list[float], float]:
    """Dominated area after each trial on one landscape, and CPU seconds per proposal."""
    timed = Timed(make(seed))
    found, _ = landscapes.search(
        timed.sampler, landscapes.make_problem(), landscapes.Truth(seed), count, seed
    )
    return landscapes.hypervolumes(found).tolist(), timed.spent_s / max(1, timed.count)


def main() -> None:
    """Measure, print a table, write what was measured."""
    parser = argparse.ArgumentParser(description="Proposers on landscapes whose truth is known")
    parser.add_argument("--repeats", type=int, default=6, help="landscapes (default %(default)s)")
    parser.add_argument("--trials", type=int, default=21, help="of each (default %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    raw: dict[str, Any] = {}
    for name, make in methods().items():
        runs = [run(make, seed, args.trials) for seed in range(args.repeats)]
        raw[name] = {"areas": [a for a, _ in runs], "proposal_s": [s for _, s in runs]}
        reached = landscapes.trials_to_reach(
            np.array(raw[name]["areas"]), np.array(raw["random"]["areas"])[:, -1]
        )
        raw[name]["trials_to_random"] = reached
        at = [np.array(raw[name]["areas"])[:, min(n, args.trials - 1)] for n in AT]
        areas = "  ".join(f"{a.mean():.3f} ± {a.std(ddof=1) / len(a) ** 0.5:.3f}" for a in at)
        seconds = float(np.median(raw[name]["proposal_s"]))
        print(f"{name:20} {areas}  {np.median(reached):5.1f}  {seconds:.2f} s", flush=True)
    if args.out is not None:
        write_json(args.out, {"args": json.loads(json.dumps(vars(args), default=str)), **raw,
                              "environment": environment()})  # fmt: skip


if __name__ == "__main__":
    main()
