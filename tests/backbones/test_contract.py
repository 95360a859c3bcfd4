"""The backbone contract, over every backbone."""

import copy

import pytest
import torch

from asesearch.backbones import Backbone, DiT, UViT
from asesearch.backbones.acceleration import run_at
from asesearch.backbones.exit_weights import ExitWeights, weight_sets
from asesearch.errors import AseSearchError, ConfigError, ScheduleError

UVIT = {"img_size": 8, "patch_size": 4, "in_chans": 2, "embed_dim": 16, "depth": 8, "num_heads": 2}
NETWORKS = {
    "dit": lambda: DiT(
        input_size=8,
        patch_size=4,
        in_channels=2,
        hidden_size=16,
        depth=4,
        num_heads=2,
        num_classes=3,
    ),
    "uvit": lambda: UViT(**UVIT, num_classes=-1),
    "uvit-class": lambda: UViT(**UVIT, num_classes=4, conv=False, mlp_time_embed=True),
    "uvit-options": lambda: UViT(
        **UVIT, num_classes=3, has_null_label=False, qkv_bias=True, qk_scale=0.2, skip=False
    ),
    "exit-weights": lambda: ExitWeights(NETWORKS["dit"](), NETWORKS["dit"]()),
    "uvit-exit-weights": lambda: ExitWeights(NETWORKS["uvit"](), NETWORKS["uvit"]()),
    "uvit-recompute": lambda: UViT(**UVIT, use_checkpoint=True),
}
N = 6
MIXED = torch.tensor([2, 4, 1, 3, 1, 4])


@pytest.fixture(params=NETWORKS)
def net(request) -> Backbone:
    """A network whose every parameter is random: zero-initialised gates would hide the blocks."""
    gen = torch.Generator().manual_seed(0)
    net = NETWORKS[request.param]()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=gen) * 0.2
    return net


def batch(net: Backbone, n: int = N):
    gen = torch.Generator().manual_seed(1)
    x_t = torch.randn(n, net.in_channels, net.input_size, net.input_size, generator=gen)
    t = torch.randint(1000, (n,), generator=gen)
    return x_t, t, torch.randint(net.num_classes, (n,), generator=gen) if net.num_classes else None


def idle_of(net: Backbone) -> int | None:
    """The droppable block that no call runs: the last of weights for early exits alone."""
    return 2 * net.depth - 1 if isinstance(net, ExitWeights) else None


def take(args, rows):
    return tuple(None if a is None else a[rows] for a in args)


def test_output_has_the_input_s_shape_and_the_variance_where_learned(net) -> None:
    out = net(*batch(net))
    assert out.shape == (
        N,
        net.in_channels * (2 if net.learn_sigma else 1),
        net.input_size,
        net.input_size,
    )
    assert 1 <= net.guided_channels <= net.in_channels


def test_none_is_full_depth(net) -> None:
    args = batch(net)
    full = net(*args)
    assert torch.equal(full, net(*args, exit_depth=net.depth))
    assert torch.equal(full, net(*args, exit_depth=torch.full((N,), net.depth)))


@torch.no_grad()
def test_each_exit_depth_gives_another_output(net) -> None:
    args = batch(net)
    outs = [net(*args, exit_depth=k) for k in range(net.min_exit_depth, net.depth + 1)]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(outs) for b in outs[:i])


def test_blocks_that_always_run_and_those_that_may_be_dropped_are_all(net) -> None:
    for own in weight_sets(net):
        assert own.fixed_blocks == net.fixed_blocks
        assert own.fixed_blocks + own.depth == len(own.transformer_blocks())
        for depth in range(1, own.depth + 1):
            assert run_at(net, depth).tolist() == run_at(own, depth).tolist()
            assert run_at(net, depth).sum() == own.fixed_blocks + depth


@torch.no_grad()
def test_all_exits_are_those_of_forward_to_the_last_bit_and_run_each_block_once(net) -> None:
    args = batch(net)
    depths = range(net.min_exit_depth, net.depth + 1)
    outs = [net(*args, exit_depth=k) for k in depths]
    calls = []
    for i, block in enumerate(net.droppable_blocks()):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    found = list(net.all_exits(*args))
    assert len(found) == len(depths)
    assert all(torch.equal(a, b) for a, b in zip(found, outs, strict=True))
    assert sorted(calls) == [i for i in range(len(net.droppable_blocks())) if i != idle_of(net)]
    calls.clear()
    next(net.all_exits(*args))
    assert len(calls) == net.min_exit_depth  # nothing is computed before it is asked for
    assert all(torch.equal(a, b) for a, b in zip(Backbone.all_exits(net, *args), outs, strict=True))


@torch.no_grad()
def test_a_sample_in_a_mixed_batch_equals_the_sample_alone(net) -> None:
    args = batch(net)
    mixed = net(*args, exit_depth=MIXED)
    alone = torch.cat(
        [net(*take(args, slice(i, i + 1)), exit_depth=int(MIXED[i])) for i in range(N)]
    )
    assert torch.allclose(mixed, alone, atol=1e-5)
    wrong = torch.cat(
        [net(*take(args, slice(i, i + 1)), exit_depth=int(MIXED[-1 - i])) for i in range(N)]
    )
    assert not torch.allclose(mixed, wrong, atol=1e-3)


@torch.no_grad()
def test_order_within_the_batch_does_not_matter(net) -> None:
    args = batch(net)
    perm = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = net(*take(args, perm), exit_depth=MIXED[perm])
    assert torch.allclose(permuted, net(*args, exit_depth=MIXED)[perm], atol=1e-5)


