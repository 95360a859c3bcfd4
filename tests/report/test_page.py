"""The page and its figures: whole, self-contained, the same bytes for the same results, and honest
in the odd cases."""

import base64
import itertools
import os
import re
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.markers import MarkerStyle
from matplotlib.text import Annotation, Text

from asesearch.config import parse_study
from asesearch.errors import EvaluationError, StudyError, WriteError
from asesearch.point import Point
from asesearch.report import exhibits, grids, page, plots, style, tables, write_report
from asesearch.report import folder as folder_of_page
from asesearch.report.labels import place_labels, spread_out
from asesearch.sampler import Sampler
from asesearch.study import directory
from tests.report.conftest import by_flops, protocol

NAMES = {
    "spending",
    "front",
    "front_search",
    "attainment",
    "schedules",
    "samples",
    "trials",
    "hypervolume",
    "cost",
    "latency",
    "losses",
}
SCRIPT = "<script>alert('boom')</script>"
VOID = {"meta", "img", "link", "br"}


@pytest.fixture(scope="module")
def results():
    from tests.report.conftest import build

    images = np.random.default_rng(0).integers(0, 256, (4, 1, 8, 8)).astype(np.uint8)
    return build(12, samples=images, failure=SCRIPT)


@pytest.fixture(scope="module")
def folder(results, tmp_path_factory):
    return write_report(results, tmp_path_factory.mktemp("site") / "report").parent


@pytest.fixture(scope="module")
def html(folder):
    return (folder / "index.html").read_text(encoding="utf-8")


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def text_of(html):
    """The page without its pictures, whose base64 may spell anything, and without its scripts."""
    without = re.sub(r"<script.*?</script>|<!--.*?-->", "", html, flags=re.DOTALL)
    return re.sub(r'src="data:[^"]*"', "", without)


class Checker(HTMLParser):
    """Collects references, and what is not closed in the order it was opened."""

    def __init__(self):
        super().__init__()
        self.open = []
        self.errors = []
        self.references = []
        self.ids = []
        self.images = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.references += [
            value for name, value in attrs if name in ("src", "href", "srcset", "action", "poster")
        ]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append((tag, self.getpos()))


def check(html):
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.errors and not checker.open
    return checker


# -- the figures
# ------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_every_figure_lies_beside_the_table_it_was_drawn_from(results, folder):
    drawings = {d.name: d for d in plots.drawings(results)}
    assert set(drawings) == NAMES
    assert {p.name for p in (folder / "figures").iterdir()} == {
        f"{n}.{e}" for n in NAMES for e in ("svg", "png", "csv")
    }
    for name, drawing in drawings.items():
        stored = pd.read_csv(folder / "figures" / f"{name}.csv", keep_default_na=True)
        pd.testing.assert_frame_equal(
            stored, drawing.data.reset_index(drop=True), check_dtype=False
        )
    pd.testing.assert_frame_equal(drawings["front"].data, tables.points(results, "confirmed"))
    pd.testing.assert_frame_equal(drawings["front_search"].data, tables.points(results, "search"))
    pd.testing.assert_frame_equal(drawings["schedules"].data, exhibits.schedule_matrix(results))
    pd.testing.assert_frame_equal(drawings["cost"].data, tables.cost(results))


def test_tables_are_written_as_csv(results, folder):
    for name in ("trials", "front", "confirmation"):
        stored = pd.read_csv(
            folder / "tables" / f"{name}.csv", keep_default_na=False, na_values=[""]
        )
        expected = getattr(tables, name)(results)
        assert list(stored.columns) == list(expected.columns) and len(stored) == len(expected)
        np.testing.assert_array_equal(stored["number"], expected["number"])


def test_front_draws_its_table(results):
    with matplotlib.rc_context(style.STYLE):
        figure = plots.draw_front(tables.points(results, "confirmed"))
    ax = figure.axes[0]
    assert ax.get_ylabel().startswith("FID ") and "measured" in ax.get_xlabel()
    front = tables.front(results)
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), front["time_frac"])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), front["quality"])


