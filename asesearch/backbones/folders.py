"""Folders as `save_pretrained` of diffusers and transformers writes them: where they are, what
their config.json says, and which files hold the weights. Nothing here imports those libraries."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from asesearch.errors import CheckpointError, in_one_line
from asesearch.files import check_utf8, has_mark, loads, read_text
from asesearch.foreign import foreign

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model"
INDEX = ".safetensors.index.json"  # ends the name of a file that tells which shard holds what
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
#: Released DiT and PixArt folders name the class they were first made with; its `norm_type` tells
#: which is meant.
LEGACY_CLASS = "Transformer2DModel"
LEGACY_NORMS = {
    "ada_norm_zero": "DiTTransformer2DModel",
    "ada_norm_single": "PixArtTransformer2DModel",
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def find_folder(path: Path, component: str) -> Path:
    """`path`, or its subfolder `component` where `path` is a whole pipeline's folder.

    Raises:
        CheckpointError: neither has a config.json.
    """
    for folder in (path, path / component):
        if (folder / CONFIG).is_file():
            return folder
    raise CheckpointError(
        f"{path} must hold {CONFIG} and weights, itself or in {component}/; got no {CONFIG}"
        f"{_instead(path, component)}"
    )


def has_config(path: Path) -> bool:
    """Whether a folder is that of a transformer, or of a whole pipeline with one."""
    return any((folder / CONFIG).is_file() for folder in (path, path / "transformer"))


def find_index(path: Path) -> Path | None:
    """The index of the shards that a folder holds without a config.json; None where it has a
    config.json, or no index, or several."""
    if has_config(path):
        return None
    found = list(path.glob(f"[!.]*{INDEX}"))
    return found[0] if len(found) == 1 else None


def shards_of(index: Path) -> list[str]:
    """Names of the shards of an index, which are all there.

    Raises:
        CheckpointError: one is missing or something else, or the index is damaged.
    """
    names = _shards(index)
    folder = index.parent
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} must hold the {len(names)} shards that {index.name} names; got no "
            f"{', '.join(missing[:3])}; fetch them too"
        )
    count = max(int(m[2]) if (m := _SHARD.fullmatch(name)) else 0 for name in names)
    if count > len(names):
        raise CheckpointError(
            f"{index} must name all {count} shards of its network; got {', '.join(names[:3])}; "
            "fetch it again, or save the model again"
        )
    for name in names:
        if (what := foreign(folder / name, plain_text=False)) is not None:
            raise CheckpointError(f"{folder / name} {what}")
    _refuse_doubled(folder, names)
    return names


def refuse_shard(path: Path) -> None:
    """Refuse one shard of several, by its name.

    Raises:
        CheckpointError: saying what to give instead.
    """
    found = _SHARD.fullmatch(path.name)
    if found is None or int(found[2]) < 2:
        return
    index = path.with_name(f"{found[1]}{INDEX}")
    raise CheckpointError(
        f"{path} is one of the {int(found[2])} shards of a network; give the folder, with all of "
        f"them and {index.name}{'' if index.is_file() else ', which is missing: fetch it too'}"
    )


def _instead(path: Path, component: str) -> str:
    """What a folder without config.json holds, where its weights are in it, and what to do."""
    names: list[str] = []
    with suppress(OSError):  # it may be entered, but not listed
        names = sorted(p.name for p in path.iterdir())
    snapshots = [p for p in path.glob("snapshots/*") if p.is_dir()]
    states = sorted(path.glob("global_step*/*model_states.pt"), key=os.path.getmtime)
    files = [name for name in names if Path(name).suffix in (".safetensors", *_PICKLES)]
    files = [name for name in files if not name.startswith((".", "optimizer", "scheduler"))]
    if snapshots:
        return f", as in a cache of Hugging Face; give {max(snapshots, key=os.path.getmtime)}"
    if (place := _distributed(path)) is not None:
        return (
            ", but a distributed checkpoint (.distcp); join it, python -m torch.distributed."
            f"checkpoint.format_utils dcp_to_torch {place} FILE.pt, and give that file"
        )
    if states and component == "transformer":
        return (
            f", but a checkpoint of DeepSpeed; give {states[-1]}, or with ZeRO-3 the file that "
            "zero_to_fp32.py makes"
        )
    if any(_SHARD.fullmatch(name) for name in files) and (fix := _naming_fix(path)):
        return f", but {', '.join(files[:3])}; {fix}"
    if files and component == "transformer":
        return (
            f", but {', '.join(files[:3])}; give the file that holds the network, or put "
            f"{CONFIG} beside it where it is diffusers'"
        )
    return "; check the path, or save the model or pipeline there with save_pretrained"


def _distributed(path: Path) -> Path | None:
    """Where a folder holds the network in a distributed checkpoint: itself, or one in it, as
    accelerate's `pytorch_model_fsdp_0`."""
    if next(path.glob("*.distcp"), None) is not None:
        return path
    inner = sorted({p.parent for p in path.glob("*/*.distcp")})
    return next((p for p in inner if not p.name.startswith("optim")), None)


