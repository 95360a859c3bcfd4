"""Study files: their text, the types in them, and names that fit a file system."""

import json
from pathlib import Path

import pytest

from asesearch.config import load_study, parse_study
from asesearch.errors import ConfigError

BASE = """name = "tiny"
[backbone]
kind = "dit"
[data]
kind = "fashion-mnist"
{data}
[train]
{train}
[search]
{search}
[sampling]
{sampling}
[confirm]
{confirm}
"""
SECTIONS = ("data", "train", "search", "sampling", "confirm")


def study(tmp_path, encoding="utf-8", name="tiny", **sections):
    text = BASE.format(**{**dict.fromkeys(SECTIONS, ""), **sections})
    path = tmp_path / "study.toml"
    path.write_bytes(text.replace("tiny", name).encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_file_of_any_marked_encoding_is_read(tmp_path, encoding):
    path = study(tmp_path, encoding, train="batch_size = 3 # é", data='path = "Bilder/Äpfel"')
    config = load_study(path)
    assert config.train.batch_size == 3 and config.data.path == "Bilder/Äpfel"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("# é".encode("latin-1"), "line 1 is not in UTF-8 .*; save it as UTF-8"),
        (b"\n\n# \xe9", "line 3 is not in UTF-8"),
        ("a = 1".encode("utf-16-le"), "UTF-16 without a byte order mark; save it as UTF-8"),
        (b"\x89PNG\0\x1a", "it is not text"),
        (b"a = ", "is not valid TOML"),
        (b"[[train]]", "train: should be one table, its header in single brackets"),
        (b"a = " + b"9" * 5000, "an integer is too long"),
        (b"a = " + b"[" * 5000, "nested too deep"),
        (None, "Is a directory; check the path"),
    ],
)
def test_a_file_that_is_no_study_is_told_why(tmp_path, content, reason):
    path = tmp_path / "study.toml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_study(path)
    assert "study.toml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "line", "said"),
    [
        ("train", "batch_size = true", "train.batch_size: .* integer (got true: write a number)"),
        ("train", "seed = false", "train.seed: .* integer (got false: write a number)"),
        ("train", "batch_size = 64.0", "(got 64.0: write 64)"),
        ("train", "batch_size = inf", "(got inf: write a whole number)"),
        ("train", 'batch_size = "64"', "(got '64': write the number without quotes)"),
        ("train", "batch_size = [64]", "(got [64])"),
        ("train", f"batch_size = {'9' * 100}", "less than 9007199254740992"),
        ("train", "lr = true", "train.lr: .* number (got true: write a number)"),
        ("train", "lr = nan", "train.lr: .* finite number"),
        ("train", "lr = inf", "train.lr: .* finite number"),
        ("train", "compile = 1", "(got 1: write true or false, without quotes)"),
        ("train", 'compile = "true"', "write true or false, without quotes"),
        ("data", "channels = true", "data.channels: .* integer (got true"),
        ("data", "channels = 1.0", "data.channels: .* integer (got 1.0: write 1)"),
        ("data", "channels = 2", "Input should be 1 or 3"),
        ("search", 'warm_start = "full"', "(got 'full': write an array in square brackets)"),
        ("search", "warm_start = [1]", "search.warm_start.0: .* string"),
        ("search", f'samplers = ["ddim-{"9" * 300}"]', "search.samplers.0"),
        ("search", 'samplers = ["ddim-4+merge-0.6"]', "search.samplers.0: merge takes"),
        ("search", 'samplers = ["ddim-4+fly-1"]', "search.samplers.0: an acceleration is"),
        ("search", 'samplers = ["ddim+merge-0.3"]', "search.samplers.0: should be SOLVER-STEPS"),
        ("search", 'samplers = ["ddim-4+merge-0.1+merge-0.2"]', "one acceleration at most"),
        ("search", 'samplers = ["ddim-4+merge-0.10"]', "in its shortest form .* merge-0.1"),
        (
            "search",
            'samplers = ["ddim-4+cache-attn-adjusted-100"]',
            "adjusted takes an amount below 100",
        ),
        ("search", 'samplers = ["ddim-4+guide-0.1-0.5"]', "has two timesteps, integers"),
        ("sampling", 'solver = "ddim+merge-0.3"', "an acceleration into search.samplers"),
        (
            "search",
            'budget = "2y"',
            "search.budget: should be a number and one of s, m, h, d",
        ),
        ("search", 'budget = "0s"', "search.budget: should be a finite time above 0"),
        ("search", f'budget = "{"9" * 310}d"', "search.budget: should be a finite time above 0"),
        ("confirm", 'also = "x"', "confirm.also: Input should be a valid array (got 'x': write"),
        ("confirm", "also = { x = 3 }", "confirm.also.x: Input should be a valid string (got 3)"),
        ("confirm", 'also = ["x", 3]', "confirm.also.1: Input should be a valid string (got 3)"),
    ],
)
def test_types_are_strict(tmp_path, section, line, said):
    with pytest.raises(ConfigError) as caught:
        load_study(study(tmp_path, **{section: line}))
    text = str(caught.value)
    for part in said.split(" .* "):
        assert part in text
    assert len(text) < 450 and "\n" not in text