@pytest.mark.parametrize("draw", ["front", "front_search", "cost"])
def test_labels_do_not_overlap_and_are_readable(study, draw):
    results = study(40, seed=2)
    with matplotlib.rc_context(style.STYLE):
        figure = next(d for d in plots.drawings(results) if d.name == draw).draw()
        figure.draw_without_rendering()
        renderer = FigureCanvasAgg(figure).get_renderer()
        notes = [t for t in figure.findobj(Annotation) if t.get_text()]
        boxes = [Text.get_window_extent(t, renderer) for t in notes]
    assert "full network" in {t.get_text() for t in notes} and len(notes) >= 4
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert min(t.get_fontsize() for t in figure.findobj(Text) if t.get_text()) >= style.SMALL


def test_a_label_beside_its_mark_is_nearest_to_it():
    """Or has a line to its own mark: in a row of marks the text of one had stood above the next."""
    figure, ax = style.axes(4.4)
    row = [(24.0, 3.74, "38 steps"), (28.0, 3.81, "36 steps"), (32.0, 3.83, "34 steps")]
    labels = [(0.0, 3.64, "full"), *row, (36.0, 3.89, "32 steps"), (22.0, 5.47, "D1-U-ViT")]
    ax.set(xlim=(-5, 55), ylim=(3, 15), yscale="log")
    style.settle(figure)
    place_labels(ax, labels, [(x, y) for x, y, _ in labels], 8.0)
    figure.draw_without_rendering()
    marks = {text: ax.transData.transform((x, y)) for x, y, text in labels}
    renderer = FigureCanvasAgg(figure).get_renderer()
    notes = [t for t in figure.findobj(Annotation) if t.get_text()]
    assert {t.get_text() for t in notes} == set(marks)
    for note in notes:
        box = Text.get_window_extent(note, renderer)
        away = {
            text: np.hypot(*np.maximum(np.maximum(box.min - at, at - box.max), 0.0))
            for text, at in marks.items()
        }
        own = away.pop(note.get_text())
        assert note.arrow_patch is not None or own <= min(away.values()), note.get_text()


@pytest.fixture(scope="module")
def long_names():
    """A study of nine samplers, whose names and metric are long."""
    from tests.report.conftest import build

    images = np.zeros((8, 1, 28, 28), dtype=np.uint8)
    made = build(20, samples=images, extractor="dinov2-vit-b-14")
    names = [f"ddim-{n}+cache-attn-adjusted-0.{n}" for n in range(2, 8)]
    samplers = [Sampler.from_string(name) for name in (*names, "unipc-5", "unipc-8")]
    records = tuple(
        r if r.origin == "full" else replace(r, point=Point(r.schedule, samplers[r.number % 8]))
        for r in made.records
    )
    config = {**made.config, "elastic": {"num_steps": 1500}}
    return replace(made, records=records, config=config)


@pytest.mark.thorough
def test_no_text_is_cut_off_at_the_edge(long_names):
    drawn = 0
    for drawing in plots.drawings(long_names):
        with matplotlib.rc_context(style.STYLE):
            figure = drawing.draw()
            style.settle(figure)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            whole = figure.bbox
            sides = [side for ax in figure.axes for side in (ax.xaxis, ax.yaxis)]
            # ticks beyond the limits are not drawn
            ticks = {t for side in sides for t in side.get_ticklabels(which="both")}
            for text in figure.findobj(Text):
                if text in ticks or not (text.get_visible() and text.get_text()):
                    continue
                box = Text.get_window_extent(text, canvas.get_renderer())
                inside = box.x0 >= -1 and box.y0 >= -1
                inside = inside and box.x1 <= whole.x1 + 1 and box.y1 <= whole.y1 + 1
                assert inside, (drawing.name, text.get_text(), box)
                drawn += 1
    assert drawn > 50


def test_images_are_read_when_they_are_looked_at(tmp_path, monkeypatch):
    files = {n: tmp_path / f"{n}.npz" for n in (0, 2, 3, 5)}
    for n in (0, 2, 5):
        np.savez(files[n], images=np.full((1, 1, 2, 2), n, np.uint8))
    files[5].write_bytes(b"damaged")
    read = []
    true_read = directory.read_images
    monkeypatch.setattr(
        directory, "read_images", lambda path, *a: (read.append(path), true_read(path, *a))[1]
    )
    samples = directory.SampleFiles(files)
    assert not read and 7 not in samples and not read
    assert int(samples[2].max()) == 2 and read == [files[2]]
    assert list(samples) == [0, 2] and len(samples) == 2  # 3 is missing, 5 damaged
    assert 3 not in samples and samples.get(5) is None
    assert len(read) == 4


