"""The page in Chromium: it is complete without a network, fits its window, can be read, and answers
to pointer and keyboard."""

import time
from dataclasses import replace

import numpy as np
import pytest

from asesearch.report import compare, page, tables, write_report
from asesearch.study.importance import Importance
from tests.browser import CHROMIUM, Browser
from tests.report.conftest import build

pytestmark = [
    pytest.mark.slow,  # eight seconds
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
#: Every text that is seen, with its contrast: WCAG 2.1, relative luminance.
CONTRASTS = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const light = (c) => {
    const [r, g, b] = c.slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const c = rgba(getComputedStyle(at).backgroundColor);
      if (c[3] > 0.99) return c;
    }
    return [255, 255, 255, 1];
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent.trim();
    const own = walk.currentNode.parentElement;
    const box = own.getBoundingClientRect();
    if (!text || !box.width || own.closest("script, style, option, .unseen, :disabled")) continue;
    const style = getComputedStyle(own);
    const svg = own.ownerSVGElement;
    if (svg && own.matches(".on")) continue; // on a bar: checked by itself
    const ink = rgba(svg ? style.fill : style.color);
    const opacity = Number(style.opacity);
    const [a, b] = [light(ink), light(behind(own))].sort((x, y) => y - x);
    found.push([text.slice(0, 40), opacity < 1 ? 0 : (a + 0.05) / (b + 0.05)]);
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def results():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (8, 3, 16, 16))
    made = build(14, failure="</script><script>document.title = 'boom'</script>")
    samples = {
        r.number: (images + rng.integers(0, 30, images.shape)).astype(np.uint8)
        for r in made.complete
    }
    change = tuple(float(v) for v in 0.2 * np.exp(-np.arange(10) / 3))
    edges = tuple(range(0, 1001, 100))
    worth = Importance("ddim-50", edges, 14, 28, change, (0.03,) * 10, (0.05,) * 10, 40)
    name = "demo </script><script>document.title = 'boom'</script>"
    return replace(made, samples=samples, importance=worth, name=name)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def url(results, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(page.render_page(results, []), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def opened(browser, url):
    """The page at 1280 pixels; nothing may have gone wrong in the end."""
    browser.errors.clear()
    browser.requests.clear()
    browser.open(url)
    yield browser
    assert browser.errors == []
    assert {r for r in browser.requests if not r.startswith(("data:", "blob:"))} == {url}


def title(browser):
    return browser.run("document.getElementById('detail-title').textContent")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (390, True)])
def test_it_fits_its_window_and_can_be_read(opened, url, width, dark):
    opened.open(url, width, 844, dark=dark)
    sizes = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scrolled, seen = opened.run(sizes)
    assert scrolled <= seen
    texts = opened.run(CONTRASTS)
    assert len(texts) > 200 and {"full network"} <= {text for text, _ in texts}
    assert [t for t in texts if t[1] < 4.5] == []
    background = opened.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(15, 19, 24)") is dark
    assert opened.run("document.title").endswith("early-exit schedules")


def test_bad_contrast_is_seen(opened):
    opened.run("void (document.querySelector('h2').style.color = '#999')")
    assert [text for text, value in opened.run(CONTRASTS) if value < 4.5] == ["Front"]


def test_keys_choose_a_point_and_all_about_it_is_shown(opened, results):
    front = tables.front(results)["label"].tolist()
    opened.run("document.getElementById('chart').focus()")
    opened.press("Home")
    assert title(opened) == front[0]
    opened.press("ArrowRight")
    assert title(opened) == front[1]
    opened.press("End")
    assert title(opened) == front[-1]
    opened.press("ArrowLeft")
    chosen = tables.front(results).iloc[-2]
    assert title(opened) == chosen["label"]
    said = opened.run("document.getElementById('live').textContent")
    assert said.startswith(f"{chosen['label']}: ") and chosen["verdict"] in said
    shown = opened.run("document.getElementById('explorer').innerText")
    assert chosen["schedule"] in shown and f"--trial {chosen['number']}" in shown
    assert f"{chosen['speed_up']:.2f}× as fast" in shown
    opened.run("document.getElementById('copy').click()")
    assert opened.wait_for("document.getElementById('copy').textContent === 'Copied'")
    rows = opened.run("[...document.querySelectorAll('#strips img')].map((i) => i.naturalWidth)")
    assert rows == [128] * 4  # its own, the full network's, and both for the difference
    drawn = opened.run("document.querySelectorAll('#schedule-drawn .run').length")
    assert drawn == len(results.records[chosen["number"]].schedule.exit_depths)


def test_with_shift_the_arrow_keys_go_through_all_points(opened, results):
    opened.run("document.querySelector('#kinds input[value=search]').click()")
    opened.run("document.getElementById('chart').focus()")
    opened.press("Home")
    seen = [title(opened)]
    for _ in range(len(results.complete) - 1):
        opened.press("ArrowRight", shift=True)
        seen.append(title(opened))
    assert seen == tables.points(results, "search")["label"].tolist()


def test_what_is_not_told_apart_is_what_the_report_says(opened, results):
    from asesearch.study.answers import indistinguishable
    from asesearch.study.picking import scored_points

    points = scored_points(results)
    for point in points:
        number = point.record.number
        opened.run(f"explorer.choose({number})")
        found = opened.run("explorer.alike().map((p) => p.number)")
        assert tuple(sorted(found)) == indistinguishable(point, points)


