"""The study directory: the name of every file in it, and how those that hold a state are read."""

from __future__ import annotations

import logging
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from asesearch.errors import ScheduleError, StudyError, WriteError, first_line
from asesearch.files import check_writable, loads, new_file, real_path, short, warn_once
from asesearch.sampler import Sampler
from asesearch.schedule import SLUG_BYTES, ExitSchedule

STUDY = "study.json"  # settings, identity and storage
DATABASE = "study.db"  # the storage, where no other is given
INPUTS = "inputs.json"  # fingerprints of weights, data and protocol
ENVIRONMENT = "environment.json"
LATENCY = "latency.json"  # the study's first; of further devices there is latency-HASH.json
ELASTIC_WEIGHTS = "elastic.safetensors"
ELASTIC = "elastic"  # folder of the elastic warm-up's checkpoint
MAP = "map.json"
IMPORTANCE = "importance.json"  # of each interval, once the trials have ended
WARM_UP = "warm-up.json"  # what the warm-up took
ACCELERATIONS = "acceleration_*.json"  # calibrated, one a sampler
CONFIRMATIONS = "confirmations"  # a file for each point, TRIAL.json
OLD_CONFIRMATIONS = "confirmations.json"  # of all points, as releases before wrote it
WORKERS = "workers"  # a lock and a file of each: when it was at work
ARTIFACTS = "artifacts"  # sample grids, by ids of Optuna's
TRIALS = "trials"  # a folder for each schedule, with these:
WEIGHTS = "weights.safetensors"
PROMPTS = "prompts.safetensors"
RETRAINED = "training-seed-"  # K: a folder for each further training seed of a confirmed point
LOCKS = "locks"  # held by living processes only
OPENING_LOCK = "study.lock"  # in it

TUNED_FOR: str = "exit_schedule"  # no file: in the weights' metadata, their schedule as JSON

