"""Labels and prompts are handled alike."""

import pytest
import torch

from asesearch.backbones import conditioning

LABELS = torch.tensor([3, 1, 2])
PROMPT = {
    "hidden": torch.arange(12.0).view(3, 2, 2),
    "mask": torch.tensor([[1, 1], [1, 0], [0, 0]]),
}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    return torch.equal(a, b)


@pytest.mark.parametrize("y", [LABELS, PROMPT], ids=["labels", "prompt"])
def test_rows_are_taken_joined_and_moved(y):
    first = conditioning.take(y, slice(0, 1))
    rest = conditioning.take(y, [1, 2])
    assert same(conditioning.join([first, rest]), y)
    assert not same(conditioning.join([rest, first]), y)
    moved = conditioning.to(y, torch.device("meta"))
    assert all(v.is_meta for v in (moved.values() if isinstance(moved, dict) else [moved]))


@pytest.mark.parametrize("y", [LABELS, PROMPT], ids=["labels", "prompt"])
def test_some_rows_give_way_to_the_null_condition(y):
    null = conditioning.repeat(conditioning.take(y, slice(2, 3)), 3)
    mixed = conditioning.where(torch.tensor([True, False, False]), null, y)
    assert same(conditioning.take(mixed, [0]), conditioning.take(y, [2]))
    assert same(conditioning.take(mixed, [1, 2]), conditioning.take(y, [1, 2]))


def test_none_passes_through():
    assert conditioning.take(None, [0]) is None and conditioning.join([None, None]) is None
    assert conditioning.to(None, torch.device("cpu")) is None


def test_which_kind_it_is():
    assert conditioning.labels_of(LABELS) is LABELS and conditioning.prompt_of(LABELS) is None
    assert conditioning.labels_of(PROMPT) is None and conditioning.prompt_of(PROMPT) == PROMPT
    with pytest.raises(TypeError, match="labels and prompts"):
        conditioning.join([LABELS, PROMPT])