def read_config(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """What the folder's config.json says, or its file of another name.

    Raises:
        CheckpointError: unreadable, or no JSON object.
    """
    path = folder / name
    try:
        data = loads(read_text(path))
    except ValueError as error:  # a ConfigError is one
        what = foreign(path, plain_text=False) if path.is_file() else None
        raise CheckpointError(
            f"{path} {what or f'is not readable JSON: {error}; fetch it again'}"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object; got {type(data).__name__}; fetch it again"
        )
    return data


def class_name(config: Mapping[str, Any]) -> object:
    """The class a config names, today's name for a legacy one; anything where it names none."""
    name = config.get("_class_name")
    if name == LEGACY_CLASS:
        return LEGACY_NORMS.get(str(config.get("norm_type")), name)
    return name


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a diffusers network's weights: one, or the shards of an index.

    Args:
        folder: with all of them in it; a .bin file counts where there are no safetensors.

    Raises:
        CheckpointError: a file is missing or something else, or the index is damaged.
    """
    names = [f"{WEIGHTS}.safetensors"]
    index = folder / f"{WEIGHTS}{INDEX}"
    if index.is_file():
        names = _shards(index)
    elif not (folder / names[0]).is_file() and (folder / f"{WEIGHTS}.bin").is_file():
        names = [f"{WEIGHTS}.bin"]
    missing = [name for name in names if not (folder / name).is_file()]
    for name in names:
        if name not in missing and (what := foreign(folder / name, plain_text=False)) is not None:
            raise CheckpointError(f"{folder / name} {what}")
    if missing:
        _refuse_unnamed(folder)
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        fix = f"call a PyTorch file {WEIGHTS}.bin" if pickled else f"copy them beside {CONFIG}"
        if any("-of-" in name for name in pickled):
            fix = "save the model again, as safetensors: shards of PyTorch files are not read"
        fix = _naming_fix(folder) or fix
        raise CheckpointError(
            f"{folder} must hold {', '.join(missing[:3])}; got {pickled[:3] or 'no such files'}; "
            f"{fix}"
        )
    if len(names) > 1:
        _refuse_doubled(folder, names)
    return names


def _index_of(variant: str) -> str:
    """How the name of a variant's index ends, such as fp16's; an empty name stands for none."""
    return INDEX.replace(".json", f".{variant}.json") if variant else INDEX


def _refuse_unnamed(folder: Path) -> None:
    """Refuse a folder whose config.json is not of diffusers, such as that of a class with
    huggingface_hub's PyTorchModelHubMixin, by the weights that lie beside it.

    Raises:
        CheckpointError: as said.
    """
    if class_name(read_config(folder)) is not None:
        return
    others = ("optimizer", "scheduler", ".")
    found = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", *_PICKLES)]
    files = [p for p in found if not p.name.startswith(others)]
    if not files or any(p.name.startswith(WEIGHTS) for p in files):
        return
    fix = f"where its names are the official ones, give {files[0]} itself"
    if any(_SHARD.fullmatch(p.name) for p in files):
        fix = f"where its names are the official ones, take {CONFIG} out of the folder"
    raise CheckpointError(
        f"{folder / CONFIG} must name the class of diffusers, _class_name; got none beside "
        f"{', '.join(p.name for p in files[:3])}; {fix}"
    )


def _naming_fix(folder: Path) -> str:
    """What to do in a folder with shards whose index is missing, or with the weights of a variant
    alone, such as fp16; empty elsewhere."""
    for path in sorted(folder.glob("*-*-of-*.safetensors")):
        stem, _, kind = path.name.rsplit("-", 3)[0].partition(".")
        index = f"{stem}{_index_of(kind)}"
        if stem and not (folder / index).exists():
            return f"fetch {index} too, which tells what is in {path.name} and the other shards"
    indexes = sorted(folder.glob(f"*{_index_of('*')}"))
    for path in [*indexes, *sorted(folder.glob("*.*.safetensors"))]:
        *name, variant, suffix = path.name.split(".")
        plain = ".".join([*name, suffix])
        if name[0] and not (folder / plain).exists():
            return f"the weights are a variant, {variant}: rename or copy {path.name} to {plain}"
    return ""


def _refuse_doubled(folder: Path, names: Sequence[str]) -> None:
    """Refuse shards of which two hold a tensor of one name: nobody knows which is meant.

    Raises:
        CheckpointError: naming tensor and files.
    """
    holder: dict[str, str] = {}
    for name in names:
        # a damaged one is refused where its tensors are read
        with suppress(SafetensorError), safe_open(folder / name, "pt") as file:
            for tensor in file.keys():  # noqa: SIM118 (not a dict)
                if tensor in holder:
                    raise CheckpointError(
                        f"{folder} must hold each tensor once; got {tensor} in {holder[tensor]} "
                        f"and in {name}; fetch the folder again, or save the model again"
                    )
                holder[tensor] = name


def _shards(index: Path) -> list[str]:
    """The files of an index, each once."""
    try:
        found = loads(read_text(index))["weight_map"].values()
        names = list(dict.fromkeys(found))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} must map names to files; got {error!r}; save the model again"
        ) from error
    elsewhere = [
        name
        for name in names
        if not isinstance(name, str)
        or Path(name).name != name
        or Path(name).suffix != ".safetensors"
    ]
    if elsewhere or not names:
        raise CheckpointError(
            f"{index} must name safetensors files beside it; got {elsewhere[:3] or 'none'}; save "
            "the model again"
        )
    return names


def refuse_quantised_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a network that was saved quantised, as its config says, before a library looks for
    what runs such ones.

    Raises:
        CheckpointError: as said.
    """
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise CheckpointError(
            f"{path} must be of floating-point weights; got a quantization_config"
            f"{f' ({method})' if method else ''}; give the folder from before the quantisation"
        )


def _refuse_quantised(folder: Path) -> None:
    """Refuse weights of eight bits or fewer, which would be read as the numbers that they are.

    Raises:
        CheckpointError: naming one.
    """
    for path in sorted(folder.glob("*.safetensors")):
        # what is no such file beside the weights, as a Mac's "._…", was not read
        with suppress(SafetensorError), safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                kind = file.get_slice(name).get_dtype()
                if kind in ("I8", "U8") or kind.startswith(("F4", "F6", "F8")):
                    raise CheckpointError(
                        f"{path} must hold floating-point weights of 16 bits or more; got {name} "
                        f"of {kind}, as quantised networks have; give the weights from before the "
                        "quantisation"
                    )


@contextmanager
def _quiet(cls: Any) -> Iterator[None]:
    """Silence what a class's library says of weights that don't fit: it is returned or raised too,
    and false where `module.` is taken off their names afterwards."""
    logger = logging.getLogger(cls.from_pretrained.__module__)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_pretrained(
    cls: Any, folder: Path, what: str, **options: Any
) -> tuple[nn.Module, dict[str, list[str]]]:
    """A network from a local folder by its class's `from_pretrained`: nothing is downloaded,
    nothing unpickled.

    Args:
        cls: of diffusers or transformers.
        folder: with config.json and safetensors.
        what: the network in words, for the error.
        options: further arguments of `from_pretrained`.

    Returns:
        The network, and the names of the tensors that don't fit: `missing_keys`,
        `unexpected_keys`, `mismatched_keys`; those without entries are left out.

    Raises:
        CheckpointError: unreadable, quantised, or not safetensors; or a path that is not UTF-8.
    """
    check_utf8(folder, "weights", CheckpointError)
    for index in folder.glob(f"*{INDEX}"):
        _refuse_doubled(folder, [name for name in _shards(index) if (folder / name).is_file()])
    config: Mapping[str, Any] = {}
    with suppress(CheckpointError):  # an unreadable one is told below
        config = read_config(folder)
    refuse_quantised_config(folder / CONFIG, config)
    try:
        with _quiet(cls):
            net, info = cls.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # of damaged files it raises anything
        for path in sorted(folder.glob("[!.]*.safetensors")):
            with suppress(OSError):
                if (told := foreign(path, plain_text=False)) is not None:
                    raise CheckpointError(f"{path} {told}") from error
        reason = in_one_line(error)
        fix = _naming_fix(folder) or "fetch it again, or save it with save_pretrained"
        for path in (folder / CONFIG, *folder.glob(f"*{INDEX}")):
            if has_mark(path):
                fix = f"save its {path.name} as UTF-8 without a byte order mark"
        raise CheckpointError(
            f"{folder} must hold a readable {what} with its weights in safetensors; got {reason}; "
            f"{fix}"
        ) from error
    _refuse_quantised(folder)
    unfit = {key: set(map(str, info[key])) for key in ("unexpected_keys", "mismatched_keys")}
    # where an index names the wrong shard, nothing is said and nothing is read
    empty = {name for name, value in net.state_dict().items() if value.is_meta}
    unfit["missing_keys"] = (set(map(str, info["missing_keys"])) | empty) - unfit["mismatched_keys"]
    return net, {key: sorted(names) for key, names in unfit.items() if names}