def test_an_integer_is_a_float_and_an_array_a_tuple_and_both_survive_json(tmp_path):
    path = study(
        tmp_path,
        train="grad_clip = 2\nmin_snr_gamma = 5\nloss_weight = { peak = 3 }",
        search='warm_start = ["full", "D3-DiT"]\nsamplers = ["ddim-10"]',
        data="channels = 1",
    )
    config = load_study(path)
    assert config.train.grad_clip == 2.0 and config.train.loss_weight.peak == 3.0
    assert config.search.warm_start == ("full", "D3-DiT") and config.search.samplers == ("ddim-10",)
    stored = json.loads(json.dumps(config.model_dump(mode="json")))
    assert parse_study(stored, "json") == config == parse_study(config.model_dump(), "python")
    assert config.with_options("search", num_trials=7).search.samplers == ("ddim-10",)


@pytest.mark.parametrize("name", ["a", "a" * 200, "console", "nul-hypothesis", "v1.2", "A_b-c"])
def test_names_that_fit(tmp_path, name):
    assert load_study(study(tmp_path, name=name)).name == name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a" * 201, "at most 200 characters; this one has 201"),
        ("a" * 5000, "at most 200 characters; this one has 5000"),
        ("con", "Windows"),
        ("NUL.toml", "Windows"),
        ("com1", "Windows"),
        ("tiny.", "Windows"),
        ("tiny ", "should be letters A to Z"),
        ("../tiny", "should be letters A to Z"),
        ("a/b", "should be letters A to Z"),
        ("é", "should be letters A to Z"),
    ],
)
def test_names_that_no_folder_may_have(tmp_path, name, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        load_study(study(tmp_path, name=name))
    assert "name: " in str(caught.value) and len(str(caught.value)) < 400


def test_many_mistakes_make_a_line_that_can_be_read(tmp_path):
    keys = "\n".join(f"key_{i} = 1" for i in range(100))
    with pytest.raises(ConfigError, match="unknown key train.key_0; .*; and 92 more"):
        load_study(study(tmp_path, train=keys))


def test_shipped_studies_are_of_strict_types():
    files = sorted((Path(__file__).parent.parent / "studies").glob("*.toml"))
    assert len(files) >= 5 and all(load_study(path).name == path.stem for path in files)


PATHS = [
    ("backbone", "checkpoint"),
    ("data", "path"),
    ("data", "vae"),
    ("evaluation", "extractor_weights"),
    ("evaluation", "reference", "path"),
    ("map", "data", "path"),
    ("confirm", "also", "fashion-vit"),
]


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_what_can_be_no_path_is_refused_by_its_key(path):
    def given(text):
        study = {"name": "tiny", "backbone": {}, "data": {"kind": "latents"}}
        study["evaluation"] = {"reference": {"kind": "latents"}}
        study["map"] = {"data": {"kind": "latents"}}
        table = study
        for name in path[:-1]:
            table = table.setdefault(name, {})
        table[path[-1]] = text
        return parse_study(study, "s.toml")

    given("a folder/é.x")
    for text, shown in (("", "''"), ("a\0b", r"'a\x00b'")):
        with pytest.raises(ConfigError) as caught:
            given(text)
        said = str(caught.value)
        assert said.startswith(f"s.toml: {'.'.join(path)}: should be a path, not empty")
        assert f"(got {shown})" in said and "\n" not in said