@pytest.mark.thorough
def test_every_sampler_has_a_marker_of_its_own(long_names):
    (drawing,) = (d for d in plots.drawings(long_names) if d.name == "front_search")
    with matplotlib.rc_context(style.STYLE):
        figure = drawing.draw()
        style.settle(figure)
    (legend,) = figure.legends
    names = {t.get_text() for t in legend.get_texts()}
    markers = [line.get_marker() for line in legend.get_lines()]
    assert names == set(drawing.data["sampler"]) and len(set(markers)) == len(names) == 9
    frame = figure.axes[0].get_window_extent()
    assert legend.get_window_extent().y0 >= frame.y1 - 1  # it covers nothing
    many = list(itertools.islice(plots._markers(), 90))
    assert len(set(many)) == 90 and all(MarkerStyle(m).get_path() for m in many)


def test_spread_out_keeps_order_and_distance():
    for values in ([0.5, 0.5, 0.5], [0.9, 0.1, 0.11], [1.0, 1.0, 0.0], [0.3]):
        out = spread_out(values, 0.2, 0.0, 1.0)
        assert min(out) >= 0 and max(out) <= 1 + 1e-12
        assert all(b - a >= 0.2 - 1e-12 for a, b in zip(sorted(out), sorted(out)[1:], strict=False))
    assert spread_out([0.1, 0.9], 0.2, 0.0, 1.0) == [0.1, 0.9]
    assert spread_out([0.5] * 11, 0.2, 0.0, 1.0) == pytest.approx([i / 10 for i in range(11)])


# -- the page
# ---------------------------------------------------------------------------------------


def test_page_is_well_formed_and_shows_every_figure(html, folder):
    checker = check(html)
    assert len(checker.images) == len(NAMES) and all(i["alt"] for i in checker.images)
    assert len(checker.ids) == len(set(checker.ids))
    for image in checker.images:
        kind, data = image["src"].split(",", 1)
        assert kind == "data:image/svg+xml;base64" and base64.b64decode(data).lstrip().startswith(
            b"<?xml"
        )


def test_page_needs_nothing_from_outside(html, folder):
    checker = check(html)
    for reference in checker.references:
        assert (
            reference.startswith(("data:image/svg+xml;base64,", "#"))
            or (folder / reference).is_file()
        ), reference[:60]
    assert {r[1:] for r in checker.references if r.startswith("#")} <= set(checker.ids)
    assert (
        "http:" not in text_of(html)
        and "https:" not in text_of(html)
        and "@import" not in text_of(html)
        and "<script src" not in html
        and "default-src 'none'" in html
        and "Plotly Technologies Inc." in html  # the licence goes along
    )


def test_text_from_outside_is_escaped(html):
    assert SCRIPT not in html and "&lt;script&gt;alert(&#39;boom&#39;)&lt;/script&gt;" in html


def test_page_says_how_it_was_measured(html, results):
    for fact in (
        "ab" * 32,
        "cd" * 32,
        "0, 1000, 2000",
        "1000000, 1001000, 1002000",
        "ddim",
        "fashion-mnist/train",
        "60000",
    ):
        assert fact in html
    assert (
        "2.14.0" in html and "asesearch search demo.toml" in html and "--pick best-quality" in html
    )
    assert (
        "95\N{NO-BREAK SPACE}% confidence" in html and "--pick fastest-within --quality ci" in html
    )
    assert results.records[7].failure == SCRIPT and 'id="failed"' in html


def test_the_page_says_whose_weights_make_the_calls_at_full_depth(html, results):
    search = {**results.config["search"], "full_depth": "pretrained"}
    two = replace(results, config={**results.config, "search": search})
    line = "the pretrained ones make its calls at full depth"
    assert line not in html and line in page.render_page(two, [])


