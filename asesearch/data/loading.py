"""Reading ahead: what is needed next is read while what was read is used."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import spawn
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from asesearch.errors import AseSearchError

Key = TypeVar("Key")
Value = TypeVar("Value")


def workers_of(source: object) -> int:
    """Worker processes that a data source asks for: its `num_workers`, 0 where it has none."""
    return int(getattr(source, "num_workers", 0))


def read_ahead(
    read: Callable[[Key], Value], keys: Sequence[Key], num_workers: int = 0
) -> Generator[Value, None, None]:
    """`read(key)` for every key, in their order.

    Without workers one thread reads one key ahead. With workers, processes of a PyTorch DataLoader
    read two keys each ahead; they live until the last key, an exception or `close()`. They start
    from a fork server, as forking a process that has threads, a GPU or locked files is not safe:
    so `read` and what it holds must be picklable. They don't run the script again, unless `read`
    holds what it defines: it must then keep what it does under `if __name__ == "__main__":`.

    Args:
        read: must depend on the key alone.
        keys: what to read.
        num_workers: worker processes, at most one per processor that this process may use.

    Raises:
        AseSearchError: `read` raised it.
    """
    num_workers = min(num_workers, len(keys), _num_processors())
    if num_workers == 0:
        yield from _by_thread(read, keys)
    else:
        yield from _by_processes(read, keys, num_workers)


def _num_processors() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _by_thread(read: Callable[[Key], Value], keys: Sequence[Key]) -> Generator[Value, None, None]:
    pool = ThreadPoolExecutor(1)
    ahead: Future[Value] | None = None
    try:
        for key in keys:
            current = ahead
            ahead = pool.submit(read, key)
            if current is not None:
                yield current.result()
        if ahead is not None:
            yield ahead.result()
    finally:
        pool.shutdown(cancel_futures=True)


class _ByValue(pickle.Pickler):
    """Writes tensors with their values.

    PyTorch would have its workers hand them over in shared memory. Where that is full, as the
    64 MB that Docker gives a container soon are, the reader waits for ever.
    """

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return torch.from_numpy, (obj.numpy(),)  # plain pickling takes twice as long
        return NotImplemented


class _Reads(Dataset[bytes], Generic[Key, Value]):
    """`read` as a DataLoader's data set."""

    def __init__(self, read: Callable[[Key], Value]) -> None:
        self.read = read

    def __getitem__(self, key: Key) -> bytes:
        """A pickle of what was read and of the error, one of which is None: a DataLoader would put
        an error's traceback into its message."""
        found: tuple[Value | None, AseSearchError | None]
        try:
            found = self.read(key), None
        except AseSearchError as error:
            found = None, error
        file = io.BytesIO()
        _ByValue(file, pickle.HIGHEST_PROTOCOL).dump(found)
        return file.getvalue()


def _as_it_is(value: Any) -> Any:
    return value


def _end_with_the_parent(worker: int) -> None:
    """Make this worker end when its parent does, even if it is killed.

    PyTorch's own watch over the parent sees the fork server alone, which lives as long as a worker.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Mentions(pickle.Pickler):
    """Finds out whether a pickle would need the main script; numbers are not written for it."""

    def __init__(self) -> None:
        self.script = False
        super().__init__(self, pickle.HIGHEST_PROTOCOL)

    def write(self, data: Any) -> int:
        self.script = self.script or b"__main__" in bytes(data)
        return len(data)

    def reducer_override(self, obj: Any) -> Any:
        return (str, ()) if isinstance(obj, (Tensor, np.ndarray)) else NotImplemented


def _needs_script(read: object) -> bool:
    """Whether workers need what the main script defines; also where that can't be known here."""
    mentions = _Mentions()
    try:
        mentions.dump(read)
    except Exception:  # locks and shared values can be written to a starting process alone
        return True
    return mentions.script


_apart = threading.local()
_data_for = spawn.get_preparation_data


def _without_script(name: str) -> dict[str, Any]:
    """What a starting process is told, in threads that `_script_not_run_again` is in without its
    main script."""
    told: dict[str, Any] = _data_for(name)
    if getattr(_apart, "here", False):
        told = {k: v for k, v in told.items() if not k.startswith("init_main_from_")}
    return told


spawn.get_preparation_data = _without_script


@contextmanager
def _script_not_run_again(read: object) -> Iterator[None]:
    """Inside, processes that this thread starts don't run the main script, where `read` needs
    nothing that it defines: a script or notebook without a guard would begin anew in each."""
    _apart.here = not _needs_script(read)
    try:
        yield
    finally:
        _apart.here = False


def _by_processes(
    read: Callable[[Key], Value], keys: Sequence[Key], num_workers: int
) -> Generator[Value, None, None]:
    context = multiprocessing.get_context("forkserver")
    # what the server has loaded no worker loads again; it is fixed when the first worker starts
    context.set_forkserver_preload(sorted(m for m in sys.modules if m.split(".")[0] == "asesearch"))
    loader = DataLoader(
        _Reads(read),
        batch_size=None,
        sampler=cast(Any, keys),
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=_end_with_the_parent,
        multiprocessing_context=context,
    )
    with _script_not_run_again(read):
        found = iter(loader)
    try:
        for pickled in found:
            value, error = pickle.loads(pickled)
            if error is not None:
                raise error
            yield value
    finally:
        # its __del__ does so too, but only once no traceback holds it
        cast(Any, found)._shutdown_workers()
