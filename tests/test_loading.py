"""Reading ahead: the same whatever the number of workers, and no process left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from asesearch.config import DataConfig, TrainConfig
from asesearch.data import ImageFolder, loading, open_data, read_ahead, workers_of
from asesearch.diffusion import Diffusion
from asesearch.errors import DataError
from asesearch.evaluation import features
from asesearch.finetuning import batches, draw_batch, finetune
from asesearch.finetuning.batches import _epoch_indices as epoch_indices
from asesearch.schedule import ExitSchedule
from tests.reads import (
    break_at_the_third,
    process_of,
    refuse_the_third,
    square,
    without_shared_memory,
)

CONFIG = TrainConfig(num_steps=6, batch_size=8, lr=1e-3, seed=3)
PROCESSORS = len(os.sched_getaffinity(0))
TWO = min(2, PROCESSORS)  # workers, if two are asked for
SCHEDULE = ExitSchedule.from_string("4 3 2 1", 4)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    root = tmp_path_factory.mktemp("jpegs")
    rng = np.random.default_rng(0)
    for name in "abc":
        (root / name).mkdir()
        for i in range(9):
            pixels = rng.integers(0, 256, (12, 10), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.jpg")
    return root


def folder_of(root, num_workers):
    return ImageFolder(root, 8, 1, flip=True, num_workers=num_workers)


def workers():
    return multiprocessing.active_children()


def is_running(pid):
    """Whether there is such a process, and it has not ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.thorough), 2])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_values_come_in_the_order_of_their_keys(num_workers, count):
    keys = range(5, 5 + count)
    assert list(read_ahead(square, keys, num_workers)) == [k * k for k in keys]
    assert workers() == []


def test_workers_are_processes_that_last_to_the_end():
    assert set(read_ahead(process_of, range(8))) == {os.getpid()}
    seen = list(read_ahead(process_of, range(8), 2))
    assert len(set(seen)) == TWO and os.getpid() not in seen
    many = set(read_ahead(process_of, range(40), 1000))
    assert 1 <= len(many) <= PROCESSORS  # no more than can run at once


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_the_data_comes_as_it_is(num_workers):
    found = read_ahead(refuse_the_third, range(9), num_workers)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(DataError) as caught:
        next(found)
    assert str(caught.value) == "can't read the image 2; replace it"
    assert workers() == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_the_program_is_not_hidden(num_workers):
    with pytest.raises(ZeroDivisionError, match="2"):
        list(read_ahead(break_at_the_third, range(9), num_workers))
    assert workers() == []


def test_workers_need_no_shared_memory(monkeypatch):
    """Docker gives a container 64 MB of it; a worker that finds it full had its reader wait."""
    for name in ("_share_fd_cpu_", "_share_filename_cpu_"):  # that come back here as they were
        monkeypatch.setattr(torch.UntypedStorage, name, getattr(torch.UntypedStorage, name))
    expected = [without_shared_memory(key) for key in range(5)]
    found = list(read_ahead(without_shared_memory, range(5), 2))
    for theirs, ours in zip(found, expected, strict=True):
        images, others, slices, array = theirs
        assert torch.equal(images, ours[0]) and images.is_contiguous()
        images += 1  # the reader's own
        assert torch.equal(others["label"], ours[1]["label"]) and others["none"] is None
        for name, value in ours[1]["prompt"].items():
            assert torch.equal(others["prompt"][name], value)
        assert all(a.dtype == b.dtype for a, b in zip(slices, ours[2], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(slices, ours[2], strict=True))
        assert np.array_equal(array, ours[3])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_no_worker_is_left_when_the_reader_stops(error):
    with pytest.raises(error), closing(read_ahead(square, range(100), 2)) as found:
        for _ in found:
            assert len(workers()) == TWO  # negative control: they are seen while they live
            raise error
    assert workers() == []


READS_FOR_EVER = """
import os
import signal
from asesearch.data import read_ahead
from tests.reads import process_of
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where it was ignored
    found = read_ahead(process_of, range(10**9), 1)
    print(os.getpid(), next(found), flush=True)
    for _ in found:
        pass
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    "how", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_a_program_that_is_stopped_takes_its_workers_with_it(tmp_path, how):
    """Also where it is killed, and can't say good-bye."""
    script = tmp_path / "reads.py"
    script.write_text(READS_FOR_EVER)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, script], stdout=pipe, stderr=pipe, env=env) as program:
        try:
            own, worker = map(int, program.stdout.readline().split())
            assert own == program.pid != worker and is_running(worker)
            program.send_signal(how)
            program.communicate(timeout=60)
        finally:
            program.kill()
    until = time.monotonic() + 60
    while is_running(worker) and time.monotonic() < until:
        time.sleep(0.1)
    assert not is_running(worker)