@pytest.mark.thorough
def test_other_extractors_are_never_called_fid(study):
    results = study(8, extractor="fashion-cnn")
    html = page.render_page(results, [])
    assert "Fréchet distance (fashion-cnn)" in html and "FID" not in html
    with matplotlib.rc_context(style.STYLE):
        drawings = plots.drawings(results)
        assert not any("FID" in d.caption + d.title for d in drawings)
        for drawing in (d for d in drawings if d.name in ("front", "trials", "hypervolume")):
            texts = {t.get_text() for t in drawing.draw().findobj(Text)}
            assert not any("FID" in text for text in texts)
    assert "FID" in page.render_page(study(8), [])  # negative control


def test_versions_that_changed_between_trials_are_named(study):
    results = study(4, failed=())
    changed = replace(results.records[3], versions={"torch": "2.15.0"})
    html = page.render_page(replace(results, records=(*results.records[:3], changed)), [])
    assert "torch: changed between trials" in html and "2.14.0, 2.15.0" in html
    assert "changed between trials" not in page.render_page(results, [])


def test_study_file_comes_back_from_the_page_without_its_password(study):
    results = study(2, failed=())
    secret = {
        **results.config,
        "search": {**results.config["search"], "storage": "postgresql://me:hunter2@host/db"},
    }
    assert "hunter2" not in page.render_page(replace(results, config=secret), [])
    text = page.study_toml(results.config)
    assert parse_study(tomllib.loads(text), "test").model_dump(mode="json") == results.config
    odd = {
        "name": 'a "b"\n\\',
        "args": {"x y": [1, 2.5, True, "µ"], "rate": 1e-05, "deep": {"z": "1"}},
    }
    assert tomllib.loads(page.study_toml(odd)) == odd


ODD = {
    "one trial": ({"num_trials": 1, "failed": ()}, "Only the full network has a score"),
    "only failures": (
        {"num_trials": 3, "failed": (0, 1, 2), "confirm": False},
        "No trial has given a score yet",
    ),
    "full network failed": (
        {"num_trials": 5, "failed": (0,), "confirm": False},
        "nothing to compare with",
    ),
    "not confirmed": ({"num_trials": 5, "confirm": False}, "nothing is confirmed yet"),
    "one repeat": (
        {"num_trials": 5, "repeats": 1, "confirm": False},
        "spread unknown (one repeat)",
    ),
    "one repeat, confirmed": ({"num_trials": 8, "repeats": 1}, "spread unknown (one repeat)"),
}


@pytest.mark.thorough
@pytest.mark.parametrize("case", ODD)
def test_odd_studies_have_a_page_and_figures(study, case):
    arguments, words = ODD[case]
    results = study(**arguments)
    html = page.render_page(results, [])
    check(html)
    assert (
        words in html
        and 'id="samples"' not in html
        and "nan" not in text_of(html).lower().replace("nant", "")
    )
    with matplotlib.rc_context(style.STYLE):
        for drawing in plots.drawings(results):
            figure = drawing.draw()
            if case == "one trial":
                figure.draw_without_rendering()


def heads(folder):
    """Columns of every table that is written."""
    return {p.stem: p.read_text().splitlines()[0].split(",") for p in folder.rglob("*.csv")}


@pytest.mark.thorough
def test_a_study_of_flops_is_shown_by_them(study, tmp_path):
    """Before it is confirmed nothing is called a time but what was predicted of each trial."""
    results = by_flops(study(12, failed=(), confirm=False))
    write_report(results, tmp_path / "search")
    html = text_of((tmp_path / "search/index.html").read_text(encoding="utf-8"))
    check(html)
    for words in (
        "the FLOPs at a",
        "Scores and FLOPs of the search",
        "relative FLOPs",
        "against the FLOPs of a sampling",
        "below the reference point: FLOPs 1.1",
        "of the full network&#39;s FLOPs",
        "such times are not compared",
    ):
        assert words in html.replace("full network's FLOPs", "full network&#39;s FLOPs"), words
    assert "predicted sampling time" not in html and "predicted to take" not in html
    written = heads(tmp_path / "search")
    for name in ("front", "attainment", "hypervolume"):
        assert not [c for c in written[name] if c.startswith("time")], name
    assert "flops_frac" in written["front"] and "reference_flops_frac" in written["hypervolume"]
    plain = study(12, failed=(), confirm=False)
    assert list(tables.front(results)["number"]) == list(tables.front(plain)["number"])
    assert tables.front(results)["speed_up"].isna().all()
    same = tables.hypervolume(replace(results, records=plain.records))
    assert tables.hypervolume(results).equals(same)
    assert '"unit":"FLOPs"' in page.embedded(results, None)


