"""README and `docs/` do what they say: every command is parsed by the program, every snippet runs,
every table is compared, and every message is one of the program's."""

import ast
import copy
import csv
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import asesearch
from asesearch.backbones import DiT, save_backbone
from asesearch.backbones.diffusers_adapter import DiffusersBackbone
from asesearch.backbones.exit_weights import ExitWeights
from asesearch.config import DiffusionConfig, SamplingConfig, parse_study
from asesearch.deployment.bundle import Bundle
from asesearch.deployment.writing import write_bundle
from asesearch.schedule import ExitSchedule
from tests import test_layers
from tests.documents import (
    FENCE,
    PAGES,
    ROOT,
    anchors,
    blocks,
    check_inline,
    check_line,
    check_link,
    check_message,
    check_toml,
    commands,
    inline_code,
    lines_of,
    need_committed_report,
    script,
    text_of,
)

LINES = sorted({line for block in blocks("sh") for line in lines_of(block)})
INLINE = sorted(set(inline_code()))
README = text_of(ROOT / "README.md")
MEASURED = text_of(ROOT / "docs/measurements.md")
STUDY = """
name = "fashion-mnist-quick"
[backbone]
checkpoint = "net.safetensors"
[data]
kind = "fashion-mnist"
split = "test"
[train]
num_steps = 2
batch_size = 4
[sampling]
num_steps = 3
batch_size = 40
[evaluation]
extractor = "fashion-cnn"
num_samples = 70
reference = { kind = "fashion-mnist", split = "train" }
[search]
num_trials = 2
warm_start = ["3 2 2 1"]
num_intervals = 4
[confirm]
num_samples = 70
repeats = 1
time_images = 4
time_repeats = 1
"""


# -- commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", LINES)
def test_a_command_is_accepted(line):
    check_line(line)


@pytest.mark.parametrize("page", sorted({page for page, _ in INLINE}))
def test_code_in_running_text_is_true(page):
    wrong = []
    for code in (code for where, code in INLINE if where == page):
        try:
            check_inline(code)
        except (Exception, SystemExit) as error:
            wrong.append(f"{code}: {error!r}")
    assert wrong == []


@pytest.mark.parametrize(
    "line",
    [
        "asesearch export runs/x --best --out y",
        "asesearch export runs/x",
        "asesearch export runs/x --pick fastest --out y",
        "asesearch export runs/x --pick fastest-within --quality 5% --out y",
        "asesearch export runs/x --pick best-within --quality +5% --out y",
        "asesearch search studies/no-such.toml",
        "asesearch search studies/my-dit.toml --budget soon",
        "CUDA_VISIBLE_DEVICES=0 srun asesearch serch studies/my-dit.toml &",
        "accelerate launch -m asesearch finetune studies/my-dit.toml --out x",
        "make serch",
        "make search STUDY=studies/no-such.toml",
        "python benchmarks/search_efficiency.py --trails 3",
        "python benchmarks/no-such.py",
        "apt-get install x",
    ],
)
def test_a_wrong_command_is_seen(line):
    with pytest.raises((Exception, SystemExit)):
        check_line(line)


@pytest.mark.parametrize(
    "code",
    [
        "asesearch report --trials 3",
        "asesearch reports",
        "--no-such-option",
        "search.num_trial",
        "search.proposer = 'magic'",
        "[serch]",
        "make serch",
    ],
)
def test_wrong_code_in_running_text_is_seen(code):
    with pytest.raises((AssertionError, KeyError, ValueError)):
        check_inline(code)


def test_every_command_stands_in_the_readme_or_the_pages():
    said = "\n".join(LINES)
    assert [name for name in commands() if f"asesearch {name} " not in said] == []
    assert len(LINES) >= 30 and len(README.splitlines()) <= 150


# -- study files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_toml_is_a_study_file_or_a_part_of_one(block):
    check_toml(block.text)
    data = tomllib.loads(block.text)
    if "name" in data:
        assert parse_study(data, block.page).search.num_trials == 40


