"""Checkpoint files: every format read, nothing executed."""

import argparse
import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file

from asesearch.backbones import read_state_dict
from asesearch.backbones.diffusers_adapter import load_diffusers
from asesearch.backbones.files import resolve
from asesearch.backbones.folders import load_pretrained
from asesearch.errors import CheckpointError, ConfigError

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def same(got, expected=STATE) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in expected)


def test_a_plain_state_dict_is_read(tmp_path) -> None:
    torch.save(OrderedDict(STATE), tmp_path / "x.pt")
    state, source = read_state_dict(tmp_path / "x.pt")
    assert same(state) and source == "weights"
    save_file(STATE, tmp_path / "y.safetensors")
    assert same(read_state_dict(tmp_path / "y.safetensors")[0])


def test_the_format_is_told_by_content_not_by_name(tmp_path) -> None:
    save_file(STATE, tmp_path / "x.pt")
    torch.save(STATE, tmp_path / "y", _use_new_zipfile_serialization=False)  # torch before 1.6
    torch.save(STATE, tmp_path / "z.bin")
    assert all(same(read_state_dict(tmp_path / name)[0]) for name in ("x.pt", "y", "z.bin"))
    for zipped in (True, False):
        torch.save(STATE, tmp_path / "w.safetensors", _use_new_zipfile_serialization=zipped)
        assert same(read_state_dict(tmp_path / "w.safetensors")[0])