@pytest.mark.thorough
def test_a_confirmed_study_of_flops_is_shown_by_measured_time(study, tmp_path):
    write_report(by_flops(study(8, failed=())), tmp_path / "both")
    written = heads(tmp_path / "both")
    assert "time_frac" in written["front"] and "flops_frac" in written["front_search"]


def test_a_study_without_latency_losses_or_environment_has_a_page(study):
    results = study(5, failed=())
    bare = replace(
        results,
        latency_ms=(),
        environment={},
        config={"sampling": results.config["sampling"]},
        records=tuple(replace(r, losses=(), seconds={}) for r in results.records),
    )
    assert {"latency", "losses"}.isdisjoint(d.name for d in plots.drawings(bare))
    check(page.render_page(bare, []))


# -- writing
# ----------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_same_results_same_bytes_and_what_is_stale_goes(results, folder, tmp_path):
    target = tmp_path / "report"
    (target / "figures").mkdir(parents=True)
    (target / "index.html").write_text(folder_of_page.MARK.format(what="report"))
    (target / "figures" / "gone.svg").write_text("stale")
    (target / "notes.md").write_text("mine")
    assert write_report(results, target) == target / "index.html"
    again = files(target)
    assert again.pop("notes.md") == b"mine"
    assert again == files(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_a_report_that_dies_leaves_the_old_one_whole(results, folder, monkeypatch):
    before = files(folder)

    def die(self, where):
        (where / "front.svg").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(style.Drawing, "save", die)
    with pytest.raises(KeyboardInterrupt):
        write_report(results, folder)
    assert files(folder) == before and [p.name for p in folder.parent.iterdir()] == ["report"]


def test_workers_that_end_together_all_write_the_page(tmp_path, monkeypatch):
    """One moves its own while another draws; where nothing was, nobody finds a part of a page."""
    mark = folder_of_page.MARK.format(what="report")
    target = tmp_path / "report"

    def draw(folder):
        (folder / "figures/front.svg").write_text("drawn")
        (folder / "index.html").write_text(mark)

    def draw_slowly(folder):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *_: pytest.fail("file by file"))
            folder_of_page.write_folder(target, "report", draw)
        assert sorted(files(target)) == ["figures/front.svg", "index.html"]
        draw(folder)

    page = folder_of_page.write_folder(target, "report", draw_slowly)
    assert page.read_text() == mark
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"cfg_scale": 1.5, "guided_channels": 3}, "the first 3"),
        ({"cfg_scale": 1.5}, "not on record"),
        ({"cfg_scale": 1.0}, "none: no guidance"),
    ],
)
def test_the_protocol_tells_what_guidance_acts_on(changes, shown):
    rows = dict(grids.protocol_grid({"search": protocol(**changes)}).rows)
    assert rows["guided channels"] == shown and rows["cfg scale"] == str(changes["cfg_scale"])


def test_refused_before_anything_is_drawn(study, results, tmp_path, monkeypatch):
    monkeypatch.setattr(style.Drawing, "save", lambda *_: pytest.fail("drew"))
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(StudyError, match="empty folder"):
        write_report(results, tmp_path)
    with pytest.raises(StudyError, match="empty folder"):
        write_report(results, tmp_path / "thesis.tex")
    with pytest.raises(StudyError, match="a trial that has ended"):
        write_report(replace(results, records=(), confirmations=()), tmp_path / "new")
    odd = replace(results.records[3].quality.protocol, num_steps=10)
    mixed = replace(results.records[3], quality=replace(results.records[3].quality, protocol=odd))
    with pytest.raises(EvaluationError, match="num_steps"):
        write_report(replace(results, records=(*results.records[:3], mixed)), tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_written_is_one_error(results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="can't write"):
        write_report(results, tmp_path / "file" / "report")