def test_a_wrong_study_file_is_seen():
    with pytest.raises(ValueError, match="unknown key train.steps"):
        check_toml("[train]\nsteps = 3\n")
    assert sum("name" in tomllib.loads(block.text) for block in blocks("toml")) >= 2


# -- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["commands.md", "study-file.md"])
def test_tables_are_those_of_the_program(name):
    text = text_of(ROOT / "docs" / name)
    assert script("tables").with_tables(text) == text, "run: python docs/tables.py"


def test_tables_are_complete():
    tables = script("tables")
    text = text_of(ROOT / "docs/commands.md") + text_of(ROOT / "docs/study-file.md")
    listed = {(kind, name) for _, kind, name, _, _ in tables.MARK.findall(text)}
    wanted = {("options", name) for name in commands()} | {("keys", s) for s in tables.SECTIONS}
    assert listed == wanted
    fields = set(parse_study(tomllib.loads(STUDY), "").model_dump())
    assert fields - {"name"} <= set(tables.SECTIONS)
    assert "|  |" not in text, "a key without its meaning"


def test_a_stale_table_is_seen():
    tables = script("tables")
    text = text_of(ROOT / "docs/study-file.md")
    for old, new in [("| `lr` | number > 0 |", "| `lr` | integer |"), ("| `1e-4` |", "| `1e-3` |")]:
        stale = text.replace(old, new, 1)
        assert stale != text and tables.with_tables(stale) == text
    gone = re.sub(r"\| `ema_decay`.*\n", "", text, count=1)
    assert tables.with_tables(gone).count("`ema_decay`") == text.count("`ema_decay`")


def test_the_levels_of_the_architecture_are_those_of_the_layer_test():
    page = text_of(ROOT / "docs/architecture.md")
    rows = re.findall(r"^\| (\d+) \| \[?`(\w+)`", page, flags=re.MULTILINE)
    levels = {k: v for k, v in test_layers.LEVELS.items() if not k.startswith("__")}
    assert {room: int(level) for level, room in rows} == levels
    drawn = script("levels")
    assert drawn.levels() == levels
    fix = "run: python docs/levels.py"
    assert text_of(drawn.DRAWING) == drawn.drawing(levels), fix
    assert drawn.drawing({**levels, "search": 1}) != drawn.drawing(levels)


def test_the_files_of_a_study_directory_are_listed():
    (source,) = (ROOT / "asesearch").glob("*/directory.py")
    names = {
        node.targets[0].id: node.value.value
        for node in ast.parse(text_of(source)).body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    page = text_of(ROOT / "docs/files.md")
    old = {"OLD_CONFIRMATIONS"}
    missing = [v for k, v in names.items() if k not in old and f"`{v}" not in page]
    assert len(names) >= 12 and missing == []


# -- messages and links --------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("text"), ids=str)
def test_a_message_is_one_of_the_program(block):
    check_message(block.text)


def test_a_message_of_no_program_is_seen():
    damaged = (
        "bundle/model.safetensors is damaged: its SHA-256 is not the recorded one; "
        "copy the bundle again"
    )
    check_message(damaged)
    for wrong in (
        "the study is too old; make a new one",
        damaged.replace("damaged", "broken"),
        damaged.replace("copy", "export"),
    ):
        with pytest.raises(AssertionError, match="the program's texts have no"):
            check_message(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page)))
    for link in links:
        if not link.startswith("http"):
            check_link(page, link)


def test_a_dead_link_is_seen():
    page = ROOT / "docs/index.md"
    for link in ("no-such.md", "protocol.md#no-such-heading", "api/no_such_room.md"):
        with pytest.raises(AssertionError):
            check_link(page, link)
    assert "what-is-never-compared" in anchors(ROOT / "docs/protocol.md")