KEPT_IMAGES = 16  # trials whose images are held at once
T = TypeVar("T")
_NO_JSON = (ValueError, KeyError, TypeError, AttributeError, StudyError)  # nor what it should hold
_NO_ARRAYS = (
    *_NO_JSON,
    EOFError,
    NotImplementedError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
_log = logging.getLogger(__name__)


#: SQLite opens no file whose path, with "-journal" behind it, is longer.
SQLITE_PATH_BYTES = 512
NAME_BYTES = 255  # of a file, at most
_JOURNAL_BYTES = len("-journal")


def check_study_dir(run_dir: Path, storage: str | None) -> None:
    """Refuse a directory that could not hold a study, before any of it is paid for.

    Args:
        run_dir: the study directory, there or not; nothing is left in it.
        storage: URL of the storage, if it is not the database in that directory.

    Raises:
        WriteError: it can't be written, others who write to it would be shut out, or its path is
            too long.
    """
    longest = f"{TRIALS}/{'0' * SLUG_BYTES}/finetune-1000000/training.safetensors"
    check_writable(run_dir, longest)
    _check_shared(Path(run_dir))
    if storage is None and (why := why_too_long(Path(run_dir) / DATABASE)) is not None:
        raise WriteError(why)


def _check_shared(run_dir: Path) -> None:
    """Refuse to make files that the others could not write in a directory that a group shares: they
    would end the others' searches in mid-work.

    Raises:
        WriteError: as said.
    """
    try:
        of = run_dir.stat()
        # files of another group than the directory's are out of the others' reach at any umask
        if not of.st_mode & stat.S_IWGRP or not _has_others(run_dir):
            return
        made = new_file(run_dir)
    except OSError:  # it is not there yet
        return
    if made.st_gid == of.st_gid and not made.st_mode & stat.S_IWGRP:
        raise WriteError(
            "a directory that a group shares takes files that all of it may write; got "
            f"{short(run_dir, 140)}, where yours would have the permissions "
            f"{stat.S_IMODE(made.st_mode):04o} and shut the others out; set umask 002"
        )


def _has_others(run_dir: Path) -> bool:
    """Whether a directory, or a file in it or of its workers, is another user's. Root's tell of
    nobody who could be shut out: it makes folders for users, and may write everywhere.

    Raises:
        OSError: it can't be read.
    """
    own = os.geteuid() if hasattr(os, "geteuid") else 0  # on Windows all files are of user 0
    paths = [run_dir, *run_dir.iterdir()]
    if (run_dir / WORKERS).is_dir():
        paths += (run_dir / WORKERS).iterdir()
    for path in paths:
        with suppress(FileNotFoundError):  # another worker's, a moment ago
            if path.lstat().st_uid not in (own, 0):
                return True
    return False


def why_too_long(database: Path) -> str | None:
    """Why SQLite could not write to a file of this path, with the fix; None where it is short
    enough."""
    path = real_path(database)
    size = len(os.fsencode(path))
    if size > SQLITE_PATH_BYTES - _JOURNAL_BYTES:
        return (
            f"the path of a study's database has at most {SQLITE_PATH_BYTES - _JOURNAL_BYTES} "
            f"bytes, which is SQLite's limit; got {size}: {str(path)[:200]}…; choose a shorter one"
        )
    size = len(os.fsencode(path.name))
    if size > NAME_BYTES - _JOURNAL_BYTES:
        return (
            f"the name of a study's database has at most {NAME_BYTES - _JOURNAL_BYTES} bytes, as "
            f'SQLite writes a file with "-journal" behind it; got {size}: {path.name[:80]}…; '
            "choose a shorter one"
        )
    return None


def samples_file(sampler: Sampler, own: Sampler) -> str:
    """Name of the file with a trial's images, beside its weights; `own` is the study's sampler."""
    return "samples.npz" if sampler == own else f"samples_{sampler}.npz"


def acceleration_file(sampler: Sampler) -> str:
    """Name of the file with what a sampler's acceleration was calibrated to."""
    return ACCELERATIONS.replace("*", str(sampler))


def read_json(path: Path, fix: str = "is this a study directory, and is it whole?") -> Any:
    """Read JSON that can't be made again.

    Args:
        path: of the file.
        fix: what the user can do, for the message.

    Raises:
        StudyError: missing, unreadable or not JSON.
    """
    try:
        return loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise StudyError(f"can't read {path}: {_reason(path, error)}; {fix}") from error


def read_state(path: Path, parse: Callable[[Any], T], otherwise: str) -> T | None:
    """What a JSON file holds that can be made again, or done without.

    Args:
        path: of the file.
        parse: makes the value of the JSON.
        otherwise: what happens without the file, which is said where the file is damaged.

    Returns:
        None where the file is missing or damaged.

    Raises:
        StudyError: something is there that can't be opened.
    """
    try:
        return parse(loads(path.read_text(encoding="utf-8-sig")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _blocked(path, error) from error
    except _NO_JSON as error:
        say_once(f"{path} is damaged ({_reason(path, error)}): {otherwise}")
        return None


def listed(folder: Path, pattern: str) -> list[Path]:
    """What lies in a folder under names of this pattern, in order; nothing where there is no such
    folder. `Path.glob` would take a folder that can't be read for an empty one.

    Raises:
        StudyError: the folder can't be read.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if fnmatchcase(e.name, pattern))
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise StudyError(f"can't read {folder}: it is no folder; remove it") from error
    except OSError as error:
        raise StudyError(_no_permission(folder, error)) from error
    return [folder / name for name in names]


def read_images(path: Path, otherwise: str) -> np.ndarray | None:
    """A trial's images, (N, C, H, W) uint8; None where the file is missing or damaged.

    Raises:
        StudyError: see `read_state`, which has the same arguments.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            return np.asarray(data["images"])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _blocked(path, error) from error
    except _NO_ARRAYS:
        say_once(f"{path} is damaged ({_reason(path, 'no whole .npz file')}): {otherwise}")
        return None


class SampleFiles(Mapping[int, np.ndarray]):
    """Images of trials, (N, C, H, W) uint8 by number, read when they are asked for: of a thousand
    trials they are gigabytes, and most who look at a study want none. A trial whose file is missing
    or damaged has none.

    Args:
        files: of each trial.
    """

    def __init__(self, files: Mapping[int, Path]) -> None:
        self._files = files
        self._read = lru_cache(maxsize=KEPT_IMAGES)(self._images)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._files,)  # without the images that are held

    def _images(self, number: int) -> np.ndarray | None:
        return read_images(self._files[number], "the trial is shown without")

    def __getitem__(self, number: int) -> np.ndarray:
        found = self._read(number) if number in self._files else None
        if found is None:
            raise KeyError(number)
        return found

    def __iter__(self) -> Iterator[int]:
        return (number for number in self._files if number in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def is_whole(path: Path, otherwise: str, schedule: ExitSchedule | None = None) -> bool:
    """Whether a safetensors file is there with all its tensors; with `schedule`, fine-tuned for it,
    as the file itself says.

    Raises:
        StudyError: see `read_state`, which has the same arguments.
    """
    try:
        # whose own errors hide the system's
        with path.open("rb"), safe_open(path, "np") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _blocked(path, error) from error
    except SafetensorError as error:
        say_once(f"{path} is damaged ({_reason(path, error)}): {otherwise}")
        return False
    if schedule is None:
        return True
    try:
        found = ExitSchedule.from_json(metadata.get(TUNED_FOR, ""))
    except ScheduleError:
        say_once(f"{path} does not say for which schedule it was fine-tuned: {otherwise}")
        return False
    if found.merged() != schedule.merged():
        say_once(f"{path} was fine-tuned for {found}, not for {schedule}: {otherwise}")
        return False
    return True


def drop_damaged(path: Path, otherwise: str) -> None:
    """Remove a safetensors file that is damaged, see `is_whole`: what it held is made again."""
    if not is_whole(path, otherwise):
        path.unlink(missing_ok=True)


def _blocked(path: Path, error: OSError) -> StudyError:
    if os.path.isdir(path):
        return StudyError(f"can't read {path}: it is a folder; remove it")
    return StudyError(_no_permission(path, error))


def _no_permission(path: Path, error: OSError) -> str:
    return f"can't read {path}: {error.strerror or error}; check its permissions"


def _reason(path: Path, error: Exception | str) -> str:
    """Why a file can't be read, in a few words."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if path.is_file() and path.stat().st_size == 0:
        return "it is empty, as a power cut may leave it"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return error if isinstance(error, str) else first_line(error)


def say_once(line: str) -> None:
    """A line on stderr about the study's state, once in a process."""
    warn_once(_log, line)