def packed_again(path, method: int) -> None:
    """What `torch.save` wrote, unpacked and packed by another program."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def test_a_checkpoint_that_was_packed_again_is_read_or_told_so(tmp_path) -> None:
    path = tmp_path / "net.pt"
    state = {"a.weight": torch.linspace(-1, 1, 4096), "a.bias": torch.zeros(4096)}
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        torch.save(state, path)
        packed_again(path, method)
        assert same(read_state_dict(path)[0], state)
    with pytest.raises(
        RuntimeError, match="not resizable"
    ):  # the control: what mapping makes of it
        torch.load(path, weights_only=True, mmap=True)
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        torch.save(state, path)
        packed_again(path, method)
        with pytest.raises(CheckpointError, match="PyTorch can't read; unpack it, and zip it un"):
            read_state_dict(path)


@pytest.mark.parametrize(("keys", "source"), [(("model", "ema"), "ema"), (("model",), "model")])
def test_of_a_training_state_the_ema_is_taken(tmp_path, keys, source) -> None:
    options = argparse.Namespace(model="DiT-XL/2", image_size=256, results_dir="results")
    parts = {k: {n: v + i for n, v in STATE.items()} for i, k in enumerate(keys)}
    torch.save(
        {**parts, "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "args": options},
        tmp_path / "x.pt",
    )
    state, got = read_state_dict(tmp_path / "x.pt")
    assert got == source and same(state, parts[source])


def test_a_u_vit_training_folder_gives_its_ema(tmp_path) -> None:
    torch.save(STATE, tmp_path / "nnet_ema.pth")
    torch.save({k: v + 1 for k, v in STATE.items()}, tmp_path / "nnet.pth")
    state, source = read_state_dict(tmp_path)
    assert same(state) and source == "ema"


def write_folder(folder, shards) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for name, state in shards.items():
        save_file(state, folder / name)
    index = {"weight_map": {k: name for name, state in shards.items() for k in state}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def test_diffusers_folders_whole_sharded_and_in_a_pipeline(tmp_path) -> None:
    shards = {
        f"diffusion_pytorch_model-{i}.safetensors": {k: STATE[k]} for i, k in enumerate(STATE)
    }
    write_folder(tmp_path / "pipeline" / "transformer", shards)
    assert same(read_state_dict(tmp_path / "pipeline")[0])
    assert same(read_state_dict(tmp_path / "pipeline" / "transformer")[0])
    for suffix, write in (("safetensors", save_file), ("bin", torch.save)):
        folder = tmp_path / suffix
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        write(STATE, folder / f"diffusion_pytorch_model.{suffix}")
        assert same(read_state_dict(folder)[0])


def test_shards_under_official_names_are_read_by_their_index(tmp_path) -> None:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, key in zip(names, STATE, strict=True):
        save_file({key: STATE[key]}, tmp_path / name)
    for given in (tmp_path, tmp_path / names[0]):
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json") as caught:
            read_state_dict(given)
        assert "fetch" in str(caught.value)  # the index, which is missing
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip(STATE, names, strict=True))}))
    assert same(read_state_dict(tmp_path)[0]) and same(read_state_dict(index)[0])
    with pytest.raises(
        CheckpointError,
        match=r"is one of the 2 shards of a network; give the folder, with all of them and "
        r"model\.safetensors\.index\.json$",
    ):
        read_state_dict(tmp_path / names[1])
    (tmp_path / "config.json").write_text("{}")  # of diffusers, whose scheduler tells the betas
    with pytest.raises(CheckpointError, match="is a JSON text; .* the folder that holds both"):
        read_state_dict(index)
    (tmp_path / "config.json").unlink()
    index.write_text(json.dumps({"weight_map": dict.fromkeys(STATE, names[0])}))
    with pytest.raises(CheckpointError, match=f"name all 2 shards .*; got {names[0]}; fetch it"):
        read_state_dict(tmp_path)
    index.write_text(json.dumps({"weight_map": dict(zip(STATE, names, strict=True))}))
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=f"the 2 shards .*; got no {names[1]}; fetch"):
        read_state_dict(index)
    save_file(STATE, tmp_path / "whole-00001-of-00001.safetensors")
    assert same(read_state_dict(tmp_path / "whole-00001-of-00001.safetensors")[0])


def test_a_tensor_in_two_shards_is_refused(tmp_path) -> None:
    names = [f"diffusion_pytorch_model-{i}.safetensors" for i in range(2)]
    write_folder(tmp_path / "net", {n: {k: STATE[k]} for n, k in zip(names, STATE, strict=True)})
    assert same(read_state_dict(tmp_path / "net")[0])
    save_file(STATE | {"a.weight": torch.zeros(2, 3)}, tmp_path / "net" / names[1])
    for load in (read_state_dict, lambda path: load_pretrained(None, path, "network")):
        with pytest.raises(
            CheckpointError, match=rf"got a\.weight in {names[0]} and in {names[1]}"
        ):
            load(tmp_path / "net")


def test_weights_of_a_variant_alone_are_told_how_to_be_read(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file(STATE, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    fix = r"diffusion_pytorch_model\.fp16\.safetensors to diffusion_pytorch_model\.safetensors"
    for load in (read_state_dict, lambda path: load_pretrained(DiTTransformer2DModel, path, "DiT")):
        with pytest.raises(CheckpointError, match=f"a variant, fp16: rename or copy {fix}"):
            load(tmp_path)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text('{"weight_map": {"a.weight": "diffusion_pytorch_model.fp16.safetensors"}}')
    with pytest.raises(
        CheckpointError, match=r"index\.fp16\.json to \S*\.safetensors\.index\.json"
    ):
        read_state_dict(tmp_path)
    index.rename(tmp_path / "diffusion_pytorch_model.safetensors.index.json")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8-sig")  # as some editors save it
    assert same(read_state_dict(tmp_path)[0])
    marked = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    for name in ("config.json", marked.name):
        with pytest.raises(
            CheckpointError, match=f"save its {name} as UTF-8 without a byte order mark"
        ):
            load_pretrained(DiTTransformer2DModel, tmp_path, "DiT")
        (tmp_path / "config.json").write_text("{}")
        marked.write_text(marked.read_text(), encoding="utf-8-sig")
        assert same(read_state_dict(tmp_path)[0])


def test_shards_without_their_index_are_told_what_is_missing(tmp_path) -> None:
    name = "diffusion_pytorch_model"
    for variant in ("", ".fp16"):
        shards = [f"{name}{variant}-0000{i}-of-00002" for i in (1, 2)]
        folder = tmp_path / f"net{variant}"
        write_folder(
            folder,
            {f"{n}.safetensors": {k: STATE[k]} for n, k in zip(shards, STATE, strict=True)},
        )
        assert same(read_state_dict(folder)[0])  # the control: with the index they are read
        (folder / f"{name}.safetensors.index.json").unlink()
        for load in (
            read_state_dict,
            lambda path: load_pretrained(DiTTransformer2DModel, path, ""),
        ):
            with pytest.raises(
                CheckpointError, match=rf"{name}\.safetensors\.index{variant}\.json"
            ):
                load(folder)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text("{}")
    for n, k in zip(shards, STATE, strict=True):
        torch.save({k: STATE[k]}, tmp_path / "bin" / f"{n}.bin")
    with pytest.raises(
        CheckpointError, match="as safetensors: shards of PyTorch files are not read"
    ):
        read_state_dict(tmp_path / "bin")


def test_writing_to_what_was_read_leaves_the_file_alone(tmp_path) -> None:
    torch.save(STATE, tmp_path / "x.pt")
    save_file(STATE, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        state, _ = read_state_dict(tmp_path / name)
        state["a.bias"].mul_(7)
        assert state["a.bias"].tolist() == [7, 7]
        assert same(read_state_dict(tmp_path / name)[0])


class Touch:
    """Pickled, it asks the reader to create a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["raw", "zip", "legacy", "inside"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, kind: str) -> None:
    path = tmp_path / "x.pt"
    mark = tmp_path / "mark"
    bomb = (
        {"model": STATE, "args": argparse.Namespace(a=Touch(mark))}
        if kind == "inside"
        else {"a": Touch(mark)}
    )
    if kind == "raw":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, path, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(CheckpointError, match="asks for code to be run, which is refused"):
        read_state_dict(path)
    assert not mark.exists()
    if kind == "raw":  # the control: it does run where pickles are trusted
        pickle.loads(path.read_bytes())["a"].close()
        assert mark.exists()


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "legacy.pt"])
def test_a_truncated_file_is_refused(tmp_path, name: str) -> None:
    if name.endswith("pt"):
        torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=name == "x.pt")
    else:
        save_file(STATE, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for size in (0, 1, 8, 9, len(whole) // 2, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=name):
            read_state_dict(tmp_path / name)


def test_what_is_no_checkpoint_is_refused(tmp_path) -> None:
    (tmp_path / "text").write_text("a picture of a cat\n")
    (tmp_path / "noise").write_bytes(bytes(range(256)) * 8)
    torch.save([1, 2], tmp_path / "list")
    torch.save({"a": 1}, tmp_path / "numbers")
    torch.save({}, tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    for name in ("text", "noise", "list", "numbers", "nothing", "folder", "absent"):
        with pytest.raises(CheckpointError, match=name):
            read_state_dict(tmp_path / name)


def archive(kind: str) -> bytes:
    """A whole checkpoint in an archive."""
    data = io.BytesIO()
    inner = io.BytesIO()
    torch.save(STATE, inner)
    if kind == "zip":
        with zipfile.ZipFile(data, "w") as file:
            file.writestr("model/net.pt", inner.getvalue())
    else:
        with tarfile.open(fileobj=data, mode="w") as file:
            file.addfile(tarfile.TarInfo("net.pt"))
    return data.getvalue()


def script() -> bytes:
    """As `torch.jit.save` writes, which warns."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            file.writestr(f"net/{name}", b"")
    return data.getvalue()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 2700000000\n"
FOREIGN = {
    "pointer": (
        POINTER.format("a" * 64).encode(),
        r"is a Git LFS pointer .* 2,700,000,000 bytes .* `git lfs pull`",
    ),
    "pointer cut short": (
        POINTER[:50].encode(),
        "is a Git LFS pointer to the file; run `git lfs pull`",
    ),
    "page": (b"<!doctype html><html>Sign in</html>", "is a web page; download the file itself"),
    "page with a title": (
        b"\xef\xbb\xbf\n <HTML>\n<Title> 404 </title>" + b"x" * 9000,
        r"is a web page \('404'\)",
    ),
    "page after a comment": (b"<!-- \xc3\xa9 --><html></html>", "is a web page"),
    "error": (
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        "an XML text, often a server's error message",
    ),
    "bare error": (b"<Error><Code>AccessDenied</Code></Error>", "an XML text"),
    "drawing": (b"<?xml version='1.0'?><svg><path d=''/></svg>", "is an SVG drawing; convert it"),
    "bare drawing": (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "is an SVG drawing"),
    "json": (b'{"error": "gated"}', "is a JSON text; give the file of weights"),
    "json with a brace where safetensors has one": (b'{"abcde":{"a": 1}}', "is a JSON text"),
    "text": (
        b"a picture of a cat\n",
        "is a text that begins 'a picture of a cat'; give the checkpoint",
    ),
    "toml": (b"[backbone]\nkind = 'dit'\n", r"is a text that begins '\[backbone\]'"),
    "nothing": (b"", "is empty; download it again"),
    "zeros": (bytes(9000), "begins with nothing but zeros, as an unfinished download does"),
    "gzip": (gzip.compress(b"x" * 99), "is a gzip archive; unpack it"),
    "bzip2": (bz2.compress(b"x" * 99), "is a bzip2 archive; unpack it"),
    "xz": (lzma.compress(b"x" * 99), "is a xz archive; unpack it"),
    "tar": (archive("tar"), "is a tar archive; unpack it"),
    "zip": (archive("zip"), r"is a zip archive of model/net\.pt; unpack it"),
    "zip cut short": (script()[:-30], "is cut short after .* bytes, as an unfinished download is"),
    "npz": (b"", r"is an archive of NumPy arrays \(\.npz\); convert it"),
    "script": (script(), "is a TorchScript program; save its state dict"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(30), "is a PNG image; convert it"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(30), "is an HDF5 file"),
    "noise": (bytes(range(3, 256)) * 9, "begins with the bytes 03 04 05 06 07 08 09 0a; give"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_what_is_no_checkpoint_is_named(tmp_path, kind: str, name: str) -> None:
    data, rule = FOREIGN[kind]
    (tmp_path / name).write_bytes(data)
    if kind == "npz":
        with (tmp_path / name).open("wb") as file:
            np.savez(file, weight=np.zeros(3))
    with pytest.raises(CheckpointError, match=rule) as caught:
        read_state_dict(tmp_path / name)
    assert (
        name in str(caught.value)
        and "weights_only" not in str(caught.value)
        and "\n" not in str(caught.value)
    )


@pytest.mark.parametrize("kind", ["pointer", "page", "nothing", "gzip"])
def test_what_stands_in_a_diffusers_folder_in_place_of_weights_is_named(
    tmp_path, kind: str
) -> None:
    data, rule = FOREIGN[kind]
    (tmp_path / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(data)
    for load in (read_state_dict, load_diffusers):
        with pytest.raises(CheckpointError, match=rule):
            load(tmp_path)
    if kind in ("pointer", "page"):
        (tmp_path / "config.json").write_bytes(data)
        for load in (read_state_dict, load_diffusers):
            with pytest.raises(CheckpointError, match=f"config.json {rule}"):
                load(tmp_path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_an_unfinished_download_is_called_so(tmp_path, kind: str) -> None:
    path = tmp_path / "net"
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(
            CheckpointError, match="unfinished download.*; download it again"
        ) as caught:
            read_state_dict(path)
        assert f"{size:,} bytes" in str(caught.value)


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch) -> None:
    torch.save(STATE, tmp_path / "net.pt")

    def denied(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)
    with pytest.raises(
        CheckpointError, match=r"can't read .*net\.pt: Permission denied; check its permissions"
    ):
        read_state_dict(tmp_path / "net.pt")


class Holder:
    """Of no danger, but not plain tensors either."""


def test_what_a_refused_pickle_asks_for_is_named_without_advice_to_trust_it(tmp_path) -> None:
    torch.save({"model": STATE, "trainer": Holder()}, tmp_path / "net.pt")
    with pytest.raises(
        CheckpointError,
        match=r"refused \(it needs \S*test_files\.Holder\); where it was made, save",
    ) as caught:
        read_state_dict(tmp_path / "net.pt")
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "index", ["[]", "{", "{}", '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": "gone"}}']
)
def test_a_damaged_folder_is_refused(tmp_path, index: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(STATE, tmp_path / "x")  # outside of the folder
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="must hold diffusion_pytorch_model"):
        read_state_dict(folder)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError):
        read_state_dict(folder)
    (folder / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        read_state_dict(folder)


def test_shipped_names_resolve_within_the_package_only() -> None:
    for name in ("shipped:no-such-network", "shipped:../errors", "shipped:fashion-cnn", "shipped:"):
        with pytest.raises(ConfigError, match="no shipped network is called"):
            resolve(name)


def flipped(path, name: str) -> None:
    """Turn one bit round in the middle of a record."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{path.stem}/{name}")
    data = bytearray(path.read_bytes())
    extra = int.from_bytes(data[member.header_offset + 28 : member.header_offset + 30], "little")
    begin = member.header_offset + 30 + len(member.filename) + extra
    data[begin + member.file_size // 2] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("record", "named"), [("data/1", "blocks.0.weight"), ("version", "net/version")]
)
def test_bytes_that_changed_since_they_were_written_are_told(tmp_path, record, named) -> None:
    path = tmp_path / "net.pt"
    state = {f"blocks.{i}.weight": torch.randn(40, 40) for i in range(2)}
    state = {
        "x_embedder.proj.weight": torch.randn(9, 9),
        **state,
        "twice": state["blocks.1.weight"],
    }
    torch.save({"ema": state, "opt": {"exp_avg": torch.randn(50, 50)}}, path)
    read_state_dict(path)
    flipped(path, "data/3")  # of the optimizer, which nobody reads
    assert len(read_state_dict(path)[0]) == 4
    flipped(path, record)
    with pytest.raises(CheckpointError, match=rf"got others in {named}, by the CRC-32 in the file"):
        read_state_dict(path)


@pytest.mark.parametrize("how", ["no crc", "skipped", "other order", "packed"])
def test_what_has_no_crc_of_its_numbers_is_not_damaged(tmp_path, how, monkeypatch) -> None:
    path = tmp_path / "net.pt"
    state = {"blocks.0.weight": torch.randn(40, 40)}
    if how == "no crc":
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(state, path)
        finally:
            torch.serialization.set_crc32_options(True)
    elif how == "skipped":
        with torch.serialization.skip_data():
            torch.save(state, path)
    else:
        torch.save(state, path)
    if how == "other order":
        flipped(path, "data/0")
        monkeypatch.setattr("asesearch.backbones.intact.sys.byteorder", "big")
    if how == "packed":
        packed_again(path, zipfile.ZIP_DEFLATED)
    assert list(read_state_dict(path)[0]) == list(state)


def test_a_whole_pickle_is_not_called_damaged(tmp_path) -> None:
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"is a pickle that torch\.save did not write; save"):
        read_state_dict(tmp_path / "net.pkl")
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({"a": 1})[:-1])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        read_state_dict(tmp_path / "net.pkl")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["model.safetensors", "optimizer.bin"], r", but model\.safetensors; give the file that"),
        (
            ["global_step9/mp_rank_00_model_states.pt", "latest"],
            r"DeepSpeed; give \S+global_step9/mp_",
        ),
        (["__0_0.distcp", ".metadata"], r"distributed checkpoint .*dcp_to_torch \S+ FILE\.pt, and"),
        (
            ["optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/__0_0.distcp"],
            r"dcp_to_torch \S+/pytorch_model_fsdp_0 FILE\.pt, and",
        ),
        (["snapshots/abc/transformer/config.json", "refs/main"], r"Hugging Face; give \S+/abc$"),
        ([], r"got no config\.json; check the path"),
    ],
)
def test_where_the_weights_of_a_folder_without_config_are_is_told(tmp_path, names, told) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for read in (read_state_dict, load_diffusers):
        with pytest.raises(CheckpointError, match=told):
            read(tmp_path)


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("model.safetensors", r"give \S+/model\.safetensors itself$"),
        ("pytorch_model.bin", r"give \S+/pytorch_model\.bin itself$"),
        ("model-00001-of-00002.safetensors", r"take config\.json out of the folder$"),
    ],
)
def test_a_config_of_another_library_is_told(tmp_path, name: str, fix: str) -> None:
    (tmp_path / "config.json").write_text('{"num_heads": 2}')  # as PyTorchModelHubMixin
    (tmp_path / name).touch()
    (tmp_path / "optimizer.bin").touch()
    with pytest.raises(CheckpointError, match=rf"_class_name; got none beside {name}; .*{fix}"):
        read_state_dict(tmp_path)


def test_an_index_that_names_the_wrong_shard_is_told_by_what_is_missing(tmp_path) -> None:
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=3,
    )
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    path = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = min(index["weight_map"].values())
    lost = max(name for name, shard in index["weight_map"].items() if shard != first)
    only = index["weight_map"][lost]
    index["weight_map"] = {k: first if v == only else v for k, v in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"must fit its config; got \{'missing_keys': \['"):
        load_diffusers(tmp_path)
    model, unfit = load_pretrained(DiTTransformer2DModel, tmp_path, "DiT")
    assert lost in unfit["missing_keys"] and list(unfit) == ["missing_keys"]