def test_links_to_sources_lead_to_the_api_pages_of_the_site():
    hooks = script("hooks")
    made = hooks.api_pages()
    linked = set()
    for name in ("architecture", "commands", "index"):
        page = ROOT / f"docs/{name}.md"
        assert "](api/" not in text_of(page)  # which a reader without the site does not have
        shown = hooks.on_page_markdown(text_of(page))
        linked |= set(re.findall(r"\]\((api/[^)]+)\)", shown))
        assert "asesearch/" not in "".join(re.findall(r"\]\(([^)]+)\)", shown))
    assert {"api/index.md", "api/errors.md", "api/study.md"} <= linked <= set(made)


def test_every_page_is_in_the_navigation():
    navigation = text_of(ROOT / "mkdocs.yml").partition("\nnav:\n")[2]
    named = set(re.findall(r": ([\w-]+\.md)$", navigation, flags=re.MULTILINE))
    assert named == {page.name for page in PAGES if page.parent == ROOT / "docs"}


# -- the site ------------------------------------------------------------------------------------


def foreign(html):
    """What a browser would fetch from elsewhere to show a page."""
    tags = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", html)
    return [tag for tag in tags if re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag)]


@pytest.mark.slow
def test_the_site_is_built_strictly_and_needs_no_network(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert {path: foreign(text_of(path)) for path in pages if foreign(text_of(path))} == {}
    assert foreign('<script src="https://unpkg.com/x"></script>')
    api = text_of(tmp_path / "api/index.html")
    assert all(f'id="asesearch.{name}"' in api for name in asesearch._HOMES)
    assert "_HOMES" not in api
    assert 'src="reports/fashion-mnist/figures/front.svg"' in text_of(tmp_path / "index.html")
    assert (tmp_path / "reports/fashion-mnist/index.html").is_file()


def test_the_api_pages_hold_every_module():
    pages = "\n".join(script("hooks").api_pages().values())
    left_out = {"__init__", "__main__", "cli"}
    for path in (ROOT / "asesearch").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.stem not in left_out and "cli" not in path.parts:
            assert f"::: {name}\n" in pages, name


def test_several_names_of_a_docstring_get_an_entry_each():
    split = script("docstrings").split_names
    entries = ["    a, b: one", "        more.", "    c: see d, e: f"]
    text = "\n".join(["X.", "", "Attributes:", *entries, "", "Raises:", "    E: g, h: i"])
    made = split(text).splitlines()
    assert made[3:7] == ["    a: one", "        more.", "    b: one", "        more."]
    assert made[7] == entries[2]
    assert made[8:] == text.splitlines()[6:] and split(split(text)) == split(text)
    assert split("a, b: no section") == "a, b: no section"


# -- numbers -------------------------------------------------------------------------------------


def confirmed(study):
    with (ROOT / f"reports/{study}/tables/confirmation.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def claims(row, digits):
    """Score and relative time of a confirmed point, as the pages write them."""
    score = f"{float(row['confirmed_quality']):.{digits}f} ± "
    time = float(row["measured_time_frac"])
    return f"{score}{float(row['confirmed_std_error']):.{digits}f}", f"{time:.2f}×"


def wrong_claims(page, study, digits):
    """Confirmed points whose numbers are in no line of the page."""
    lines = page.splitlines()
    rows = confirmed(study)
    return [
        c
        for c in (claims(r, digits) for r in rows)
        if not any(c[0] in n and c[1] in n for n in lines)
    ]


def test_measured_numbers_are_those_of_the_reports():
    need_committed_report()
    assert wrong_claims(MEASURED, "fashion-mnist", 2) == []
    assert wrong_claims(MEASURED, "fashion-mnist-quick", 1) == []
    changed = MEASURED.replace("12.97 ± 0.11", "12.79 ± 0.11")
    assert [score for score, _ in wrong_claims(changed, "fashion-mnist", 2)] == ["12.97 ± 0.11"]


def test_the_readme_has_the_same_numbers():
    text = " ".join(README.split())
    rows = {row["label"]: row for row in confirmed("fashion-mnist-18-grid")}
    assert claims(rows["full network"], 2)[0] in text
    for label in ("#2", "#11, 5 steps", "full, 5 steps", "#10, 5 steps"):
        score, _ = claims(rows[label], 2)
        time = f"{float(rows[label]['measured_time_frac']):.3f}"
        assert re.search(rf"\| {score} \| {time}( ± [0-9.]+)?× \|", text), label
    rows = {row["label"]: row for row in confirmed("fashion-mnist")}
    best, time = claims(rows["full, 6 steps"], 2)
    assert f"{best} at {time}" in text and claims(rows["full network"], 2)[0] in text
    score, time = claims(rows["#21, 6 steps"], 2)
    assert f"exits have {score} at {time} the time" in text


# -- snippets ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny network under the names of the quick study, and what the README's
    snippet leaves there: a searched study, its report and a bundle."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "studies").mkdir()
    (folder / "studies/fashion-mnist-quick.toml").write_text(STUDY)
    torch.manual_seed(0)
    shape = {"input_size": 28, "patch_size": 14, "in_channels": 1, "hidden_size": 16}
    net = DiT(**shape, depth=3, num_heads=2, num_classes=10)
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.05)
    save_backbone(net, folder / "net.safetensors", {})
    (block,) = (b for b in blocks("python") if b.page == "README.md")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # which takes seconds, and is tested by itself
        patch.setattr("asesearch.report.page.drawings", lambda results: [])
        names = run(block)
    assert names["images"].shape == (16, 1, 28, 28) and names["images"].dtype == torch.float32
    assert (folder / "reports/quick/index.html").is_file()
    return folder, block


def run(block, **given):
    """Execute a snippet; its names."""
    names = {"__name__": "snippet", **given}
    exec(compile(block.text, str(block), "exec"), names)  # the page's own words
    return names


def tiny_pipeline():
    """A DiT pipeline of 28 narrow blocks, as the page's `pipeline`."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    class FewSteps(DiTPipeline):
        def __call__(self, class_labels):
            return super().__call__(class_labels, num_inference_steps=5)

    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8
    )
    net = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=28,
        in_channels=4,
        out_channels=8,
        sample_size=4,
    )
    pipeline = FewSteps(net.eval(), vae.eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    write_own_exits(net, "my-dit-bundle")
    return pipeline


def write_own_exits(transformer, folder):
    """A bundle of such a transformer whose early exits have weights of their own."""
    nets = [DiffusersBackbone(copy.deepcopy(transformer)) for _ in range(2)]
    with torch.no_grad():
        for p in nets[1].parameters():
            p += 0.1
    how = SamplingConfig(solver="ddim", num_steps=5)
    schedule = ExitSchedule.from_string("D3-DiT", 28)
    about = (schedule, "diffusers", DiffusionConfig(), how, {}, {})
    write_bundle(Bundle(ExitWeights(*nets), *about), Path(folder), overwrite=True)


SLOW_SNIPPETS = ("onnx", "aoti")  # words of those that take long


def snippets():
    for block in blocks("python"):
        slow = any(word in block.text for word in SLOW_SNIPPETS)
        yield pytest.param(block, id=str(block), marks=[pytest.mark.slow] if slow else [])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
@pytest.mark.parametrize("block", list(snippets()))
def test_a_snippet_runs(block, place, monkeypatch):
    folder, done = place
    monkeypatch.chdir(folder)
    if block.text == done.text:
        return  # by the fixture, for it takes a search
    assert block.given in ("", "pipeline")
    names = run(block, **({"pipeline": tiny_pipeline()} if block.given else {}))
    if block.given:
        assert names["handle"].block_calls < 28 * names["handle"].nfe


def test_a_wrong_snippet_is_seen(place, monkeypatch):
    monkeypatch.chdir(place[0])
    (block,) = (b for b in blocks("python") if b.page == "search.md" or "from_json" in b.text)
    with pytest.raises(AttributeError):
        run(type(block)(block.page, "python", block.text.replace("from_json", "from_jsn")))