READS_AT_ONCE = """
import threading
from asesearch.data import read_ahead
from tests.reads import square

print("begins")
one = threading.Thread(target=lambda: print(*read_ahead(square, range(4), 1)))
one.start()
one.join()
print(*read_ahead(square, range(3), 1), __file__ is not None)
"""


def mine(key):
    return key


def test_readers_of_the_main_script_need_it(monkeypatch):
    assert not loading._needs_script(square)
    monkeypatch.setattr(mine, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "mine", mine, raising=False)
    assert loading._needs_script(mine)
    assert loading._needs_script(threading.Lock())  # which can't be pickled here
    big = torch.zeros(1 << 28, dtype=torch.int8)[:1].expand(1 << 40)  # its values are not read
    assert not loading._needs_script((square, big))


@pytest.mark.thorough
def test_a_script_without_a_guard_is_run_once(tmp_path):
    """As the snippets of the README and a notebook are."""
    script = tmp_path / "reads.py"
    script.write_text(READS_AT_ONCE)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["begins", "0 1 4 9", "0 1 4 True"]


# -- training and references -----------------------------------------------------------------------


def test_a_source_says_how_many_workers_it_wants(jpegs, tiny_images):
    config = DataConfig(kind="image-folder", path=str(jpegs), image_size=8, num_workers=3)
    assert workers_of(open_data(config)) == 3
    assert workers_of(folder_of(jpegs, 0)) == workers_of(tiny_images) == 0
    assert folder_of(jpegs, 3).digest == folder_of(jpegs, 0).digest


def test_the_order_of_an_epoch_is_made_once(monkeypatch):
    """For a million images it takes as long as a small network's step."""
    made = []
    true_rng = np.random.default_rng

    def counting(seed):
        made.append(seed)
        return true_rng(seed)

    monkeypatch.setattr(np.random, "default_rng", counting)
    drawn = [i for step in range(25) for i in epoch_indices(100, 8, step, 712)]
    assert made == [[712, 0, 3], [712, 1, 3]]
    assert sorted(drawn[:100]) == sorted(drawn[100:]) == list(range(100))
    assert drawn[:100] == true_rng([712, 0, 3]).permutation(100).tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_their_steps(tiny_dit, jpegs, num_workers):
    data = folder_of(jpegs, num_workers)
    steps = range(4, 9)
    found = list(batches(data, tiny_dit, CONFIG, Diffusion(), (0, 1), steps))
    assert len(found) == 5
    for step, batch in zip(steps, found, strict=True):
        expected = draw_batch(data, tiny_dit, CONFIG, Diffusion(), step, (0, 1))
        for name in ("x_start", "y", "t", "noise", "u"):
            assert torch.equal(getattr(batch, name), getattr(expected, name)), name


def test_fine_tuning_is_the_same_for_any_number_of_workers(tiny_dit, jpegs):
    results = [
        finetune(tiny_dit, folder_of(jpegs, n), Diffusion(), SCHEDULE, CONFIG) for n in (0, 1, 2)
    ]
    alone = dict(results[0].backbone.named_parameters())
    for other in results[1:]:
        assert other.losses == results[0].losses
        assert all(torch.equal(p, alone[n]) for n, p in other.backbone.named_parameters())


def test_ctrl_c_in_a_fine_tuning_leaves_no_worker(tiny_dit, jpegs):
    def stop(done, loss):
        assert len(workers()) == TWO
        raise KeyboardInterrupt

    config = CONFIG.model_copy(update={"num_steps": 30})
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_dit, folder_of(jpegs, 2), Diffusion(), SCHEDULE, config, on_step=stop)
    assert workers() == []


def test_references_are_the_same_for_any_number_of_workers(jpegs):
    class Flat:
        def __call__(self, images):
            return images.flatten(1).double()

    found = [features.extract_features(Flat(), folder_of(jpegs, n), batch_size=5) for n in (0, 2)]
    assert found[0].shape == (27, 64)
    assert np.array_equal(found[0], found[1]) and workers() == []
