"""Sizes far beyond any machine are refused in one line, before anything of that size is made."""

import pytest

from asesearch.backbones import load_backbone
from asesearch.backbones.device import check_memory
from asesearch.config import BackboneConfig, TrainConfig, parse_study
from asesearch.diffusion import Diffusion
from asesearch.errors import ConfigError, EvaluationError
from asesearch.finetuning import Trainer
from asesearch.schedule import ExitSchedule
from asesearch.score import Protocol
from asesearch.search.protocols import Protocols

HUGE = 10**12


@pytest.mark.parametrize(
    "args",
    [{"depth": HUGE}, {"hidden_size": HUGE}, {"input_size": HUGE, "depth": 2, "hidden_size": 8}],
)
def test_a_network_that_no_memory_holds(args):
    with pytest.raises(ConfigError, match=r"\[backbone\].*correct args"):
        load_backbone(BackboneConfig(args={"num_heads": 1, **args}))


def test_a_batch_that_no_memory_holds(tiny_dit, tiny_images):
    config = TrainConfig(batch_size=HUGE)
    with pytest.raises(ConfigError, match="got 1,000,000,000,000 of at least 256 bytes each"):
        Trainer(tiny_dit, tiny_images, Diffusion(), ExitSchedule.full(4), config)
    check_memory(1, 1024, "a little", "nothing")


@pytest.mark.parametrize("section", ["evaluation", "promotion", "confirm"])
def test_repeats_have_a_bound(section):
    data = {"name": "a", "backbone": {}, "data": {"kind": "fashion-mnist"}}
    with pytest.raises(ConfigError, match=rf"{section}\.repeats: .*less than or equal to 10000"):
        parse_study({**data, section: {"repeats": HUGE}}, "a")


@pytest.mark.parametrize(
    ("seed", "num", "fix"),
    [(10**9 - 1, 2, "lower evaluation.seed to at most 999999996"), (0, 10**9, "lower its num_sam")],
)
def test_the_way_out_of_shared_seeds_can_be_gone(seed, num, fix):
    common = {"metric": "kid", "extractor": "a", "extractor_digest": "", "reference": "b"}
    common |= {"reference_size": 9, "reference_digest": "", "solver": "ddim", "num_steps": 3}
    common |= {"cfg_scale": 1.0}
    ours = Protocol(**common, num_samples=num, seeds=(seed, seed + num))
    fresh = Protocol(**common, num_samples=5, seeds=(10**9,))
    with pytest.raises(EvaluationError, match=fix):
        Protocols(ours, fresh)
