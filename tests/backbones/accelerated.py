"""Small networks and accelerations of every kind, for the tests of both."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

from asesearch.backbones import DiT, UViT
from asesearch.backbones.caching import Caching
from asesearch.backbones.dbcache import DBCache
from asesearch.backbones.diffusers_adapter import DiffusersBackbone
from asesearch.backbones.guidance import GuidanceInterval
from asesearch.backbones.merging import Merging
from asesearch.backbones.smoothcache import Measuring, SmoothCache
from asesearch.backbones.uncertainty import TIME_CHANNELS, DeeDiff, counted
from asesearch.calibration import calibrated
from asesearch.diffusion import Diffusion
from asesearch.sampler import LIMITS
from asesearch.sampling import sample
from asesearch.schedule import ExitSchedule

PARTS = ("attn", "mlp", "block")
CALLS = 5
FULL = ExitSchedule.full(4)
SCHEDULE = ExitSchedule.from_string("4 3 3 1", 4)


def awake(net):
    """Not what a new network is, whose gates are zero."""
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net.eval()


def dit():
    torch.manual_seed(0)
    return awake(
        DiT(input_size=8, patch_size=2, in_channels=1, hidden_size=16, depth=4, num_heads=2)
    )


def uvit(num_classes=-1):
    torch.manual_seed(0)
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "num_heads": 2}
    return awake(UViT(depth=8, num_classes=num_classes, **shape))


def tame(model, last):
    """With outputs of the size of noise, so that rounding stays small."""
    for parameter in getattr(model, last).parameters():
        parameter.data *= 0.1
    return model


def diffusers_dit(width=16, **sizes):
    torch.manual_seed(0)
    sizes = {
        "num_layers": 4,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
        "in_channels": 1,
        **sizes,
    }
    heads = {"num_attention_heads": 2, "attention_head_dim": width // 2}
    model = DiTTransformer2DModel(**heads, **sizes)
    return DiffusersBackbone(tame(awake(model), "proj_out_2"))


def pixart():
    torch.manual_seed(0)
    sizes = {"num_layers": 4, "sample_size": 8, "cross_attention_dim": 16, "caption_channels": 12}
    heads = {"num_attention_heads": 2, "attention_head_dim": 8}
    model = PixArtTransformer2DModel(**heads, in_channels=1, out_channels=1, **sizes)
    return DiffusersBackbone(
        tame(awake(model), "proj_out"), {"encoder_hidden_states": torch.randn(1, 3, 12)}
    )


NETWORKS = {"DiT": dit, "U-ViT": uvit}
#: Of other packages: they act on these networks.
RIVALS = ("dbcache", "smoothcache")
DIFFUSERS = {"diffusers DiT": diffusers_dit, "PixArt": pixart}


def networks(kind):
    return DIFFUSERS if kind in RIVALS else NETWORKS


def prompts(net, count):
    """Of so many images, where the network takes any."""
    if not net.takes_prompt:
        return None
    return {"encoder_hidden_states": torch.randn(count, 3, 12, generator=torch.Generator())}


def make(net, acceleration=None, schedule=SCHEDULE, **options):
    seeds = range(3)
    y = torch.tensor([1, 2, 3]) if net.num_classes else prompts(net, 3)
    options = {"diffusion": Diffusion(), "num_steps": CALLS, "y": y, "batch_size": 2, **options}
    return sample(net, "ddim", schedule, seeds=seeds, acceleration=acceleration, **options)


def calibrate(net, name, **options):
    timesteps = Diffusion().timesteps(CALLS)
    return calibrated(name, timesteps, lambda looking: make(net, looking, FULL, **options))


def some_flags(net, seed=0):
    flags = np.random.default_rng(seed).random((CALLS, len(net.transformer_blocks()))) < 0.6
    flags[0] = False
    return flags


def some_adjustment(net, part):
    flags = some_flags(net)
    rng = np.random.default_rng(1)
    values = 0.1 * rng.standard_normal((flags.sum(), 2, 16))
    return Caching(part, flags, values.astype(np.float16))


def some_exits(net, schedule=SCHEDULE):
    """Images leave where random estimators say, as counted under the schedule."""
    weights = np.random.default_rng(2).standard_normal((3, 16 + TIME_CHANNELS + 1))
    weights[:, :16] *= 20
    weights[:, 16:] /= 10
    none = np.tile([0, 0, 0, 1], (CALLS, 1))
    made = DeeDiff(0.4, weights.astype(np.float32), none)
    return counted(made, lambda looking: make(net, looking, schedule))


def some_layers(net):
    """Layers of each kind reuse at calls of their own."""
    measuring = Measuring(CALLS)
    make(net, measuring, FULL)
    rows = zip(measuring.shares, ("01101", "00110", "01010"), strict=False)
    reuse = {name: np.array(list(row)) == "1" for name, row in rows}
    return SmoothCache(reuse, measuring.shares)


#: Of each kind one that changes images: its class is that of all of the kind.
STRONG = {
    "cache-attn": lambda net: Caching("attn", some_flags(net)),
    "cache-mlp": lambda net: Caching("mlp", some_flags(net)),
    "cache-block": lambda net: Caching("block", some_flags(net)),
    "cache-attn-adjusted": lambda net: some_adjustment(net, "attn"),
    "cache-mlp-adjusted": lambda net: some_adjustment(net, "mlp"),
    "cache-block-adjusted": lambda net: some_adjustment(net, "block"),
    "merge": lambda net: Merging(0.5),
    "deediff": some_exits,
    "dbcache": lambda net: DBCache(np.array([False, True, False, True, True])),
    "smoothcache": some_layers,
    "guide": lambda net: GuidanceInterval(np.array([False, True, False, True, False])),
}
#: Of each kind with what it changes nothing.
WEAK = {kind: "guide-0-1000" if kind == "guide" else f"{kind}-0" for kind in STRONG}
#: Of each kind with half of the most that it does.
MIDDLE = {kind: f"{kind}-{LIMITS.get(kind, 4) / 2:g}" for kind in STRONG}
MIDDLE["guide"] = "guide-300-700"


@dataclass
class Case:
    """A network and a strong acceleration, sampled with guidance where that is about it."""

    kind: str
    net: Any
    strong: Any
    options: dict[str, Any]

    def make(self, acceleration=None, **options):
        return make(self.net, acceleration, **{**self.options, **options})

    def calibrate(self, name):
        return calibrate(self.net, name, **self.options)

    @property
    def passes(self):
        """Network calls of one image at one step."""
        return 2 if "cfg_scale" in self.options else 1


def case(name, kind):
    guided = kind == "guide"
    made = NETWORKS | {"U-ViT": partial(uvit, 5)} if guided else networks(kind)
    net = made[name]()
    return Case(kind, net, STRONG[kind](net), {"cfg_scale": 1.5} if guided else {})


def check_again_under_its_number(net, acceleration):
    """A reused call reuses again under its number, and does not under number 0."""
    x_t = torch.randn(2, 1, 8, 8)
    y = torch.tensor([1, 2])
    t = torch.tensor([500, 500])
    with torch.no_grad(), acceleration.most(net).attached(net) as begin:
        begin(0)
        net(x_t, t, y)
        begin(1)
        once, again = (net(x_t + 1, t + 100, y) for _ in range(2))
        assert torch.equal(once, again)
        begin(0)
        assert not torch.equal(net(x_t + 1, t + 100, y), once)  # the control
