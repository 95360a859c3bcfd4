"""A network as one ONNX graph: each block behind an `If` on the exit depth, all weights in one
file beside it.

The parts of the network (`asesearch.deployment.parts`) are exported once each, as ONNX functions of
their weights; the graph calls the block's function once for each block. So the graph does not grow
with the weights, and no weight is stored twice, whatever depths a schedule uses. Where early exits
have weights of their own, one more `If` chooses between them and those for full depth.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor

from asesearch.backbones.base import Backbone, check_schedule
from asesearch.backbones.exit_weights import EXITS, weight_sets
from asesearch.deployment.bundle import Bundle
from asesearch.deployment.onnx_runtime import (
    EXIT_DEPTH,
    FILES,
    FORMAT,
    GRAPH,
    OUTPUT,
    PARITY,
    VERSION,
    WEIGHTS,
    Network,
)
from asesearch.deployment.parity import make_parity
from asesearch.deployment.parts import Part, Parts, cut
from asesearch.deployment.writing import whole_folder, write_manifest
from asesearch.diffusion import make_diffusion

OPSET = 20
DOMAIN = "asesearch"
IR_VERSION = 10
ALIGNMENT = 64  # bytes, of a weight in the file


@dataclass(frozen=True)
class Exported:
    """A part as an ONNX function.

    Attributes:
        function: of the tensors, then the weights.
        weights: names of the weights it takes, in its order, as in `Part.weights`.
        turned: those that it takes transposed.
    """

    function: onnx.FunctionProto
    weights: tuple[str, ...]
    turned: frozenset[str]


def export_part(part: Part, name: str, tensors: Sequence[Tensor]) -> Exported:
    """Export a part with an example of its tensors, N first in each."""
    pure = part.pure()
    weights = list(part.weights().values())
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            pure,
            (*tensors, weights),
            dynamo=True,
            dynamic_shapes=((*({0: batch} for _ in tensors), [None] * len(weights)),),
            opset_version=OPSET,
            verbose=False,
        )
    graph = program.model_proto.graph
    names = [value.name for value in graph.input]
    given = dict(zip(names[len(tensors) :], part.weights(), strict=True))
    nodes, turned = _turn(graph.node, set(given))
    nodes = [*map(_constant, graph.initializer), *nodes]
    used = {i for node in nodes for i in node.input}
    taken = [value for value in given if value in used]
    function = helper.make_function(
        DOMAIN,
        name,
        [*names[: len(tensors)], *taken],
        [value.name for value in graph.output],
        nodes,
        [helper.make_opsetid("", OPSET)],
    )
    return Exported(
        function,
        tuple(given[value] for value in taken),
        frozenset(given[value] for value in turned),
    )


def _turn(nodes: Iterable[Any], weights: set[str]) -> tuple[list[Any], set[str]]:
    """Drop the transpositions of weights that are used in no other way; their names."""
    nodes = list(nodes)
    uses: dict[str, list[Any]] = {name: [] for name in weights}
    for node in nodes:
        for name in set(node.input) & weights:
            uses[name].append(node)
    turned = {
        name
        for name, users in uses.items()
        if users and all(u.op_type == "Transpose" and len(u.attribute[0].ints) == 2 for u in users)
    }
    dropped = {node.output[0]: node.input[0] for name in turned for node in uses[name]}
    kept = []
    for node in nodes:
        if node.output[0] in dropped:
            continue
        for i, name in enumerate(node.input):
            node.input[i] = dropped.get(name, name)
        node.ClearField("metadata_props")  # where it came from in this machine's source
        kept.append(node)
    return kept, turned


def _constant(tensor: Any) -> Any:
    return helper.make_node("Constant", [], [tensor.name], value=tensor)


def write_onnx(bundle: Bundle, folder: Path, *, overwrite: bool = False) -> Path:
    """Write a bundle as an ONNX folder, see `asesearch.deployment.onnx_runtime`; it appears whole
    or not at all.

    Raises:
        CheckpointError, WriteError: see `asesearch.deployment.writing.check_bundle_dir`.
        ConfigError: a network that is not cut into parts.
        ScheduleError: the schedule does not fit the network.
    """
    folder = Path(folder)
    diffusion = make_diffusion(bundle.diffusion)
    check_schedule(bundle.backbone, diffusion.num_train_timesteps, bundle.schedule)
    net = bundle.backbone.cpu()
    parts = [cut(own, diffusion.time_dtype) for own in weight_sets(net)]
    with whole_folder(folder, overwrite=overwrite) as part:
        write_graph(parts, part)
        tensors = make_parity(net, bundle.schedule, diffusion.num_train_timesteps, bundle.prompts)
        save_file(tensors, part / PARITY)
        own = {
            "format": FORMAT,
            "version": VERSION,
            "opset": OPSET,
            "network": network_of(net).model_dump(),
        }
        write_manifest(part, own, bundle, FILES)
    return folder


def network_of(net: Backbone) -> Network:
    """What a sampler without torch must know of a network."""
    return Network(
        name=type(weight_sets(net)[0]).__name__,
        parameters=sum(p.numel() for p in net.parameters()),
        depth=net.depth,
        min_exit_depth=net.min_exit_depth,
        in_channels=net.in_channels,
        input_size=net.input_size,
        num_classes=net.num_classes,
        has_null_label=net.has_null_label,
        guided_channels=net.guided_channels,
        learn_sigma=net.learn_sigma,
        fixed_blocks=net.fixed_blocks,
    )


def write_graph(sets: Sequence[Parts], folder: Path) -> None:
    """Write `GRAPH` and `WEIGHTS` of a network, or of the two for full depth and for early exits,
    into a folder.

    Inputs are those of the parts, and `exit_depth`, an int64 without dimensions; the output is
    `output` (N, C or 2·C, H, W) float32.
    """
    parts = sets[0]
    with torch.no_grad():
        first = _example(parts.before, list(parts.inputs.values()))
    x, fixed = first[0], first[1 : 1 + parts.num_fixed]
    used = {
        "Before": export_part(parts.before, "Before", list(parts.inputs.values())),
        "Block": export_part(parts.blocks[0], "Block", [x, *fixed]),
        "After": export_part(parts.after, "After", [x, *fixed]),
    }
    if parts.merges:
        used["Merge"] = export_part(parts.merges[0], "Merge", [x, x.clone()])
    with closing(_Builder(folder, used)) as builder:
        nodes = _nodes(parts, builder) if len(sets) == 1 else _choosing(sets, builder)
    inputs = [
        helper.make_tensor_value_info(name, _TYPES[value.dtype], ["N", *value.shape[1:]])
        for name, value in parts.inputs.items()
    ]
    inputs.append(helper.make_tensor_value_info(EXIT_DEPTH, TensorProto.INT64, []))
    output = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["N", None, None, None])
    graph = helper.make_graph(nodes, "network", inputs, [output], builder.initializers)
    model = helper.make_model(
        graph,
        functions=[exported.function for exported in used.values()],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=IR_VERSION,
        producer_name="asesearch",
    )
    (folder / GRAPH).write_bytes(model.SerializeToString())


def _example(part: Part, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    out = part.compute(*tensors)
    return out if isinstance(out, tuple) else (out,)


_TYPES = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64}


class _Builder:
    """Calls of the parts' functions, and the weights they bring."""

    def __init__(self, folder: Path, used: dict[str, Exported]) -> None:
        self.used = used
        self.initializers: list[Any] = []
        self.prefix = ""  # of the names of weights
        self._known: dict[tuple[int, bool], str] = {}  # by place in memory and whether turned
        self._file = (folder / WEIGHTS).open("wb")

    def call(self, name: str, part: Part, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
        """A call of the function `name` with the weights of a part."""
        exported = self.used[name]
        weights = part.weights()
        given = [
            self._store(self.prefix + part.prefix + key, weights[key], key in exported.turned)
            for key in exported.weights
        ]
        return helper.make_node(name, [*inputs, *given], list(outputs), domain=DOMAIN)

    def _store(self, name: str, value: Tensor, turned: bool) -> str:
        """Write a weight, once; its name in the graph."""
        place = (value.data_ptr(), turned)
        if place in self._known:
            return self._known[place]
        name += ".T" * turned
        self._known[place] = name
        array = (value.T if turned else value).cpu().contiguous().numpy()
        offset = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
        self._file.write(b"\0" * (offset - self._file.tell()))
        self._file.write(array.data)
        tensor = TensorProto(name=name, data_type=_TYPES[value.dtype], dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, entry in (
            ("location", WEIGHTS),
            ("offset", str(offset)),
            ("length", str(array.nbytes)),
        ):
            tensor.external_data.add(key=key, value=entry)
        self.initializers.append(tensor)
        return name

    def close(self) -> None:
        """All weights are written."""
        self._file.close()


def _choosing(sets: Sequence[Parts], builder: _Builder) -> list[Any]:
    """The network for full depth, or that for early exits, as the exit depth says."""
    branches: list[Any] = []
    for parts, prefix in zip(sets, ("", EXITS), strict=True):
        builder.prefix = prefix
        output = f"{OUTPUT}_{len(branches)}"
        made = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        nodes = _nodes(parts, builder, output)
        branches.append(helper.make_graph(nodes, f"network_{len(branches)}", [], [made]))
    last = numpy_helper.from_array(np.array(len(sets[0].blocks) - 1, dtype=np.int64), "last")
    return [
        helper.make_node("Constant", [], ["last"], value=last),
        helper.make_node("Greater", [EXIT_DEPTH, "last"], ["is_full"]),
        helper.make_node(
            "If", ["is_full"], [OUTPUT], then_branch=branches[0], else_branch=branches[1]
        ),
    ]


def _nodes(parts: Parts, builder: _Builder, output: str = OUTPUT) -> list[Any]:
    """Before, the blocks each behind an `If`, after."""
    fixed = [f"fixed_{i}" for i in range(parts.num_fixed)]
    skips = [f"skip_{i}" for i in range(len(parts.merges))]
    nodes = [builder.call("Before", parts.before, list(parts.inputs), ["x_0", *fixed, *skips])]
    x = "x_0"
    for i, block in enumerate(parts.blocks):
        if parts.merges:
            nodes.append(builder.call("Merge", parts.merges[i], [x, skips[i]], [f"merged_{i}"]))
            x = f"merged_{i}"
        run = builder.call("Block", block, [x, *fixed], [f"run_{i}"])
        leave = helper.make_node("Identity", [x], [f"left_{i}"])
        index = numpy_helper.from_array(np.array(i, dtype=np.int64), f"index_{i}")
        nodes.append(helper.make_node("Constant", [], [f"index_{i}"], value=index))
        nodes.append(helper.make_node("Greater", [EXIT_DEPTH, f"index_{i}"], [f"runs_{i}"]))
        nodes.append(
            helper.make_node(
                "If",
                [f"runs_{i}"],
                [f"x_{i + 1}"],
                then_branch=_branch(run, f"block_{i}"),
                else_branch=_branch(leave, f"no_block_{i}"),
            )
        )
        x = f"x_{i + 1}"
    nodes.append(builder.call("After", parts.after, [x, *fixed], [output]))
    return nodes


def _branch(node: Any, name: str) -> Any:
    tokens = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
    return helper.make_graph([node], name, [], [tokens])
