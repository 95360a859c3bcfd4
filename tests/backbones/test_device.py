"""Which GPU a process takes."""

import pytest
import torch

from asesearch.backbones.device import _LOCAL_RANKS, default_device


@pytest.mark.parametrize(
    ("count", "started", "taken"),
    [
        (4, {"SLURM_LOCALID": "3"}, [3]),
        (4, {"SLURM_LOCALID": "0"}, [0]),
        (4, {"SLURM_LOCALID": "6"}, [2]),  # more workers than GPUs
        (4, {"OMPI_COMM_WORLD_LOCAL_RANK": "1"}, [1]),
        (4, {"MPI_LOCALRANKID": "1"}, [1]),
        (4, {"MV2_COMM_WORLD_LOCAL_RANK": "1"}, [1]),
        (4, {"PMI_LOCAL_RANK": "1"}, [1]),
        # mpirun in a job's script, which is a process of SLURM itself
        (4, {"SLURM_LOCALID": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}, [2]),
        (1, {"SLURM_LOCALID": "3"}, []),  # SLURM shows each task its own
        (4, {}, []),
        (4, {"SLURM_LOCALID": ""}, []),
        (0, {"SLURM_LOCALID": "3"}, []),
    ],
)
def test_workers_on_one_machine_take_a_gpu_each(monkeypatch, count, started, taken):
    for name in _LOCAL_RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    made_current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    assert str(default_device()) == ("cuda" if count else "cpu")
    assert made_current == taken
