"""The latency table that all workers of a study share: measured once for each kind of device, under
a lock."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asesearch.errors import EvaluationError, StudyError
from asesearch.evaluation.cost import LatencyTable
from asesearch.files import write_json
from asesearch.locks import waited_lock
from asesearch.study import directory


@dataclass(frozen=True)
class Conditions:
    """What a latency table is measured under.

    Attributes:
        device: see `device_name`.
        batch_size: images per call, guidance's included.
        precision: see `SamplingConfig`.
        guided: whether calls have guidance's double batch.
        compile: whether blocks run as compiled code.
    """

    device: str
    batch_size: int
    precision: str
    guided: bool
    compile: bool = False

    def fit(self, table: LatencyTable) -> bool:
        """Whether a table was measured under these, as far as it tells."""
        return (
            (table.device, table.batch_size) == (self.device, self.batch_size)
            and table.precision in ("", self.precision)
            and table.guided in (None, self.guided)
            and table.compile == self.compile
        )

    def __str__(self) -> str:
        guided = " of guided sampling" if self.guided else ""
        code = ", compiled blocks" if self.compile else ""
        return f"{self.device}, {self.batch_size} images per call{guided}, {self.precision}{code}"


def shared_table(
    run_dir: Path, now: Conditions, measure: Callable[[], LatencyTable], *, one_only: bool
) -> LatencyTable:
    """The study's latency table for this device; measured under a lock where there is none yet.

    Args:
        run_dir: the study directory.
        now: of this worker.
        measure: makes the table.
        one_only: whether a study has one table alone, as where time is what is searched for.

    Raises:
        StudyError: the one table is of another device, batch or precision.
    """
    with waited_lock(run_dir / directory.LOCKS / "latency.lock", "measures the latency table"):
        first = _read(run_dir / directory.LATENCY)
        if first is None or now.fit(first):
            path = run_dir / directory.LATENCY
            found = first
        elif one_only:
            raise StudyError(_refusal(run_dir, now, first))
        else:
            path = run_dir / f"latency-{hashlib.sha256(str(now).encode()).hexdigest()[:8]}.json"
            found = _read(path)
        if found is None:
            found = measure()
            write_json(path, found.to_dict())
        _tell_threads(path, found)
        return found


def check_table(run_dir: Path, now: Conditions) -> None:
    """Refuse what `shared_table` would with `one_only`; nothing is measured, written or locked.

    Args:
        run_dir: the study directory.
        now: of this worker.

    Raises:
        StudyError: the one table is of another device, batch or precision.
    """
    first = _read(run_dir / directory.LATENCY)
    if first is not None and not now.fit(first):
        raise StudyError(_refusal(run_dir, now, first))


def _tell_threads(path: Path, table: LatencyTable) -> None:
    """Say so where a CPU's table was measured with other threads; it serves all workers all the
    same, so that their trials can be compared."""
    own = torch.get_num_threads()
    if table.device == "cpu" and table.threads != own:
        directory.say_once(
            f"{path} was measured with {table.threads} CPU threads, this process has {own}: "
            f"predicted times are those of {table.threads} (OMP_NUM_THREADS={table.threads})"
        )


def changed_table(
    run_dir: Path, now: Conditions, name: str, measure: Callable[[], LatencyTable]
) -> LatencyTable:
    """The study's latency table of calls that an acceleration changes in full, on this device;
    measured under the lock of the other where there is none yet.

    Args:
        run_dir: the study directory.
        now: of this worker.
        name: of the acceleration at its most.
        measure: makes the table.
    """
    key = hashlib.sha256(f"{now} {name}".encode()).hexdigest()[:8]
    path = run_dir / f"latency-{key}.json"
    with waited_lock(run_dir / directory.LOCKS / "latency.lock", "measures the latency table"):
        found = _read(path)
        if found is None:
            found = measure()
            write_json(path, found.to_dict())
        return found


def _refusal(run_dir: Path, now: Conditions, first: LatencyTable) -> str:
    size = first.batch_size
    theirs = Conditions(
        first.device,
        size,
        first.precision or now.precision,
        now.guided if first.guided is None else first.guided,
        first.compile,
    )
    if now.device != first.device:
        one = "kind of device"
        fix = (
            'search on a device of that kind, or in another directory (there with cost = "flops" '
            "for several kinds of device)"
        )
    elif now.batch_size != size:
        one = "batch size"
        fix = (
            f"set sampling.batch_size back to {size // 2 if theirs.guided else size}, or search "
            "in another directory"
        )
    else:
        one = "arithmetic"
        fix = "set [sampling] back to it, or search in another directory"
    return (
        f"times of one study must come from one {one}; the latency table of {run_dir} is "
        f"of {theirs}, and this worker has {now}; {fix}"
    )


def _read(path: Path) -> LatencyTable | None:
    """A table on record; None where it is missing or damaged."""

    def parse(data: dict[str, Any]) -> LatencyTable:
        try:
            return LatencyTable.from_dict(data)
        except EvaluationError as error:
            raise ValueError(str(error)) from error

    return directory.read_state(path, parse, "latency is measured again")