def test_a_click_on_a_mark_chooses_it_and_other_scores_can_be_seen(opened, results):
    front = tables.front(results)
    opened.run(
        "void document.getElementById('chart')"
        ".scrollIntoView({ block: 'center', behavior: 'instant' })"
    )
    opened.run("explorer.choose(explorer.data.full)")
    place = opened.run(
        "(() => { const box = explorer.chart.getBoundingClientRect();"
        "const l = explorer.chart._fullLayout; const p = explorer.front[0];"
        "return [box.x + l.xaxis._offset + l.xaxis.d2p(p.time),"
        " box.y + l.yaxis._offset + l.yaxis.d2p(p.quality)]; })()"
    )
    opened.point_at(*place)
    hovered = opened.wait_for("document.querySelector('.hoverlayer .hovertext')?.textContent")
    assert hovered.startswith(front["label"].iloc[0]) and "× as fast" in hovered
    opened.click(*place)
    assert title(opened) == front["label"].iloc[0]
    opened.run("document.querySelector('#kinds input[value=search]').click()")
    options = opened.run("document.querySelectorAll('#point option').length")
    assert options == len(results.complete)


def test_tables_sort_and_download(opened):
    region = "document.querySelector('[aria-label=\"Every trial under the search protocol\"]')"
    numbers = f"[...{region}.querySelectorAll('tbody th')].map((h) => Number(h.textContent))"
    before = opened.run(numbers)
    assert before == sorted(before)
    opened.run(f"{region}.querySelector('.sort').focus()")
    opened.press("Enter")
    opened.press("Enter")
    assert opened.run(numbers) == sorted(before, reverse=True)
    header = f"{region}.querySelector('th')"
    assert opened.run(f"{header}.getAttribute('aria-sort')") == "descending"
    opened.run(f"{region}.querySelectorAll('.sort')[3].click()")  # the score: text without is last
    scores = (
        f"[...{region}.querySelectorAll('tbody tr')].map((r) => parseFloat(r.cells[3].textContent))"
    )
    values = opened.run(scores)
    known = [v for v in values if v is not None]
    assert known == sorted(known) and values[len(known) :] == [None]
    text = opened.run(
        "new Promise((done) => { const make = URL.createObjectURL; URL.createObjectURL = (blob) =>"
        " { blob.text().then(done); return make(blob); };"
        f" {region}.nextElementSibling.querySelector('button').click(); }})"
    )
    assert text.splitlines()[0].startswith("no.,origin,") and len(text.splitlines()) == 15


def test_without_script_the_same_tables_are_there(browser, url):
    browser.open(url, script=False)
    browser.send("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.run("document.getElementById('explorer').hidden")
    assert browser.run("document.querySelectorAll('table').length") >= 7
    assert browser.run("document.querySelectorAll('.sort').length") == 0


def test_a_thousand_trials_are_no_burden(browser, tmp_path):
    """Under 20 seconds of work and 10 MB, samples included; the page is quick to choose on."""
    many = build(1000)
    rng = np.random.default_rng(0)
    base = rng.integers(0, 200, (40, 3, 64, 64))  # noise, which no format makes smaller
    samples = {
        r.number: (base + rng.integers(0, 50, base.shape)).astype(np.uint8) for r in many.complete
    }
    begun = time.process_time()
    path = write_report(replace(many, samples=samples), tmp_path / "report")
    assert time.process_time() - begun < 20
    assert path.stat().st_size < 10e6
    browser.errors.clear()
    browser.open(path.as_uri())
    choose = (
        "explorer.kind = 'search'; explorer.show(); explorer.choose(explorer.points[500].number)"
    )
    took_ms = browser.run(
        f"(() => {{ const t = performance.now(); {choose}; return performance.now() - t; }})()"
    )
    assert took_ms < 2000 and browser.errors == []


def test_everything_has_a_name_and_headings_skip_no_level(opened):
    nameless = opened.run(
        "[...document.querySelectorAll('button, select, input, a, img, [role=img], [tabindex]')]"
        ".filter((n) => !n.closest('#chart *') && !n.innerText?.trim() && !n.labels?.length"
        " && !n.getAttribute('aria-label') && !n.getAttribute('alt')"
        " && !n.closest('.difference')).map((n) => n.outerHTML.slice(0, 80))"
    )
    assert nameless == []
    levels = opened.run(
        "[...document.querySelectorAll('h1, h2, h3, h4')].map((h) => Number(h.tagName[1]))"
    )
    assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))


def test_a_comparison_fits_a_phone_and_sorts(browser, results, tmp_path):
    other = replace(build(12, seed=3), name="other")
    compare([results, other], tmp_path / "out")
    browser.errors.clear()
    browser.open((tmp_path / "out/index.html").as_uri(), 390, 844)
    sizes = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scrolled, seen = browser.run(sizes)
    assert scrolled <= seen and browser.run("document.querySelectorAll('.sort').length") > 8
    assert [t for t in browser.run(CONTRASTS) if t[1] < 4.5] == []
    assert browser.errors == []