@torch.no_grad()
def test_a_sample_that_is_done_costs_nothing_in_later_blocks(net) -> None:
    rows: list[int] = []
    for block in net.droppable_blocks():
        block.register_forward_hook(lambda _m, inputs, _out: rows.append(inputs[0].shape[0]))
    net(*batch(net), exit_depth=MIXED)
    assert sum(rows) == 6 + 4 + 3 + 2
    assert isinstance(net, ExitWeights) or rows == [6, 4, 3, 2]
    rows.clear()
    net(*batch(net), exit_depth=3)
    assert rows == [6, 6, 6]


def gradients(net: Backbone, outs_and_rows) -> dict[str, torch.Tensor | None]:
    """Of a weighted sum of the outputs; each sample has its own random weights, whatever batch it
    comes in."""
    net.zero_grad()
    loss = torch.zeros(())
    for out, rows in outs_and_rows:
        for sample, row in zip(out, rows, strict=True):
            loss = (
                loss
                + (
                    sample * torch.randn(sample.shape, generator=torch.Generator().manual_seed(row))
                ).sum()
            )
    loss.backward()
    return {
        n: None if p.grad is None else p.grad.clone()
        for n, p in net.named_parameters()
        if p.requires_grad
    }


def test_gradients_equal_those_of_each_depth_computed_apart(net) -> None:
    args = batch(net)
    mixed = gradients(net, [(net(*args, exit_depth=MIXED), range(N))])
    apart = []
    for depth in MIXED.unique().tolist():
        rows = [i for i in range(N) if MIXED[i] == depth]
        # the whole batch is computed, the others masked out
        apart.append((net(*args, exit_depth=depth)[rows], rows))
    expected = gradients(net, apart)
    for name, grad in expected.items():
        got = mixed[name]
        assert (grad is None) == (got is None), name
        assert grad is None or torch.allclose(got, grad, rtol=1e-4, atol=1e-4), name


def test_a_block_that_never_runs_gets_no_gradient(net) -> None:
    net(*batch(net), exit_depth=torch.tensor([1, 2, 2, 1, 1, 2])).square().sum().backward()
    early = net.exits if isinstance(net, ExitWeights) else net
    for i in range(net.depth):
        named = early.block_at(i).named_parameters()
        body = [p for n, p in named if not n.startswith("skip_linear")]
        assert all(
            (p.grad is not None and p.grad.abs().max() > 0) == (i < 2) for p in body if p.ndim > 1
        )


@pytest.mark.parametrize(
    "exit_depth",
    [
        -1,
        5,
        2.0,
        "3",
        torch.full((N,), 2.0),
        torch.ones(N, dtype=torch.bool),
        torch.full((N - 1,), 2),
        torch.full((N, 1), 2),
        torch.tensor(2),
        torch.tensor([1, 2, 3, 4, 4, 5]),
        torch.tensor([1, 2, 3, 4, 4, -1]),
    ],
    ids=repr,
)
def test_a_wrong_exit_depth_is_refused_before_anything_runs(net, exit_depth) -> None:
    ran: list[int] = []
    net.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(ScheduleError, match=r"exit_depth must .*; got .*; "):
        net(*batch(net), exit_depth=exit_depth)
    assert not ran


def test_min_exit_depth_is_the_smallest_accepted(net) -> None:
    args = batch(net)
    net(*args, exit_depth=net.min_exit_depth)
    with pytest.raises(ScheduleError):
        net(*args, exit_depth=net.min_exit_depth - 1)


def test_labels_must_fit_the_network(net) -> None:
    x_t, t, y = batch(net)
    wrong = [torch.zeros(N, dtype=torch.long)] if y is None else [None, y[:-1], y[:, None]]
    for labels in wrong:
        with pytest.raises(ConfigError, match="; got .*; "):
            net(x_t, t, labels)


@torch.no_grad()
def test_the_null_label_has_an_embedding_of_its_own(net) -> None:
    x_t, t, y = batch(net)
    if not net.has_null_label:
        with pytest.raises((AseSearchError, IndexError)):
            net(x_t, t, torch.full((N,), net.num_classes))
        return
    null = net(x_t, t, torch.full((N,), net.num_classes))
    assert not torch.allclose(null, net(x_t, t, y), atol=1e-3)


def test_config_makes_the_same_network(net) -> None:
    net = net.full if isinstance(net, ExitWeights) else net
    other = type(net)(**net.config)
    assert other.config == net.config
    assert [(k, v.shape) for k, v in other.state_dict().items()] == [
        (k, v.shape) for k, v in net.state_dict().items()
    ]
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(*batch(net)), net(*batch(net)))


def test_block_at_and_time_embedder_are_parts_of_the_network(net) -> None:
    modules = set(net.modules())
    assert len({net.block_at(i) for i in range(net.depth)} & modules) == net.depth
    embedder = net.time_embedder()
    assert embedder is None or (embedder in modules and list(embedder.parameters()))


@torch.no_grad()
def test_a_copy_and_half_precision_run(net) -> None:
    x_t, t, y = batch(net)
    twin = copy.deepcopy(net).bfloat16()
    out = twin(x_t.bfloat16(), t, y, exit_depth=MIXED)
    assert out.dtype == torch.bfloat16
    reference = net(x_t, t, y, exit_depth=MIXED)
    assert (out.float() - reference).abs().max() < 0.1 * reference.abs().max()
